"""The flow's kernels against the oracle in float64: every condition, precision and gradient, on awkward sizes."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastbgad import reference
from fastbgad.errors import BackendError, ConfigError, FeatureError
from fastbgad.flow import ConditionalFlow
from fastbgad.flow_spec import CouplingWeights, FlowSpec
from fastbgad.kernels.tiles import default_tiles, use_tiles
from fastbgad.ops import FlowOutput, Geometry, PositionalRows, Precision, debug_checks, flow_forward, pack_flow
from fastbgad.ops.flow_triton import flow_infer, flow_train
from fastbgad.ops.gradient_scale import gradient_scale
from tests.flows import active_units, double, lively_flow, reference_with_masks, whole_error

pytestmark = pytest.mark.usefixtures("poisoned")

HEIGHT, WIDTH = 11, 7
# Relative error of a whole tensor. float16: the operands of the subnets' products are rounded to 11 bits, the
# permutation and the state are not; over the channels of a row the errors of lp average out.
LP_TOLERANCE = {"float32": 1e-5, "float16": 5e-5}
GRADIENT_TOLERANCE = {"float32": 1e-5, "float16": 1e-3}
CONDITIONS = ["none", "raster", "gathered", "positions", "dense"]


@pytest.fixture(scope="module", autouse=True)
def _large_tiles(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> Iterator[None]:
    """Under the interpreter every operation costs the same whatever its size, so its tiles are large.

    Which rows are staged in memory (BK) stays as it ships.
    """
    if device.type == "cuda":
        yield
        return
    tiles = {
        kernel: {key: {**sizes, "BM": 256 if "weight" in kernel else 64, "BH": 64} for key, sizes in entries.items()}
        for kernel, entries in default_tiles().items()
        if kernel.startswith("flow")
    }
    path = tmp_path_factory.mktemp("tiles") / "interpreter.json"
    path.write_text(json.dumps({"tiles": tiles}))
    use_tiles(path)
    yield
    use_tiles(None)


class Problem:
    """A flow, N rows with a condition of the given kind, and the oracle's view of them: rows and a dense condition."""

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
    def run(self, precision: Precision = "float16", **options: object) -> FlowOutput:
        """Inference; maps are cut into tiles of neighbouring pixels then."""
        options = {"impl": "triton", "rows": self.rows, **options}
        return flow_forward(self.x, self.flow.weights(), self.spec, self.condition, precision=precision, **options)

    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        z, log_det = reference.flow_forward(self.exact_x, double(self.flow.weights()), self.spec, self.dense)
        return reference.log_likelihood(z, log_det), log_det, z

    def exact_gradients(self, precision: Precision, *upstream: Tensor) -> dict[str, Tensor]:
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

    def subnet_inputs(self, precision: Precision) -> Tensor:
        """What every layer's subnet saw of the features, [L, N, C1], from what the kernels keep for the backward."""
        pack = pack_flow(self.flow.weights(), self.spec, Geometry.of(self.condition, precision))
        index = self.condition.index if isinstance(self.condition, PositionalRows) else None
        kept = flow_train(
            self.x, [t for layer in self.flow.weights() for t in layer], pack.tensors,
            index if self.rows is None else self.rows, self.rows is not None,
            self.condition if isinstance(self.condition, Tensor) else None, HEIGHT, WIDTH, self.spec.condition_channels,
            self.spec.hidden_channels, self.spec.clamp, self.spec.clamp_form == "scaled_tanh", self.spec.global_affine,
            False, False,
        )[4]  # fmt: skip
        return kept[:, 0, :, : self.spec.passive_channels]

    def gradients(self, precision: Precision, *upstream: Tensor, **options: object) -> dict[str, Tensor]:
        x = self.x.clone().requires_grad_() if self.rows is None else self.x
        layers = [CouplingWeights(*(t.detach().clone().requires_grad_() for t in w)) for w in self.flow.weights()]
        options = {"impl": "triton", "rows": self.rows, "return_z": len(upstream) == 3, **options}
        out = flow_forward(x, layers, self.spec, self.condition, precision=precision, **options)
        names = [name for name in CouplingWeights._fields if name != "w_perm"]
        leaves = [getattr(layer, name) for name in names for layer in layers]
        inputs = leaves if self.rows is not None else [x, *leaves]
        outputs = [out.log_likelihood, out.log_det, out.z][: len(upstream)]
        grads = list(torch.autograd.grad(outputs, inputs, upstream))
        result = {} if self.rows is not None else {"x": grads.pop(0)}
        for i, name in enumerate(names):
            result[name] = torch.stack(grads[i * len(layers) :][: len(layers)])
        return result


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("kind", CONDITIONS)
@pytest.mark.parametrize(("rows", "channels"), [(1, 8), (63, 41), (200, 40)])
def test_forward(precision: Precision, kind: str, rows: int, channels: int, device: torch.device) -> None:
    problem = Problem(kind, rows, channels, device)
    out = problem.run(precision, return_z=True)
    lp, log_det, z = problem.exact()
    assert out.log_likelihood.dtype == torch.float32
    tolerance = LP_TOLERANCE[precision]
    assert whole_error(out.log_likelihood, lp) < tolerance
    # log_det may be near zero; its share in lp is what it is measured by
    assert float((out.log_det.double() - log_det).norm() / channels / lp.norm()) < tolerance
    assert whole_error(out.z, z) < 10 * tolerance
    assert torch.equal(problem.run(precision).log_likelihood, out.log_likelihood)


