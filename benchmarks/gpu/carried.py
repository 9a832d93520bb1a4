"""Carry compiled kernels, and wheels of missing packages, to a machine without a network.

`python -m benchmarks.gpu.carried` compiles the kernels that a run asks for, without a GPU (`make gpu-carry`), and
packs them into .gpu/kernels.tar.xz. A run unpacks them into .gpu/triton-cache, which has the form of Triton's own
cache. Triton finds them again where its own files, its ptxas, the source of the kernel and its line in the file are the
same, so they are built with the Python and the Triton of that machine. Without them a run compiles by itself and takes
longer. Wheels lie in .gpu/wheels.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import lzma
import os
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".gpu"
ARCHIVE, CACHE, WHEELS = FOLDER / "kernels.tar.xz", FOLDER / "triton-cache", FOLDER / "wheels"
MADE_WITH = "made-with.json"
MOST_BYTES = 45 * 10**6
# Stages whose kernels are carried.
STAGES = ("smoke", "headline", "whole", "tests")

_GROUP = "__grp__"


class CarriedError(Exception):
    """A carried result cannot be used; the message names it."""


def digest(key: str) -> str:
    """Return the first digits of the SHA-256 of a key, enough to see whether two are the same."""
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def compiler() -> dict[str, str]:
    """Return what decides whether a carried kernel is found, beside the kernel's own source."""
    import triton
    from triton.runtime.cache import triton_key

    ptxas = triton.knobs.nvidia.ptxas.version
    return {"triton": triton.__version__, "triton_key": digest(triton_key()), "ptxas": str(ptxas)}


def environment() -> dict[str, str]:
    """Return the variables that make a child use what is carried; nothing is changed where nothing is.

    Raises:
        CarriedError: the archive is damaged.
    """
    found: dict[str, str] = {}
    if ARCHIVE.exists():
        unpack()
        found["TRITON_CACHE_DIR"] = str(CACHE)
    wheels = sorted(WHEELS.glob("*.whl"))
    if wheels:  # of plain Python, so they are imported as they are
        paths = [str(path) for path in wheels]
        found["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    return found


def pack() -> None:
    """Write what Triton needs of the cache into the archive; the kernels' intermediate text stays here."""
    (CACHE / MADE_WITH).write_text(json.dumps(compiler()))
    temporary = ARCHIVE.with_name(f".{ARCHIVE.name}.{os.getpid()}")
    try:
        with tarfile.open(temporary, "w:xz") as archive:
            archive.add(CACHE / MADE_WITH, MADE_WITH)
            for path in sorted(CACHE.glob("*/*")):
                if path.is_file() and (path.suffix in (".cubin", ".json")):
                    archive.add(path, path.relative_to(CACHE).as_posix())
        temporary.replace(ARCHIVE)
    finally:
        temporary.unlink(missing_ok=True)


def unpack() -> None:
    """Put the archive's kernels into the cache beside what it holds, with the paths that they have here."""
    try:
        with tarfile.open(ARCHIVE, "r:xz") as archive:
            archive.extractall(CACHE, filter="data")
    except (OSError, EOFError, lzma.LZMAError, tarfile.TarError) as error:
        raise CarriedError(
            f"{ARCHIVE} cannot be unpacked ({error}); delete it, or build it with make gpu-carry"
        ) from error
    relocate(CACHE)


def relocate(cache: Path) -> int:
    """Make the groups of files in a cache name the files beside them; returns the number of groups."""
    count = 0
    for group in cache.glob(f"*/{_GROUP}*"):
        content = json.loads(group.read_text())
        names = [name for name in content.get("child_paths", {}) if (group.parent / name).exists()]
        paths = {name: str(group.parent / name) for name in names}
        count += 1
        if paths != content.get("child_paths"):
            temporary = group.with_name(f".{group.name}.{os.getpid()}")
            temporary.write_text(json.dumps({"child_paths": paths}))
            temporary.replace(group)
    return count


def describe() -> dict[str, Any]:
    """Return how many kernels are carried, in how many bytes, and what they were compiled with."""
    if not ARCHIVE.exists() or not (CACHE / MADE_WITH).exists():
        return {"kernels": 0}
    made = json.loads((CACHE / MADE_WITH).read_text())
    kernels = len(list(CACHE.glob(f"*/{_GROUP}*")))
    return {"kernels": kernels, "bytes": ARCHIVE.stat().st_size, "made_with": made}


def build(stages: Sequence[str], say: Callable[[str], object] = print) -> int:
    """Compile what these stages launch into .gpu/triton-cache; returns the exit status.

    The stages run on a stand-in driver, with their real sizes, and launch kernels only. What an earlier build left
    stays where it still fits and is thrown away where nothing asked for it.
    """
    from .command import main as run

    start = time.monotonic()
    CACHE.mkdir(parents=True, exist_ok=True)
    relocate(CACHE)
    began = time.time()
    with tempfile.TemporaryDirectory(prefix="fastbgad-gpu-") as out:
        os.environ |= {"TRITON_CACHE_DIR": str(CACHE), "TRITON_STORE_BINARY_ONLY": "1"}
        status = run(
            ["--driver", "stand-in", "--launch-only", "--stage", ",".join(stages), "--out", out, "--seconds", "7200"]
        )
    if status != 0:
        say("error: not everything could be launched, so nothing was packed; see above")
        return status
    dropped = drop_unused(began)
    pack()
    size = ARCHIVE.stat().st_size
    say(
        f"{describe()['kernels']} kernels, {size / 1e6:.1f} MB in {ARCHIVE.relative_to(ROOT)}, {dropped} unused ones "
        f"dropped, {time.monotonic() - start:.0f} s"
    )
    if size > MOST_BYTES:
        say(f"error: more than {MOST_BYTES / 1e6:.0f} MB cannot be carried; build fewer stages with --stage")
        return 1
    return 0


def drop_unused(began: float) -> int:
    """Remove the entries that nothing has read since `began`, by the marks that `mark_used` leaves."""
    dropped = 0
    for entry in CACHE.iterdir():
        if entry.is_dir() and entry.stat().st_mtime < began:
            shutil.rmtree(entry)
            dropped += 1
    return dropped


def mark_used(digest_: str) -> None:
    """Note that an entry of the cache, given by its hexadecimal digest, was asked for."""
    name = base64.b32encode(bytes.fromhex(digest_)).decode().rstrip("=")
    folder = Path(os.environ.get("TRITON_CACHE_DIR", CACHE)) / name
    if folder.is_dir():
        os.utime(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.carried", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--stage", default=",".join(STAGES), help="stages whose kernels are compiled (%(default)s)")
    options = parser.parse_args(arguments)
    return build([name for name in options.stage.split(",") if name])


if __name__ == "__main__":
    sys.exit(main())
