"""Models of other code as models of fastbgad, and back: backbone, levels, flows and the clamp form.

The files of the official BGAD and CFLOW-AD hold few settings, those of anomalib more; `ReadOptions` holds the rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from ..backbones import GaborBackbone, create_backbone
from ..backbones.weights import load_weights
from ..config import FlowConfig
from ..data import parse_size
from ..errors import CheckpointError, ConfigError, check_choice
from ..flow_spec import ClampForm
from ..model.detector import BGAD
from .checkpoint import KIND_NAMES, ForeignCheckpoint, Kind, Permutation, foreign_state, our_state
from .standardizing_layers import standardizing_layers, with_standardizing_layers

if TYPE_CHECKING:
    from ..backbones.timm_features import TimmBackbone

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLAMP = 1.9  # default of all three codes
# Encoders that are recognized by their tensors. The first that has them all is taken, so the smaller of two with the
# same first stages comes first.
_EFFICIENTNETS = tuple(f"tf_efficientnet_b{size}.aa_in1k" for size in range(8))
_RESNETS = ("resnet18", "resnet34", "resnet50", "wide_resnet50_2", "resnext50_32x4d", "resnet101", "resnet152")


@dataclass(frozen=True)
class ReadOptions:
    """Settings that a checkpoint of other code lacks; those that can be inferred may be left out."""

    backbone: str | None = None
    """timm's name of the backbone; recognized by its tensors if left out."""
    weights: str | None = None
    """Backbone weights instead of the checkpoint's own: pretrained (from the hub), package (needs fastbgad[weights]),
    or a .safetensors, .pth or .pt file."""
    levels: tuple[int, ...] = ()
    """Feature levels, in timm's numbering; if left out, those that the checkpoint's code uses."""
    image_size: tuple[int, int] | None = None
    """Height and width in pixels; the checkpoint's own if it holds them, else 256 256."""
    clamp: float | None = None
    """Bound of the log-scale; the checkpoint's own if it holds it, else 1.9."""
    clamp_form: ClampForm | None = None
    """tanh: clamp * tanh(a), as FrEIA 0.2; scaled_tanh: clamp * tanh(a / clamp), as FrEIA since August 2023.
    If left out: inferred from the file, else tanh."""
    mean: tuple[float, float, float] | None = None
    """Values to subtract from images in [0, 1]; the checkpoint's own if it holds them, else ImageNet's."""
    std: tuple[float, float, float] | None = None
    """Values to divide by after that; likewise."""

    def __post_init__(self) -> None:
        if self.clamp is not None and not self.clamp > 0:
            raise ConfigError(f"clamp is {self.clamp}; it must be positive")
        if self.clamp_form is not None:
            check_choice("clamp_form", self.clamp_form, ClampForm)
        if self.image_size is not None:
            parse_size(self.image_size)


def to_model(foreign: ForeignCheckpoint, options: ReadOptions | None = None) -> BGAD:
    """Return a detector that computes the same as the foreign code, without calibration; it needs no download.

    `BGAD.history["converted"]` names the file, its kind, and the settings that were assumed or inferred.

    Raises:
        CheckpointError: a backbone that is not known, or does not fit the flows or the encoder's tensors.
        ConfigError: a clamp form that the file cannot have.
        BackboneError: see `create_backbone`.
    """
    options, path = options or ReadOptions(), foreign.path
    name = options.backbone or foreign.backbone or _recognize(foreign)
    levels = options.levels or _levels(foreign, name)
    form, why_form = _clamp_form(foreign, options.clamp_form)
    backbone = create_backbone(
        name,
        levels,
        options.weights or "random",
        # The convolutions of CFLOW-AD's own ResNets reflect the border; their tensors are those of any ResNet.
        padding_mode="reflect" if foreign.kind == "cflow-ad" else "zeros",
        mean=options.mean or foreign.mean or IMAGENET_MEAN,
        std=options.std or foreign.std or IMAGENET_STD,
        standardize="none",  # other code leaves features as they are
    )
    channels = tuple(flow.channels for flow in foreign.flows)
    if backbone.channels != channels:
        raise CheckpointError(
            f"the flows in {path} take {joined(channels)} channels, but {name} has {joined(backbone.channels)} at "
            f"levels {joined(levels)}; name what they were trained on: --backbone NAME --levels N ..."
        )
    origin = {"from": foreign.kind, "file": path.name, "permutation": foreign.flows[0].permutation}
    if options.weights is None:
        net = cast("TimmBackbone", backbone).net
        load_weights(net, _needs_encoder(foreign), path, name)
        matched = len(net.state_dict())
        later = max(0, len(foreign.encoder) - matched)
        origin["encoder"] = f"{matched} tensors matched" + (f", {later} of later stages not needed" if later else "")
    else:
        origin["encoder"] = f"weights {options.weights} instead of the checkpoint's"
    clamp, why_clamp = _clamp(foreign, options.clamp)
    config = FlowConfig(
        coupling_layers=foreign.flows[0].coupling_layers,
        condition_channels=foreign.flows[0].condition_channels,
        clamp=clamp,
        clamp_form=form,
        hard_permutation=foreign.flows[0].permutation != "rotation",
    )
    model = BGAD(backbone, options.image_size or foreign.image_size or (256, 256), flow=config, seed=None)
    for level, decoder in enumerate(foreign.decoders):
        model.flow(level).load_state_dict(our_state(decoder))
        model.flow(level).freeze()
    model.history = {"converted": {**origin, "clamp": why_clamp, "clamp_form": why_form}}
    return model.eval()


