"""Training sets, trainers and options that BGAD refuses in anomalib."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("anomalib")

from anomalib.pre_processing import PreProcessor
from torchvision.transforms import v2

from fastbgad.compat.anomalib import with_known_anomalies
from fastbgad.errors import ConfigError, DataError, FastBGADError, FeatureError

from .engines import SIZE, Run, bgad, engine, folder_data

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_training_set_without_what_the_method_needs(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="with_known_anomalies"):
        engine(tmp_path).fit(bgad(), datamodule=folder_data(parts))
    no_masks = with_known_anomalies(folder_data(parts, mask_dir=None), 2)
    with pytest.raises(DataError, match=r"bad\d\d\.png has no mask.*mask_dir"):
        engine(tmp_path).fit(bgad(), datamodule=no_masks)
    engine(tmp_path).fit(bgad(method="bgad_without", cache_features=False), datamodule=no_masks)
    cropped = PreProcessor(v2.Compose([v2.Resize(80), v2.CenterCrop(SIZE)]))
    with pytest.raises(ConfigError, match="cut_paste=0"):
        engine(tmp_path).fit(
            bgad(pre_processor=cropped, cut_paste=1), datamodule=with_known_anomalies(folder_data(parts), 2)
        )
    with pytest.raises(ConfigError, match="datamodule of anomalib"):
        engine(tmp_path).fit(bgad(), torch.utils.data.DataLoader(torch.zeros(4, 3, SIZE, SIZE)))


def test_anomalies_that_are_not_there(parts: Path) -> None:
    for count, message in ((10, "has 9 anomalous images"), (9, "none is left for the test")):
        with pytest.raises(DataError, match=message):
            with_known_anomalies(folder_data(parts), count).setup()
    half = with_known_anomalies(folder_data(parts))
    half.setup()
    assert len(half.known) == 4  # of 9
    with pytest.raises(DataError, match="abnormal_dir"):
        with_known_anomalies(folder_data(parts, abnormal_dir=None, mask_dir=None), 1).setup()
    none = with_known_anomalies(folder_data(parts, abnormal_dir=None, mask_dir=None), 0)
    none.setup()
    assert not len(none.known)
    with pytest.raises(ConfigError, match="num_anomalies is -1"):
        with_known_anomalies(folder_data(parts), -1)
    with pytest.raises(ConfigError, match="KnownAnomalies: it has its own"):
        with_known_anomalies(none, 1)


def test_trainers_that_do_not_suit(parts: Path, tmp_path: Path) -> None:
    datamodule = with_known_anomalies(folder_data(parts), 2)
    with pytest.raises(ConfigError, match="use 2 at least"):
        engine(tmp_path, max_epochs=1).fit(bgad(), datamodule=datamodule)
    with pytest.raises(ConfigError, match="needs a number"):
        engine(tmp_path, max_epochs=-1, max_steps=3).fit(bgad(), datamodule=datamodule)
    with pytest.raises(ConfigError, match="'bf16-true'"):
        engine(tmp_path, precision="bf16-true").fit(bgad(), datamodule=datamodule)
    with pytest.raises(FeatureError, match="lower the learning rate"):
        engine(tmp_path).fit(bgad(lr=1e12, warmup_epochs=0, method="nfad"), datamodule=datamodule)


def test_models_that_cannot_be(run: Run) -> None:
    with pytest.raises(ConfigError, match="leave Normalize out"):
        bgad(pre_processor=PreProcessor(v2.Compose([v2.Resize(64), v2.Normalize([0.5] * 3, [0.5] * 3)])))
    with pytest.raises(ConfigError, match="method is"):
        bgad(method="other")
    with pytest.raises(FeatureError, match="never trained"):
        bgad()(torch.rand(1, 3, SIZE, SIZE))
    with pytest.raises(FastBGADError, match="no calibration"):
        bgad().to_fastbgad()
    with pytest.raises(FeatureError, match="96 x 96"):
        run.model.model(torch.rand(1, 3, 96, 96))
