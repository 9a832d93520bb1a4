"""Feature levels of any timm model, cut off after the last level used."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import EfficientNetFeatures, MobileNetV3Features
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from ..errors import BackboneError, FeatureError
from ..wording import choose, did_you_mean
from .base import Backbone, check_smallest, unit_range
from .image_sizes import Size, SizeTrial
from .options import DTYPES, BackboneOptions, check_timm_options
from .packaged import package_of, packaged_state
from .standardization import Standardization
from .weights import hub_error, load_weights, read_weights, resolve_weights

_COARSE = 8  # pixels, the least stride of levels that are averaged over neighbors
_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES}


class TimmBackbone(Backbone):
    """A frozen timm `features_only` model that runs no stage beyond the last level it returns.

    The features are bit-equal to those of timm's own `features_only` model. Tensors are kept channels_last, which the
    convolution libraries prefer; shapes stay [B, C, H, W].

    Attributes:
        weights_source: `pretrained` (the hub or its cache), `package`, `random` or a path.
    """

    net: nn.Module
    mean: Tensor
    std: Tensor

    def __init__(self, options: BackboneOptions) -> None:
        """Build the model and load its weights.

        Raises:
            BackboneError: unknown name, level, dtype or padding, a model without feature maps or that cannot pad so,
                statistics that are not three numbers, an unreachable hub, or a package that does not exist.
            CheckpointError: a weights file that is missing, damaged or of another model.
            MissingDependencyError: the package that `weights` asks for is not installed.
        """
        super().__init__()
        check_timm_options(options)
        self.name: str = options.name
        self.levels: tuple[int, ...] = tuple(int(level) for level in options.levels)
        self.dtype: str = options.dtype
        self.padding_mode: str = options.padding_mode
        self.neighborhood: int = options.patches_a_side
        info = _build(self.name, options.seed).feature_info
        _check_levels(self.name, self.levels, info)
        self.channels: tuple[int, ...] = tuple(info.channels(list(self.levels)))
        self.strides: tuple[int, ...] = tuple(info.reduction(list(self.levels)))

        self.weights_source: str
        self.weights_source, overlay = resolve_weights(self.name, options.weights)
        net = _build(self.name, options.seed, out_indices=self.levels, overlay=overlay)
        _truncate(net, self.levels)
        if options.padding_mode == "reflect":
            _reflect(net, self.name)
        _load(net, self.name, self.weights_source, options.weights)

        self._channels_come_last = str(getattr(net, "output_fmt", "")).endswith("NHWC")
        source_config = net.pretrained_cfg
        self._usual_size: Size = tuple(source_config["input_size"][1:])
        self._is_fixed_size = bool(source_config.get("fixed_input_size"))
        self._sizes_that_work: set[Size] = set()
        # No tensors of the state dict: they follow from the name or are part of `config`.
        self._chosen: dict[str, list[float]] = {}
        for buffer, chosen in (("mean", options.mean), ("std", options.std)):
            usual = tuple(float(value) for value in source_config[buffer])
            values = usual if chosen is None else _statistics(buffer, chosen)
            if values != usual:
                self._chosen[buffer] = list(values)
            tensor = torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1)
            self.register_buffer(buffer, tensor, persistent=False)
        self.net = _channels_last(net.to(_DTYPES[options.dtype]))
        if options.standardize != "none":
            self.standardization: Standardization = Standardization(self.channels, options.standardize)
        self._freeze()
        if options.compile:
            # In place: a wrapping module would rename every tensor of the state dict.
            self.net.compile()

    def extract(self, images: Tensor) -> list[Tensor]:
        """Return the levels as the network gives them; see `Backbone.forward`.

        A last row or column of patches may be partly outside the image.

        Raises:
            FeatureError: images that the model cannot take, or features that are not maps of this many channels.
        """
        images = unit_range(images, self._smallest)
        height, width = images.shape[-2:]
        self._check_fixed_size(height, width)
        images = ((images - self.mean) / self.std).to(_DTYPES[self.dtype], memory_format=torch.channels_last)
        try:
            features = self.net(images)
        except Exception:
            # A size that does not fit ends in as many kinds of exceptions as there are networks. Others, such as too
            # little memory, stay as they are.
            self.check_image_size(height, width)
            raise
        if self._channels_come_last:
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        for feature, channels in zip(features, self.channels, strict=True):
            if feature.ndim != 4 or feature.shape[1] != channels:
                raise FeatureError(
                    f"{self.name} gives features of the shape {list(feature.shape)} where [batch, {channels}, height, "
                    "width] was expected; choose another backbone"
                )
        return [self._averaged(level, maps) for level, maps in enumerate(features)]

    def check_image_size(self, height: int, width: int) -> None:
        """See `Backbone.check_image_size`; the network is tried without memory, and not at all a second time."""
        check_smallest(height, width, self._smallest)
        self._check_fixed_size(height, width)
        if (height, width) in self._sizes_that_work:
            return
        trial = SizeTrial(self.net)
        if trial.works((height, width)):
            self._sizes_that_work.add((height, width))
            return
        # Where no size at all can be tried, the failure says nothing about this one.
        if near := trial.near((height, width), self._usual_size, self._smallest):
            sizes = " and ".join(f"{rows} x {columns}" for rows, columns in near)
            raise FeatureError(
                f"{self.name} cannot take images of {height} x {width} pixels (height x width): its layers do not fit "
                f"that size. Nearby {sizes} work{'s' * (len(near) == 1)}; choose such an image size, or another "
                "backbone"
            )

    @property
    def _smallest(self) -> int:
        # A reflection needs a neighbor on every map: twice as many pixels as zeros need.
        return max(self.strides) * (2 if self.padding_mode == "reflect" else 1)

    def _check_fixed_size(self, height: int, width: int) -> None:
        if self._is_fixed_size and (height, width) != self._usual_size:
            raise FeatureError(
                f"{self.name} takes images of {self._usual_size[0]} x {self._usual_size[1]} pixels only, not {height} "
                f"x {width}; resize them or choose a convolutional backbone"
            )

    def _averaged(self, level: int, maps: Tensor) -> Tensor:
        """Average over neighbors (Roth et al., PatchCore, CVPR 2022); beyond the border there are none.

        The fine levels are left sharp: there a small defect fills few patches.
        """
        size = self.neighborhood
        if size == 1 or self.strides[level] < _COARSE:
            return maps
        return avg_pool2d(maps, size, stride=1, padding=size // 2, count_include_pad=False)

    def config(self) -> dict[str, Any]:
        """See `Backbone.config`. `compile` is left out: it depends on the machine, not on the model."""
        config = {
            "name": self.name,
            "levels": list(self.levels),
            "dtype": self.dtype,
            "neighborhood": self.neighborhood,
            "standardize": "none" if self.standardization is None else self.standardization.kind,
            **self._chosen,
        }
        if self.padding_mode != "zeros":
            config["padding_mode"] = self.padding_mode
        return config


def blank_extractor(name: str, levels: tuple[int, ...] | None = None) -> Any:
    """Return timm's feature extractor on the meta device, without memory, for names and shapes.

    Raises:
        BackboneError: unknown name, or a model without feature maps.
    """
    with torch.device("meta"):
        return _build(name, seed=0, out_indices=levels)


def whole_state(backbone: TimmBackbone) -> dict[str, Tensor]:
    """Return the state dict of timm's own `features_only` model of these levels: float32 tensors on the CPU.

    Stages that were cut off have random weights, the same at every call; no level depends on them.
    """
    whole = _build(backbone.name, seed=0, out_indices=backbone.levels).state_dict()
    kept = backbone.net.state_dict()
    state = {**whole, **{key: value.detach().cpu() for key, value in kept.items()}}
    return {key: (value.float() if value.is_floating_point() else value).contiguous() for key, value in state.items()}


def _build(
    name: str, seed: int, out_indices: tuple[int, ...] | None = None, overlay: dict[str, Any] | None = None
) -> Any:
    """Return a features_only model with pretrained weights (`overlay`, see `hub_overlay`), or random ones (None)."""
    if not timm.is_model(name.partition(".")[0]):
        question = did_you_mean(name.partition(".")[0], timm.list_models(), most=5, cutoff=0.5).strip()
        hint = question or "`timm.list_models()` lists all"
        raise BackboneError(f"there is no backbone {name!r} in timm {timm.__version__}; {hint}")
    base, _, tag = name.partition(".")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{base}.*")]
    if tag and tag not in tags:
        raise BackboneError(f"{base} has no pretrained weights {tag!r}; {choose(tags or ['none'])}")
    options: dict[str, Any] = {} if out_indices is None else {"out_indices": out_indices}
    if overlay is not None:
        options.update(pretrained=True, pretrained_cfg_overlay=overlay or None)
    try:
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would also reseed the generators of the GPUs.
            torch.default_generator.manual_seed(seed)
            return timm.create_model(name, features_only=True, **options)
    except Exception as error:
        # timm reports a model without feature maps in as many ways as it has model families.
        if overlay is not None:
            raise hub_error(name, error) from error
        raise BackboneError(f"timm offers no feature maps of {name} ({error}); choose another backbone") from error


def _check_levels(name: str, levels: tuple[int, ...], info: Any) -> None:
    count = len(info.info)
    increasing = all(low < high for low, high in itertools.pairwise(levels))
    if not levels or not increasing or levels[0] < 0 or levels[-1] >= count:
        existing = ", ".join(
            f"{level} ({entry['num_chs']} channels, stride {entry['reduction']})"
            for level, entry in enumerate(info.info)
        )
        raise BackboneError(f"{name} has no levels {list(levels)}; name some of these, in increasing order: {existing}")


def _load(net: Any, name: str, source: str, weights: str | Path) -> None:
    """Load weights from a package or a file; `pretrained` and `random` ones are in the network already."""
    if source == "package":
        state, package = packaged_state(name), package_of(name)
        load_weights(net, state, f"the package {package.distribution}" if package else source, name)
    elif source not in ("pretrained", "random"):
        load_weights(net, read_weights(weights), weights, name)


def _truncate(net: Any, levels: tuple[int, ...]) -> None:
    """Cut off everything after the last level, in the classes that timm itself does not cut."""
    if isinstance(net, (EfficientNetFeatures, MobileNetV3Features)) and net.feature_hooks is None:
        # Stage s is the output of blocks[s - 1], stage 0 that of the stem; forward runs all blocks there are.
        last = max(net.feature_info[level]["stage"] for level in levels)
        net.blocks = nn.Sequential(*list(net.blocks)[:last])


def _channels_last(net: nn.Module) -> nn.Module:
    """Lay out the weights of two-dimensional convolutions channels_last, in place.

    `net.to(memory_format=...)` would refuse networks that have a three-dimensional one, too.
    """
    for parameter in net.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return net


def _reflect(net: nn.Module, name: str) -> None:
    """Make every convolution that pads reflect the border instead of adding zeros."""
    convolutions = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    if not all(type(module) is nn.Conv2d and isinstance(module.padding, tuple) for module in convolutions):
        raise BackboneError(f"{name} pads in a way of its own and cannot reflect; leave padding_mode at zeros")
    for module in convolutions:
        if any(module.padding):
            module.padding_mode = "reflect"


def _statistics(what: str, values: Sequence[float]) -> tuple[float, ...]:
    numbers = tuple(float(value) for value in values)
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)) or (what == "std" and min(numbers) <= 0):
        kind = "positive numbers" if what == "std" else "numbers"
        raise BackboneError(f"{what} of a backbone is {list(values)}; give three {kind}, for red, green and blue")
    return numbers