@pytest.mark.equivalence
@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize(("rows", "channels"), [(1023, 40), (63, 72), (40, 200), (33, 256), (20, 2)])
def test_forward_of_eight_layers(precision: Precision, rows: int, channels: int, device: torch.device) -> None:
    """The depth that ships, at the widths that ship: 72 and 200 channels are staged in memory between layers."""
    problem = Problem("gathered", rows, channels, device, layers=8)
    lp, _, _ = problem.exact()
    assert whole_error(problem.run(precision).log_likelihood, lp) < LP_TOLERANCE[precision]


@pytest.mark.equivalence
@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("channels", [40, 200])
def test_maps_of_eight_layers(precision: Precision, channels: int, device: torch.device) -> None:
    problem = Problem("raster", 77, channels, device, layers=8)
    lp, _, _ = problem.exact()
    assert whole_error(problem.run(precision).log_likelihood, lp) < LP_TOLERANCE[precision]


@pytest.mark.parametrize(("height", "width", "maps"), [(1, 1, 3), (1, 9, 1), (9, 1, 2), (8, 8, 1), (9, 17, 2)])
def test_maps_of_any_shape(height: int, width: int, maps: int, device: torch.device) -> None:
    """Tiles of pixels that hang over every edge."""
    spec = FlowSpec(9, 128, 2)
    flow = lively_flow(spec, gain=1.0).to(device)
    positions = PositionalRows(height, width)
    x = torch.randn(maps * height * width, 9, device=device)
    flow.requires_grad_(False)
    out = flow_forward(x, flow.weights(), spec, positions, impl="triton", precision="float32")
    dense = positions.dense(len(x), torch.float64, device)
    z, log_det = reference.flow_forward(x.double(), double(flow.weights()), spec, dense)
    assert whole_error(out.log_likelihood, reference.log_likelihood(z, log_det)) < LP_TOLERANCE["float32"]


@pytest.mark.equivalence
@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize(
    ("kind", "rows", "channels"),
    [("none", 63, 41), ("raster", 77, 8), ("gathered", 1023, 40), ("positions", 63, 41), ("positions", 1, 40),
     ("dense", 63, 41), ("positions", 40, 72), ("positions", 33, 200)],
)  # fmt: skip
def test_gradients(precision: Precision, kind: str, rows: int, channels: int, device: torch.device) -> None:
    """Of every weight and of x, from gradients of lp, log_det and z at once."""
    problem = Problem(kind, rows, channels, device)
    count = len(problem.exact_x)
    upstream = [torch.randn(count, device=device) / count, torch.randn(count, device=device) / count / channels,
                torch.randn(count, channels, device=device) / count / channels]  # fmt: skip
    got, exact = problem.gradients(precision, *upstream), problem.exact_gradients(precision, *upstream)
    for name, value in got.items():
        assert value.dtype == torch.float32
        assert whole_error(value, exact[name]) < GRADIENT_TOLERANCE[precision], name


