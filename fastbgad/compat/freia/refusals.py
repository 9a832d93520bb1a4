"""Sentences on invertible modules that `fastbgad.accelerate` does not take: graphs, single blocks, other couplings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

from torch import nn

from ...wording import count, listed
from .blocks import looks_like_flow

_MOST_NAMES = 3


def stray_blocks(module: nn.Module) -> str:
    """Return a sentence on the AllInOneBlocks of a module that are in no sequence, empty where there are none."""
    strays = _strays(module)
    graphs = []
    for label, graph in _labeled(module):
        members = {id(child) for child in graph.modules()}
        if _is_a(graph, "GraphINN") and members & strays.keys():
            graphs.append(_graph_text(label, graph))
            strays = {block: name for block, name in strays.items() if block not in members}
    if graphs:
        return graphs[0] + (f" ({count(len(graphs) - 1, 'more graph')} likewise)" if graphs[1:] else "")
    if not strays:
        return ""
    names = list(strays.values())
    if len(names) == 1:
        return f"{names[0]} is a single AllInOneBlock, which is not accelerated; append it to a FrEIA SequenceINN"
    return (
        f"{len(names)} AllInOneBlocks are in no SequenceINN and not accelerated ({listed(names, _MOST_NAMES)}); append "
        "them to a FrEIA SequenceINN"
    )


def no_flow(module: nn.Module) -> str:
    """Return a sentence on a module without any flow of AllInOneBlocks: it names the invertible modules it has."""
    invertible: list[tuple[str, nn.Module]] = []
    inside: set[int] = set()
    for label, child in _labeled(module):
        if _is_a(child, "InvertibleModule") and id(child) not in inside:
            invertible.append((label, child))
            inside.update(map(id, child.modules()))
    if not invertible:
        return (
            f"{type(module).__name__} contains no flow of AllInOneBlocks; give a FrEIA SequenceINN, anomalib's Cflow, "
            "or a module that contains one"
        )
    for label, child in invertible:
        if hasattr(child, "module_list"):
            text = _container_text(child)
            return f"{label} is {text}, which is not accelerated; only AllInOneBlocks in a SequenceINN are"
    names = listed([label for label, _ in invertible], _MOST_NAMES)
    kinds = _kinds([child for _, child in invertible])
    return f"{names}: {kinds} cannot be accelerated; only AllInOneBlocks in a SequenceINN can"


def _strays(module: nn.Module) -> dict[int, str]:
    """Return the names of AllInOneBlocks outside of sequences, by the identity of the block."""
    inside = {
        id(block) for child in module.modules() if looks_like_flow(child) for block in cast(Any, child.module_list)
    }
    return {
        id(child): label
        for label, child in _labeled(module)
        if type(child).__name__ == "AllInOneBlock" and id(child) not in inside
    }


def _graph_text(label: str, graph: nn.Module) -> str:
    blocks = list(cast(Any, graph).module_list)
    alone = all(type(block).__name__ == "AllInOneBlock" for block in blocks)
    blocks_to_take = "the same blocks" if alone else "AllInOneBlocks alone"
    return (
        f"{label} is {_container_text(graph)}, and graphs are not accelerated; build a FrEIA SequenceINN of "
        f"{blocks_to_take}"
    )


def _container_text(module: nn.Module) -> str:
    """Return the class and the content of a sequence or graph, such as a GraphINN of 3 AllInOneBlocks."""
    kinds = _kinds(list(cast(Any, module).module_list)) or "no blocks"
    conditions = len(getattr(module, "condition_nodes", ()))
    with_conditions = f" with {count(conditions, 'ConditionNode')}" if conditions else ""
    return f"a {type(module).__name__} of {kinds}{with_conditions}"


def _kinds(modules: list[nn.Module]) -> str:
    return ", ".join(count(number, kind) for kind, number in Counter(type(child).__name__ for child in modules).items())


def _labeled(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules inside a module, itself first, with the names that messages give them."""
    for name, child in module.named_modules():
        yield f"submodule {name}" if name else "the module", child


def _is_a(module: nn.Module, name: str) -> bool:
    """Return True for a module of a class of this name, or derived from one, whichever package has it."""
    return any(cls.__name__ == name for cls in type(module).__mro__)
