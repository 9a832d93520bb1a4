"""Sentences on invertible modules that `fastbgad.accelerate` does not take: each names what it found."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from torch import nn

pytest.importorskip("FrEIA")

import FrEIA.framework as Ff
import FrEIA.modules as Fm

import fastbgad
from fastbgad.errors import UnsupportedFlowError

from ...flows import subnet

NO_GRAPH = "and graphs are not accelerated; build a FrEIA SequenceINN of the same blocks"


def graph_of(*blocks: type, condition: int = 0, deprecated: bool = False) -> Any:
    nodes: list[Any] = [Ff.InputNode(6)]
    conditions = [Ff.ConditionNode(condition)] if condition else []
    for block in blocks:
        nodes.append(Ff.Node(nodes[-1], block, options(block), conditions=conditions))
    nodes.append(Ff.OutputNode(nodes[-1]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (Ff.ReversibleGraphNet if deprecated else Ff.GraphINN)([*nodes, *conditions], verbose=False)


def sequence_of(*blocks: type) -> Any:
    flow = Ff.SequenceINN(6)
    for block in blocks:
        flow.append(block, **options(block))
    return flow


def options(block: type) -> dict[str, Any]:
    return {} if block is Fm.PermuteRandom else {"subnet_constructor": subnet}


def single_blocks(number: int) -> nn.ModuleList:
    return nn.ModuleList([sequence_of(Fm.AllInOneBlock).module_list[0] for _ in range(number)])


class OwnBlock(Fm.AllInOneBlock):
    pass


BLOCKS = (Fm.AllInOneBlock,) * 3
CASES: dict[str, tuple[Any, str]] = {
    "graph": (lambda: graph_of(*BLOCKS), f"the module is a GraphINN of 3 AllInOneBlocks, {NO_GRAPH}"),
    "graph with a condition": (
        lambda: graph_of(*BLOCKS, condition=8),
        f"the module is a GraphINN of 3 AllInOneBlocks with 1 ConditionNode, {NO_GRAPH}",
    ),
    "deprecated graph": (
        lambda: graph_of(*BLOCKS, deprecated=True),
        f"the module is a ReversibleGraphNet of 3 AllInOneBlocks, {NO_GRAPH}",
    ),
    "graph of several blocks": (
        lambda: graph_of(Fm.AllInOneBlock, Fm.PermuteRandom),
        "the module is a GraphINN of 1 AllInOneBlock, 1 PermuteRandom, and graphs are not accelerated; build a FrEIA "
        "SequenceINN of AllInOneBlocks alone",
    ),
    "graph inside": (
        lambda: nn.ModuleDict({"net": nn.Sequential(nn.Linear(2, 2), graph_of(*BLOCKS))}),
        f"submodule net.1 is a GraphINN of 3 AllInOneBlocks, {NO_GRAPH}",
    ),
    "parallel graph": (
        lambda: nn.DataParallel(graph_of(*BLOCKS)),
        f"submodule module is a GraphINN of 3 AllInOneBlocks, {NO_GRAPH}",
    ),
    "graphs": (
        lambda: nn.ModuleList([graph_of(*BLOCKS) for _ in range(3)]),
        f"submodule 0 is a GraphINN of 3 AllInOneBlocks, {NO_GRAPH} (2 more graphs likewise)",
    ),
    "graph beside a sequence": (
        lambda: nn.ModuleList([sequence_of(*BLOCKS), graph_of(*BLOCKS)]),
        f"submodule 1 is a GraphINN of 3 AllInOneBlocks, {NO_GRAPH}",
    ),
    "graph of other blocks": (
        lambda: graph_of(Fm.GLOWCouplingBlock),
        "the module is a GraphINN of 1 GLOWCouplingBlock, which is not accelerated; only AllInOneBlocks in a "
        "SequenceINN are",
    ),
    "other couplings": (
        lambda: sequence_of(Fm.GLOWCouplingBlock, Fm.GLOWCouplingBlock, Fm.RNVPCouplingBlock, Fm.PermuteRandom),
        "the module is a SequenceINN of 2 GLOWCouplingBlocks, 1 RNVPCouplingBlock, 1 PermuteRandom, which is not "
        "accelerated; only AllInOneBlocks in a SequenceINN are",
    ),
    "derived blocks": (
        lambda: sequence_of(OwnBlock),
        "the module is a SequenceINN of 1 OwnBlock, which is not accelerated; only AllInOneBlocks in a SequenceINN are",
    ),
    "nothing in a sequence": (
        lambda: Ff.SequenceINN(6),
        "the module is a SequenceINN of no blocks, which is not accelerated; only AllInOneBlocks in a SequenceINN are",
    ),
    "one block": (
        lambda: single_blocks(1)[0],
        "the module is a single AllInOneBlock, which is not accelerated; append it to a FrEIA SequenceINN",
    ),
    "single blocks": (
        lambda: single_blocks(5),
        "5 AllInOneBlocks are in no SequenceINN and not accelerated (submodule 0, submodule 1, submodule 2, and 2 "
        "more); append them to a FrEIA SequenceINN",
    ),
    "another single block": (
        lambda: nn.ModuleList([sequence_of(Fm.GINCouplingBlock).module_list[0]]),
        "submodule 0: 1 GINCouplingBlock cannot be accelerated; only AllInOneBlocks in a SequenceINN can",
    ),
    "nothing invertible": (
        lambda: nn.Linear(2, 2),
        "Linear contains no flow of AllInOneBlocks; give a FrEIA SequenceINN, anomalib's Cflow, or a module that "
        "contains one",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_sentences(name: str) -> None:
    make, sentence = CASES[name]
    module = make()
    classes = [type(child) for child in module.modules()]
    with pytest.raises(UnsupportedFlowError) as caught:
        fastbgad.accelerate(module)
    assert str(caught.value) == sentence
    assert [type(child) for child in module.modules()] == classes


def test_blocks_of_sequences_are_no_strays() -> None:
    """Not those of a flow accelerated before, of one in a wrapper, or of one whose blocks have a second name either."""
    flow = sequence_of(*BLOCKS)
    for module in (flow, nn.DataParallel(flow), nn.ModuleDict({"again": flow.module_list, "flow": flow})):
        fastbgad.accelerate(module)
    assert type(flow) is not Ff.SequenceINN
