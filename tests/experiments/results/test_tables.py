"""Tables in the terminal and as CSV: every number in its place, and none where there is none."""

from __future__ import annotations

import csv
import io

from fastbgad.experiments.results.summary import summarize
from fastbgad.experiments.results.tables import SWEEP_COLUMNS, TABLE_COLUMNS, csv_text, print_summary
from tests.experiments.results.conftest import NUMBERS, RESULTS
from tests.made_up_results import result, sweep, table


def lines_of(text: str) -> dict[tuple[str, ...], dict[str, str]]:
    return {
        tuple(line[name] for name in ("row", "method", "metric", "selection")): line
        for line in csv.DictReader(io.StringIO(text))
    }


def test_csv_has_every_number_once():
    text = csv_text(summarize(table(), RESULTS, NUMBERS))
    assert text.splitlines()[0] == ",".join(TABLE_COLUMNS)
    lines = lines_of(text)
    assert len(lines) == len(text.splitlines()) - 1 == 1 + 2 * 3 * 3 * 2
    assert lines["carpet", "NFAD", "image_auroc", "last"] == {
        "table": "toy", "dataset": "mvtec", "setting": "multi_class", "row": "carpet", "method": "NFAD",
        "metric": "image_auroc", "selection": "last", "published": "0.9", "published_std": "", "ours": "0.92",
        "ours_std": "0.014142", "difference": "0.02", "seeds": "2", "cells": "2", "cells_planned": "2",
    }  # fmt: skip
    best = lines["carpet", "NFAD", "image_auroc", "best"]
    assert (best["ours"], best["difference"]) == ("0.93", "0.03")
    mean = lines["mean", "BGAD", "image_auroc", "last"]  # seed 0 alone: (0.98 + 0.96) / 2
    assert [mean[k] for k in ("published", "published_std", "ours", "ours_std", "difference")] == [
        "0.95", "0.002", "0.97", "", "0.02",
    ]  # fmt: skip
    assert [mean[k] for k in ("seeds", "cells", "cells_planned")] == ["1", "3", "4"]
    only = lines["carpet", "DRA", "image_auroc", "published only"]
    assert [only[k] for k in ("published", "ours", "difference", "cells_planned")] == ["0.6", "", "", "0"]


def test_csv_of_a_sweep():
    plan = sweep(values=(False, True), option="loss.focal", logarithmic=False)
    first = plan.points[0].cells
    text = csv_text(summarize(plan, {first[0]: result(first[0], 0.8, 0.9), first[1]: result(first[1], 0.9, 0.9)}))
    lines = list(csv.DictReader(io.StringIO(text)))
    assert tuple(lines[0]) == SWEEP_COLUMNS
    assert len(lines) == 2 * 3 * 2
    assert list(lines[0].values()) == [
        "swept", "mvtec", "bgad", "off", "image_auroc", "last", "0.85", "0.070711", "2", "2", "2",
    ]  # fmt: skip
    assert list(lines[-1].values()) == ["swept", "mvtec", "bgad", "on", "aupro", "best", "", "", "0", "0", "2"]


def test_the_terminal_shows_published_ours_and_differences(capsys):
    print_summary(summarize(table(), RESULTS, NUMBERS))
    lines = [[part.strip() for part in line.strip("│").split("│")] for line in capsys.readouterr().out.splitlines()]
    assert ["carpet", "NFAD", "90.00", "92.00 ±1.41", "+2.00", "93.00 ±1.41", "+3.00", "2 seeds"] in lines
    assert ["Mean", "BGAD", "95.00 ±0.20", "97.00", "+2.00", "98.00", "+3.00", "1/2 seeds"] in lines
    assert ["grid", "-"] in lines  # of DRA
    assert ["carpet", "60.00"] in lines
    print_summary(summarize(table(), {}, NUMBERS))
    lines = [[part.strip() for part in line.strip("│").split("│")] for line in capsys.readouterr().out.splitlines()]
    assert ["carpet", "NFAD", "90.00", "-", "-", "-", "-", "0/2 cells"] in lines
    plan = sweep()
    print_summary(summarize(plan, {one: result(one, 0.5) for one in plan.points[0].cells}))
    lines = [[part.strip() for part in line.strip("│").split("│")] for line in capsys.readouterr().out.splitlines()]
    assert ["0.01", "BGAD", "AUPRO", "40.00 ±0.00", "-", "2 seeds"] in lines
    assert ["0.1", "BGAD", "AUPRO", "-", "-", "0/2 cells"] in lines