def _recognize(foreign: ForeignCheckpoint) -> str:
    """Return timm's name of the encoder, recognized by its tensors."""
    from ..backbones.timm_features import blank_extractor

    shapes = {
        key: tensor.shape
        for key, tensor in _needs_encoder(foreign).items()
        if not key.endswith("num_batches_tracked") and not key.startswith("fc.")
    }
    for name in _EFFICIENTNETS if "conv_stem.weight" in shapes else _RESNETS:
        candidate = blank_extractor(name).state_dict()
        if all(key in candidate and candidate[key].shape == shape for key, shape in shapes.items()):
            return name
    raise CheckpointError(
        f"the backbone in {foreign.path} is none that convert recognizes (torchvision's ResNets, timm's "
        "tf_efficientnet_b0 to b7); give timm's name of it: --backbone NAME"
    )


def _needs_encoder(foreign: ForeignCheckpoint) -> dict[str, torch.Tensor]:
    if not foreign.encoder:
        raise CheckpointError(
            f"{foreign.path} holds no backbone; give one: --backbone NAME --weights FILE, or --weights pretrained "
            "or package"
        )
    return foreign.encoder


def _levels(foreign: ForeignCheckpoint, name: str) -> tuple[int, ...]:
    """Return the levels that the foreign code uses, in timm's numbering."""
    from ..backbones.timm_features import blank_extractor

    count = len(foreign.flows)
    if foreign.kind == "bgad":
        return tuple(range(1, count + 1))
    if foreign.kind == "cflow-ad":
        return tuple(range(5 - count, 5))
    if not foreign.layers:
        raise CheckpointError(
            f"{foreign.path} does not name its layers; give their levels in timm's numbering, such as --levels 2 3 4"
        )
    modules = [entry["module"] for entry in blank_extractor(name).feature_info.info]
    unknown = [layer for layer in foreign.layers if isinstance(layer, str) and layer not in modules]
    if unknown:
        raise CheckpointError(
            f"{foreign.path} takes features from {joined(unknown)} of {name}, where no feature level of timm is "
            f"({joined(modules)}); it cannot be converted: train again with `fastbgad train`"
        )
    return tuple(layer if isinstance(layer, int) else modules.index(layer) for layer in foreign.layers)


def _clamp(foreign: ForeignCheckpoint, requested: float | None) -> tuple[float, str]:
    """Return the bound of the log-scale, and where it comes from."""
    if requested is not None:
        return requested, "as asked"
    if foreign.clamp is not None:
        return foreign.clamp, "from the file"
    return _CLAMP, "assumed: the file does not say it"


def _clamp_form(foreign: ForeignCheckpoint, requested: ClampForm | None) -> tuple[ClampForm, str]:
    """Return the clamp form, and the reason for it."""
    implied: tuple[ClampForm, str] | None = None
    if foreign.flows[0].permutation == "index":
        implied = "scaled_tanh", "only FrEIA's main branch stores permutations as indices"
    elif foreign.kind == "anomalib":
        implied = "tanh", "anomalib's own blocks have no other"
    if implied is not None:
        if requested not in (None, implied[0]):
            raise ConfigError(f"{foreign.path} has the clamp form {implied[0]}: {implied[1]}; leave --clamp-form out")
        return implied
    if requested is not None:
        return requested, "as asked"
    return "tanh", "assumed, as in FrEIA 0.2: the file does not say it, see --clamp-form"


