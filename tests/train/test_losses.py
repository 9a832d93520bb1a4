"""The loss of each method in each phase."""

from __future__ import annotations

import pytest
import torch

from fastbgad import reference
from fastbgad.config import LossConfig
from fastbgad.train.losses import training_loss

CONFIG = LossConfig(beta=0.1, tau=0.2, lam=0.5, focal=True)


@pytest.fixture
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    lp = 4 * torch.randn(300, dtype=torch.float64, generator=generator) - 3
    return lp, torch.rand(300, generator=generator) < 0.2


@pytest.mark.parametrize("method", ["nfad", "bgad_without", "bgad_dagger", "bgad"])
def test_first_phase_is_plain_maximum_likelihood(rows, method: str) -> None:
    lp, anomalous = rows
    loss = training_loss(lp, anomalous, 7, method, CONFIG, first_phase=True)
    expected = -torch.nn.functional.logsigmoid(lp[~anomalous]).mean()
    assert loss.total == pytest.approx(float(expected))
    assert float(loss.normal) == float(loss.anomalous) == 0


def test_second_phase(rows) -> None:
    lp, anomalous = rows
    options = {"beta": 0.1, "tau": 0.2, "lam": 0.5, "focal": True}
    full = reference.spp_loss(lp, anomalous, 7, **options)
    half = reference.spp_loss(lp, anomalous, 7, push=False, **options)
    pull, push = reference.contrastive_loss(lp / 10, anomalous, 0.2)
    expected = {
        "nfad": full.ml,
        "bgad_without": half.total,
        "bgad": full.total,
        "bgad_dagger": full.ml + 0.5 * (pull + push),
    }
    values = set()
    for method, value in expected.items():
        loss = training_loss(lp, anomalous, 7, method, CONFIG, first_phase=False)
        assert float(loss.total) == pytest.approx(float(value), rel=1e-12)
        assert float(loss.b_n) == float(full.b_n)
        values.add(round(float(loss.total), 9))
    assert len(values) == 4  # the four methods differ


def test_phase_two_of_nfad_ignores_anomalous_rows(rows) -> None:
    lp, anomalous = rows
    lp = lp.clone().requires_grad_()
    training_loss(lp, anomalous, 7, "nfad", CONFIG, first_phase=False).total.backward()
    assert (lp.grad[anomalous] == 0).all()
    assert (lp.grad[~anomalous] != 0).all()
