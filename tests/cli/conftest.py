"""A trained model for the tests of the commands, and the command that trains it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastbgad.__main__ import main
from tests.make_data import make_mvtec
from tests.models import SIZE

TINY = ["--backbone", "gabor", "--image-size", str(SIZE), str(SIZE), "--flow.coupling-layers", "2"]
SHORT = ["--schedule.meta-epochs", "2", "--schedule.sub-epochs", "1", "--schedule.warmup-epochs", "1"]
FEW = ["--anomalies.num-anomalies", "2", "--anomalies.cut-paste", "1", "--anomalies.repeat", "1"]


def train(root: Path, out: Path, *more: str) -> list[str]:
    """Return the arguments of a short training."""
    return ["train", "--data", str(root), "--out", str(out), *TINY, *SHORT, *FEW, *more]


@pytest.fixture(scope="package")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of a dataset and of a finished run."""
    root = tmp_path_factory.mktemp("data")
    make_mvtec(root, normals=5, per_type=3, size=SIZE)
    out = tmp_path_factory.mktemp("runs") / "widget"
    assert main(train(root, out)) == 0
    return root, out
