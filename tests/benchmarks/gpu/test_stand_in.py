"""All that the kernel tests launch is compiled for a GPU, as Triton's JIT specializes it, though there is none.

The tests run once more, in processes of their own, on a driver that compiles and launches nothing: some of them always,
all of them in the slow tier. What a launch asks for first takes some seconds; it stays in Triton's cache.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.gpu import pytest_stand_in, stand_in_driver
from fastbgad.kernels.variants import MODULES
from tests import ROOT
from tests.grids import slow

# Groups of files of kernel tests, each with the kernels that it must reach, and which of the tests reach them all and
# every kind of rows: these are enough outside the slow tier.
ROWS = (
    (
        "ops/log_likelihood/test_dispatcher.py",
        "ops/boundary/test_registered.py",
        "ops/score_map/test_registered.py",
        "ops/spp_loss/test_registered.py",
    ),
    {
        "log_likelihood_forward_kernel",
        "log_likelihood_backward_kernel",
        "boundary_small_kernel",
        "boundary_histogram_kernel",
        "boundary_finish_kernel",
        "score_map_kernel",
        "spp_loss_small_kernel",
        "spp_loss_partial_kernel",
        "spp_loss_finish_kernel",
        "spp_loss_backward_kernel",
    },
    "stride or narrow or half_precision or several_tiles or same_bits or sums_of_many or spread_as_in",
)
FLOW = (
    (
        "kernels/flow/test_pack.py",
        "ops/flow/test_registered.py",
        "ops/flow/test_registered_operator.py",
        "ops/flow/test_registered_values.py",
    ),
    {
        "flow_pack_kernel",
        "flow_forward_kernel",
        "flow_backward_kernel",
        "flow_weight_gradient_kernel",
        "flow_unpack_kernel",
    },
    "test_maps_of_any_shape or test_variants or (test_tiles_that_ship and (40 or 200)) or "
    "(test_gradients and (dense or (none and float32)))",
)
WIDE = (
    (
        "ops/flow/test_wide.py",
        "kernels/coupling/test_coupling.py",
        "ops/flow/test_wide_lost_rows.py",
        "ops/flow/test_wide_operator.py",
    ),
    {
        "coupling_forward_kernel",
        "coupling_backward_kernel",
        "coupling_operand_kernel",
        "coupling_rows_kernel",
        "coupling_clear_kernel",
    },
    "(test_variants and float16) or unusable_rows",
)
GROUPS = {"rows and maps": ROWS, "flow": FLOW, "wide flow": WIDE}
# These look at operators and graphs, which dynamo cannot trace under -O; their kernels are those of the other tests.
# Names of files count, too: "regist" would leave out test_registered.py.
OF_OPERATORS = (
    "opcheck or registration or registered_operators or registered_operation or compile or export or waits_for_nothing "
    "or frozen_flow"
)
# These compare by a function in place of an assertion, after their last launch.
OF_VALUES = {"test_values_that_are_not_finite_spread_as_in_the_oracle"}


@pytest.mark.parametrize(
    ("group", "everything"), [*((name, False) for name in GROUPS), *(slow(name, True) for name in GROUPS)]
)
def test_every_launch_compiles(group: str, everything: bool, tmp_path: Path) -> None:
    """For capability 9.0: specialization, compilation, shared memory, and the limits of a grid."""
    files, kernels, some = GROUPS[group]
    selection = (
        ["-k", f"not ({OF_OPERATORS})"]
        if everything
        else ["-k", f"({some}) and not ({OF_OPERATORS})", "-m", "not slow"]
    )
    log = tmp_path / "launches.jsonl"
    log.touch()
    environment = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    environment[pytest_stand_in.LOG] = str(log)
    # With -O there are no assertions: outputs hold whatever was in memory.
    command = [
        sys.executable,
        "-O",
        "-m",
        "pytest",
        "-q",
        "-o",
        "addopts=",
        "--assert=plain",
        "-p",
        pytest_stand_in.__name__,
        "-p",
        "no:cacheprovider",
        *selection,
        "--tb=short",
        *(str(ROOT / "tests" / name) for name in files),
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment | {pytest_stand_in.LOG: str(log)},
        capture_output=True,
        text=True,
        check=False,
    )
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert not [entry for entry in entries if "failed" in entry], done.stdout[-3000:]
    # A test that ended early may not have reached its launches.
    ended = {test.partition("[")[0] for test in re.findall(r"^(?:FAILED|ERROR) \S+::(\w+)", done.stdout, re.MULTILINE)}
    assert ended <= OF_VALUES, done.stdout[-3000:]
    assert " passed" in done.stdout, done.stdout + done.stderr
    launched = {entry["launched"] for entry in entries if "launched" in entry}
    assert launched >= kernels, kernels - launched


def test_every_kernel_is_reached_by_some_test() -> None:
    """A new kernel belongs into a group above."""
    source = "".join(path.read_text() for path in sorted((ROOT / "kernels").rglob("*.py")))
    kernels = set(re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE))
    assert kernels == set().union(*(reached for _, reached, _ in GROUPS.values()))


def run(folder: Path, script: str) -> str:
    """The output of a process in which nothing imported a kernel before."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    (folder / "script.py").write_text(script)  # Triton reads a kernel's source from its file
    command = [sys.executable, str(folder / "script.py")]
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


