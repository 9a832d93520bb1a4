"""The official BGAD's engine restated, from image files to metrics, and the same run by `fastbgad.fit`.

Every sub-epoch reads each image from its file again, synthesises the anomalies anew, and runs the encoder; each chunk
of 4096 rows goes through FrEIA's flow with the encoding of every row, then through the losses of
`tests/official_loop.py`, and the loss is read back. After every meta epoch all test images are read, encoded and scored
one by one, and scikit-learn computes the AUROCs. Rows beyond a multiple of 4096 are left out, as in the official code.
Two things are ours, so that both learn from the same: the synthesis of anomalies, and the learning rate.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import interpolate, logsigmoid

from fastbgad import reference
from fastbgad.backbones import Backbone
from fastbgad.config import TrainConfig
from fastbgad.data import AnomalySynthesis, AugmentedAnomalies, DecodedImages, Split, load_sample
from fastbgad.evaluate.metrics import evaluate
from fastbgad.features import ImageFeatures, ImageReading, StoreOptions
from fastbgad.flow_spec import FlowSpec
from fastbgad.model import BGAD
from fastbgad.model.calibration import stored_log_likelihoods
from fastbgad.model.scoring import official_anomaly_maps
from fastbgad.train.fit import fit, spare_slots
from fastbgad.train.schedule import image_batches, learning_rate
from tests.flows import freia_flow
from tests.official_loop import LAMBDA, loss_terms, patch_rows, plain


@dataclass
class EngineResult:
    """Seconds and results of a run.

    Attributes:
        training: seconds of training, features included.
        testing: seconds of measuring after the meta epochs.
        image_auroc, pixel_auroc, aupro: after the last meta epoch; the official engine computes no AUPRO.
        maps: [n, H, W], anomaly maps of the test images after it.
    """

    training: float = 0.0
    testing: float = 0.0
    image_auroc: float = float("nan")
    pixel_auroc: float = float("nan")
    aupro: float = float("nan")
    maps: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def seconds(self) -> float:
        return self.training + self.testing


def fast_engine(model: BGAD, split: Split, config: TrainConfig) -> EngineResult:
    """The same run by `fastbgad.fit`, with the test images measured after every meta epoch from kept features.

    The features of the test images are extracted within the time that testing takes.
    """
    size, batch = model.image_size, config.schedule.batch_size
    known = len(split.known_anomalies)
    result = EngineResult()
    started = time.perf_counter()
    images = [*split.normals, *split.known_anomalies, *split.test]
    features = ImageFeatures(
        model.backbone,
        size,
        images,
        split.normals,
        spare_slots(config, known),
        store=StoreOptions(device=model.device, cell_labels=config.anomalies.cell_labels),
        reading=ImageReading(batch_size=batch),
    )
    labels = np.array([sample.label for sample in split.test], dtype=bool)

    def measure(meta_epoch: int) -> None:
        start = time.perf_counter()
        features.extract(split.test)
        levels = stored_log_likelihoods(model, features.store, features.slots(split.test), batch)
        result.maps = official_anomaly_maps(levels, size).cpu()
        masks = torch.stack([features.decoded(sample).mask for sample in split.test])
        found = evaluate(result.maps, masks, result.maps.amax(dim=(1, 2)), labels)
        result.image_auroc, result.pixel_auroc, result.aupro = found.image_auroc, found.pixel_auroc, found.aupro
        result.testing += time.perf_counter() - start

    fit(model, split, config, features=features, on_meta_epoch=measure)
    features.close()
    result.training = time.perf_counter() - started - result.testing
    return result


class OfficialEngine:
    """One run. The flows start with the weights of `model`, which is left as it is.

    Args:
        encoder: what the loop calls for features, [B, 3, H, W] uint8 to levels.
        model: gives the flows' first weights, the image size and their shape.
        split: training normals, known anomalies, test.
        config: schedule and anomalies; the losses are the official commands'.
    """

    def __init__(self, encoder: Backbone, model: BGAD, split: Split, config: TrainConfig) -> None:
        self.encoder, self.split, self.config, self.size = encoder, split, config, model.image_size
        self.device = model.device
        self.decoders = nn.ModuleList()
        for flow in model.flows:
            spec: FlowSpec = flow.spec  # type: ignore[assignment]
            decoder = freia_flow(spec).float().to(self.device)
            decoder.load_state_dict(flow.state_dict())
            self.decoders.append(decoder)
        parameters = [p for p in self.decoders.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(parameters, lr=config.schedule.lr)
        recipe = AnomalySynthesis(config.anomalies.repeat, config.anomalies.cut_paste)
        nothing_kept = DecodedImages(self.size, cache_bytes=0)
        known = split.known_anomalies if config.uses_anomalies else ()
        self.anomalies = AugmentedAnomalies(known, split.normals, recipe, self.size, config.seed, nothing_kept)

    def run(self) -> EngineResult:
        result = EngineResult()
        for meta_epoch in range(self.config.schedule.meta_epochs):
            start = time.perf_counter()
            self._meta_epoch(meta_epoch)
            middle = time.perf_counter()
            result.image_auroc, result.pixel_auroc, result.maps = self._validate()
            result.training += middle - start
            result.testing += time.perf_counter() - middle
        return result

    def _load(self, item: int, sub_epoch: int) -> tuple[Tensor, Tensor]:
        if item < len(self.split.normals):
            loaded = load_sample(self.split.normals[item], self.size)
        else:
            loaded = self.anomalies.get(sub_epoch, item - len(self.split.normals))
        return loaded.image, loaded.mask

    def _meta_epoch(self, meta_epoch: int) -> None:
        schedule = self.config.schedule
        items = torch.arange(len(self.split.normals) + (len(self.anomalies) if meta_epoch else 0))
        for sub_epoch in range(schedule.sub_epochs):
            number = meta_epoch * schedule.sub_epochs + sub_epoch
            batches = image_batches(items, schedule.batch_size, self.config.seed, number)
            for place, batch in enumerate(batches):
                progress = (sub_epoch + place / len(batches)) / schedule.sub_epochs
                for group in self.optimizer.param_groups:
                    group["lr"] = learning_rate(schedule, meta_epoch, progress)
                loaded = [self._load(int(item), number) for item in batch]
                images, masks = (torch.stack(parts) for parts in zip(*loaded, strict=True))
                with torch.no_grad():
                    features = self.encoder(images.to(self.device))
                for maps, decoder in zip(features, self.decoders, strict=True):
                    self._train_level(
                        decoder, maps, masks[:, None].float().to(self.device), first_phase=meta_epoch == 0
                    )

    def _train_level(self, decoder: nn.Module, maps: Tensor, masks: Tensor, first_phase: bool) -> None:
        channels, height, width = maps.shape[1:]
        size = self.config.schedule.chunk_rows
        rows, where = patch_rows(maps, _encoding(*maps.shape[2:]))
        labels = interpolate(masks, size=(height, width), mode="nearest").reshape(-1)
        order = torch.randperm(len(rows)).to(self.device)
        for start in range(0, len(rows) // size * size, size):
            chosen = order[torch.arange(start, start + size).to(self.device)]
            z, log_det = decoder(rows[chosen], [where[chosen]])
            lp = plain.get_logp(channels, z, log_det) / channels
            if first_phase:
                loss = -logsigmoid(lp).mean()
            elif self.config.method == "nfad":
                loss = (-logsigmoid(lp) * plain.normal_fl_weighting(lp.detach())).mean()
            else:
                loss, pull, push = loss_terms(plain, lp, labels[chosen])
                # Without a violating row a mean is NaN while its gradients stay finite; a term that is left out has
                # the same.
                loss = loss + LAMBDA * (torch.nan_to_num(pull) + torch.nan_to_num(push))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss.item()

    @torch.no_grad()
    def _validate(self) -> tuple[float, float, Tensor]:
        levels: list[list[Tensor]] = [[] for _ in self.decoders]
        masks, labels = [], []
        for sample in self.split.test:
            image, mask = load_sample(sample, self.size)
            masks.append(mask.numpy())
            labels.append(sample.label)
            for level, (maps, decoder) in enumerate(
                zip(self.encoder(image[None].to(self.device)), self.decoders, strict=True)
            ):
                rows, where = patch_rows(maps, _encoding(*maps.shape[2:]))
                z, log_det = decoder(rows, [where])
                lp = plain.get_logp(maps.shape[1], z, log_det) / maps.shape[1]
                levels[level].append(lp.view(1, *maps.shape[2:]))
        total = torch.zeros(len(labels), *self.size, dtype=torch.float64)
        for parts in levels:
            lp = torch.cat(parts).cpu().double()
            likelihood = torch.exp(lp - lp.max())
            total += interpolate(likelihood[:, None], size=self.size, mode="bilinear", align_corners=True)[:, 0]
        maps = total.max() - total
        scores = maps.numpy()
        image_auroc = roc_auc_score(np.array(labels), scores.max(axis=(1, 2)))
        pixel_auroc = roc_auc_score(np.stack(masks).ravel(), scores.ravel())
        return float(image_auroc), float(pixel_auroc), maps


def _encoding(height: int, width: int) -> Tensor:
    """Built for every batch and level, as in the official loop; sines and cosines at once, which is kinder to it."""
    return reference.positional_encoding(128, height, width, torch.float32)
