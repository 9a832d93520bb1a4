"""Scores for files: a stream of images in, a CSV line and a map per image out, in memory that does not grow."""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from ..data import read_image, resize_image
from ..data.wide_pixels import check_bit_depth
from ..errors import ConfigError, DataError, OutputError, check_choice
from ..model.detector import BGAD, Prediction
from ..model.scoring import DECISIONS
from ..render.plots import decision_contour, heat_overlay
from ..system.files import make_folder, write_json, write_with
from .image_list import iterate_images

MapFormat = Literal["overlay", "png16", "npy", "none"]

CSV_FILE = "scores.csv"
SCALE_FILE = "maps.json"
COLUMNS = ("image", "score", "decision", "anomalous_area", "map", "error")

# A temporary file's name is longer than its target's, and file systems allow 255 bytes.
_LONGEST_NAME = 200


@dataclass(frozen=True)
class PredictionSummary:
    """The result of `predict_files`."""

    scored: int
    skipped: int  # already in the CSV of an earlier call
    failed: tuple[str, ...]  # one message per image that could not be read


def find_images(patterns: Sequence[str | Path], leave_out: str | Path | None = None) -> list[Path]:
    """Return the images that files, folders and globs name, each once, in a stable order.

    Folders are searched recursively and through links, for the suffixes of images; hidden files and folders are left
    out. A file that is named itself is taken whatever its name. A `fastbgad.errors.Notice` counts and names what was
    left out.

    Args:
        patterns: names of files, folders and globs.
        leave_out: the folder that results are written to, if it lies among the images: its maps are not found.

    Raises:
        DataError: a name that matches no image, or a folder that cannot be listed.
    """
    # Not a comprehension, which would be a caller of its own to the notice.
    return list(map(Path, iterate_images(patterns, leave_out)))


def predict_files(
    model: BGAD,
    images: Sequence[Path],
    out: str | Path,
    *,
    maps: MapFormat = "overlay",
    resume: bool = False,
    batch_size: int = 8,
    workers: int = 2,
    bit_depth: int | None = None,
    on_images: Callable[[int], None] | None = None,
) -> PredictionSummary:
    """Score image files; write `scores.csv` and one map per image.

    A CSV line is written and flushed as soon as its batch is done, after the maps it names, so the CSV only ever lists
    finished images. An image that cannot be read gets a line with its error; the others are scored.

    Args:
        model: a trained model.
        images: files, as from `find_images`.
        out: folder for the CSV and the maps.
        maps: "overlay": heat over the image, the decision outlined (PNG, at the image's own size); "png16": the raw
            map as 16-bit PNG, scaled as `maps.json` says; "npy": the raw float32 map; "none".
        resume: keep an existing CSV and leave out the images it lists without an error.
        batch_size: images that go through the model together.
        workers: threads that decode images and write maps.
        bit_depth: significant bits of images that are stored in 16; if None, as the model was trained.
        on_images: called with the number of images of every finished batch.

    Raises:
        ConfigError: an option has a value that cannot work.
        FeatureError: the model has no calibration.
        OutputError: `out` cannot be written, or holds a CSV and `resume` is false.
    """
    model.calibration()  # before anything is written
    check_options(maps, batch_size, workers, bit_depth)
    folder = make_folder(out)
    table = folder / CSV_FILE
    if table.exists() and not resume:
        raise OutputError(f"{table} exists already; choose another folder, or --resume to score only what it lacks")
    finished = _finished(table) if resume else set()
    waiting = [path for path in images if str(path) not in finished]
    if maps == "png16":
        write_scale(folder, model)
    failed: list[str] = []
    batches = score_images(
        model,
        waiting,
        map_names(images),
        folder,
        maps=maps,
        batch_size=batch_size,
        workers=workers,
        bit_depth=bit_depth,
    )
    with _CsvWriter(table) as rows:
        for lines in batches:
            rows.write(lines)
            failed += [line[-1] for line in lines if line[-1]]
            if on_images is not None:
                on_images(len(lines))
    scored = len(waiting) - len(failed)
    return PredictionSummary(scored, len(images) - len(waiting), tuple(failed))


