"""The training engine against a loop that anyone can follow: one optimizer, no store, nothing ahead, float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastbgad.config import Method, TrainConfig
from fastbgad.data import AnomalySynthesis, AugmentedAnomalies, Split, load_sample
from fastbgad.features import cell_mask
from fastbgad.model import BGAD
from fastbgad.ops import PositionalRows
from fastbgad.train.fit import fit
from fastbgad.train.losses import training_loss
from fastbgad.train.schedule import image_batches, learning_rate, patch_chunks
from tests.models import SIZE, tiny_config, tiny_model, tiny_split


def plain_loop(model: BGAD, split: Split, config: TrainConfig) -> None:
    """What `fit` does to the flows, written down in the order of the paper's code."""
    schedule, known = config.schedule, split.known_anomalies if config.uses_anomalies else ()
    recipe = AnomalySynthesis(config.anomalies.repeat, config.anomalies.cut_paste)
    plan = AugmentedAnomalies(known, split.normals, recipe, model.image_size, config.seed)
    parameters = [p for p in model.flows.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=schedule.lr)

    def encode(images: Tensor, masks: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Features [B, h * w, C] and labels [B, h * w] of every level."""
        with torch.no_grad():
            features = model.backbone(images)
        return [
            (
                maps.permute(0, 2, 3, 1).flatten(1, 2).double(),
                cell_mask(masks, (maps.shape[2], maps.shape[3]), config.anomalies.cell_labels).flatten(1),
            )
            for maps in features
        ]

    for number in range(schedule.meta_epochs * schedule.sub_epochs):
        meta_epoch, sub_epoch = divmod(number, schedule.sub_epochs)
        normals = [load_sample(sample, model.image_size) for sample in split.normals]
        # numbered as the run numbers them: normals, known anomalies, synthesized ones
        files = [*normals, *(load_sample(sample, model.image_size) for sample in known)]
        generation = number // config.anomalies.refresh
        synthetic = [i for i in range(len(plan)) if plan.is_synthetic(i)]
        images = [*files, *(plan.get(generation, i) for i in synthetic)]
        anomalous = [
            len(files) + synthetic.index(i) if plan.is_synthetic(i) else len(normals) + known.index(plan.source(i))
            for i in range(len(plan))
        ]
        items = torch.tensor([*range(len(normals)), *(anomalous if meta_epoch else [])])
        batches = image_batches(items, schedule.batch_size, config.seed, number)
        for place, batch in enumerate(batches):
            progress = (sub_epoch + place / len(batches)) / schedule.sub_epochs
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(schedule, meta_epoch, progress)
            chosen = [images[int(item)] for item in batch]
            levels = encode(torch.stack([c.image for c in chosen]), torch.stack([c.mask for c in chosen]))
            for level, (features, labels) in enumerate(levels):
                height = SIZE // model.backbone.strides[level]
                key = (config.seed, number, place, level)
                for image, position in patch_chunks(
                    torch.arange(len(batch)), features.shape[1], schedule.chunk_rows, key
                ):
                    where = PositionalRows(height, height, position, config.flow.condition_channels)
                    lp = model.flow(level)(features[image, position], where).log_likelihood
                    loss = training_loss(
                        lp, labels[image, position], features.shape[2], config.method, config.loss,
                        first_phase=meta_epoch == 0,
                    )  # fmt: skip
                    optimizer.zero_grad(set_to_none=not schedule.adam_coasting)
                    loss.total.backward()
                    optimizer.step()


@pytest.mark.parametrize("coasting", [False, True])
@pytest.mark.parametrize("method", ["nfad", "bgad", "bgad_dagger"])
def test_the_engine_is_the_plain_loop(method: Method, coasting: bool, tmp_path: Path) -> None:
    split = tiny_split(tmp_path)
    config = tiny_config(method, adam_coasting=coasting)
    config = replace(
        config, loss=replace(config.loss, focal=True), anomalies=replace(config.anomalies, refresh=2), seed=3
    )
    engine, plain = tiny_model(config), tiny_model(config)
    engine.flows.double()
    plain.flows.double()
    fit(engine, split, config)
    # The engine fits the statistics of the backbone; they are not what is compared.
    plain.backbone.load_state_dict(engine.backbone.state_dict())
    plain_loop(plain, split, config)
    expected = plain.flows.state_dict()
    for name, tensor in engine.flows.state_dict().items():
        # features are float32, and batches of another composition may round them differently
        assert torch.allclose(tensor, expected[name], rtol=1e-4, atol=1e-5), name
