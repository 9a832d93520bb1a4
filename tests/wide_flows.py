"""Wide flows to test, and the reference's view of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastbgad import reference
from fastbgad.flow_spec import CouplingWeights, FlowSpec
from fastbgad.kernels.tile_sizes import use_tiles
from fastbgad.ops import MatmulPrecision, PositionalRows
from fastbgad.ops.flow import wide
from fastbgad.ops.flow.backend import FlowCall, FlowOptions
from tests.flows import double, lively_flow, reference_with_masks

PRECISIONS = ["float32", "float16"]
# Relative errors of whole tensors. lp and log_det / C are averages over channels, where roundings cancel; z is not.
BUDGET = {
    "float32": {"lp": 1e-5, "z": 1e-5, "gradient": 1e-5},
    "float16": {"lp": 5e-5, "z": 5e-4, "gradient": 1e-3},
}


def interpreter_tiles(device: torch.device, folder: Path, columns: int = 32) -> Iterator[None]:
    """Large tiles for the interpreter, where each program costs milliseconds; a GPU runs the shipped ones.

    Tests of the loops over channels take fewer columns.
    """
    if device.type == "cpu":
        sizes = {"BM": 16, "BK": columns, "num_warps": 4}
        path = folder / f"tiles{columns}.json"
        tiles = {"coupling_forward": {"rows": sizes, "operand": sizes}, "coupling_backward": {"rows": sizes}}
        path.write_text(json.dumps({"tiles": tiles}))
        use_tiles(path)
    yield
    use_tiles(None)


class Case:
    """A lively flow with features and a condition of one kind."""

    def __init__(self, device: torch.device, rows: int, channels: int, kind: str = "none", **options: Any) -> None:
        torch.manual_seed(rows + channels)
        self.spec = FlowSpec(channels, condition_channels=0 if kind == "none" else 8, **options)
        self.flow = lively_flow(self.spec).to(device)
        self.x = torch.randn(rows, channels, device=device, requires_grad=True)
        self.condition: PositionalRows | Tensor | None = None
        if kind == "dense":
            self.condition = torch.randn(rows, 8, device=device, requires_grad=True)
        elif kind == "gathered":
            self.condition = PositionalRows(11, 7, torch.randint(0, 77, (rows,), device=device), channels=8)
        elif kind == "raster":
            self.condition = PositionalRows(1, rows, channels=8)
        self.weights = self.flow.weights()

    @property
    def dense(self) -> Tensor | None:
        """The condition as float64 [N, P]."""
        if isinstance(self.condition, PositionalRows):
            return self.condition.dense(len(self.x), torch.float64, self.x.device)
        return None if self.condition is None else self.condition.detach().double()

    def run(
        self, precision: MatmulPrecision, return_z: bool = True, **options: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The flow under test."""
        return run_wide(self.x, self.weights, self.spec, self.condition, return_z, precision, **options)

    def inputs(self) -> dict[str, Tensor]:
        """Everything that has a gradient, by name."""
        found = {"x": self.x, **names(self.weights)}
        return found | ({"condition": self.condition} if isinstance(self.condition, Tensor) else {})

    def gradients(self, outputs: Sequence[Tensor | None], upstream: Sequence[Tensor]) -> dict[str, Tensor]:
        """Of all inputs."""
        inputs = self.inputs()
        return dict(zip(inputs, torch.autograd.grad(outputs, list(inputs.values()), upstream), strict=True))

    def operator_arguments(self, precision: MatmulPrecision, keep: bool, return_z: bool = True) -> tuple[Any, ...]:
        """The same call, as the registered operator takes it."""
        positions = self.condition if isinstance(self.condition, PositionalRows) else None
        dense = self.condition if isinstance(self.condition, Tensor) else None
        height, width, index = (
            (0, 0, None) if positions is None else (positions.height, positions.width, positions.index)
        )
        weights = [tensor for layer in self.weights for tensor in layer]
        form = (self.spec.clamp, self.spec.clamp_form, self.spec.global_affine, self.spec.hard_permutation)
        return self.x, dense, index, weights, height, width, *form, precision, 20, return_z, keep

    def exact(self, precision: MatmulPrecision) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Tensor]]:
        """The reference in float64: its lp, log_det and z, and its inputs by name.

        With the hidden units active that are active in the flow under test. A unit within rounding of zero may be on in
        one and off in the other, and then its gradient is there or not. About one unit in 10^4 does that in float16,
        which alone would make a difference of 10^-2.
        """
        with torch.no_grad():
            masks = list(wide.flow_wide(*self.operator_arguments(precision, keep=True))[5] > 0)
        layers = double(self.weights)
        x, dense = self.x.detach().double().requires_grad_(), self.dense
        inputs = {"x": x, **names(layers)}
        if isinstance(self.condition, Tensor) and dense is not None:
            inputs["condition"] = dense.requires_grad_()
        z, log_det = reference_with_masks(x, layers, self.spec, dense, masks)
        return (reference.log_likelihood(z, log_det), log_det, z), inputs


def run_wide(
    x: Tensor,
    layers: Sequence[CouplingWeights],
    spec: FlowSpec,
    condition: PositionalRows | Tensor | None,
    return_z: bool,
    precision: MatmulPrecision,
    *,
    recompute: bool | None = None,
    chunk_rows: int = wide.CHUNK_ROWS,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The backend for flows that are too wide for the other kernels, at any width."""
    options = FlowOptions(return_z, precision, recompute=recompute)
    needs_grad = torch.is_grad_enabled()
    call = FlowCall(x, layers, spec, condition, None, torch.float32, needs_grad=needs_grad, options=options)
    return wide.train(call, chunk_rows=chunk_rows)


def names(layers: Sequence[CouplingWeights]) -> dict[str, Tensor]:
    """The tensors of all layers that have gradients, by name."""
    return {
        f"{i}.{name}": tensor
        for i, layer in enumerate(layers)
        for name, tensor in layer._asdict().items()
        if name != "w_perm"
    }
