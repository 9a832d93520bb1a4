from __future__ import annotations

import statistics
from collections import Counter, defaultdict

import pytest

from fastbgad.config import METHOD_NAMES
from fastbgad.errors import DataError
from fastbgad.experiments.plan.cells import PEERS
from fastbgad.experiments.plan.published import RUNNABLE, TABLES, PublishedNumber, published, read_published

HEAD = "table,dataset,setting,row,method,metric,value,std\n"
LINE = "btad,btad,multi_class,1,BGAD,pixel_auroc,0.982,0.0027\n"


def value(table: str, row: str, method: str, metric: str, setting: str = "one_class") -> float:
    (cell,) = (cell for cell in published(table) if cell.key == (setting, row, method, metric))
    return cell.value


def test_every_table_is_there():
    counts = {table: len(published(table)) for table in TABLES}
    assert counts == {
        "unsupervised_vs_bgad": 16 * 2 * 8 + 8,
        "supervised_vs_bgad": 16 * 2 * 2 + 4,
        "btad": 4 * (3 + 2 * 2),
        "one_class": 11 * (2 * 2 + 5),
        "ablation_subsets": 3 * 3 * 2,
        "ablation_semi_push_pull": 5 * 3 * 2,
    }
    assert published("beta") == ()


def test_numbers_of_the_slides():
    assert published("btad")[5] == PublishedNumber(
        "btad", "btad", "multi_class", "1", "BGAD", "pixel_auroc", 0.982, 0.0027
    )
    assert value("unsupervised_vs_bgad", "transistor", "NFAD", "aupro", "multi_class") == 0.788
    assert {cell.std for cell in published("one_class")} == {None}


@pytest.mark.parametrize("table", ["unsupervised_vs_bgad", "supervised_vs_bgad", "btad"])
def test_the_means_are_those_of_their_rows(table):
    rows = defaultdict(list)
    for cell in published(table):
        rows[cell.method, cell.metric, cell.row == "mean"].append(cell.value)
    means = {place[:2]: values[0] for place, values in rows.items() if place[2] and (*place[:2], False) in rows}
    off = {
        method
        for (method, metric), mean in means.items()
        if abs(statistics.mean(rows[method, metric, False]) - mean) > 0.0006
    }
    assert len(means) >= 4
    # So the slides print it: of DRAEM another paper's mean, of the autoencoders means cut off after two decimals.
    assert off == {"unsupervised_vs_bgad": {"DRAEM"}, "btad": {"AE-MSE", "AE-SSIM"}}.get(table, set())


def test_rows_of_the_semi_push_pull_ablation_are_means_over_the_known_types():
    for category in ("carpet", "metal_nut"):
        for method in ("NFAD", "BGAD"):
            for metric in ("image_auroc", "pixel_auroc"):
                mean = value("one_class", f"{category}:mean", method, metric)
                assert value("ablation_semi_push_pull", category, method, metric) == mean
                types = [
                    cell.value
                    for cell in published("one_class")
                    if cell.row.startswith(f"{category}:") and cell.key[2:] == (method, metric)
                ]
                assert statistics.mean(types) == pytest.approx(mean, abs=0.0011)


def test_runnable_methods_are_all_methods_of_the_package():
    assert sorted(RUNNABLE.values()) == sorted([*METHOD_NAMES, *PEERS])
    written = Counter(cell.method for table in TABLES for cell in published(table))
    assert set(RUNNABLE) - set(written) == {"CFLOW-AD", "SuperSimpleNet"}
    assert set(written) - set(RUNNABLE) == {
        "MSFD", "FCDD", "DevNet", "DRA", "FLOS", "SAOE", "MLEP", "AE-MSE", "AE-SSIM", "VT-ADL",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("table,value\n", "columns"),
        (HEAD + LINE + LINE, "two numbers for btad, multi_class, 1, BGAD, pixel_auroc"),
        (HEAD + LINE.replace("0.982", "98.2"), "line 2 .* 98.2"),
        (HEAD + LINE.replace("0.982", "nan"), "line 2 .* nan"),
        (HEAD + LINE.replace("0.982", "-"), "line 2 .*'-'"),
        (HEAD + LINE.replace("0.0027", "2"), "deviation 2"),
        (HEAD + LINE.replace("btad,btad", "btad,visa"), "dataset is 'visa'"),
        (HEAD + LINE.replace("btad,btad", "visa,btad"), "table is 'visa'"),
        (HEAD + LINE.replace("pixel_auroc", "pro"), "metric is 'pro'"),
        (HEAD + LINE.replace(",0.0027", ""), "line 2 .* fields"),
        (HEAD + LINE.replace("0.0027", "0.0027,1"), "line 2 .* fields"),
    ],
)
def test_a_damaged_file_is_refused(text, message):
    with pytest.raises(DataError, match=message):
        read_published(text)