def from_model(model: BGAD, kind: Kind, origin: str | Path = "this model") -> dict[str, Any]:
    """Return the content of a checkpoint that the foreign code loads: float32 tensors on the CPU, and plain values.

    Args:
        model: its calibration is left out, since none of the three codes has one.
        kind: of the checkpoint.
        origin: the model's file, for messages.

    Raises:
        CheckpointError: the foreign code cannot compute what this model computes; the message says why.
    """
    obstacles = _obstacles(model, kind)
    if obstacles:
        raise CheckpointError(
            f"{origin} cannot become a checkpoint of {KIND_NAMES[kind]}: {'; '.join(obstacles)}. Choose another --to, "
            "or train a model that it can express"
        )
    from ..backbones.timm_features import whole_state

    backbone = cast("TimmBackbone", model.backbone)
    encoder, permutation = whole_state(backbone), _stored_permutation(model, kind)
    decoders = [foreign_state(_raw_flow(model, level), permutation) for level in range(len(model.flows))]
    if kind != "anomalib":
        return {"encoder_state_dict": encoder, "decoder_state_dict": decoders}
    state = {f"model.encoder.feature_extractor.{key}": tensor for key, tensor in encoder.items()}
    for level, decoder in enumerate(decoders):
        state |= {f"model.decoders.{level}.{key}": tensor for key, tensor in decoder.items()}
    return {**_lightning(model, backbone), "state_dict": {**state, **_no_thresholds()}}


def _raw_flow(model: BGAD, level: int) -> dict[str, torch.Tensor]:
    """Return the state dict of a level's flow for features without standardization."""
    flow, standardization = model.flow(level), model.backbone.standardization
    if standardization is None:
        return flow.state_dict()
    return with_standardizing_layers(flow.state_dict(), flow.spec, *standardization.statistics(level))


def _coupling_layers(model: BGAD) -> int:
    """Return the number of coupling layers of the foreign code's flows."""
    return model.flow_config.coupling_layers + _added_layers(model)


def _added_layers(model: BGAD) -> int:
    """Return the number of coupling layers that standardize the features."""
    standardization = model.backbone.standardization
    return 0 if standardization is None else standardizing_layers(standardization.kind)


def how_to_load(model: BGAD, kind: Kind) -> tuple[str, ...]:
    """Return the settings that the foreign code needs to load a checkpoint of this model, in whole sentences."""
    from ..backbones.timm_features import blank_extractor

    backbone, config = cast("TimmBackbone", model.backbone), model.flow_config
    name, levels, (height, width) = backbone.name.partition(".")[0], len(backbone.levels), model.image_size
    layers, flow = _coupling_layers(model), config.condition_channels
    side = str(height) if height == width else f"SIDE (its images are square, the model's are {height} x {width})"
    notes = []
    if added := _added_layers(model):
        first = "The first" if added == 1 else f"The first {added}"
        notes.append(
            f"{first} of the {layers} coupling layers standardize{'s' * (added == 1)} the features: log-likelihoods "
            "differ from the model's by a constant per level, anomaly maps do not."
        )
    if kind == "bgad":
        arch = "conditional_flow_model" if flow else "flow_model"
        notes.append(
            f"The official code needs --backbone_arch {name} --feature_levels {levels} --flow_arch {arch} "
            f"--coupling_layers {layers} --clamp_alpha {config.clamp:g} --pos_embed_dim {flow or 128} "
            f"--inp_size {side}."
        )
    elif kind == "cflow-ad":
        arch = "freia-cflow" if flow else "freia-flow"
        notes.append(
            f"CFLOW-AD needs --enc-arch {name} --dec-arch {arch} --pool-layers {levels} "
            f"--coupling-blocks {layers} --input-size {side}, and in main.py c.clamp_alpha = {config.clamp:g} and "
            f"c.condition_vec = {flow or 128}."
        )
    else:
        notes.append(
            "anomalib loads it with Cflow.load_from_checkpoint(PATH); it has no thresholds, and scores are not "
            "normalized, before anomalib has validated it."
        )
    mean, std = _normalization(backbone)
    if kind != "anomalib" and (mean, std) != (IMAGENET_MEAN, IMAGENET_STD):
        notes.append(f"In its main.py, norm_mean is to be {list(mean)} and norm_std {list(std)}.")
    if config.clamp_form == "scaled_tanh":
        notes.append("It computes the same only with FrEIA's main branch, whose clamp form the model has.")
    if len(blank_extractor(backbone.name, backbone.levels).state_dict()) > len(backbone.net.state_dict()):
        notes.append(
            "Backbone stages after the last level are not part of the model: theirs are random weights, unused."
        )
    return tuple(notes)


