"""Formats of `fastbgad.export`: requirements on the machine, writers and loaders.

A writer takes the traced detector and returns the number of operations. A loader returns a function from images
[B, 3, H, W] float32 on the CPU to the outputs by name; it can replace the file's scoring constants.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._pytree import tree_unflatten

from ..errors import BackendError, ConfigError, MissingDependencyError

ExportFormat = Literal["onnx", "torch-export", "aoti"]
Run = Callable[[Tensor], Mapping[str, Tensor]]
Constants = Mapping[str, Tensor]

INPUT = "images"
METADATA_FILE = "fastbgad.json"  # inside a torch.export archive
# An ONNX file without external data is one protobuf message, of 2 GiB at most; the graph itself takes a few MB.
MOST_ONNX_BYTES = 2**31 - 2**26


class Format(NamedTuple):
    """One format: the suffix of its files, and its three functions."""

    suffix: str
    check: Callable[[torch.device], None]  # raises an error if this machine cannot write the format
    write: Callable[[ExportedProgram, Path, Mapping[str, str]], int]
    load: Callable[[Path, torch.device, Constants], Run]


def _check_onnx(device: torch.device) -> None:
    if device.type != "cpu":
        raise ConfigError(f"an ONNX file is bound to no device: leave out the device {device}")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise MissingDependencyError(package, "export", "the format onnx") from error


def _write_onnx(program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> int:
    constants = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    if constants > MOST_ONNX_BYTES:
        raise BackendError(
            f"the model holds {constants / 2**30:.1f} GiB of constants, and an ONNX file holds 2 GiB at most; choose "
            "the format torch-export, or a smaller backbone"
        )
    spec = program.call_spec.out_spec
    assert spec is not None
    output_index = tree_unflatten(range(spec.num_leaves), spec)
    onnx_program = torch.onnx.export(
        program,
        (),
        dynamo=True,
        input_names=[INPUT],
        output_names=sorted(output_index, key=output_index.__getitem__),
        dynamic_shapes={INPUT: {0: "batch"}},
        external_data=False,
        verbose=False,
    )
    assert onnx_program is not None
    model = onnx_program.model
    # The metadata of the nodes is as large as the flows.
    for holder in (model.graph, *model.graph, *model.graph.inputs, *model.graph.outputs):
        holder.metadata_props.clear()
    model.metadata_props.clear()
    model.metadata_props.update(metadata)
    onnx_program.save(path, external_data=False)
    return len(model.graph)


def _load_onnx(path: Path, device: torch.device, constants: Constants) -> Run:
    import onnx
    import onnxruntime

    model = onnx.load(path)
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, value in constants.items():
        initializers[name].CopyFrom(onnx.numpy_helper.from_array(value.cpu().numpy(), name))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(images: Tensor) -> dict[str, Tensor]:
        return {
            name: torch.from_numpy(value)
            for name, value in zip(names, session.run(names, {INPUT: images.numpy()}), strict=True)
        }

    return run


def _check_torch_export(device: torch.device) -> None:
    """Raise nothing: PyTorch itself is enough."""


def _write_torch_export(program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> int:
    program.example_inputs = None  # two whole images
    with path.open("wb") as file:  # given a path, PyTorch writes its name into the archive
        torch.export.save(program, file, extra_files={METADATA_FILE: json.dumps(metadata)})
    return _operations(program)


def _load_torch_export(path: Path, device: torch.device, constants: Constants) -> Run:
    with path.open("rb") as file:  # given a path, PyTorch opens only names that are UTF-8
        program = torch.export.load(file)
    for name, value in constants.items():
        program.state_dict[name].copy_(value)
    module = program.module()
    return lambda images: module(images.to(device))


def _check_aoti(device: torch.device) -> None:
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None:
        raise BackendError(
            f"the format aoti compiles C++, and this machine has no compiler {compiler}: install one (on Debian and "
            "Ubuntu: apt-get install g++), name another in the environment variable CXX, or choose torch-export"
        )


def _write_aoti(program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> int:
    options = {"aot_inductor.metadata": dict(metadata)}
    with path.open("wb") as file:
        torch._inductor.aoti_compile_and_package(program, package_path=file, inductor_configs=options)
    return _operations(program)


def _load_aoti(path: Path, device: torch.device, constants: Constants) -> Run:
    with path.open("rb") as file:
        package: Any = torch._inductor.aoti_load_package(file)
    if constants:
        package.load_constants(dict(constants), check_full_update=False)
    # The compiled code expects the memory layout that it was traced with and ignores strides.
    return lambda images: package(images.to(device).contiguous())


def _operations(program: ExportedProgram) -> int:
    return sum(node.op == "call_function" for node in program.graph.nodes)


FORMATS: dict[ExportFormat, Format] = {
    "onnx": Format(".onnx", _check_onnx, _write_onnx, _load_onnx),
    "torch-export": Format(".pt2", _check_torch_export, _write_torch_export, _load_torch_export),
    "aoti": Format(".pt2", _check_aoti, _write_aoti, _load_aoti),
}
