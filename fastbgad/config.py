"""Options of a run: frozen dataclasses that check their values, for Python and for the command line.

The defaults are the official ones but for the weights of the levels in the anomaly map; `--preset official` has equal
weights, too. `short_preset` is for real photographs on a CPU, `demo_preset` for small textures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from .errors import ConfigError, check_choice
from .flow_spec import ClampForm, FlowSpec, GlobalAffine
from .ops import MlForm, Reduction
from .ops.boundary.dispatcher import check_boundary_options

CellLabels = Literal["nearest", "any"]
LevelWeights = Literal["channels", "equal"]
"""How much each level counts in the anomaly map: in proportion to its channels, or alike as in the official code."""
Method = Literal["nfad", "bgad_without", "bgad_dagger", "bgad"]

METHOD_NAMES: dict[str, str] = {
    "nfad": "NFAD",
    "bgad_without": "BGAD w/o",
    "bgad_dagger": "BGAD-dagger",
    "bgad": "BGAD",
}
"""How the paper writes each method."""


@dataclass(frozen=True)
class FlowConfig:
    """The normalizing flow of every level."""

    coupling_layers: int = 8
    """Coupling layers per level."""
    condition_channels: int = 128
    """Channels of the positional condition; 0 trains an unconditional flow."""
    clamp: float = 1.9
    """Bound of the log-scale of a coupling layer."""
    clamp_form: ClampForm = "tanh"
    """tanh: clamp * tanh(a), as the official code; scaled_tanh: clamp * tanh(a / clamp), as FrEIA since August 2023."""
    global_affine: GlobalAffine = "SOFTPLUS"
    """Activation of the global scale, as FrEIA names it."""
    hard_permutation: bool = False
    """Permute channels after every coupling layer, as anomalib does by default, instead of rotating them."""

    def spec(self, channels: int) -> FlowSpec:
        """Return the flow of a level with this many channels."""
        return FlowSpec(
            channels,
            self.condition_channels,
            self.coupling_layers,
            self.clamp,
            self.clamp_form,
            self.global_affine,
            self.hard_permutation,
        )


@dataclass(frozen=True)
class LossConfig:
    """The loss: maximum likelihood, and from the second phase on the semi-push-pull terms."""

    beta: float = 0.01
    """The boundary is this fraction's percentile of the normal log-likelihoods."""
    tau: float = 0.1
    """Margin between the normal and the anomalous boundary, in units of log-likelihood / normalizer."""
    lam: float = 1.0
    """Lambda, the weight of the semi-push-pull terms."""
    normalizer: float = 10.0
    """Log-likelihoods are divided by this before they meet the boundary."""
    ml_form: MlForm = "logsigmoid"
    """logsigmoid: -log sigmoid(lp), as the official code; nll: the exact negative log-likelihood of the slides."""
    reduction: Reduction = "mean"
    """mean over the violating rows of each term, as the official code; sum, as the slides write it."""
    focal: bool = True
    """Weight rows by how hard they are, as the official commands do."""

    def __post_init__(self) -> None:
        check_boundary_options(self.beta, self.tau, self.normalizer)
        if self.lam < 0:
            raise ConfigError(f"lam is {self.lam}; the weight of a loss term cannot be negative")
        check_choice("ml_form", self.ml_form, MlForm)
        check_choice("reduction", self.reduction, Reduction)


