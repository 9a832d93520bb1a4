"""Import fastbgad from several places in turn, and say what was found where.

    python -S tests/import_probe.py REQUEST

REQUEST is JSON: `libraries`, folders that hold PyTorch and the like, and `cases`, each with the `folder` to work in,
what to put in front of `sys.path` (`path`), and folders whose .pth files are read as Python does when it starts
(`site`). Each case prints a line of JSON: the files of the modules, what one operation computes by the portable path
and by its kernel in Triton's interpreter, and what `python -m fastbgad.kernels.resources --help` prints.

PyTorch takes seconds to import and is the same for all cases: it is imported once, and every case is a fork. With -S no
.pth file of the libraries is read, since one of them may lead to the checkout that is being tested.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import runpy
import site
import sys
import traceback

MODULES = ("fastbgad", "fastbgad.kernels", "fastbgad.kernels.tile_sizes", "fastbgad.ops", "fastbgad.experiments")
# What fastbgad imports of others.
PRELOADED = ("numpy", "PIL.Image", "safetensors.torch", "scipy.ndimage", "torch", "torchvision")


def probe() -> dict[str, object]:
    """Return the file of every module of `MODULES`, the results of an operation, and the help of a command."""
    files = {name: os.path.realpath(str(importlib.import_module(name).__file__)) for name in MODULES}
    sys.argv = ["resources", "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        runpy.run_module("fastbgad.kernels.resources", run_name="__main__", alter_sys=True)
    torch, ops = importlib.import_module("torch"), importlib.import_module("fastbgad.ops")
    values = {
        impl: ops.log_likelihood(torch.zeros(2, 4), torch.zeros(2), impl=impl).tolist() for impl in ("torch", "triton")
    }
    return {"files": files, "log_likelihoods": values, "help": said.getvalue()}


def main() -> None:
    """Print one line for each case, in their order."""
    request = json.loads(sys.argv[1])
    sys.path[:1] = request["libraries"]  # in place of this file's folder
    os.environ["TRITON_INTERPRET"] = "1"
    for name in PRELOADED:
        importlib.import_module(name)
    for case in request["cases"]:
        if os.fork() != 0:
            os.wait()
            continue
        os.chdir(case["folder"])
        # In front of the libraries, too: each editable installation has a module of the same name.
        sys.path[:0] = [*case["path"], *case["site"]]
        for folder in case["site"]:
            site.addsitedir(folder)
        try:
            answer: object = probe()
        except BaseException:
            answer = {"failed": traceback.format_exc()}
        print(json.dumps(answer), flush=True)
        os._exit(0)


if __name__ == "__main__":
    main()
