from __future__ import annotations

from pathlib import Path

import pytest

from fastbgad.config import METHOD_NAMES, TrainConfig, demo_preset
from fastbgad.errors import ConfigError
from fastbgad.experiments.plan.cells import PEERS, Cell
from fastbgad.experiments.plan.plan import SweepPlan, TablePlan, cells_of
from fastbgad.experiments.plan.protocol import make_plan, names, sweep_names, table_names
from fastbgad.experiments.plan.protocol_file import (
    TableProtocol,
    dataset_facts,
    protocol_names,
    protocol_source,
    read_protocol,
)
from fastbgad.experiments.plan.published import RUNNABLE, TABLES, published
from fastbgad.experiments.plan.setup import Setup

TABLE = """
kind = "table"
title = "Mine"
dataset = "mvtec"
seeds = [0, 1]
methods = ["bgad"]
peers = ["padim"]
[subset]
carpet = ["cut", "color"]
[[setting]]
name = "hard_subsets"
num_anomalies = 10
known = "subset"
test = "known"
rows = ["category"]
"""

SWEEP = """
kind = "sweep"
title = "Mine"
label = "lambda"
dataset = "mvtec"
seeds = [0, 1]
methods = ["bgad"]
references = ["nfad"]
categories = ["tile"]
num_anomalies = 3
option = "loss.lam"
values = [1, 2]
"""


def table(name: str, **options) -> TablePlan:
    plan = make_plan(name, **options)
    assert isinstance(plan, TablePlan)
    return plan


def sweep(name: str, **options) -> SweepPlan:
    plan = make_plan(name, **options)
    assert isinstance(plan, SweepPlan)
    return plan


def cells_at(plan: TablePlan, setting: str, row: str, method: str) -> tuple[Cell, ...]:
    (found,) = (r.cells for r in plan.rows if (r.setting, r.row, r.method) == (setting, row, method))
    return found


def test_mvtec_has_its_public_counts():
    images = dataset_facts("mvtec").images
    assert (len(images), sum(map(len, images.values()))) == (15, 73)
    assert sum(sum(types.values()) for types in images.values()) == 1258
    assert sum(types["ko"] for types in dataset_facts("btad").images.values()) == 290


def test_names():
    assert table_names() == TABLES
    assert set(table_names()) == set(protocol_names("table"))
    assert set(sweep_names()) == {
        "beta", "tau", "lambda", "num_anomalies", "coupling_layers", "focal", "augmentation", "adam_coasting",
    }  # fmt: skip
    assert len(names()) == 14


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("peers", [False, True])
def test_every_published_cell_of_a_runnable_method_has_a_row(name, peers):
    planned = [(row.setting, row.row, row.method) for row in table(name, peers=peers).rows]
    assert len(set(planned)) == len(planned)
    wanted = {cell.key[:3] for cell in published(name) if RUNNABLE.get(cell.method) in {**METHOD_NAMES, **PEERS}}
    if not peers:
        wanted = {place for place in wanted if RUNNABLE[place[2]] in METHOD_NAMES}
    additional = {place for place in planned if place[2] == "CFLOW-AD"}
    assert set(planned) - additional == wanted
    assert bool(additional) == (peers and name in ("unsupervised_vs_bgad", "btad"))


def test_multi_class():
    plan = table("unsupervised_vs_bgad", peers=True)
    cells = cells_at(plan, "multi_class", "carpet", "BGAD")
    assert cells == tuple(Cell("mvtec", "carpet", "bgad", seed) for seed in range(5))
    assert len(cells_at(plan, "multi_class", "mean", "NFAD")) == 15 * 5
    assert cells_at(plan, "multi_class", "tile", "PatchCore") == (Cell("mvtec", "tile", "patchcore"),)
    # A category's cells come one after another, for the features of its images.
    assert [cell.category for cell in plan.cells] == sorted((c.category for c in plan.cells), key=list(
        dataset_facts("mvtec").images).index)  # fmt: skip


def test_one_class():
    plan = table("one_class", seeds=[3])
    (cell,) = cells_at(plan, "one_class", "carpet:metal", "BGAD")
    assert cell.known_types == ("metal_contamination",)
    assert cell.test_types == ("color", "cut", "hole", "thread")
    mean = cells_at(plan, "one_class", "metal_nut:mean", "NFAD")
    assert [known for c in mean for known in c.known_types or ()] == ["bent", "color", "flip", "scratch"]
    assert len({c.training_key for c in mean}) == 1
    rows = list(dict.fromkeys(row.row for row in plan.rows))
    assert rows[4:7] == ["carpet:thread", "carpet:mean", "metal_nut:bent"]