def check_options(maps: str, batch_size: int, workers: int, bit_depth: int | None = None) -> None:
    """Raise `ConfigError` for an option with a value that cannot work."""
    check_choice("maps", maps, MapFormat)
    if batch_size < 1 or workers < 1:
        raise ConfigError(f"batch_size is {batch_size} and workers {workers}; both must be at least 1")
    check_bit_depth(bit_depth)


def chosen_depth(model: BGAD, bit_depth: int | None) -> int | None:
    """Return the significant bits of images that are stored in 16: as asked for, or as the model was trained.

    None: the model was trained on none of 16 bits. Then an image that uses fewer is refused, since its depth is not
    known.
    """
    return bit_depth or model.history.get("bit_depth")


def score_images(
    model: BGAD,
    images: Sequence[Path],
    names: Mapping[Path, str],
    folder: Path,
    *,
    maps: MapFormat,
    batch_size: int,
    workers: int,
    bit_depth: int | None = None,
) -> Iterator[list[list[str]]]:
    """Score images and write their maps; yield the CSV lines (`COLUMNS`) of a batch once its maps are written.

    While the model works on a batch, `workers` threads decode the next one and write the maps of the last one, so at
    most three batches of decoded images are in memory.

    Args:
        names: of every image the name of its map below `maps/`, without a suffix.
        folder: where the maps go.
        bit_depth: see `predict_files`.
    """
    read = partial(_read, bit_depth=chosen_depth(model, bit_depth))
    scale = _map_range(model)
    with ThreadPoolExecutor(workers, thread_name_prefix="fastbgad-predict") as pool:
        unwritten: list[Callable[[], list[str]]] = []
        for batch in _batches(images, batch_size, pool, read):
            good = [(path, image) for path, image in batch if not isinstance(image, DataError)]
            lines: dict[Path, Callable[[], list[str]]] = {}
            if good:
                resized = [resize_image(image, model.image_size) for _, image in good]
                stacked = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)
                prediction = _to_cpu(model.predict(stacked))
                for i, (path, image) in enumerate(good):
                    job = pool.submit(_write_map, folder, names[path], maps, image, prediction, i, scale)
                    lines[path] = partial(_line_of, path, prediction, i, job)
            if unwritten:
                yield [line() for line in unwritten]
            unwritten = [
                partial(_failed_line, path, image) if isinstance(image, DataError) else lines[path]
                for path, image in batch
            ]
        if unwritten:
            yield [line() for line in unwritten]


def write_scale(folder: Path, model: BGAD) -> None:
    """Write `maps.json`: how the values of "png16" maps become scores again."""
    low, high = _map_range(model)
    write_json(folder / SCALE_FILE, {"score": "low + (high - low) * value / 65535", "low": low, "high": high})


