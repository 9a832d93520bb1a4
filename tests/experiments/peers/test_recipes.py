"""Recipes of methods of other authors."""

from __future__ import annotations

from fastbgad.experiments.peers.recipes import RECIPES, recipe_of
from fastbgad.experiments.plan.cells import PEERS, Cell
from tests.experiments.peers.conftest import cell


def test_every_peer_has_a_recipe() -> None:
    assert set(RECIPES) == set(PEERS)
    assert recipe_of(Cell("mvtec", "widget", "draem")).epochs == 700
    assert recipe_of(cell("patchcore")).backbone == "resnet18"
