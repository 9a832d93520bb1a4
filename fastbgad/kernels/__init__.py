"""Find the kernels of a checkout, which lie in the folder `kernels` beside this package.

This file is not installed: there `fastbgad.kernels` is that folder itself (see `package-dir` in pyproject.toml). Here
the module replaces itself by the package in that folder, so that nothing can tell the two apart.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_folder = Path(__file__).resolve().parents[2] / "kernels"
_spec = spec_from_file_location(__name__, _folder / "__init__.py", submodule_search_locations=[str(_folder)])
assert _spec is not None
assert _spec.loader is not None
sys.modules[__name__] = _package = module_from_spec(_spec)
_spec.loader.exec_module(_package)
