"""The official code's functions: values and gradients of its formulas, restated here with boolean indexing."""

from __future__ import annotations

import copy
import math
import warnings
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from fastbgad import FlowSpec, PositionalRows, ops, reference
from fastbgad.compat.bgad import functions as bgad
from fastbgad.errors import CheckpointError, ConfigError, FastBGADError, FeatureError, MetricError, OutputError
from fastbgad.ops.positional_tensor import PositionalEncoding, positional_rows, positions_of

from ...flows import budget, freia_flow, relative_error

ARGS = Namespace(
    coupling_layers=2, clamp_alpha=1.9, pos_embed_dim=8, flow_arch="conditional_flow_model", feature_levels=3,
    img_size=(17, 12),
)  # fmt: skip
DTYPES = [torch.float32, torch.float64]
SPEC = FlowSpec(7, 8, 2)


# ------------------------------------------------------------------------------ the oracle: rows picked by their index


def exact_boundary(lp: Tensor, mask: Tensor, beta: float, tau: float, normalizer: float) -> tuple[Tensor, Tensor]:
    normal = lp.detach()[mask == 0]
    ordered = normal.sort().values
    edge = ordered[int(torch.tensor(len(normal)) * beta)] / normalizer  # an integer tensor times a float is float32
    return edge, edge - tau