@dataclass(frozen=True)
class ScheduleConfig:
    """The training schedule. A pass sees every training image once; sub_epochs passes make a meta epoch."""

    meta_epochs: int = 25
    """Meta epochs; the first trains on normal images with maximum likelihood alone."""
    sub_epochs: int = 8
    """Passes over the training images per meta epoch."""
    batch_size: int = 32
    """Images whose patches are shuffled together."""
    chunk_rows: int = 4096
    """Patches per optimizer step; the last chunk of a batch may be smaller, none is dropped."""
    lr: float = 2e-4
    """Peak learning rate of Adam."""
    lr_floor: float = 1e-3
    """The cosine ends at lr * lr_floor."""
    warmup_epochs: int = 2
    """Meta epochs of linear warm-up from lr / 10."""
    adam_coasting: bool = False
    """Let levels without a gradient coast on their momentum, as torch 1.x did for the official code."""

    def __post_init__(self) -> None:
        for name in ("meta_epochs", "sub_epochs", "batch_size", "chunk_rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.lr > 0:
            raise ConfigError(f"lr is {self.lr}; it must be positive")
        if not 0 <= self.lr_floor <= 1:
            raise ConfigError(f"lr_floor is {self.lr_floor}; it is a fraction of lr between 0 and 1")
        if not 0 <= self.warmup_epochs <= self.meta_epochs:
            raise ConfigError(f"warmup_epochs is {self.warmup_epochs}; it must lie between 0 and {self.meta_epochs}")


@dataclass(frozen=True)
class AnomalyConfig:
    """The labeled anomalies that are known, and what is synthesized from them."""

    num_anomalies: int | None = None
    """Known anomalies drawn from the test set, which they then leave. None: 10, or half of the anomalous images where
    that is fewer (with per_type of each type)."""
    per_type: bool = False
    """Draw num_anomalies of every defect type instead of in total."""
    repeat: int = 5
    """How often a pass sees each known anomaly as it is (repeated utilization)."""
    cut_paste: int = 5
    """How many RandAugment CutPaste images a pass makes from each known anomaly."""
    cell_labels: CellLabels = "nearest"
    """Patches that count as anomalous. nearest: those whose sampled pixel is, as in the official code; any: those with
    any anomalous pixel, so that defects thinner than a patch do not train as normal."""
    refresh: int = 1
    """Make new CutPaste images every so many passes; the official code does in every pass."""

    def __post_init__(self) -> None:
        for name in ("num_anomalies", "repeat", "cut_paste"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it cannot be negative")
        check_choice("cell_labels", self.cell_labels, CellLabels)
        if self.refresh < 1:
            raise ConfigError(f"refresh is {self.refresh}; it must be at least 1")


@dataclass(frozen=True)
class ScoreConfig:
    """Options of the anomaly map. Training does not depend on them; they are part of the trained model."""

    level_weights: LevelWeights = "channels"
    """channels: levels count in proportion to their channels; equal: all alike, as in the official code."""

    def __post_init__(self) -> None:
        check_choice("level_weights", self.level_weights, LevelWeights)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the outcome of a training run, data and backbone aside."""

    method: Method = "bgad"
    """nfad: maximum likelihood only; bgad_without: BGAD without anomalies; bgad_dagger: conventional contrastive loss;
    bgad: the paper's method."""
    seed: int = 0
    """Seed of initial weights, known anomalies, shuffling and synthesis."""
    flow: FlowConfig = field(default_factory=FlowConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    anomalies: AnomalyConfig = field(default_factory=AnomalyConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHOD_NAMES)

    @property
    def uses_anomalies(self) -> bool:
        """True for methods that train on labeled anomalies."""
        return self.method in ("bgad", "bgad_dagger")

    def as_dict(self) -> dict[str, Any]:
        """Return nested plain values, for JSON."""
        return asdict(self)


def demo_preset(method: Method = "bgad", seed: int = 0) -> TrainConfig:
    """Return a short schedule with a higher learning rate and half the coupling layers, for textures on a CPU."""
    return TrainConfig(
        method=method,
        seed=seed,
        flow=FlowConfig(coupling_layers=4),
        schedule=ScheduleConfig(meta_epochs=4, sub_epochs=2, batch_size=8, lr=1e-3, warmup_epochs=1, lr_floor=1e-2),
        anomalies=AnomalyConfig(repeat=1, cut_paste=4, refresh=2, cell_labels="any"),
    )


def short_preset(method: Method = "bgad", seed: int = 0) -> TrainConfig:
    """Return a schedule with three times the demo's passes: minutes on a CPU for some hundred photographs.

    benchmarks/REAL.md has its accuracy on real photographs; features must be standardized for so few passes.
    """
    demo = demo_preset(method, seed)
    return replace(demo, schedule=replace(demo.schedule, meta_epochs=12))


PRESETS: dict[str, Callable[..., TrainConfig]] = {
    "official": lambda method="bgad", seed=0: TrainConfig(method=method, seed=seed, score=ScoreConfig("equal")),
    "short": short_preset,
    "demo": demo_preset,
}
"""Named starting points of a configuration."""
