"""Flows with rows of every kind, and the results of the reference; the tests of the flow's kernels share these."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbgad import reference
from fastbgad.flow_spec import CouplingWeights, FlowSpec
from fastbgad.ops import FlowOutput, Geometry, MatmulPrecision, PositionalRows, flow_forward, pack_flow
from fastbgad.ops.flow.registered import flow_train
from tests.flows import active_units, double, lively_flow, reference_with_masks

HEIGHT, WIDTH = 11, 7
# Relative error of a whole tensor. float16: the operands of the subnets' products are rounded to 11 bits, the
# permutation and the state are not; over the channels of a row the errors of lp average out.
LP_TOLERANCE = {"float32": 1e-5, "float16": 5e-5}
GRADIENT_TOLERANCE = {"float32": 1e-5, "float16": 1e-3}
CONDITIONS = ["none", "raster", "gathered", "positions", "dense"]


class Problem:
    """A flow, N rows with a condition of the given kind, and as the reference sees them: rows and a dense condition."""

    def __init__(
        self,
        kind: str,
        rows: int,
        channels: int,
        device: torch.device,
        layers: int = 2,
        gain: float = 1.0,
        **spec: object,
    ) -> None:
        torch.manual_seed(rows + channels)
        self.spec = FlowSpec(channels, 0 if kind == "none" else 128, layers, **spec)
        self.flow = lively_flow(self.spec, gain=gain).to(device)
        self.rows: Tensor | None = None
        self.condition: PositionalRows | Tensor | None = None
        area = HEIGHT * WIDTH
        if kind == "raster":
            rows = -(-rows // area) * area
        self.x = torch.randn(rows, channels, device=device)
        self.exact_x = self.x.double()
        self.dense: Tensor | None = None
        if kind == "raster":
            self.condition = PositionalRows(HEIGHT, WIDTH)
        elif kind == "positions":
            self.condition = PositionalRows(HEIGHT, WIDTH, torch.randint(0, area, (rows,), device=device))
        elif kind == "gathered":
            self.condition = PositionalRows(HEIGHT, WIDTH)
            self.x = torch.randn(3 * area, channels, device=device)
            self.rows = torch.randint(0, len(self.x), (rows,), device=device, dtype=torch.int32)
            self.exact_x = self.x[self.rows.long()].double()
            self.dense = PositionalRows(HEIGHT, WIDTH, self.rows.long() % area).dense(rows, torch.float64, device)
        elif kind == "dense":
            self.condition = torch.randn(rows, 128, device=device)
            self.dense = self.condition.double()
        if isinstance(self.condition, PositionalRows) and self.dense is None:
            self.dense = self.condition.dense(rows, torch.float64, device)

    @torch.no_grad()
    def run(self, precision: MatmulPrecision = "float16", **options: object) -> FlowOutput:
        """Inference; maps are cut into tiles of neighboring pixels then."""
        options = {"impl": "triton", "rows": self.rows, **options}
        return flow_forward(
            self.x, self.flow.weights(), self.spec, self.condition, matmul_precision=precision, **options
        )

    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        z, log_det = reference.flow_forward(self.exact_x, double(self.flow.weights()), self.spec, self.dense)
        return reference.log_likelihood(z, log_det), log_det, z

    def exact_gradients(self, precision: MatmulPrecision, *upstream: Tensor) -> dict[str, Tensor]:
        """Of the stacked weights and of x, with the hidden units active that are active in this precision.

        A hidden unit within rounding of zero has one of two gradients; which one is not an error.
        """
        layers = double(self.flow.weights())
        tables = not isinstance(self.condition, Tensor)
        masks = active_units(self.subnet_inputs(precision), layers, self.dense, tables, precision)
        x = self.exact_x.clone().requires_grad_()
        z, log_det = reference_with_masks(x, layers, self.spec, self.dense, masks)
        outputs = [reference.log_likelihood(z, log_det), log_det, z][: len(upstream)]
        names = [name for name in CouplingWeights._fields if name != "w_perm"]
        leaves = [getattr(layer, name) for name in names for layer in layers]
        grads = torch.autograd.grad(outputs, [x, *leaves], [u.double() for u in upstream])
        stacked = {name: torch.stack(grads[1 + i * len(layers) :][: len(layers)]) for i, name in enumerate(names)}
        return {"x": grads[0], **stacked}

    def subnet_inputs(self, precision: MatmulPrecision) -> Tensor:
        """What every layer's subnet saw of the features, [L, N, C1], from what the kernels keep for the backward."""
        pack = pack_flow(self.flow.weights(), self.spec, Geometry.of(self.condition, precision))
        index = self.condition.index if isinstance(self.condition, PositionalRows) else None
        kept = flow_train(
            self.x, [t for layer in self.flow.weights() for t in layer], pack.tensors,
            index if self.rows is None else self.rows, self.rows is not None,
            self.condition if isinstance(self.condition, Tensor) else None, HEIGHT, WIDTH, self.spec.condition_channels,
            self.spec.hidden_channels, self.spec.clamp, self.spec.clamp_form == "scaled_tanh",
            False, False,
        )[4]  # fmt: skip
        return kept[:, 0, :, : self.spec.passive_channels]

    def gradients(self, precision: MatmulPrecision, *upstream: Tensor, **options: object) -> dict[str, Tensor]:
        x = self.x.clone().requires_grad_() if self.rows is None else self.x
        layers = [CouplingWeights(*(t.detach().clone().requires_grad_() for t in w)) for w in self.flow.weights()]
        options = {"impl": "triton", "rows": self.rows, "return_z": len(upstream) == 3, **options}
        out = flow_forward(x, layers, self.spec, self.condition, matmul_precision=precision, **options)
        names = [name for name in CouplingWeights._fields if name != "w_perm"]
        leaves = [getattr(layer, name) for name in names for layer in layers]
        inputs = leaves if self.rows is not None else [x, *leaves]
        outputs = [out.log_likelihood, out.log_det, out.z][: len(upstream)]
        grads = list(torch.autograd.grad(outputs, inputs, upstream))
        result = {} if self.rows is not None else {"x": grads.pop(0)}
        for i, name in enumerate(names):
            result[name] = torch.stack(grads[i * len(layers) :][: len(layers)])
        return result
