"""Compilation of the C++ parts with the machine's own compiler, once per user, at their first use.

A compiled library is specific to the CPU it was compiled on, so none is shipped. It is kept in the user's cache folder
under the hash of everything that it depends on: the source, the flags, the compiler and the CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import threading
from pathlib import Path

from ...errors import BackendError, OutputError
from ...system.environment import cpu_facts
from ...system.files import atomic_path

SOURCES = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
# NaN and Inf keep their meaning: only those parts of -ffast-math that cannot change a value.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
# Compilers for ARM before GCC 6 and Apple's know only the second.
THIS_CPU = ("-march=native", "-mcpu=native")
# Compiling takes 4 s; several times as long on a busy machine.
LONGEST_BUILD = 120.0  # seconds

_lock = threading.Lock()


class _Outcome:
    """Outcome of building in this process: the library, or why there is none."""

    def __init__(self) -> None:
        self.library: ctypes.CDLL | None = None
        self.obstacle: str | None = None


_outcome = _Outcome()


def library() -> ctypes.CDLL:
    """Return the compiled library, built on first use; raise `BackendError` if that is not possible."""
    with _lock:
        if _outcome.library is None and _outcome.obstacle is None:
            try:
                _outcome.library = _load()
            except BackendError as error:
                _outcome.obstacle = str(error)
        if _outcome.library is None:
            raise BackendError(_outcome.obstacle)
        return _outcome.library


def why_not_native() -> str | None:
    """Return why the compiled backend is unavailable, or None. Builds the library on first use."""
    if _outcome.library is not None:
        return None
    if _outcome.obstacle is None:
        with contextlib.suppress(BackendError):
            library()
    return _outcome.obstacle


def forget() -> None:
    """Make the next use look for a compiler again."""
    with _lock:
        _outcome.library = _outcome.obstacle = None


def cache_folder() -> Path:
    """Return the folder of compiled libraries: fastbgad in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The convention asks for relative ones to be ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "fastbgad"


def find_compiler() -> str:
    """Return the path of a C++ compiler: CXX if it is set, else the first of `COMPILERS` that is installed."""
    chosen = os.environ.get("CXX", "").strip()
    for name in (chosen,) if chosen else COMPILERS:
        found = shutil.which(name)
        if found is not None:
            return found
    if chosen:
        raise BackendError(
            f"CXX names the C++ compiler {chosen}, which is not installed; set it to one that is, or unset it"
        )
    raise BackendError(f"there is no C++ compiler ({', '.join(COMPILERS)}); install one, for example Debian's g++")


def _load() -> ctypes.CDLL:
    if sys.platform == "win32":
        raise BackendError("the C++ parts are built with GCC or Clang on Linux and macOS, not on Windows")
    compiler = find_compiler()
    target = _target(compiler)
    if target.is_file():
        # a file that cannot be loaded (a full disk, a copied home folder) is built again
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(target))
    _build(compiler, target)
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise BackendError(f"the library that the C++ compiler {compiler} makes cannot be loaded: {error}") from error


def _target(compiler: str) -> Path:
    """Return the file of the library that this compiler makes for this CPU."""
    version = _run([compiler, "--version"], timeout=20.0)
    try:
        sources = [path.read_text() for path in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")])]
    except OSError as error:
        raise BackendError(f"cannot read {error.filename}, which is part of fastbgad: {error.strerror}") from error
    parts = [*sources, *FLAGS, *THIS_CPU, compiler, version, platform.machine(), _cpu()]
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    try:
        return cache_folder() / f"flow-{name}.so"
    except RuntimeError as error:  # no home folder
        raise BackendError(f"no folder to keep compiled C++ in ({error}); set XDG_CACHE_HOME to one") from error


def _build(compiler: str, target: Path) -> None:
    """Compile into a file of its own, which becomes the target in one step: other processes see all of it or none."""
    try:
        with atomic_path(target) as temporary:
            for index, cpu in enumerate(THIS_CPU):
                try:
                    _run(
                        [compiler, *FLAGS, cpu, "-o", str(temporary), str(SOURCES / "flow.cpp")], timeout=LONGEST_BUILD
                    )
                    return
                except BackendError:
                    if index + 1 == len(THIS_CPU) or platform.machine() in ("x86_64", "AMD64"):
                        raise
    except OutputError as error:
        raise BackendError(f"{error} (XDG_CACHE_HOME), where compiled C++ is kept") from error


def _run(command: list[str], timeout: float) -> str:
    """Run a compiler and return its output; raise `BackendError` with the first line of its errors if it fails."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise BackendError(f"the C++ compiler {command[0]} did not finish within {timeout:.0f} s") from error
    except OSError as error:
        raise BackendError(f"the C++ compiler {command[0]} cannot be run: {error.strerror}") from error
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        why = next((line for line in said if "error" in line.lower()), said[0] if said else f"status {done.returncode}")
        raise BackendError(f"the C++ compiler {command[0]} failed: {why}")
    return done.stdout


def _cpu() -> str:
    """Return the instructions of this CPU, as far as they are known: machines may share a home folder."""
    facts = cpu_facts()
    kept = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(f"{name}: {facts[name]}" for name in kept if name in facts) or platform.processor()