@pytest.mark.equivalence
@pytest.mark.parametrize("channels", [40, 200])
def test_gradients_of_eight_layers(channels: int, device: torch.device) -> None:
    """From lp alone, as in training."""
    problem = Problem("positions", 48, channels, device, layers=8)
    upstream = torch.rand(48, device=device) / 48
    got, exact = problem.gradients("float16", upstream), problem.exact_gradients("float16", upstream)
    for name, value in got.items():
        assert whole_error(value, exact[name]) < GRADIENT_TOLERANCE["float16"], name


@pytest.mark.parametrize("magnitude", [1e-12, 1e6])
def test_gradients_of_any_magnitude(magnitude: float, device: torch.device) -> None:
    """A mean over a million rows and a loss scaled by an AMP scaler both stay inside the range of float16."""
    problem = Problem("positions", 63, 24, device)
    upstream = magnitude * torch.randn(63, device=device)
    got, exact = problem.gradients("float16", upstream), problem.exact_gradients("float16", upstream)
    for name, value in got.items():
        assert whole_error(value, exact[name]) < GRADIENT_TOLERANCE["float16"], name


def test_gradient_scale() -> None:
    """An exact power of two for whatever comes; of the wide flow, too."""
    nothing = torch.zeros(0)
    assert gradient_scale(nothing, None).tolist() == [1]
    assert gradient_scale(torch.zeros(3), nothing).tolist() == [1]
    assert gradient_scale(None, torch.tensor([1e-3, -3.0]), torch.zeros(2, 2)).tolist() == [0.25]
    for bad in (float("nan"), float("inf")):
        assert gradient_scale(torch.tensor([2.0]), torch.tensor([bad, 3.0])).tolist() == [1]
    for value in (2.0**-119, 1e-30, 7e-5, 0.5, 1 - 2.0**-24, 1.0, 1 + 2.0**-23, 9e20, 2.0**119):
        scale = float(gradient_scale(torch.tensor([value, 0.0])))
        assert math.frexp(scale)[0] == 0.5
        assert 0.5 <= value * scale < 1
    # Beyond, the scale and its inverse stay normal numbers.
    for value in (1e-45, 3e38):
        scale = gradient_scale(torch.tensor([value]))
        assert 2.0**-120 <= float(scale) <= 2.0**120
        assert float(1 / scale) == 1 / float(scale)


@pytest.mark.parametrize("form", ["tanh", "scaled_tanh"])
@pytest.mark.parametrize("affine", ["SOFTPLUS", "SIGMOID", "EXP"])
@pytest.mark.parametrize("hard", [False, True])
def test_variants(form: str, affine: str, hard: bool, device: torch.device) -> None:
    problem = Problem(
        "positions", 40, 9, device, layers=3, clamp=1.3, clamp_form=form, global_affine=affine, hard_permutation=hard
    )
    out, (lp, _, z) = problem.run("float32", return_z=True), problem.exact()
    assert whole_error(out.log_likelihood, lp) < LP_TOLERANCE["float32"]
    assert whole_error(out.z, z) < LP_TOLERANCE["float32"]
    upstream = torch.randn(40, device=device), torch.randn(40, device=device), torch.randn(40, 9, device=device)
    got, exact = problem.gradients("float32", *upstream), problem.exact_gradients("float32", *upstream)
    for name, value in got.items():
        assert whole_error(value, exact[name]) < GRADIENT_TOLERANCE["float32"], name


