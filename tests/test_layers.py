"""Imports point downwards only: those of every module, inside functions, too, against a list of layers.

A room is a folder or a file of the list. Rooms on one line are siblings, which do not import each other either.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT

LAYERS = (
    ("fastbgad.__main__",),
    ("fastbgad.cli",),
    ("fastbgad",),  # the face alone
    ("fastbgad.experiments",),
    ("fastbgad.experiments.results", "fastbgad.experiments.running"),
    ("fastbgad.experiments.peers",),
    ("fastbgad.experiments.plan",),
    ("fastbgad.compat",),
    ("fastbgad.compat.anomalib", "fastbgad.compat.freia"),
    ("fastbgad.compat.bgad", "fastbgad.bench"),
    ("fastbgad.prediction",),  # a former name
    ("fastbgad.convert", "fastbgad.export", "fastbgad.predict", "fastbgad.train", "fastbgad.evaluate"),
    ("fastbgad.model",),
    ("fastbgad.features",),
    ("fastbgad.backbones", "fastbgad.config"),
    ("fastbgad.ops",),  # the face alone
    ("fastbgad.ops.flow", "fastbgad.ops.spp_loss"),
    ("fastbgad.ops.boundary", "fastbgad.ops.log_likelihood", "fastbgad.ops.score_map", "fastbgad.ops.native"),
    ("fastbgad.ops.debug",),
    ("fastbgad.ops.positional_tensor",),
    ("fastbgad.ops.registration",),
    ("fastbgad.ops.dispatch", "fastbgad.ops.positional"),
    ("fastbgad.ops.permutations", "fastbgad.ops.reused_memory", "fastbgad.ops.tensor_state"),
    ("fastbgad.reference", "fastbgad.data"),
    ("fastbgad.flow_spec", "fastbgad.render", "fastbgad.system"),
    ("fastbgad.kernels",),
    ("fastbgad.errors", "fastbgad.progress"),
    ("fastbgad.wording",),
)
# These rooms are one file: what lies below their folders has a line of its own.
FACES = {"fastbgad", "fastbgad.experiments", "fastbgad.compat", "fastbgad.ops"}
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}


def modules() -> dict[str, Path]:
    """Return the file of every module, by its name once installed."""
    found = {}
    for top, package in (("fastbgad", "fastbgad"), ("kernels", "fastbgad.kernels")):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT / top).with_suffix("").parts
            name = ".".join([package, *(part for part in parts if part != "__init__")])
            # The file that leads a checkout to its kernels is not a module of its own.
            if path != ROOT / "fastbgad" / "kernels" / "__init__.py":
                found[name] = path
    return found


MODULES = modules()


def imports(name: str, path: Path) -> Iterator[tuple[str, int]]:
    """Yield every module of fastbgad that a module imports, and the line."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                if inner in MODULES:
                    yield inner, node.lineno
                elif source in MODULES:
                    yield source, node.lineno


GRAPH = {name: list(imports(name, path)) for name, path in MODULES.items()}


def room_of(module: str) -> str:
    """Return the innermost room of the list that holds a module."""
    name = module
    while name not in RANK or (name in FACES and name != module):
        name = name.rpartition(".")[0]
        assert name, f"{module} is in no layer: add its folder to LAYERS"
    return name


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_downwards(module: str) -> None:
    room = room_of(module)
    for target, line in GRAPH[module]:
        below = room_of(target)
        assert room == below or RANK[room] < RANK[below], f"line {line} of {module} imports {target}, not below it"


def test_no_circle() -> None:
    """Not inside a room either."""
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " imports ".join([*path[path.index(module) :], module])
        if module not in done:
            for target, _ in GRAPH[module]:
                if target != module:
                    visit(target, (*path, module))
            done.add(module)

    for module in GRAPH:
        visit(module, ())


def test_every_room_is_there() -> None:
    assert set(RANK) <= set(MODULES)


def test_kernels_import_nothing_else() -> None:
    inside = [name for name in MODULES if name.startswith("fastbgad.kernels")]
    assert all(target.startswith("fastbgad.kernels") for name in inside for target, _ in GRAPH[name])


@pytest.mark.parametrize("face", sorted(name for name, path in MODULES.items() if path.name == "__init__.py"))
def test_faces_are_short(face: str) -> None:
    """The package's own face lists all that users need."""
    assert len(MODULES[face].read_text().splitlines()) <= 40 or face == "fastbgad"


def test_few_modules_at_the_top() -> None:
    assert len(list((ROOT / "fastbgad").glob("*.py"))) <= 12