PROBE = """
import torch, triton, triton.language as tl
from benchmarks.gpu import stand_in_driver

@triton.jit
def probe_kernel(out_ptr, count, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    total = tl.sum(tl.dot(tl.zeros((SIZE, SIZE), tl.float32), tl.zeros((SIZE, SIZE), tl.float32)), 0)
    tl.store(out_ptr + at, total, mask=at < count)

out = torch.zeros(256)
launches, compilations = [], []
stand_in_driver.install(launches.append, compilations.append)
"""


def test_specialization_is_that_of_a_launch(tmp_path: Path) -> None:
    """1 and multiples of 16 make kernels of their own; what was compiled is not compiled again."""
    script = PROBE + (
        "for count in (1, 16, 32, 17, 33):\n"
        "    probe_kernel[(2,)](out, count, 16)\n"
        "print(len(launches), len(compilations), len({launch.digest for launch in launches}), launches[0].grid)\n"
        "print(float(out.sum()))"
    )
    assert run(tmp_path, script).splitlines()[-2:] == ["5 3 3 (2, 1, 1)", "0.0"]  # nothing ran


def test_limits_of_the_chip(tmp_path: Path) -> None:
    script = PROBE + (
        "def attempt(grid, size):\n"
        "    try:\n"
        "        probe_kernel[grid](out, 16, size)\n"
        "    except Exception as error:\n"
        "        print(f'{type(error).__name__}: {error}')\n"
        "stand_in_driver.H100['max_shared_mem'] = 8_000\n"
        "attempt((1, 70_000), 16)\n"
        "attempt((1,), 128)\n"
    )
    output = run(tmp_path, script)
    assert "GridError: probe_kernel has 70000 programs along y; CUDA takes 1 to 65535" in output
    assert "OutOfResources: out of resource: shared memory" in output


def test_kernels_for_the_interpreter_are_refused(tmp_path: Path) -> None:
    script = (
        "import os; os.environ['TRITON_INTERPRET'] = '1'\n"
        "import fastbgad.kernels.boundary\n"
        "from benchmarks.gpu import stand_in_driver\n"
        "stand_in_driver.install()"
    )
    assert "were imported for the interpreter before the stand-in driver was installed" in run(tmp_path, script)


def test_the_architecture_is_that_of_the_gate() -> None:
    """`fastbgad.kernels.resources` holds the same chip's shared memory."""
    resources = importlib.import_module("fastbgad.kernels.resources")
    assert resources.SHARED_LIMIT[stand_in_driver.ARCHITECTURE] == stand_in_driver.H100["max_shared_mem"]
    assert MODULES