def test_semi_push_pull_shares_the_cells_of_one_class():
    one_class, ablation = table("one_class"), table("ablation_semi_push_pull")
    for category in ("carpet", "metal_nut"):
        for method in ("NFAD", "BGAD"):
            mean = cells_at(one_class, "one_class", f"{category}:mean", method)
            assert cells_at(ablation, "one_class", category, method) == mean
    assert {cell.method for cell in ablation.cells} == {"nfad", "bgad_dagger", "bgad"}


def test_subsets():
    plan = table("ablation_subsets", seeds=[0])
    full = cells_at(table("unsupervised_vs_bgad", seeds=[0]), "multi_class", "mean", "BGAD")
    assert cells_at(plan, "multi_class", "mean", "BGAD") == full
    hard = cells_at(plan, "hard_subsets", "mean", "BGAD")
    unseen = cells_at(plan, "unseen_subsets", "mean", "BGAD")
    assert [(c.category, c.test_types) for c in hard] == [(c.category, c.test_types) for c in unseen]
    for one, other in zip(hard, unseen, strict=True):
        types = dataset_facts("mvtec").types(one.category)
        assert one.known_types == one.test_types
        assert sorted([*(other.known_types or ()), *(other.test_types or ())]) == list(types)


def test_the_release_has_enough_anomalies_for_every_cell():
    for cell in cells_of(make_plan(name) for name in names()):
        images = dataset_facts(cell.dataset).images[cell.category]
        available = sum(images[defect] for defect in cell.known_types or images)
        tested = sum(images[defect] for defect in cell.test_types or images)
        left = tested - cell.num_anomalies if cell.test_types in (None, cell.known_types) else tested
        assert available >= cell.num_anomalies
        assert left > 0


def test_btad_has_the_folders_names_in_cells_and_the_papers_in_rows():
    plan = table("btad", seeds=[0])
    assert cells_at(plan, "multi_class", "2", "BGAD") == (Cell("btad", "02", "bgad"),)
    assert [cell.category for cell in cells_at(plan, "multi_class", "mean", "NFAD")] == ["01", "02", "03"]


@pytest.mark.parametrize("name", protocol_names("sweep"))
@pytest.mark.parametrize("training", [TrainConfig(), demo_preset()])
def test_every_cell_of_a_sweep_has_a_configuration(name, training):
    setup = Setup(training=training)
    seen = set()
    for point in sweep(name, training=training).points:
        for cell in point.cells:
            config = setup.training_of(cell)
            assert config.method == cell.method
            seen.add((config.method, repr(config.loss), repr(config.flow), repr(config.anomalies),
                      repr(config.schedule)))  # fmt: skip
    bgad = {point.value for point in sweep(name).points if point.method == "bgad"}
    assert len([one for one in seen if one[0] == "bgad"]) == len(bgad) - (name == "num_anomalies")


def test_what_is_swept():
    def values(name: str) -> list:
        return [point.value for point in sweep(name).points if point.method == "bgad"]

    assert values("beta")[0] == 0.001
    assert values("beta")[-1] == 0.2
    assert values("tau")[0] == 0
    assert values("lambda")[-1] == 10
    assert values("num_anomalies") == [0, 1, 5, 10]
    assert values("coupling_layers") == [2, 4, 8, 12]
    assert values("focal") == values("adam_coasting") == [False, True]
    assert sweep("beta").logarithmic
    assert not sweep("tau").logarithmic


def test_references_repeat_one_measurement_that_tables_have():
    points = [point for point in sweep("beta", seeds=[0]).points if point.method == "nfad"]
    assert len(points) == 7
    assert len({point.cells for point in points}) == 1
    assert set(points[0].cells) < set(table("unsupervised_vs_bgad", seeds=[0]).cells)


def test_the_configurations_own_value_shares_the_cells_of_tables():
    cells = set(table("unsupervised_vs_bgad").cells)

    def shared(name: str, training: TrainConfig | None) -> list:
        points = sweep(name, training=training).points
        return [point.value for point in points if point.method == "bgad" and set(point.cells) < cells]

    assert shared("beta", TrainConfig()) == [0.01]
    assert shared("beta", None) == []
    assert shared("coupling_layers", TrainConfig()) == [8]
    assert shared("coupling_layers", demo_preset()) == [4]
    assert shared("augmentation", TrainConfig()) == ["repeated 5 times, CutPaste 5 times"]
    assert shared("augmentation", demo_preset()) == []
    assert shared("num_anomalies", None) == [10]