def csv_bytes(lines: Sequence[Sequence[str]]) -> bytes:
    """Return CSV lines in UTF-8; a file name that is not UTF-8 keeps its bytes."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue().encode(errors="surrogateescape")


def _batches(
    paths: Sequence[Path],
    batch_size: int,
    pool: ThreadPoolExecutor,
    read: Callable[[Path], np.ndarray | DataError],
) -> Iterator[list[tuple[Path, np.ndarray | DataError]]]:
    """Yield batches of decoded images, one batch ahead of the model, with errors for unreadable images."""
    remaining = iter(paths)
    ahead = [(path, pool.submit(read, path)) for path in islice(remaining, batch_size)]
    while ahead:
        current = ahead
        ahead = [(path, pool.submit(read, path)) for path in islice(remaining, batch_size)]
        yield [(path, job.result()) for path, job in current]


def _read(path: Path, bit_depth: int | None) -> np.ndarray | DataError:
    try:
        return read_image(path, bit_depth, refuse_unknown_depth=True)
    except DataError as error:
        return error


def _line_of(path: Path, prediction: Prediction, i: int, map_name: Future[str]) -> list[str]:
    area = float((prediction.decision[i] == 2).float().mean())
    score = float(prediction.image_score[i])
    return [str(path), f"{score:.7g}", DECISIONS[int(prediction.image_side[i])], f"{area:.6f}", map_name.result(), ""]


def _failed_line(path: Path, error: DataError) -> list[str]:
    return [str(path), "", "", "", "", str(error)]


def _write_map(
    folder: Path,
    name: str,
    kind: MapFormat,
    image: np.ndarray,
    prediction: Prediction,
    i: int,
    scale: tuple[float, float],
) -> str:
    """Write one map and return its path within the folder, "" for none."""
    if kind == "none":
        return ""
    anomaly_map, decision = prediction.anomaly_map[i].numpy(), prediction.decision[i].numpy()
    low, high = scale
    relative = Path("maps") / f"{name}.{'npy' if kind == 'npy' else 'png'}"
    target = folder / relative
    if kind == "npy":
        write_with(target, lambda path: np.save(path, anomaly_map))
    elif kind == "png16":
        values = np.round(np.clip((anomaly_map - low) / (high - low), 0, 1) * 65535).astype(np.uint16)
        write_with(target, lambda path: Image.fromarray(values).save(path))
    else:
        height, width = image.shape[:2]
        large = np.asarray(Image.fromarray(anomaly_map).resize((width, height), Image.Resampling.BILINEAR))
        sides = np.asarray(Image.fromarray(decision).resize((width, height), Image.Resampling.NEAREST))
        picture = decision_contour(heat_overlay(image, large, low, high), sides)
        write_with(target, lambda path: Image.fromarray(picture).save(path))
    return str(relative)


def _map_range(model: BGAD) -> tuple[float, float]:
    """Return the scores at both ends of a map's scale: 0 and the highest possible one, the calibration's offset."""
    return 0.0, max(float(model.offset), 1e-6)


def map_names(images: Sequence[Path]) -> dict[Path, str]:
    """Return a unique file name per image: its stem, or its path with separators replaced where stems collide.

    Where that is not unique either (a.png beside a.jpg), or too long for a file system, the name ends in a digest.
    """
    stems = Counter(path.stem for path in images)
    names = {path: path.stem if stems[path.stem] == 1 else _joined(path) for path in images}
    users = Counter(names.values())
    for path, name in names.items():
        if users[name] > 1 or len(os.fsencode(name)) > _LONGEST_NAME:
            names[path] = f"{name[-40:]}_{hashlib.sha256(os.fsencode(path)).hexdigest()[:12]}"
    return names


def _joined(path: Path) -> str:
    return "_".join(path.with_suffix("").parts).replace(os.sep, "").strip("_")


def _finished(table: Path) -> set[str]:
    """Return the images that an earlier call finished; a last line cut short by a crash does not count."""
    if not table.exists():
        return set()
    with table.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return {row["image"] for row in csv.DictReader(file) if row["map"] is not None and row["error"] == ""}


def _to_cpu(prediction: Prediction) -> Prediction:
    score, side, anomaly_map, decision, levels, patches = prediction
    return Prediction(
        score.cpu(),
        side.cpu(),
        anomaly_map.cpu(),
        decision.cpu(),
        tuple(lp.cpu() for lp in levels),
        tuple(patch.cpu() for patch in patches),
    )


class _CsvWriter:
    """A CSV file that lines are appended to, whole and flushed: only the last one can be cut short by a crash."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> _CsvWriter:
        try:
            content = self.path.read_bytes() if self.path.exists() else b""
            # A line that a crash cut short is dropped before anything is appended to it.
            whole = content[: content.rfind(b"\n") + 1]
            self.file = self.path.open("r+b" if content else "wb")
            self.file.truncate(len(whole))
            self.file.seek(len(whole))
        except OSError as error:
            raise self._error(error) from error
        if not whole:
            self.write([list(COLUMNS)])
        return self

    def write(self, lines: Sequence[Sequence[str]]) -> None:
        try:
            self.file.write(csv_bytes(lines))
            self.file.flush()
        except OSError as error:
            raise self._error(error) from error

    def __exit__(self, *exception: object) -> None:
        self.file.close()

    def _error(self, error: OSError) -> OutputError:
        return OutputError(f"cannot write {self.path}: {error.strerror}; free some space or choose another folder")
