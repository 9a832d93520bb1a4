"""Compiling a kernel for a GPU that is not there, and reading the resources that it needs."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from ..variants import Variant
from .machine_code import MATRIX_UNITS, count_local_in_loops


class Resources(NamedTuple):
    """Resources of the chip that one compiled kernel needs."""

    registers: int  # per thread
    stack_bytes: int  # per thread; more than a few mean that registers spill
    shared_bytes: int  # per program
    local_in_loops: int  # loads and stores of local memory inside innermost loops
    matrix_unit: str  # the matrix instruction used, "" for none
    tensor_columns: int  # columns of tensor memory (sm_100)


class ResourcesError(RuntimeError):
    """The gate cannot run here; the message says what is missing."""


def compile_variant(variant: Variant, arch: int) -> Resources:
    """Compile a variant for compute capability `arch` (80, 90, 100) and return the resources that its code needs."""
    # Triton is imported where it is used: without it, or with an old one, the command says what to do.
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments = variant.kernel.arg_names
    signature = {name: variant.types.get(name, "constexpr") for name in arguments}
    constants = {(arguments.index(name),): value for name, value in variant.constants.items()}
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, name in enumerate(arguments):
        kind = signature[name]
        parts = [((i, j), part) for j, part in enumerate(kind)] if isinstance(kind, tuple) else [((i,), kind)]
        for path, part in parts:
            if part.startswith("*") or name in variant.multiples_of_16:
                aligned[path] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(variant.kernel, signature, constants, aligned),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": variant.num_warps, "num_stages": variant.num_stages},
    )
    usage, assembly = _disassemble(compiled.asm["cubin"])
    per_thread = dict(re.findall(r"\b(REG|STACK):(\d+)", usage))
    return Resources(
        registers=int(per_thread["REG"]),
        stack_bytes=int(per_thread["STACK"]),
        shared_bytes=compiled.metadata.shared,
        local_in_loops=count_local_in_loops(assembly),
        matrix_unit=next((unit for unit in MATRIX_UNITS if re.search(rf"\b{unit}\b", assembly)), ""),
        tensor_columns=getattr(compiled.metadata, "tmem_size", None) or 0,
    )


def find_tool(name: str) -> str:
    """Return the path of cuobjdump or nvdisasm, which ship with Triton."""
    import triton

    try:
        return str(getattr(triton.knobs.nvidia, name).path)
    except RuntimeError as error:
        raise ResourcesError(f"{name} was not found; it ships with the package triton: reinstall that") from error


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """Return cuobjdump's resource usage, and the machine code as nvdisasm prints it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        commands = ("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "--print-code")
        usage, assembly = (
            subprocess.run([find_tool(tool), option, str(path)], check=True, capture_output=True, text=True).stdout
            for tool, option in commands
        )
    return usage, assembly
