"""The official code's flows against FrEIA's, their conditions, and log-likelihoods."""

from __future__ import annotations

import copy
import math
from argparse import Namespace

import pytest
import torch
from torch import Tensor, nn

from fastbgad import FlowSpec, PositionalRows, reference
from fastbgad.compat import bgad
from fastbgad.errors import ConfigError, FastBGADError, FeatureError
from fastbgad.ops.positional_tensor import PositionalEncoding, positional_rows, positions_of

from ...flows import budget, freia_flow, relative_error
from .official_formulas import ARGS, DTYPES


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
        ("flow_arch", "maf"),
        ("coupling_layers", 0),
        ("pos_embed_dim", 6),
        ("pos_embed_dim", 0),
        ("clamp_alpha", -1),
    ):
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
