"""Which packages there are; everything else about the distribution stands in pyproject.toml.

The kernels lie at the top of the repository and are installed as `fastbgad.kernels`: the name `kernels` belongs to
another package on PyPI. pyproject.toml can list packages or find them, but not find them under another name.
"""

from setuptools import find_packages, setup

found = find_packages(include=["fastbgad", "fastbgad.*"])
kernels = [f"fastbgad.{name}" for name in find_packages(include=["kernels", "kernels.*"])]
setup(packages=sorted({*found, *kernels}), package_dir={"fastbgad": "fastbgad", "fastbgad.kernels": "kernels"})
