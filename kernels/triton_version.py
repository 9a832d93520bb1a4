"""The version of Triton that the kernels need, and the one that is installed.

Reading it does not import Triton: importing fastbgad must not depend on it, and torch.compile must not trace into it.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

# `tl.histogram` has no mask before 3.4, and `triton.knobs` is not there. The same bound stands in pyproject.toml.
LOWEST = (3, 4)


def triton_version() -> str | None:
    """Return the version of the Triton that `import triton` would find, or None.

    The version is read off the package itself and not off its metadata: the builds for ROCm and XPU, and nightly ones,
    install the same package under other names. "unknown" where the package does not say it in its usual place.
    """
    spec = importlib.util.find_spec("triton")
    # A folder that happens to be called triton is found as a package without a file.
    if spec is None or spec.origin is None:
        return None
    found = re.search(r"""^__version__\s*=\s*["']([^"']+)["']""", Path(spec.origin).read_text("utf-8"), re.MULTILINE)
    return found[1] if found else "unknown"


def why_not_this_triton(version: str | None) -> str | None:
    """Return why the kernels cannot run with this version of Triton and what to do about it, or None."""
    lowest = ".".join(map(str, LOWEST))
    if version is None:
        return f"the package triton is not installed: pip install 'triton>={lowest}'"
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers and (int(numbers[1]), int(numbers[2])) < LOWEST:
        return f"triton {version} is installed, the kernels need {lowest} or newer: pip install 'triton>={lowest}'"
    return None
