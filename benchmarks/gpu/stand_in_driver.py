"""Stand in for a CUDA driver: launches go through Triton's own JIT compiler, and then nothing runs.

A launch is specialized for its arguments as on a GPU (integers that are 1 or multiples of 16, aligned pointers),
compiled for the architecture, and held against the limits of shared memory and of grids. Outputs stay as they were
allocated. The interpreter checks values but compiles nothing; the ahead-of-time gate
(`python -m fastbgad.kernels.resources`) compiles, but only the arguments that it was told of.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

H100 = {
    "max_shared_mem": 232_448,
    "multiprocessor_count": 132,
    "warpSize": 32,
    "max_num_regs": 65_536,
    "sm_clock_rate": 1_980_000,
    "mem_clock_rate": 2_619_000,
    "mem_bus_width": 5_120,
}
ARCHITECTURE = 90
MOST_THREADS = 1024  # of a program
LARGEST_GRID = (2**31 - 1, 65_535, 65_535)


class GridError(RuntimeError):
    """A launch has more programs in one dimension than CUDA takes."""


class Compilation(NamedTuple):
    """A compilation that Triton requested, and whether its cache had the result."""

    kernel: str
    digest: str  # the name of its entry in the cache, in hexadecimal
    cache_hit: bool
    seconds: float
    shared_bytes: int


class Launch(NamedTuple):
    """A kernel that would have run."""

    kernel: str
    digest: str
    grid: tuple[int, int, int]


class StandInDriver:
    """A driver for Triton that answers as for one H100; see `install`."""

    def __init__(self, on_launch: Callable[[Launch], object] | None = None) -> None:
        driver = self
        self.on_launch = on_launch or (lambda launch: None)
        self.utils = _Utilities()

        class Launcher:
            def __init__(self, src: Any, metadata: Any) -> None:
                self.name, self.digest = metadata.name, metadata.hash

            def __call__(self, x: int, y: int, z: int, *_: Any) -> None:
                for axis, size, most in zip("xyz", (x, y, z), LARGEST_GRID, strict=True):
                    if not 0 < size <= most:
                        raise GridError(f"{self.name} has {size} programs along {axis}; CUDA takes 1 to {most}")
                driver.on_launch(Launch(self.name, self.digest, (x, y, z)))

        self.launcher_cls = Launcher

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", ARCHITECTURE, 32)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(ARCHITECTURE, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class _Utilities:
    """The driver's module of C functions."""

    def get_device_properties(self, device: int) -> Mapping[str, int]:
        return H100

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills and the most threads of a program."""
        return 1, 1, 0, 0, MOST_THREADS


def install(
    on_launch: Callable[[Launch], object] | None = None,
    on_compilation: Callable[[Compilation], object] | None = None,
) -> None:
    """Make this process launch kernels on the stand-in, from CPU tensors. Call it before anything imports a kernel.

    Args:
        on_launch: told of every launch.
        on_compilation: told of every kernel that was compiled, or found in Triton's cache.

    Raises:
        RuntimeError: a kernel was imported before, for the interpreter.
    """
    # Triton reads this when a kernel is defined: these are for the compiler.
    os.environ.pop("TRITON_INTERPRET", None)
    from fastbgad.kernels.variants import MODULES

    modules = [importlib.import_module(f"fastbgad.kernels.variants.{name}") for name in MODULES]
    from triton.runtime import driver
    from triton.runtime.interpreter import InterpretedFunction

    if any(isinstance(value, InterpretedFunction) for module in modules for value in vars(module).values()):
        raise RuntimeError("kernels were imported for the interpreter before the stand-in driver was installed")
    driver.set_active(StandInDriver(on_launch))
    if on_compilation is not None:
        listen(on_compilation)
    # fastbgad's operators now take CPU tensors, as they do for the interpreter.
    os.environ["TRITON_INTERPRET"] = "1"


def listen(on_compilation: Callable[[Compilation], object]) -> None:
    """Tell of every kernel that this process compiles or finds in Triton's cache, on any driver."""
    import triton

    def listener(*, src: Any, metadata: Mapping[str, Any], times: Any, cache_hit: bool, **_: Any) -> None:
        on_compilation(Compilation(src.name, metadata["hash"], cache_hit, 1e-6 * times.total, metadata["shared"]))

    triton.knobs.compilation.listener = listener