def test_no_known_anomalies_is_bgad_without():
    (point,) = (p for p in sweep("num_anomalies").points if (p.method, p.value) == ("bgad", 0))
    assert {(cell.method, cell.num_anomalies) for cell in point.cells} == {("bgad_without", 0)}
    nfad = [cell for p in sweep("num_anomalies", seeds=[0]).points if p.method == "nfad" for cell in p.cells]
    assert len({cell.training_key for cell in nfad}) == 3


def test_choices():
    plan = table("unsupervised_vs_bgad", seeds=[7], categories=["tile", "grid"], methods=["bgad", "NFAD"])
    assert {(cell.category, cell.method, cell.seed) for cell in plan.cells} == {
        ("grid", "nfad", 7), ("grid", "bgad", 7), ("tile", "nfad", 7), ("tile", "bgad", 7),
    }  # fmt: skip
    assert [row.row for row in plan.rows] == ["grid", "grid", "tile", "tile", "mean", "mean"]
    assert "Run for grid, tile only" in plan.note
    comparable = {row.row: row.comparable for row in plan.rows}
    assert comparable == {"tile": True, "grid": True, "mean": False}  # the published mean is over 15
    assert all(row.comparable for row in table("unsupervised_vs_bgad").rows)
    assert "Run for" not in table("btad", categories=["01", "02", "03"]).note
    assert {cell.category for cell in sweep("tau", categories=["grid"]).cells} == {"grid"}
    assert {cell.method for cell in table("btad", peers=True, methods=["cflow_ad"]).cells} == {"cflow_ad"}


