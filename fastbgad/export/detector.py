"""Export of a trained detector to one file that runs without fastbgad: ONNX, torch.export, or AOTInductor.

A file is kept only if it was loaded back and run, and its results are those of `BGAD.predict`.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.export import Dim, ExportedProgram

from ..backbones import create_backbone
from ..errors import BackendError, ConfigError, FastBGADError, check_choice
from ..model.detector import BGAD
from ..model.scoring import DECISIONS
from ..system.environment import choose_device, versions
from ..system.files import atomic_path
from ..wording import first_line
from .check import Difference, check_file, check_images, compare, outputs_of
from .formats import FORMATS, INPUT, ExportFormat
from .graph import ExportedDetector, scoring_constants

_SHOWN_REASON = 300
_REMEDY = "choose another format or backbone"


@dataclass(frozen=True)
class ExportSummary:
    """Facts about a file of `export_detector`."""

    path: Path
    file_bytes: int
    operations: int  # in the graph
    difference: Difference  # to the model, its backbone in float32
    narrow: tuple[str, Difference] | None = None  # type of the model's narrower backbone, the difference that it makes

    def facts(self) -> dict[str, object]:
        """Return names and values for display."""
        facts: dict[str, object] = {
            "file": f"{self.path}, {self.file_bytes / 2**20:.1f} MiB",
            "operations": self.operations,
        }
        if self.narrow is None:
            return facts | {"differs from the model by": self.difference}
        dtype, difference = self.narrow
        return facts | {
            "differs from the model in float32 by": self.difference,
            f"and that from {dtype} by": difference,
        }


def export_detector(
    model: BGAD, path: str | Path, format: ExportFormat = "onnx", *, device: str | torch.device = "cpu"
) -> ExportSummary:
    """Write a detector to one file, atomically, after checking that it computes the same.

    The file takes `images` [B, 3, H, W] float32, RGB in [0, 1], contiguous, of the model's size and in any number. Its
    outputs are those of `fastbgad.export.graph.ExportedDetector.forward`. It holds thresholds, image size, the bit
    depth of the 16-bit images in training, the names of the sides and the version: as `metadata_props` of an ONNX
    model, as the extra file `fastbgad.json` of a torch.export archive, as metadata of an AOTInductor package.

    A backbone in float16 or bfloat16 is exported in float32, which every runtime has; the summary holds the difference
    that this makes.

    Args:
        model: a calibrated model; it is not changed.
        path: `.onnx`, or `.pt2` for the others.
        format: "onnx": for ONNX Runtime and others. "torch-export": for PyTorch, on any machine. "aoti": compiled by
            AOTInductor for machines like this one.
        device: that a "torch-export" or "aoti" file will run on. An ONNX file is bound to no device.

    Raises:
        ConfigError: an unknown format or device, another suffix, or a device for ONNX.
        FeatureError: the model has no calibration, or its log-likelihoods are not finite.
        MissingDependencyError: "onnx" without the extra `export`.
        BackendError: no C++ compiler, a backbone that cannot be exported, a model too large for ONNX, or a file that
            does not compute the same. No file is left then.
        OutputError: the file cannot be written.
    """
    path, device = Path(path), choose_device(str(device))
    check_choice("format", format, FORMATS)
    kind = FORMATS[format]
    if path.suffix != kind.suffix:
        raise ConfigError(f"a file of the format {format} ends in {kind.suffix}, unlike {path}; rename it")
    kind.check(device)
    model.calibration()
    dtype, narrow = model.backbone.config().get("dtype", "float32"), None
    with atomic_path(path) as temporary:
        plain = _float32_copy(model, device)
        with _explained(f"the format {format} cannot express this model"):
            operations = kind.write(_traced(plain), temporary, _metadata(model))
        with _explained(f"the {format} file does not run"), _full_precision():
            difference = check_file(lambda constants: kind.load(temporary, device, constants), plain)
        if not difference.small:
            raise BackendError(
                f"the {format} file does not compute what the model does (it differs by {difference}), so {path} was "
                f"not written; {_REMEDY}"
            )
        if dtype != "float32":
            narrow = dtype, _narrow_difference(plain, model)
        size = temporary.stat().st_size
    return ExportSummary(path, size, operations, difference, narrow)


def _float32_copy(model: BGAD, device: torch.device) -> BGAD:
    """Return the same model on `device`: backbone in float32, without torch.compile, operations in plain PyTorch."""
    config = dict(model.backbone.config())
    if config["name"] != "gabor":
        config |= {"weights": "random", "dtype": "float32"}  # the weights are overwritten below
    backbone = create_backbone(**config)
    copy = BGAD(
        backbone, model.image_size, flow=model.flow_config, normalizer=model.normalizer, seed=None, impl="torch"
    )
    copy.load_state_dict(model.state_dict())
    return copy.to(device).eval()


def _traced(model: BGAD) -> ExportedProgram:
    detector = ExportedDetector(model)
    # PyTorch treats a batch size of 1 as a constant, even where it is declared to vary.
    example = torch.full((2, 3, *model.image_size), 0.5, device=model.device)
    program = torch.export.export(detector, (example,), dynamic_shapes={INPUT: {0: Dim("batch")}}, strict=False)
    # Paths of source files on this machine are of no use in the file.
    for node in program.graph.nodes:
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn"):
            node.meta.pop(key, None)
    return program


def _metadata(model: BGAD) -> dict[str, str]:
    """Return facts that a user of the file needs, as JSON values."""
    b_n, b_a = model.thresholds()
    facts = {
        "version": versions()["fastbgad"],
        "backbone": model.backbone.config()["name"],
        "image_size": model.image_size,
        "threshold_b_n": b_n,
        "threshold_b_a": b_a,
        "highest_score": float(model.offset),
        "sides": DECISIONS,
        # Significant bits of the 16-bit files that it was trained on; null where they span all, and for files of 8.
        "bit_depth": model.history.get("bit_depth"),
        "images": "float32 [batch, 3, height, width], RGB in [0, 1], contiguous",
    }
    return {f"fastbgad.{name}": json.dumps(value) for name, value in facts.items()}


def _narrow_difference(plain: BGAD, model: BGAD) -> Difference:
    """Return the difference of `model`, whose backbone has a narrower type, from `plain` in float32."""
    images = check_images(model.image_size)
    constants = scoring_constants(model.calibration(), model.normalizer)
    return compare(outputs_of(plain.predict(images)), outputs_of(model.predict(images)), constants)


@contextlib.contextmanager
def _explained(failure: str) -> Iterator[None]:
    """Turn every exception of an exporter or a runtime into a `BackendError`, and suppress their output.

    Args:
        failure: begin of the message, without the reason.
    """
    disabled, output = logging.root.manager.disable, io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            warnings.simplefilter("ignore")
            logging.disable(max(disabled, logging.WARNING))
            yield
    except FastBGADError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        # Exporters raise all kinds of errors, several with pages of text.
        reason = first_line(error)[:_SHOWN_REASON]
        raise BackendError(f"{failure} ({reason}); {_REMEDY}") from error
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Run convolutions on a GPU without TF32, whose rounding depends on the algorithm that is chosen."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
