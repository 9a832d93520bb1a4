"""Find the kernels of a checkout, which lie in the folder `kernels` beside this package.

This file is not installed: there `fastbgad.kernels` is that folder itself (see `package-dir` in pyproject.toml).
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "kernels")]