@pytest.mark.parametrize("channels", [41, 72])
def test_hard_permutation_in_half_precision(channels: int, device: torch.device) -> None:
    """Moving channels loses nothing: the state stays float32."""
    problem = Problem("gathered", 63, channels, device, hard_permutation=True)
    assert whole_error(problem.run(return_z=True).log_likelihood, problem.exact()[0]) < LP_TOLERANCE["float16"]


def test_recomputing_gives_the_same_gradients(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of rows that the backward carries forward again: every kind of rows can be cut."""
    monkeypatch.setattr("fastbgad.ops.flow_triton.RECOMPUTE_ROWS", 64)
    for kind in CONDITIONS:
        problem = Problem(kind, 100, 9, device)
        upstream = torch.randn(len(problem.exact_x), device=device)
        kept = problem.gradients("float32", upstream, recompute=False)
        again = problem.gradients("float32", upstream, recompute=True)
        for name, value in again.items():
            assert whole_error(value, kept[name]) < 1e-6, (kind, name)


def test_same_input_same_bits(device: torch.device) -> None:
    problem = Problem("gathered", 300, 41, device)
    upstream = torch.randn(300, device=device)
    first, second = (problem.gradients("float16", upstream) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e5])
def test_a_bad_row_touches_no_other(bad: float, device: torch.device) -> None:
    """Its log-likelihood is NaN, the others keep their bits, and it has no share in any gradient."""
    problem = Problem("positions", 63, 9, device)
    clean = problem.run().log_likelihood
    upstream = torch.randn(63, device=device)
    upstream[5] = 0
    without = problem.gradients("float16", upstream)
    problem.x[5, 3] = bad
    upstream[5] = 3.0
    out = problem.run().log_likelihood
    others = torch.arange(63, device=device) != 5
    assert torch.isnan(out[5])
    assert torch.equal(out[others], clean[others])
    for name, value in problem.gradients("float16", upstream).items():
        assert torch.isfinite(value).all()
        assert whole_error(value, without[name]) < 1e-6, name


@pytest.mark.parametrize("channels", [64, 128])
def test_what_leaves_float16_on_the_way_shows(channels: int, device: torch.device) -> None:
    """Also where every hidden unit of the next layer is off and the layer after brings the value back."""
    # A soft permutation has the same operands and would show it by itself, and so would padded hidden units: with these
    # channels there are none.
    problem = Problem("positions", 12, channels, device, layers=3, hard_permutation=True)
    passive = channels - channels // 2
    with torch.no_grad():
        for layer in problem.flow.module_list:
            layer.w_perm.copy_(torch.eye(channels))
        first, second, _ = problem.flow.module_list
        first.global_scale.fill_(0.0)
        second.subnet[0].weight[:, :passive] = -1.0
        first.global_offset[0, :passive] = 50.0
    assert torch.isfinite(problem.run().log_likelihood).all()
    with torch.no_grad():
        first.global_offset[0, 0] = 1e5
        second.global_scale.fill_(-20.0)
    assert torch.isnan(problem.run().log_likelihood).all()
    assert torch.isfinite(problem.run("float32").log_likelihood).all()


@pytest.mark.parametrize("beyond", [-1, 3 * HEIGHT * WIDTH, 2**31 - 1])
def test_an_index_out_of_range_is_nan_and_found_by_the_debug_mode(
    beyond: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem("gathered", 63, 9, device)
    clean = problem.run().log_likelihood
    assert problem.rows is not None
    problem.rows[7] = beyond
    with debug_checks(), pytest.raises(FeatureError, match=r"rows .*0, 231\)|outside \[0, 231\), first number 7"):
        problem.run()
    # On a CPU the door looks at the indices itself; a GPU is not waited for.
    monkeypatch.setattr("fastbgad.ops.flow._check", lambda *_: None)
    out = problem.run().log_likelihood
    assert torch.isnan(out[7])
    others = torch.arange(63, device=device) != 7
    assert torch.equal(out[others], clean[others])


def test_debug_checks(device: torch.device) -> None:
    problem = Problem("positions", 10, 9, device)
    problem.x[4, 2] = float("nan")
    with debug_checks(), pytest.raises(FeatureError, match="first in row 4"):
        problem.run()
    problem.x[4, 2] = 0.0
    with debug_checks():
        problem.run()
    assert isinstance(problem.condition, PositionalRows)
    assert problem.condition.index is not None
    problem.condition.index[3] = HEIGHT * WIDTH
    with debug_checks(), pytest.raises(FeatureError, match="first number 3, which is 77"):
        problem.run()
    problem.condition.index[3] = 0
    with torch.no_grad():
        problem.flow.module_list[1].w_perm *= 1.01
    with debug_checks(), pytest.raises(FeatureError, match="layer 1 is not orthogonal"):
        problem.run()


def test_features_of_any_type_and_stride(device: torch.device) -> None:
    problem = Problem("raster", 77, 24, device)
    for dtype in (torch.float16, torch.bfloat16):
        rounded = problem.x.to(dtype)
        problem.x = rounded.float()
        expected = problem.run("float32").log_likelihood
        problem.x = rounded
        assert torch.equal(problem.run("float32").log_likelihood, expected)
    wide = torch.randn(77, 100, device=device)
    problem.x = wide[:, 10:34].contiguous()
    expected = problem.run("float32").log_likelihood
    for strided in (wide[:, 10:34], problem.x.T.contiguous().T):
        problem.x = strided
        assert torch.equal(problem.run("float32").log_likelihood, expected)


def test_no_rows(device: torch.device) -> None:
    problem = Problem("positions", 0, 8, device)
    assert problem.run().log_likelihood.shape == (0,)
    got = problem.gradients("float16", torch.zeros(0, device=device))
    assert all((value == 0).all() for value in got.values())


def test_only_what_needs_a_gradient(device: torch.device) -> None:
    """Frozen weights, mixed with trained ones: the trained ones' gradients do not change."""
    problem = Problem("positions", 30, 9, device)
    upstream = torch.randn(30, device=device)
    expected = problem.gradients("float32", upstream)
    layers = [CouplingWeights(*(t.detach().clone() for t in w)) for w in problem.flow.weights()]
    layers[1].w2.requires_grad_()
    out = flow_forward(problem.x, layers, problem.spec, problem.condition, impl="triton", precision="float32")
    out.log_likelihood.backward(upstream)
    assert torch.equal(layers[1].w2.grad, expected["w2"][1])
    assert layers[0].w2.grad is None


def test_gradcheck(device: torch.device) -> None:
    """Against finite differences, independent of the oracle; float32, so with wide steps and tolerances."""
    spec = FlowSpec(6, condition_channels=4, coupling_layers=2)
    flow = lively_flow(spec, gain=1.0).to(device)
    positions = PositionalRows(3, 4, torch.tensor([0, 11, 5, 5, 2, 7], device=device), channels=4)
    shapes = [p.shape for layer in flow.weights() for p in layer[:-1]]
    rotations = [layer.w_perm for layer in flow.weights()]

    def run(x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        layers = [CouplingWeights(*tensors[6 * i : 6 * i + 6], rotations[i]) for i in range(2)]
        return tuple(flow_forward(x, layers, spec, positions, return_z=True, impl="triton", precision="float32"))

    x = torch.randn(6, 6, device=device, requires_grad=True)
    leaves = [p.detach().clone().requires_grad_() for layer in flow.weights() for p in layer[:-1]]
    assert [leaf.shape for leaf in leaves] == shapes
    assert torch.autograd.gradcheck(run, (x, *leaves), eps=3e-3, atol=3e-2, rtol=3e-2, fast_mode=True)


def test_saved_activations_are_small() -> None:
    """At 4096 rows, in bytes, without computing anything: below 70 MB at C = 200, 9 MB at C = 40."""
    from torch._subclasses import FakeTensorMode

    for channels, limit in ((200, 70e6), (72, 20e6), (40, 9e6)):
        spec = FlowSpec(channels)
        with FakeTensorMode():
            weights = [torch.empty(1) for _ in range(7 * spec.coupling_layers)]
            results = torch.ops.fastbgad.flow_train(
                torch.empty(4096, channels), weights, [torch.empty(1, dtype=torch.float16)], None, False, None, 64, 64,
                128, spec.hidden_channels, 1.9, False, "SOFTPLUS", False, False,
            )  # fmt: skip
        assert sum(t.numel() * t.element_size() for t in results) < limit


# ---------------------------------------------------------------- what surrounds the kernels


def test_registered_operators(device: torch.device) -> None:
    """opcheck: schema, fake tensors, autograd registration and tracing agree with the kernels."""
    problem = Problem("gathered", 9, 8, device)
    pack = pack_flow(problem.flow.weights(), problem.spec, Geometry.of(problem.condition, "float16"))
    where = (problem.rows, True, None, HEIGHT, WIDTH)
    shape = (problem.spec.hidden_channels, 1.9, False)
    torch.library.opcheck(flow_infer, (problem.x, pack.tensors, *where, *shape, True))
    weights = [t.detach().requires_grad_(i % 7 != 6) for layer in problem.flow.weights() for i, t in enumerate(layer)]
    torch.library.opcheck(flow_train, (problem.x, weights, pack.tensors, *where, 128, *shape, "SOFTPLUS", True, False))


class Scores(torch.nn.Module):
    """A flow as a compiler or an exporter sees it."""

    def __init__(self, flow: ConditionalFlow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> Tensor:
        return self.flow(x, PositionalRows(HEIGHT, WIDTH), impl="triton").log_likelihood


def test_compile_and_export(device: torch.device) -> None:
    """One graph without a break, with the same values; the exported program keeps the operator."""
    model = Scores(lively_flow(FlowSpec(8, 128, 2), gain=1.0).to(device))
    x = torch.randn(HEIGHT * WIDTH, 8, device=device)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), expected, rtol=1e-4)
    compiled(x).sum().backward()
    got = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    expected.sum().backward()
    exact = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(whole_error(a, b) < 1e-5 for a, b in zip(got, exact, strict=True))
    program = torch.export.export(model.requires_grad_(False), (x,))
    nodes = [node for part in program.graph_module.modules() for node in part.graph.nodes]
    assert any("flow_infer" in str(node.target) for node in nodes)
    # Inference adds the bias of a map's pixels in another order than training does.
    assert torch.allclose(program.module()(x), expected, rtol=1e-4)


def test_autocast_changes_nothing(device: torch.device) -> None:
    problem = Problem("positions", 20, 8, device)
    expected = problem.run("float32").log_likelihood
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = problem.run("float32").log_likelihood
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


def test_frozen_flow(device: torch.device) -> None:
    """A frozen flow gives the same values, packs once, and notices weights that change."""
    flow = lively_flow(FlowSpec(8, 128, 2), gain=1.0).to(device).requires_grad_(False)
    x, positions = torch.randn(HEIGHT * WIDTH, 8, device=device), PositionalRows(HEIGHT, WIDTH)
    expected = flow(x, positions, impl="triton").log_likelihood
    flow.freeze()
    assert torch.equal(flow(x, positions, impl="triton").log_likelihood, expected)
    assert flow._packs is not None
    (first,) = flow._packs.values()
    flow(x, positions, impl="triton")
    assert next(iter(flow._packs.values())) is first
    flow.module_list[0].global_scale += 1
    changed = flow(x, positions, impl="triton").log_likelihood
    assert not torch.equal(changed, expected)
    assert torch.allclose(changed, flow(x, positions, impl="torch").log_likelihood, rtol=1e-3)
    flow(x, positions, impl="torch")  # other implementations are not affected
    twin = copy.deepcopy(flow)
    assert twin._packs == {}
    assert torch.equal(twin(x, positions, impl="triton").log_likelihood, changed)
    assert flow.double()._packs == {}


def test_gradients_have_the_strides_of_the_fake(device: torch.device) -> None:
    """A compiler holds the operator's results against those of its fake; 32 channels have no padding to cut off."""
    problem = Problem("positions", 10, 32, device)
    x = problem.x.clone().requires_grad_()
    parameters = [p for p in problem.flow.parameters() if p.requires_grad]

    def step(x: Tensor) -> Tensor:
        return problem.flow(x, problem.condition, impl="triton").log_likelihood.sum()

    for gradient, of in zip(torch.autograd.grad(step(x), [x, *parameters]), [x, *parameters], strict=True):
        assert gradient.shape == of.shape
    from fastbgad.ops.flow_triton import _flow_train_backward_fake, flow_train_backward

    pack = pack_flow(problem.flow.weights(), problem.spec, Geometry.of(problem.condition, "float16"))
    assert isinstance(problem.condition, PositionalRows)
    where = (problem.condition.index, False, None, HEIGHT, WIDTH)
    shape = (128, problem.spec.hidden_channels, 1.9, False, "SOFTPLUS")
    weights = [t for layer in problem.flow.weights() for t in layer]
    lp, _, _, *saved = flow_train(x, weights, pack.tensors, *where, *shape, False, False)
    scales = torch.stack([layer.global_scale for layer in problem.flow.weights()]).detach()
    arguments = (
        x.detach(), pack.tensors, saved, lp.detach(), torch.ones_like(lp), None, None, scales, *where, *shape, True
    )  # fmt: skip
    for real, fake in zip(flow_train_backward(*arguments), _flow_train_backward_fake(*arguments), strict=True):
        assert real.shape == fake.shape
        assert real.stride() == fake.stride()


def test_a_condition_of_many_channels_goes_through_the_library(device: torch.device) -> None:
    """More condition channels than one operand holds."""
    spec = FlowSpec(8, 256, 2)
    flow = lively_flow(spec, gain=1.0).to(device)
    x, p = torch.randn(20, 8, device=device), torch.randn(20, 256, device=device)
    out = flow_forward(x, flow.weights(), spec, p, impl="triton", precision="float32")
    z, log_det = reference.flow_forward(x.double(), double(flow.weights()), spec, p.double())
    assert whole_error(out.log_likelihood, reference.log_likelihood(z, log_det)) < LP_TOLERANCE["float32"]


def test_a_pack_of_another_geometry_is_refused(device: torch.device) -> None:
    problem = Problem("raster", 77, 8, device)
    pack = pack_flow(problem.flow.weights(), problem.spec, Geometry.of(PositionalRows(7, 11), "float16"))
    with torch.no_grad(), pytest.raises(ConfigError, match="packed for"):
        problem.run(pack=pack)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.zeros(4)}, "rows must be int32 or int64"),
        ({"rows": torch.zeros(4, 1, dtype=torch.int64)}, "rows must be int32 or int64"),
        ({"condition": PositionalRows(1, 4, torch.zeros(4).long()), "rows": torch.zeros(2).int()}, "whole maps"),
        ({"rows": torch.tensor([0, 4])}, r"rows must lie in \[0, 4\)"),
        ({"precision": "bfloat16"}, "precision is 'bfloat16'"),
    ],
)  # fmt: skip
def test_bad_input(change: dict, message: str) -> None:
    spec = FlowSpec(8, 128, 1)
    flow = ConditionalFlow(spec)
    options = {"condition": PositionalRows(2, 2), **change}
    with pytest.raises((FeatureError, ConfigError), match=message):
        flow_forward(torch.zeros(4, 8), flow.weights(), spec, **options)


def test_what_the_kernels_cannot_do_is_said(device: torch.device) -> None:
    problem = Problem("positions", 8, 8, device)
    with pytest.raises(BackendError, match="float64"):
        flow_forward(problem.x.double(), double(problem.flow.weights()), problem.spec, problem.condition, impl="triton")
    problem = Problem("dense", 8, 8, device)
    assert isinstance(problem.condition, Tensor)
    problem.condition.requires_grad_()
    with pytest.raises(BackendError, match="dense condition"):
        flow_forward(problem.x, problem.flow.weights(), problem.spec, problem.condition, impl="triton")