def exact_loss(
    lp: Tensor, mask: Tensor, edges: tuple[Tensor, Tensor], normalizer: float, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    u = lp / normalizer
    pulled = torch.nonzero((mask == 0) & (u <= edges[0]))[:, 0]
    pushed = torch.nonzero((mask == 1) & (u >= edges[1]))[:, 0]
    w = torch.ones_like(lp) if weights is None else weights
    return (w[pulled] * (edges[0] - u[pulled])).mean(), (w[pushed] * (u[pushed] - edges[1])).mean()


def exact_weight(u: float, anomalous: bool) -> float:
    if anomalous:
        return 0.53 * (1 + math.exp(u)) ** 2 / abs(u) if u > -1 else 1.0
    return 11.7 * math.sqrt(1 - math.exp(u)) * abs(u) if u <= -0.2 else 1.0


def exact_scores(levels: list[list[Tensor]], size: tuple[int, int]) -> np.ndarray:
    summed = 0
    for parts in levels:
        lp = torch.cat(parts)
        likelihood = torch.exp(lp - lp.max())[:, None]
        summed = summed + interpolate(likelihood, size=size, mode="bilinear", align_corners=True)[:, 0].numpy()
    return summed.max() - summed


# ----------------------------------------------------------------------------------------------------------- the losses


def chunk(case: str, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Log-likelihoods, mask and boundaries; "violating" and "calm" say which rows lie on the wrong side."""
    generator = torch.Generator().manual_seed(rows)
    lp = 4 * torch.randn(rows, dtype=dtype, generator=generator) - 3
    share = {"normal": 0.0, "anomalous": 1.0}.get(case, 0.3)
    mask = (torch.rand(rows, generator=generator) < share).to(dtype)
    far = {"violating": 100.0, "calm": -100.0}.get(case)
    edges = (-0.5, -0.6) if far is None else (far, -far)
    return lp.requires_grad_(), mask, (torch.tensor(edges[0], dtype=dtype), torch.tensor(edges[1], dtype=dtype))


@pytest.mark.parametrize("empty", ["nan", "zero"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 1023])
@pytest.mark.parametrize("case", ["mixed", "normal", "anomalous", "violating", "calm"])
def test_loss(case: str, rows: int, dtype: torch.dtype, weighted: bool, empty: str) -> None:
    lp, mask, edges = chunk(case, rows, dtype)
    weights = torch.rand(rows, dtype=dtype, generator=torch.Generator().manual_seed(1)) if weighted else None
    exact = lp.detach().double().requires_grad_()
    exact_weights = None if weights is None else weights.double()
    wanted = exact_loss(exact, mask, (edges[0].double(), edges[1].double()), 7.0, exact_weights)
    found = bgad.calculate_bg_spp_loss(lp, mask, edges, 7.0, weights, empty=empty)
    alone = bgad.calculate_bg_spp_loss_normal(lp, mask, edges, 7.0, weights, empty=empty)
    slack = budget(dtype, rows)
    for mine, theirs in (*zip(found, wanted, strict=True), (alone, wanted[0])):
        assert mine.dtype == dtype
        if theirs.isnan():
            assert mine.isnan() if empty == "nan" else mine == 0
        else:
            assert mine.item() == pytest.approx(theirs.item(), rel=slack, abs=slack)
        got = torch.autograd.grad(mine, lp, retain_graph=True)[0]
        assert relative_error(got, torch.autograd.grad(theirs, exact, retain_graph=True)[0]) < slack
        assert torch.isfinite(got).all()


def test_loss_passes_gradients_to_weights_and_boundaries() -> None:
    lp, mask, edges = chunk("mixed", 57, torch.float64)
    inputs = [lp, torch.rand(57, dtype=torch.float64).requires_grad_(), *(b.requires_grad_() for b in edges)]

    def total(loss) -> tuple[Tensor, ...]:
        return torch.autograd.grad(sum(loss(lp, mask, edges, 10, inputs[1])), inputs)

    for mine, theirs in zip(total(bgad.calculate_bg_spp_loss), total(exact_loss), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("empty", ["nan", "zero"])
def test_rows_that_take_no_part_do_no_harm(empty: str) -> None:
    """Infinite weights and NaN stay in their rows, and an empty term spoils no gradient of the others."""
    lp = torch.tensor([math.nan, -9.0, 0.0, math.inf, -3.0], requires_grad=True)
    mask, weights = torch.tensor([0, 0, 0, 0, 1]), torch.tensor([math.inf, 2.0, math.inf, math.nan, math.inf])
    normal, anomalous = bgad.calculate_bg_spp_loss(lp, mask, (-0.5, 0.0), 10, weights, empty=empty)
    assert normal.item() == pytest.approx(0.8)
    assert anomalous.isnan() if empty == "nan" else anomalous == 0
    with warnings.catch_warnings(action="ignore"), torch.autograd.detect_anomaly():  # it warns of being slow
        (normal + anomalous).backward()
    assert torch.allclose(lp.grad, torch.tensor([0, -0.2, 0, 0, 0]))


def test_loss_in_half_precision_does_not_overflow() -> None:
    lp = torch.full((4096,), -300.0, dtype=torch.float16)
    loss = bgad.calculate_bg_spp_loss_normal(lp, torch.zeros(4096), (0.0, -0.1))
    assert loss.dtype == torch.float16
    assert loss == 30


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.int64, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_boundary(dtype: torch.dtype, mask_dtype: torch.dtype, on_host: bool, monkeypatch) -> None:
    if not on_host:  # the arithmetic for a GPU, which counts nothing on the host
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for rows in (1, 100, 1023):
        # With 100 normal rows, 0.29 is place 29 in float32 and 28 in float64; 0.01 is the same in both.
        for beta, share in ((0.0, 0.2), (0.01, 0.2), (0.05, 0.0), (0.29, 0.0), (0.29, 0.2), (0.999, 0.5)):
            lp, _, _ = chunk("normal", rows, dtype)
            mask = torch.arange(rows) % 100 >= 100 * (1 - share)
            found = bgad.get_logp_boundary(lp, mask.to(mask_dtype), beta, 0.3, 7)
            assert [b.dtype for b in found] == [dtype, dtype]
            assert not any(b.requires_grad for b in found)
            for mine, theirs in zip(found, exact_boundary(lp, mask.to(mask_dtype), beta, 0.3, 7), strict=True):
                assert mine == theirs


def test_default_options_are_the_official_ones() -> None:
    lp, mask, edges = chunk("mixed", 200, torch.float64)
    assert bgad.get_logp_boundary(lp, mask) == exact_boundary(lp, mask, 0.05, 0.1, 10)
    lp = lp.detach()
    wanted = [float(loss) for loss in exact_loss(lp, mask, edges, 10, None)]
    assert [float(loss) for loss in bgad.calculate_bg_spp_loss(lp, mask, edges)] == pytest.approx(wanted)


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("beta", [0.05, 0.29])
@pytest.mark.parametrize("rows", [0, 300])
def test_boundary_without_a_normal_row(rows: int, beta: float, on_host: bool, monkeypatch) -> None:
    if not on_host:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    lp, mask = torch.zeros(rows, requires_grad=True), torch.ones(rows)
    edges = bgad.get_logp_boundary(lp, mask, beta)
    assert all(b.isnan() for b in edges)
    normal, anomalous = bgad.calculate_bg_spp_loss(lp, mask, edges, empty="zero")
    assert (normal, anomalous) == (0, 0)
    (normal + anomalous).backward()
    assert (lp.grad == 0).all()


@pytest.mark.parametrize("anomalous", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_focal_weights(dtype: torch.dtype, anomalous: bool) -> None:
    weighting = bgad.abnormal_fl_weighting if anomalous else bgad.normal_fl_weighting
    lp = torch.cat([torch.linspace(-40, 20, 121, dtype=dtype), torch.tensor([-2.0, -10.0], dtype=dtype)])
    lp = lp[lp != 0]
    found = weighting(lp)
    wanted = torch.tensor([exact_weight(float(u), anomalous) for u in lp / 10], dtype=torch.float64)
    assert found.dtype == dtype
    assert torch.allclose(found.double(), wanted, rtol=32 * torch.finfo(dtype).eps, atol=0)
    assert torch.allclose(weighting(4 * lp, normalizer=40), found, rtol=0, atol=0)
    assert weighting(torch.tensor([math.nan], dtype=dtype)) == 0
    assert weighting(torch.zeros(1, dtype=dtype)) == (math.inf if anomalous else 1)


def test_focal_weights_with_other_options_and_gradients() -> None:
    lp = torch.tensor([-30.0, -5.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    u = lp.detach() / 10
    hard = torch.where(u <= -0.2, 2 * (1 - u.exp()) ** 1.5 * u.abs(), 1.0)
    weights = bgad.normal_fl_weighting(lp, 1.5, 2)
    assert torch.allclose(weights, hard)
    weights.sum().backward()  # of rows with u > 0 the formula alone would be NaN
    assert torch.isfinite(lp.grad).all()
    assert lp.grad[2:].tolist() == [0, 0]
    assert torch.allclose(bgad.abnormal_fl_weighting(lp, 1, 3)[1:], 3 * (1 + u.exp()[1:]) / u.abs()[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 41])
def test_log_likelihood(channels: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    z = torch.randn(33, channels, dtype=dtype, requires_grad=True)
    log_det = torch.randn(33, dtype=dtype, requires_grad=True)
    exact = [t.detach().double().requires_grad_() for t in (z, log_det)]
    wanted = -channels / 2 * math.log(2 * math.pi) - exact[0].square().sum(dim=1) / 2 + exact[1]
    found = bgad.get_logp(channels, z, log_det)
    assert relative_error(found, wanted) < budget(dtype, channels)
    up = torch.randn(33, dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad(found, (z, log_det), up.to(dtype)), torch.autograd.grad(wanted, exact, up), strict=True
    ):
        assert relative_error(mine, theirs) < budget(dtype, channels)


# ------------------------------------------------------------------------------------------------------------ the flows


def places(rows: int, channels: int = 8) -> Tensor:
    """A selection of a 5 x 6 map's rows, made as the official training loop makes it, for a batch of two images."""
    encoding = bgad.positionalencoding2d(channels, 5, 6).to("cpu").unsqueeze(0).repeat(2, 1, 1, 1)
    encoding = encoding.permute(0, 2, 3, 1).reshape(-1, channels)
    return encoding[torch.randperm(60, generator=torch.Generator().manual_seed(4))[torch.arange(rows)]]


def test_positional_encoding() -> None:
    exact = reference.positional_encoding(12, 5, 70)
    found = bgad.positionalencoding2d(12, 5, 70)
    assert found.shape == (12, 5, 70)
    assert found.dtype == torch.float32
    assert torch.allclose(found, exact.float(), rtol=0, atol=1e-6)
    for channels, height in ((6, 3), (0, 3), (8, 0)):
        with pytest.raises(FastBGADError):
            bgad.positionalencoding2d(channels, height, 3)


def dense(condition: Tensor) -> Tensor:
    return condition.values() if isinstance(condition, PositionalEncoding) else condition


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["dense", "places", "rows", "object", "none"])
@pytest.mark.parametrize("rows", [1, 30])
def test_flow_equals_freias(rows: int, kind: str, dtype: torch.dtype) -> None:
    spec = FlowSpec(7, 0 if kind == "none" else 8, 2)
    theirs = freia_flow(spec).to(dtype)
    mine = (bgad.flow_model if kind == "none" else bgad.conditional_flow_model)(ARGS, 7).to(dtype)
    assert {k: v.shape for k, v in mine.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    mine.load_state_dict(theirs.state_dict())
    theirs.double()  # the same weights

    where = torch.arange(rows) % 30
    condition = {
        "dense": torch.randn(rows, 8, generator=torch.Generator().manual_seed(5)).to(dtype),
        "places": places(rows),
        "rows": positional_rows(5, 6, where, channels=8),
        "object": PositionalRows(5, 6, where, channels=8),
        "none": None,
    }[kind]
    given = () if condition is None else ([condition],)
    values = positional_rows(5, 6, where, channels=8) if kind == "object" else condition
    exact = () if values is None else ([dense(values).double()],)
    x = torch.randn(rows, 7, generator=torch.Generator().manual_seed(6)).to(dtype)
    z, log_det = mine(x, *given)
    exact_z, exact_log_det = theirs(x.double(), *exact)
    # Conditions made here are float32, whatever the flow is.
    slack = budget(torch.float32 if kind in ("places", "rows", "object") else dtype, 20)
    assert z.dtype == log_det.dtype == dtype
    assert relative_error(z, exact_z) < slack
    assert relative_error(log_det, exact_log_det) < 10 * slack  # a sum of terms of both signs

    # Gradients of the official step's first loss, by the chain of official names.
    mine_loss = -nn.functional.logsigmoid(bgad.get_logp(7, z, log_det) / 7).mean()
    mine_loss.backward()
    lp = (-3.5 * math.log(2 * math.pi) - exact_z.square().sum(dim=1) / 2 + exact_log_det) / 7
    (-nn.functional.logsigmoid(lp).mean()).backward()
    for (name, ours), (_, freias) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
        if ours.requires_grad:
            assert relative_error(ours.grad, freias.grad) < 20 * slack, name

    with torch.no_grad():
        back, back_det = mine(z, *given, rev=True)
        exact_back, exact_back_det = theirs(exact_z, *exact, rev=True)
    assert relative_error(back, exact_back) < 10 * slack
    assert relative_error(back_det, exact_back_det) < 10 * slack
    assert relative_error(back, x) < 10 * slack


def test_places_are_used_as_places(monkeypatch) -> None:
    """The positional condition of the official training loop reaches the flow without ever becoming values."""
    decoder, x = bgad.conditional_flow_model(ARGS, 7), torch.randn(33, 7)
    condition = places(33)
    assert positions_of(condition) is not None
    wanted = decoder(x, [dense(places(33))])
    monkeypatch.setattr(PositionalEncoding, "values", lambda self: pytest.fail("values were computed"))
    for mine, theirs in zip(decoder(x, [condition]), wanted, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_places_that_were_written_to_are_values() -> None:
    decoder, x, condition = bgad.conditional_flow_model(ARGS, 7), torch.randn(33, 7), places(33)
    condition += 1
    assert torch.equal(decoder(x, [condition])[0], decoder(x, [dense(places(33)) + 1])[0])


def test_initial_weights_follow_torchs_random_state() -> None:
    def made(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return bgad.load_flow_model(ARGS, 40).state_dict()

    first, second, other = made(3), made(3), made(4)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["module_list.0.w_perm"], other["module_list.0.w_perm"])
    assert not torch.equal(first["module_list.0.w_perm"], first["module_list.1.w_perm"])
    for block in ("module_list.0.", "module_list.1."):
        w = first[block + "w_perm"].double()
        assert torch.allclose(w @ w.T, torch.eye(40).double(), atol=1e-6)
        assert torch.linalg.det(w) == pytest.approx(1, abs=1e-5)
        assert torch.equal(first[block + "w_perm_inv"], first[block + "w_perm"].T)
        scale = reference.flow.global_affine_scale(first[block + "global_scale"], "SOFTPLUS")
        assert torch.allclose(scale, torch.ones(1, 40))
        assert (first[block + "global_offset"] == 0).all()
        for layer, inputs in (("subnet.0", 28), ("subnet.2", 56)):  # uniform, as nn.Linear starts
            for values in (first[block + layer + ".weight"], first[block + layer + ".bias"]):
                assert values.abs().max() <= 1 / math.sqrt(inputs)
                assert values.std() == pytest.approx(1 / math.sqrt(3 * inputs), rel=0.3)


def test_decoder_is_an_ordinary_module() -> None:
    """Copies, types, files of weights and freezing work, and no parameter appears twice."""
    decoder, x = bgad.conditional_flow_model(ARGS, 7), torch.randn(5, 7)
    condition = [torch.randn(5, 8)]
    assert len(list(decoder.parameters())) == len(list(decoder.flow.parameters())) == len(decoder.state_dict())
    twin = copy.deepcopy(decoder)
    assert torch.equal(twin(x, condition)[0], decoder(x, condition)[0])
    with torch.no_grad():
        twin.module_list[0].global_offset += 1
    assert not torch.equal(twin(x, condition)[0], decoder(x, condition)[0])
    assert twin.double()(x.double(), condition)[0].dtype == torch.float64
    with torch.no_grad():
        frozen = decoder.freeze().eval()(x, condition)
        assert all(torch.equal(a, b) for a, b in zip(frozen, copy.deepcopy(decoder)(x, condition), strict=True))
    assert "coupling_layers=2" in repr(decoder)
    flat = bgad.load_flow_model(Namespace(**{**vars(ARGS), "flow_arch": "flow_model"}), 7)
    assert torch.equal(flat(x)[0], flat(x, condition)[0])  # FrEIA takes no notice of a condition either


def test_bad_flows_and_conditions() -> None:
    for name, value in (
        ("flow_arch", "maf"), ("coupling_layers", 0), ("pos_embed_dim", 6), ("pos_embed_dim", 0), ("clamp_alpha", -1),
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            bgad.load_flow_model(Namespace(**{**vars(ARGS), name: value}), 7)
    with pytest.raises(ConfigError, match="coupling_layers"):
        bgad.flow_model(Namespace(clamp_alpha=1.9), 7)
    decoder = bgad.conditional_flow_model(ARGS, 7)
    for condition in (None, [], torch.zeros(3, 8), [torch.zeros(3, 4)], [torch.zeros(2, 8)], [places(2)]):
        with pytest.raises(FeatureError, match=r"condition|positions"):
            decoder(torch.zeros(3, 7), condition)
    with pytest.raises(FeatureError, match="features"):
        decoder(torch.zeros(3, 6), [torch.zeros(3, 8)])


# --------------------------------------------------------------------------------------------- scores, metric and files


def batches(counts: list[int], dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(2)
    sides = ((8, 6), (4, 3), (1, 1))
    return [[torch.randn(n, h, w, generator=generator).to(dtype) - 2 for n in counts] for h, w in sides]


@pytest.mark.parametrize("counts", [[1], [3, 2], [1, 1, 4]])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_anomaly_scores(dtype: torch.dtype, counts: list[int], monkeypatch) -> None:
    levels = batches(counts, dtype)
    before = copy.deepcopy(levels)
    for pixels in (bgad._PIXELS_AT_ONCE, 2 * 17 * 12):  # all images at once, and two at a time
        monkeypatch.setattr(bgad, "_PIXELS_AT_ONCE", pixels)
        scores = bgad.convert_to_anomaly_scores(ARGS, levels)
        wanted = exact_scores(levels, (17, 12))
        assert scores.shape == (sum(counts), 17, 12)
        assert scores.dtype == wanted.dtype
        assert np.abs(scores - wanted).max() < 8 * torch.finfo(dtype).eps
        assert scores.min() == 0
    assert all(torch.equal(a, b) for x, y in zip(levels, before, strict=True) for a, b in zip(x, y, strict=True))


def test_anomaly_scores_of_some_levels_in_a_square() -> None:
    args, levels = Namespace(feature_levels=2, img_size=9), batches([2, 1])
    levels[0][0].requires_grad_()
    scores = bgad.convert_to_anomaly_scores(args, levels)
    assert np.abs(scores - exact_scores([[lp.detach() for lp in parts] for parts in levels[:2]], (9, 9))).max() < 1e-6


def test_bad_scores() -> None:
    good = batches([2])
    nan, infinite = copy.deepcopy(good), copy.deepcopy(good)
    nan[1][0][0, 0, 0] = math.nan
    infinite[2][0][:] = -math.inf
    for levels, words in (
        (good[:2], "feature_levels"), (nan, "level 1 is nan"), (infinite, "level 2 is -inf"),
        ([[], *good[1:]], "no log-likelihoods"), ([good[0], good[1], batches([3])[2]], "same images"),
        ([[torch.zeros(2, 3)], *good[1:]], "b, h, w"),
        ([[torch.zeros(2, 3, 3), torch.zeros(2, 4, 3)], *good[1:]], "b, h, w"),
        ([[lp.double() for lp in good[0]], *good[1:]], "one type"),
    ):  # fmt: skip
        with pytest.raises(FeatureError, match=words):
            bgad.convert_to_anomaly_scores(ARGS, levels)
    with pytest.raises(ConfigError, match="img_size"):
        bgad.convert_to_anomaly_scores(Namespace(feature_levels=3, img_size=(0, 4)), good)
    with pytest.raises(ConfigError, match="feature_levels"):
        bgad.convert_to_anomaly_scores(Namespace(img_size=4), good)


def test_pro_of_thresholds() -> None:
    """One region of three pixels, of which the score finds two above every normal pixel, and the third last."""
    mask = np.zeros((2, 6, 6), dtype=bool)
    mask[0, 2, 1:4] = True
    scores = np.linspace(0.1, 0.4, 72).reshape(2, 6, 6)
    scores[0, 2, 1:4] = 1.0, 0.9, 0.0
    assert bgad.calculate_pro_metric(scores, mask) == pytest.approx(2 / 3)
    assert bgad.calculate_pro_metric(torch.from_numpy(scores), mask.astype(np.uint8)) == pytest.approx(2 / 3)
    with pytest.raises(MetricError):
        bgad.calculate_pro_metric(scores, np.zeros_like(mask))


def test_to_numpy() -> None:
    assert bgad.t2np(None) is None
    assert bgad.t2np(torch.ones(2, requires_grad=True)).tolist() == [1, 1]


def encoder(width: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 1), nn.BatchNorm2d(width))


@pytest.mark.parametrize("theirs", [False, True])
def test_weights_survive_a_file(theirs: bool, tmp_path: Path) -> None:
    decoders = [freia_flow(SPEC, seed).float() if theirs else bgad.conditional_flow_model(ARGS, 7) for seed in (1, 2)]
    source = encoder()
    assert bgad.save_weights(source, decoders, tmp_path / "out", "exp", "model.screw") is None
    path = tmp_path / "out" / "exp" / "weights" / "model.screw.pt"
    content = torch.load(path, weights_only=True)
    assert list(content) == ["encoder_state_dict", "decoder_state_dict"]
    assert list(content["decoder_state_dict"][1]) == list(decoders[1].state_dict())
    mine, freias, copied = [bgad.conditional_flow_model(ARGS, 7) for _ in decoders], [freia_flow(SPEC, 9)], encoder()
    assert bgad.load_weights(copied, mine, str(path)) is None
    for loaded, saved in zip((copied, *mine), (source, *decoders), strict=True):
        assert all(torch.equal(value, saved.state_dict()[key]) for key, value in loaded.state_dict().items())
    # A file of one flow that is not in a list, into a flow of FrEIA's.
    bgad.save_weights(source, decoders[0], tmp_path, "exp", "single")
    bgad.load_weights(encoder(), freias, tmp_path / "exp" / "weights" / "single.pt")
    bgad.load_weights(encoder(), freias[0], tmp_path / "exp" / "weights" / "single.pt")
    assert torch.equal(freias[0].state_dict()["module_list.0.w_perm"].float(), mine[0].module_list[0].w_perm)


def test_encoders_of_other_versions_load_in_part(tmp_path: Path) -> None:
    bgad.save_weights(encoder(), [], tmp_path, "exp", "model")
    larger = nn.Sequential(*encoder(), nn.Conv2d(3, 3, 1))
    bgad.load_weights(larger, [], tmp_path / "exp" / "weights" / "model.pt")
    with pytest.raises(CheckpointError, match="no tensor of the encoder"):
        bgad.load_weights(nn.Sequential(nn.Identity(), nn.Linear(2, 2, bias=False)), [], _emptied(tmp_path))


def _emptied(folder: Path) -> Path:
    torch.save({"encoder_state_dict": {"other": torch.zeros(1)}, "decoder_state_dict": []}, folder / "other.pt")
    return folder / "other.pt"


def test_nothing_is_loaded_from_a_file_that_does_not_fit(tmp_path: Path) -> None:
    def flow(**changes: object) -> bgad.FlowDecoder:
        return bgad.load_flow_model(Namespace(**{**vars(ARGS), **changes}), 7)

    source = encoder()
    bgad.save_weights(source, [flow(), flow()], tmp_path, "exp", "model")
    path = tmp_path / "exp" / "weights" / "model.pt"
    for decoders, words in (
        ([flow()], "2 decoders but 1"),
        ([flow(), flow(coupling_layers=3)], "decoder 1 in .* module_list.2.global_scale is missing"),
        ([flow(), flow(coupling_layers=1)], "module_list.1.global_scale is not expected"),
        ([flow(), flow(pos_embed_dim=4)], r"subnet.0.bias is \[24\] instead of \[16\]"),
        ([flow(), flow(flow_arch="flow_model")], "decoder 1"),
    ):
        target = encoder()
        before = copy.deepcopy([module.state_dict() for module in (target, *decoders)])
        with pytest.raises(CheckpointError, match=words) as caught:
            bgad.load_weights(target, decoders, path)
        assert str(path) in str(caught.value)
        for module, state in zip((target, *decoders), before, strict=True):
            assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    with pytest.raises(CheckpointError, match=r"0.bias is \[3\] instead of \[4\]"):
        bgad.load_weights(encoder(4), [flow(), flow()], path)


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    path = tmp_path / "exp" / "weights" / "model.pt"
    with pytest.raises(CheckpointError, match="no weights file"):
        bgad.load_weights(encoder(), [], path)
    bgad.save_weights(encoder(), [], tmp_path, "exp", "model")
    whole = path.read_bytes()
    for content in (whole[:-100], whole[: len(whole) // 2], b"", b"no weights", b"\x80\x02junk"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged"):
            bgad.load_weights(encoder(), [], path)
    torch.save(Namespace(run="code"), path)
    with pytest.raises(CheckpointError, match="for safety"):
        bgad.load_weights(encoder(), [], path)
    for content in (torch.zeros(1), {"encoder_state_dict": {}}, {"encoder_state_dict": {}, "decoder_state_dict": [1]}):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match="no weights file of BGAD"):
            bgad.load_weights(encoder(), [], path)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        bgad.save_weights(encoder(), [], tmp_path / "file", "exp", "model")


def test_bad_rows() -> None:
    lp, mask, edges = torch.zeros(4), torch.zeros(4), (torch.tensor(0.0), torch.tensor(-0.1))
    calls = [
        lambda lp, mask: bgad.get_logp_boundary(lp, mask),
        lambda lp, mask: bgad.calculate_bg_spp_loss(lp, mask, edges),
        lambda lp, mask: bgad.calculate_bg_spp_loss_normal(lp, mask, edges),
    ]
    for call in calls:
        for bad in ((lp, mask[:3]), (lp, mask[:, None]), (lp[:, None], mask[:, None]), (lp, mask.to("meta"))):
            with pytest.raises(FeatureError):
                call(*bad)
    for options in ({"pos_beta": 1.0}, {"pos_beta": -0.1}, {"margin_tau": -1.0}, {"normalizer": 0}):
        with pytest.raises(ConfigError):
            bgad.get_logp_boundary(lp, mask, **options)
    with pytest.raises(FeatureError, match="1 of 4 log-likelihoods are NaN"):
        bgad.get_logp_boundary(torch.tensor([0.0, math.nan, 1.0, 2.0]), mask)
    for value in (255, 0.5, -1):
        with pytest.raises(FeatureError, match="binarise"):
            bgad.get_logp_boundary(lp, torch.tensor([0, 0, value, value]))
    with pytest.raises(FeatureError, match="weights"):
        bgad.calculate_bg_spp_loss(lp, mask, edges, weights=torch.ones(3))
    with pytest.raises(FeatureError, match="boundaries"):
        bgad.calculate_bg_spp_loss(lp, mask, edges[:1])
    with pytest.raises(FeatureError, match="boundaries"):
        bgad.calculate_bg_spp_loss(lp, mask, (torch.zeros(2), torch.zeros(2)))
    with pytest.raises(ConfigError, match="empty"):
        bgad.calculate_bg_spp_loss_normal(lp, mask, edges, empty="none")
    for weighting in (bgad.normal_fl_weighting, bgad.abnormal_fl_weighting):
        with pytest.raises(ConfigError, match="normalizer"):
            weighting(lp, normalizer=-1)
    with pytest.raises(FeatureError, match="C is 3"):
        bgad.get_logp(3, torch.zeros(5, 4), torch.zeros(5))
    with pytest.raises(FeatureError, match="latent"):
        bgad.get_logp(4, torch.zeros(5, 4), torch.zeros(4))


def test_values_are_looked_at_inside_debug_checks(monkeypatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    lp, mask = torch.tensor([0.0, math.nan]), torch.zeros(2)
    bgad.get_logp_boundary(lp, mask)
    with ops.debug_checks(), pytest.raises(FeatureError, match="NaN"):
        bgad.get_logp_boundary(lp, mask)