def _obstacles(model: BGAD, kind: Kind) -> list[str]:
    """Return the reasons why the foreign code cannot compute the same as the model; empty if it can."""
    if isinstance(model.backbone, GaborBackbone):
        return ["its backbone gabor exists in fastbgad alone"]
    backbone, config = cast("TimmBackbone", model.backbone), model.flow_config
    levels, reasons = backbone.levels, []
    last = tuple(range(5 - len(levels), 5))
    if kind == "bgad" and levels != tuple(range(1, len(levels) + 1)):
        reasons.append(f"it takes levels 1 to {len(levels)}, the model has {joined(levels)}")
    if kind == "cflow-ad" and backbone.name.partition(".")[0] not in _RESNETS:
        reasons.append(f"its backbones are torchvision's ResNets, the model has {backbone.name}")
    elif kind == "cflow-ad" and (levels != last or len(levels) > 3):
        reasons.append(f"it takes the last levels up to 4, at most three, the model has {joined(levels)}")
    if (kind == "cflow-ad") != (backbone.padding_mode == "reflect"):
        reasons.append(
            f"its convolutions pad with {'reflections' if kind == 'cflow-ad' else 'zeros'}, the model's with "
            f"{'zeros' if kind == 'cflow-ad' else 'reflections'}"
        )
    if config.global_affine != "SOFTPLUS":
        reasons.append(f"it knows the global scale SOFTPLUS, the model has {config.global_affine}")
    if backbone.neighborhood > 1:
        reasons.append("its features are averaged over neighbors (--neighborhood 1 would leave them as they are)")
    whitens = backbone.standardization is not None and backbone.standardization.kind == "whiten"
    if whitens and config.hard_permutation:
        reasons.append("its features are whitened, which needs soft permutations, and the model has hard ones")
    if kind == "anomalib" and config.clamp_form != "tanh":
        reasons.append(f"it knows the clamp form tanh, the model has {config.clamp_form}")
    if kind == "anomalib" and not config.condition_channels:
        reasons.append("its flows are conditioned on the position, the model's are not")
    if kind == "anomalib" and "vit" in backbone.name:
        reasons.append(f"it takes tokens, not feature maps, from {backbone.name}")
    return reasons


def _stored_permutation(model: BGAD, kind: Kind) -> Permutation:
    """Return the form in which to store permutations: that of the source, or of the FrEIA with this clamp form."""
    if not model.flow_config.hard_permutation:
        return "rotation"
    original = origin_of(model).get("permutation")
    if kind == "anomalib" or original == "matrix":
        return "matrix"
    return "index" if original == "index" or model.flow_config.clamp_form == "scaled_tanh" else "matrix"


def _lightning(model: BGAD, backbone: TimmBackbone) -> dict[str, Any]:
    """Return the entries that Lightning and anomalib need beside the tensors, in the layout of anomalib 2.7."""
    from ..backbones.timm_features import blank_extractor

    modules = [entry["module"] for entry in blank_extractor(backbone.name).feature_info.info]
    config = model.flow_config
    (mean, std), transforms = _normalization(backbone), "torchvision.transforms.v2."
    resize = {"size": list(model.image_size), "interpolation": "bilinear", "max_size": None, "antialias": True}
    steps = [
        {"class_path": f"{transforms}Resize", "init_args": resize},
        {"class_path": f"{transforms}Normalize", "init_args": {"mean": list(mean), "std": list(std), "inplace": False}},
    ]
    return {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": "2.6.0",
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {
            "backbone": backbone.name,
            "layers": tuple(modules[level] for level in backbone.levels),
            "pre_trained": False,
            "decoder": "freia-cflow",
            "condition_vector": config.condition_channels,
            "coupling_blocks": _coupling_layers(model),
            "clamp_alpha": config.clamp,
            "permute_soft": not config.hard_permutation,
        },
        "anomalib_pre_processor_config": {
            "transform": {"class_path": f"{transforms}Compose", "init_args": {"transforms": steps}}
        },
    }


def _no_thresholds() -> dict[str, torch.Tensor]:
    """Return the state of anomalib's post-processing before it has seen any image."""
    names = ("_image_threshold", "_pixel_threshold", "image_min", "image_max", "pixel_min", "pixel_max")
    return {f"post_processor.{name}": torch.tensor(torch.nan) for name in names}


def _normalization(backbone: TimmBackbone) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation that images are normalized with."""
    # Rounded: the buffers are float32, the values were decimal numbers.
    mean, std = (tuple(round(v, 6) for v in buffer.flatten().tolist()) for buffer in (backbone.mean, backbone.std))
    return mean, std


def origin_of(model: BGAD) -> dict[str, str]:
    """Return the origin that a converted model's history names; empty for other models."""
    return dict(model.history.get("converted", {}))


def joined(values: Iterable[object]) -> str:
    """Join values to a list in words: "1, 2, 3"."""
    return ", ".join(map(str, values))