def test_number_of_known_anomalies():
    plan = table("one_class", num_anomalies=5)
    assert {cell.num_anomalies for cell in plan.cells} == {5}
    assert not any(row.comparable for row in plan.rows)  # the published numbers are of ten
    assert "Run with 5 known anomalies; the published numbers are for 10." in plan.note
    assert "Run with" not in table("one_class", num_anomalies=10).note
    assert {cell.num_anomalies for cell in sweep("tau", num_anomalies=1).cells} == {1}
    assert {c.num_anomalies for c in table("ablation_subsets", num_anomalies=1).cells} == {1}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("one_clas", {}, "did you mean one_class"),
        ("dataset_mvtec", {}, "no protocol"),
        ("btad", {"seeds": []}, "seeds are"),
        ("btad", {"seeds": [1, 1]}, "seeds are"),
        ("btad", {"seeds": [-1]}, "seeds are"),
        ("btad", {"categories": ["1"]}, "BTAD has no category '1'"),
        ("beta", {"categories": ["scew"]}, "did you mean screw"),
        ("beta", {"categories": []}, "no category"),
        (
            "one_class",
            {"categories": ["tile"]},
            "one_class has none of the categories chosen; it has carpet, metal_nut",
        ),
        ("btad", {"methods": ["bagd"]}, "did you mean bgad"),
        ("btad", {"methods": ["padim"]}, "none of the methods"),
        ("beta", {"methods": []}, "none of the methods"),
        ("unsupervised_vs_bgad", {"methods": ["bgad", "padim"]}, "padim is a method of other authors"),
        ("btad", {"num_anomalies": -1}, "num_anomalies is -1"),
        ("num_anomalies", {"num_anomalies": 3}, "varies the number"),
    ],
)
def test_wrong_choices(name, options, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(name, **options)


def write(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


def test_a_file_of_ones_own(tmp_path):
    plan = table(write(tmp_path, TABLE), peers=True)
    assert plan.name == "mine"
    assert [row.row for row in plan.rows] == ["carpet", "carpet"]
    assert plan.cells[0] == Cell("mvtec", "carpet", "bgad", 0, 10, ("color", "cut"), ("color", "cut"))
    own = sweep(write(tmp_path, SWEEP))
    assert [type(point.value) for point in own.points] == [float] * 4
    assert own.points[1].cells[0] == Cell("mvtec", "tile", "bgad", 0, 3, overrides=(("loss.lam", 2.0),))
    named = write(tmp_path, SWEEP.replace('option = "loss.lam"\nvalues = [1, 2]', """
        [[point]]
        value = "much"
        overrides = { "loss.lam" = 3 }
        [[point]]
        value = "less"
        overrides = { "loss.lam" = 2 }"""))  # fmt: skip
    assert [point.value for point in sweep(named).points] == ["much", "less"] * 2


@pytest.mark.parametrize(
    ("text", "old", "new", "message"),
    [
        (TABLE, "kind", "sort", "'kind' is missing"),
        (TABLE, '"table"', '"dataset"', "kind is 'dataset'"),
        (TABLE, '"mvtec"', '"mvtek"', "did you mean mvtec"),
        (TABLE, '["bgad"]', '["bagd"]', "did you mean bgad"),
        (TABLE, '["bgad"]', '["padim"]', "methods is 'padim'"),
        (TABLE, '["bgad"]', "[]", r"methods is \[\]"),
        (TABLE, '["bgad"]', '"bgad"', "methods is 'bgad'; it is of type list"),
        (TABLE, '["padim"]', '["fcdd"]', "peers is 'fcdd'"),
        (TABLE, "peers", "pears", "the key 'pears' is unknown; did you mean peers"),
        (TABLE, "rows =", "rose =", "number 1: the key 'rows' is missing"),
        (TABLE, '["category"]', '["type"]', 'need known = "each"'),
        (TABLE, '"known"', '"unknown"', "test is 'unknown'"),
        (TABLE, '"cut"', '"cutt"', "did you mean cut"),
        (TABLE, '["cut", "color"]', '["cut", "cut"]', "something twice"),
        (TABLE, '["cut", "color"]', '["cut", "color", "hole", "thread", "metal_contamination"]', "lists every type"),
        (TABLE, "carpet", "carpets", "did you mean carpet"),
        (TABLE, "= 10", "= true", "num_anomalies is True"),
        (TABLE, "= 10", "= -1", "num_anomalies is -1"),
        (TABLE, "[0, 1]", "[0, 0.5]", "seeds are"),
        (TABLE, "[[setting]]", "[setting]", "setting is .* type list"),
        (TABLE, '"subset"', '"all"\ncategories = ["carpet"]\nextra = 1', "number 1: the key 'extra' is unknown"),
        (TABLE, 'known = "subset"', 'known = "subset"\ncategories = ["tile"]', "no types of tile"),
        (TABLE, 'known = "subset"\ntest = "known"', 'known = "all"\ntest = "others"', "no other types"),
        (TABLE, 'known = "subset"\ntest = "known"', 'known = "each"\ntest = "others"', "toothbrush has one"),
        (TABLE, "title =", "title", "not valid TOML"),
        (SWEEP, '"loss.lam"', '"loss.lamda"', "no option 'loss.lamda'"),
        (SWEEP, '"loss.lam"', '"seed.real"', "seed.real|field|dataclass"),
        (SWEEP, "[1, 2]", "[1, -2]", "lam is -2"),
        (SWEEP, "[1, 2]", "[1, nan]", "loss.lam is nan"),
        (SWEEP, "[1, 2]", '[1, "2"]', "loss.lam is '2'"),
        (SWEEP, "[1, 2]", "[1, [2]]", r"loss.lam is \[2\]"),
        (SWEEP, "[1, 2]", "[1, 1.0]", "two or more different"),
        (SWEEP, "[1, 2]", "[0, 1]\nlogarithmic = true", "above 0"),
        (SWEEP, '["nfad"]', '["bgad"]', "among methods and references"),
        (SWEEP, "option", "#", "the key 'values' is unknown"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, text, old, new, message):
    assert old in text
    path = write(tmp_path, text.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message) as error:
        make_plan(path)
    assert path in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.toml: No such file"):
        make_plan(str(tmp_path / "nowhere.toml"))


def test_sources_are_whole_files(tmp_path):
    assert 'kind = "table"' in protocol_source("btad")
    assert protocol_source(write(tmp_path, SWEEP)) == SWEEP
    assert all(read_protocol(name).note for name in names())


def test_the_hard_subsets_are_of_the_categories_that_the_note_speaks_of():
    aupro = {c.row: c.value for c in published("unsupervised_vs_bgad") if (c.method, c.metric) == ("NFAD", "aupro")}
    several = [name for name, types in dataset_facts("mvtec").images.items() if len(types) > 1]
    protocol = read_protocol("ablation_subsets")
    assert isinstance(protocol, TableProtocol)
    assert set(protocol.subset) == set(sorted(several, key=aupro.__getitem__)[:6])
