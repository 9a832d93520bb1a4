"""Datasets: folder layouts, splits, loading, anomaly synthesis and the demo set."""

from __future__ import annotations

from .category import list_categories, open_category
from .decoded import DecodedImages
from .demo import make_demo_dataset
from .images import image_size, read_image, read_mask, resize_image, resize_mask
from .layouts import FolderLayout
from .loading import Batch, LoadedSample, SampleImages, load_sample, parse_size, stream_batches
from .sample import Category, Sample
from .splits import Split, split_known_anomalies
from .synthesis import AnomalySynthesis, AugmentedAnomalies, rand_augment_cut_paste

__all__ = [
    "AnomalySynthesis",
    "AugmentedAnomalies",
    "Batch",
    "Category",
    "DecodedImages",
    "FolderLayout",
    "LoadedSample",
    "Sample",
    "SampleImages",
    "Split",
    "image_size",
    "list_categories",
    "load_sample",
    "make_demo_dataset",
    "open_category",
    "parse_size",
    "rand_augment_cut_paste",
    "read_image",
    "read_mask",
    "resize_image",
    "resize_mask",
    "split_known_anomalies",
    "stream_batches",
]
