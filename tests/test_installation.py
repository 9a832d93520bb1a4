"""fastbgad imports and is complete however it came: wheel, editable install, checkout, source distribution.

Nothing is downloaded: the distributions are built with the setuptools that is here, from a copy of the sources.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT

SOURCES = ("fastbgad", "kernels", "tests", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
STUB = "fastbgad/kernels/__init__.py"  # leads a checkout to its kernels; a wheel has them in its place


def run(*command: str, folder: Path) -> str:
    """Run a Python command in a folder and return what it prints; its messages are shown where it fails."""
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, source: Path, out: Path) -> Path:
    """Build a distribution as pip does, with no environment of its own: "sdist", "wheel" or "editable".

    Whatever setuptools warns of is an error; it informs about every editable installation.
    """
    out.mkdir()
    script = (
        "import warnings, setuptools.build_meta, setuptools.warnings\n"
        "warnings.simplefilter('error', setuptools.warnings.SetuptoolsWarning)\n"
        "warnings.simplefilter('ignore', setuptools.warnings.InformationOnly)\n"
        f"setuptools.build_meta.build_{kind}({str(out)!r})"
    )
    run("-c", script, folder=source)
    (built,) = out.iterdir()
    return built


def install(wheel: Path, target: Path) -> Path:
    options = ("--quiet", "--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check")
    run("-m", "pip", "install", *options, "--target", str(target), str(wheel), folder=wheel.parent)
    return target


def files_below(folder: Path, *parts: str) -> set[str]:
    """The files in some parts of a folder, as relative paths, without what Python and editors leave there."""
    paths = (path for part in parts for path in (folder / part).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)) for path in paths if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, with none of what a build or an installation leaves in the real checkout."""
    folder = tmp_path_factory.mktemp("installation") / "checkout"
    folder.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder)
    return folder


@pytest.fixture(scope="module")
def sdist(checkout: Path) -> Path:
    """The unpacked source distribution."""
    archive = build("sdist", checkout, checkout.parent / "sdist")
    with tarfile.open(archive) as content:
        content.extractall(checkout.parent / "unpacked", filter="data")
    (folder,) = (checkout.parent / "unpacked").iterdir()
    return folder


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """The wheel, built from a copy of the source distribution: what pip does with one."""
    source = shutil.copytree(sdist, sdist.parent.parent / "to_build")
    return build("wheel", source, sdist.parent.parent / "wheel")


@pytest.fixture(scope="module")
def found(checkout: Path, sdist: Path, wheel: Path) -> dict[str, dict[str, Any]]:
    """What each way of installing finds."""
    empty = checkout.parent / "elsewhere"
    empty.mkdir()
    installed = str(install(wheel, checkout.parent / "installed"))
    editable = str(install(build("editable", checkout, checkout.parent / "editable"), checkout.parent / "linked"))
    cases = {
        "wheel": {"folder": str(empty), "path": [""], "site": [installed]},
        "editable": {"folder": str(empty), "path": [""], "site": [editable]},
        "checkout": {"folder": str(checkout), "path": [""], "site": []},
        "sdist": {"folder": str(sdist), "path": [""], "site": []},
        "wheel, in a checkout": {"folder": str(checkout), "path": [""], "site": [installed]},
        "wheel, in a checkout, by the console script": {"folder": str(checkout), "path": [], "site": [installed]},
    }
    libraries = [folder for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")]
    request = json.dumps({"libraries": libraries, "cases": list(cases.values())})
    lines = run("-S", str(ROOT / "tests" / "import_probe.py"), request, folder=empty).splitlines()
    return dict(zip(cases, map(json.loads, lines), strict=True))


@pytest.mark.parametrize(
    ("case", "home", "kernels"),
    [
        ("wheel", "installed", "fastbgad/kernels"),
        ("editable", "checkout", "kernels"),
        ("checkout", "checkout", "kernels"),
        ("sdist", "unpacked/fastbgad-*", "kernels"),
        # The working directory comes first, for the kernels as for the rest: the two are never mixed.
        ("wheel, in a checkout", "checkout", "kernels"),
        ("wheel, in a checkout, by the console script", "installed", "fastbgad/kernels"),
    ],
)
def test_imports(case: str, home: str, kernels: str, found: dict[str, dict[str, Any]], checkout: Path) -> None:
    assert "failed" not in found[case], found[case]["failed"]
    (root,) = checkout.parent.glob(home)
    files = {name: str(Path(path).relative_to(root)) for name, path in found[case]["files"].items()}
    assert files == {
        "fastbgad": "fastbgad/__init__.py",
        "fastbgad.kernels": f"{kernels}/__init__.py",
        "fastbgad.kernels.tile_sizes": f"{kernels}/tile_sizes.py",
        "fastbgad.ops": "fastbgad/ops/__init__.py",
        "fastbgad.experiments": "fastbgad/experiments/__init__.py",
    }
    assert "--update-budget" in found[case]["help"]
    # Standard normal at the origin of 4 dimensions, per dimension: -log(2 pi) / 2.
    for impl in ("torch", "triton"):
        assert found[case]["log_likelihoods"][impl] == pytest.approx([-0.918939] * 2, abs=1e-6)


def test_the_wheel_holds_every_file_and_no_package_named_kernels(checkout: Path, wheel: Path) -> None:
    """Modules, templates, protocols, C++ sources, tile sizes, budget: all that the checkout has, in its place."""
    names = zipfile.ZipFile(wheel).namelist()
    kernels = {f"fastbgad/{name}" for name in files_below(checkout, "kernels")}
    assert {name for name in names if ".dist-info/" not in name} == files_below(checkout, "fastbgad") - {STUB} | kernels
    with zipfile.ZipFile(wheel) as content:
        assert content.read(STUB) == (checkout / "kernels" / "__init__.py").read_bytes()


def test_the_source_distribution_holds_what_a_build_needs(checkout: Path, sdist: Path) -> None:
    """No tests: half of them test benchmarks, examples and pages, which belong to the repository, too."""
    assert files_below(sdist, "fastbgad", "kernels") == files_below(checkout, "fastbgad", "kernels")
    assert {path.name for path in sdist.iterdir()} == {
        "fastbgad", "kernels", "fastbgad.egg-info", "pyproject.toml", "setup.py", "setup.cfg", "PKG-INFO",
        "MANIFEST.in", "README.md", "LICENSE",
    }  # fmt: skip
