"""Checkpoint files of other code: the official BGAD, CFLOW-AD and anomalib's Cflow, recognized by their content.

Files are read by PyTorch's restricted unpickler only: classes that it does not know are replaced by inert objects, and
no code in a file is executed. The shapes of the flows are inferred from their tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, TypeGuard

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..ops.permutations import is_permutation_matrix, permutation_matrix
from ..system.files import atomic_path
from ..system.torch_file import read_torch_file
from ..wording import listed

Kind = Literal["bgad", "cflow-ad", "anomalib"]
Permutation = Literal["rotation", "matrix", "index"]

KIND_NAMES: dict[str, str] = {"bgad": "official BGAD", "cflow-ad": "CFLOW-AD", "anomalib": "anomalib Cflow"}
"""Name of each kind of checkpoint in messages."""

_READABLE = "convert reads the .pt files of the official BGAD and of CFLOW-AD, and the .ckpt files of anomalib's Cflow"
_ENCODER = "encoder.feature_extractor."  # prefix of timm's model in anomalib's
_SHOWN = 3
# The tensors of one FrEIA AllInOneBlock whose subnet is Linear, ReLU, Linear.
_BLOCK = (
    "global_scale",
    "global_offset",
    "w_perm",
    "w_perm_inv",
    "subnet.0.weight",
    "subnet.0.bias",
    "subnet.2.weight",
    "subnet.2.bias",
)


class FlowShape(NamedTuple):
    """Shape of a flow, inferred from its tensors."""

    channels: int
    condition_channels: int  # 0 for an unconditional flow
    coupling_layers: int
    permutation: Permutation  # general rotations; permutation matrices; or indices, as FrEIA's main branch stores them


class _Preprocessing(NamedTuple):
    """Preprocessing of images that an anomalib checkpoint describes; see `ForeignCheckpoint`."""

    image_size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ForeignCheckpoint:
    """A checkpoint of other code, read and checked, its flows one per level.

    Attributes:
        path: the file.
        kind: the code that wrote it.
        encoder: the backbone's tensors under their own names; empty if the file has none.
        decoders: per level the state dict of FrEIA's `SequenceINN`, unchanged.
        flows: shape of the flow of each level.
        backbone: timm's name of the backbone, if the file names it.
        layers: names or indices of the feature levels, if the file names them.
        clamp: bound of the log-scale, if the file gives it.
        image_size: (height, width) in pixels, if the file gives it.
        mean: three values to subtract from images in [0, 1], if the file gives them.
        std: three values to divide by after that, likewise.
        notes: settings in the file that fastbgad does not follow, in whole sentences.
    """

    path: Path
    kind: Kind
    encoder: dict[str, Tensor]
    decoders: tuple[dict[str, Tensor], ...]
    flows: tuple[FlowShape, ...]
    backbone: str | None = None
    layers: tuple[str | int, ...] = ()
    clamp: float | None = None
    image_size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    notes: tuple[str, ...] = ()


def read_foreign(path: str | Path) -> ForeignCheckpoint:
    """Read a checkpoint of the official BGAD, of CFLOW-AD or of anomalib's Cflow, without running any code in it.

    Raises:
        CheckpointError: no such file, damaged, none of the three, or a flow that fastbgad does not have.
    """
    path = Path(path)
    content = _load(path)
    if isinstance(content, Mapping) and "decoder_state_dict" in content:
        return _from_state_dicts(path, content)
    if isinstance(content, Mapping):
        state = content.get("state_dict", content)
        if isinstance(state, Mapping) and any(re.match(r"(model\.)?decoders\.0\.module_list\.", str(k)) for k in state):
            return _from_anomalib(path, content, state)
        described = _listed(map(str, state if isinstance(state, Mapping) else content))
    else:
        described = f"a {type(content).__name__}"
    raise CheckpointError(f"{path} holds {described} and no flows of FrEIA: {_READABLE}")


def write_foreign(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint with `torch.save`, atomically; raise `OutputError` if that is not possible."""
    # Through an open file: given a path, torch.save would write the temporary file's name into the archive.
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        torch.save(dict(content), file)


def our_state(decoder: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a flow's tensors as `fastbgad.ConditionalFlow` loads them: float32, permutations as matrices [C, C]."""
    state = {}
    for key, tensor in decoder.items():
        if not tensor.is_floating_point():
            tensor = permutation_matrix(tensor, torch.float32)
        state[key] = tensor.float()
    return state


def foreign_state(flow: Mapping[str, Tensor], permutation: Permutation) -> dict[str, Tensor]:
    """Return a `fastbgad.ConditionalFlow`'s state dict as FrEIA loads it, on the CPU; the inverse of `our_state`."""
    state = {}
    for key, tensor in flow.items():
        tensor = tensor.detach().cpu()
        if permutation == "index" and key.rpartition(".")[2] in ("w_perm", "w_perm_inv"):
            tensor = tensor.argmax(dim=1)
        state[key] = tensor.clone(memory_format=torch.contiguous_format)
    return state


def _load(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; {_READABLE}")
    return read_torch_file(path, f"copy it again from its source. {_READABLE}", inert_objects=True)


def _from_state_dicts(path: Path, content: Mapping[str, Any]) -> ForeignCheckpoint:
    """Read the layout of the official BGAD and CFLOW-AD: an encoder and a list of decoders."""
    encoder = _tensors(path, content.get("encoder_state_dict", {}), "encoder_state_dict")
    states = content["decoder_state_dict"]
    if isinstance(states, Mapping) and any(str(key).startswith("module_list.") for key in states):
        states = [states]  # a single decoder
    elif isinstance(states, Mapping):
        states = _by_number(path, {str(key): value for key, value in states.items()})
    if not isinstance(states, (list, tuple)) or not states:
        raise CheckpointError(f"{path} has no flows in its decoder_state_dict; save it again from the trained model")
    decoders = tuple(_tensors(path, state, f"decoder {level + 1}") for level, state in enumerate(states))
    flows = _flow_shapes(path, decoders)
    return ForeignCheckpoint(path, _kind_of(path, encoder, flows), encoder, decoders, flows)


def _from_anomalib(path: Path, content: Mapping[str, Any], state: Mapping[str, Any]) -> ForeignCheckpoint:
    """Read anomalib's layout: the state dict of the Lightning module, hyperparameters and preprocessing."""
    everything = {str(key).removeprefix("model."): value for key, value in state.items()}
    encoder = {k.removeprefix(_ENCODER): value for k, value in everything.items() if k.startswith(_ENCODER)}
    numbered = {k.removeprefix("decoders."): value for k, value in everything.items() if k.startswith("decoders.")}
    decoders = tuple(
        _tensors(path, part, f"decoder {level + 1}") for level, part in enumerate(_by_number(path, numbered))
    )
    options = content.get("hyper_parameters") if content is not state else None
    options = options if isinstance(options, Mapping) else {}
    backbone, layers, clamp = options.get("backbone"), options.get("layers"), options.get("clamp_alpha")
    layers = tuple(layer for layer in layers if isinstance(layer, (str, int))) if _is_sequence(layers) else ()
    if layers and len(layers) != len(decoders):
        raise CheckpointError(
            f"{path} names {len(layers)} layers ({', '.join(map(str, layers))}) but holds {len(decoders)} flows, so "
            "that levels are missing; save it again from the trained model"
        )
    preprocessing = _preprocessing(content.get("anomalib_pre_processor_config"))
    return ForeignCheckpoint(
        path,
        "anomalib",
        _tensors(path, encoder, "encoder"),
        decoders,
        _flow_shapes(path, decoders),
        backbone=backbone if isinstance(backbone, str) else None,
        layers=layers,
        clamp=float(clamp) if isinstance(clamp, (int, float)) else None,
        **preprocessing._asdict(),
    )


def _preprocessing(config: object) -> _Preprocessing:
    """Read image size, mean and deviation in anomalib's description of its transform, and note what else is in it."""
    found = _Preprocessing()
    for name, args in _transforms(config.get("transform") if isinstance(config, Mapping) else None):
        size = args.get("size")
        if name == "Normalize" and _is_sequence(args.get("mean")) and _is_sequence(args.get("std")):
            found = found._replace(mean=tuple(map(float, args["mean"])), std=tuple(map(float, args["std"])))
        elif name == "Resize" and _is_sequence(size) and len(size) == 2:
            found = found._replace(image_size=(int(size[0]), int(size[1])))
        else:
            note = f"anomalib also applied {name} to images, which is not taken over."
            found = found._replace(notes=(*found.notes, note))
    return found


def _transforms(spec: object) -> list[tuple[str, Mapping[str, Any]]]:
    """Return class name and arguments of every transform in anomalib's nested description."""
    if not isinstance(spec, Mapping) or not isinstance(spec.get("init_args"), Mapping):
        return []
    name, args = str(spec.get("class_path", "")).rpartition(".")[2], spec["init_args"]
    if name == "Compose" and _is_sequence(args.get("transforms")):
        return [inner for part in args["transforms"] for inner in _transforms(part)]
    return [(name, args)]


def _by_number(path: Path, state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the parts "0.*", "1.*", ... of a module list's state dict."""
    parts: dict[str, dict[str, Any]] = {}
    for key, value in state.items():
        number, _, rest = key.partition(".")
        parts.setdefault(number, {})[rest] = value
    missing = [str(level) for level in range(len(parts)) if str(level) not in parts]
    if missing:
        raise CheckpointError(
            f"{path} lacks the flow of level {', '.join(missing)} (counted from 0) of {len(parts)}; save it again from "
            "the trained model"
        )
    return [parts[str(level)] for level in range(len(parts))]


def _tensors(path: Path, state: object, what: str) -> dict[str, Tensor]:
    """Return a state dict without the prefix of data parallel training; raise `CheckpointError` if it is none."""
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: {what} is no dict of tensors; save it again with the model's `state_dict()`")
    tensors = {str(key): value.detach() for key, value in state.items()}
    if tensors and all(key.startswith("module.") for key in tensors):
        return {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors


def _kind_of(path: Path, encoder: Mapping[str, Tensor], flows: tuple[FlowShape, ...]) -> Kind:
    """Tell the official BGAD from CFLOW-AD, which saves the same layout, by the encoder.

    The official BGAD takes timm's `features_only` levels 1 to L; CFLOW-AD takes the last L <= 3 layers of a ResNet of
    its own.
    """
    # CFLOW-AD's other encoders are whole classifiers with hooks inside their blocks, where timm has no feature level.
    if any(re.match(r"(conv_head|blocks\.0\.attn|\d+\.(\d+|block))\.", key) for key in encoder):
        raise CheckpointError(
            f"{path} is a CFLOW-AD checkpoint whose encoder is no ResNet: it takes features from within the blocks of "
            "its network, where no backbone of fastbgad does; train again with `fastbgad train --method nfad`"
        )
    last = [f"layer{stage}" for stage in range(5 - len(flows), 5)]
    if 1 <= len(flows) <= 3 and [_stage_channels(encoder, stage) for stage in last] == [f.channels for f in flows]:
        return "cflow-ad"
    return "bgad"


def _stage_channels(encoder: Mapping[str, Tensor], stage: str) -> int | None:
    """Return the channels of a ResNet's layer: those of the last normalization of its first block."""
    norms = [key for key in encoder if re.fullmatch(rf"{stage}\.0\.bn\d\.weight", key)]
    return len(encoder[max(norms)]) if norms else None


def _flow_shapes(path: Path, decoders: tuple[dict[str, Tensor], ...]) -> tuple[FlowShape, ...]:
    """Return the shape of the flow of each level; they differ in their channels alone."""
    flows = tuple(_flow_shape(f"{path}: flow {level + 1}", state) for level, state in enumerate(decoders))
    for field in ("condition_channels", "coupling_layers", "permutation"):
        values = [getattr(flow, field) for flow in flows]
        if len(set(values)) > 1:
            raise CheckpointError(
                f"{path}: its flows differ in {field.replace('_', ' ')} ({', '.join(map(str, values))}), which no "
                "model of fastbgad does; train again with `fastbgad train`"
            )
    return flows


def _flow_shape(where: str, state: Mapping[str, Tensor]) -> FlowShape:
    """Return the shape of a flow; raise `CheckpointError` if fastbgad has no such flow."""
    blocks: dict[int, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = re.fullmatch(r"module_list\.(\d+)\.(.+)", key)
        if match is None:
            _refuse(where, f"has {key}, which belongs to no SequenceINN of FrEIA")
        blocks.setdefault(int(match[1]), {})[match[2]] = tensor
    if not blocks or sorted(blocks) != list(range(len(blocks))):
        _refuse(where, f"has the coupling layers {sorted(blocks)}, which are not all from 0 on")
    shapes = [_block(f"{where}, coupling layer {n}", blocks[n]) for n in range(len(blocks))]
    channels, condition, _ = shapes[0]
    if any(shape[:2] != (channels, condition) for shape in shapes):
        _refuse(where, "has coupling layers of different widths")
    kinds = {permutation for _, _, permutation in shapes}
    if "index" in kinds and len(kinds) > 1:
        _refuse(where, "stores some permutations as indices and some as matrices")
    # A permutation matrix among rotations counts as a rotation; only a flow of permutations needs no products for them.
    permutation: Permutation = kinds.pop() if len(kinds) == 1 else "rotation"
    return FlowShape(channels, condition, len(blocks), permutation)


def _block(where: str, block: Mapping[str, Tensor]) -> tuple[int, int, Permutation]:
    """Return the channels C, condition channels P and kind of permutation of one coupling layer."""
    if "vk_householder" in block:
        _refuse(where, "permutes by learned Householder reflections, which fastbgad does not have")
    differing = [*(name for name in _BLOCK if name not in block), *(name for name in block if name not in _BLOCK)]
    if differing:
        _refuse(where, f"lacks tensors of FrEIA's AllInOneBlock or has others: {_listed(differing)}")
    scale, w_perm, w_perm_inv = block["global_scale"], block["w_perm"], block["w_perm_inv"]
    first, second = block["subnet.0.weight"], block["subnet.2.weight"]
    if scale.ndim != 2 or first.ndim != 2 or second.ndim != 2:
        _refuse(where, "works on images, not on patches")
    channels = scale.shape[1]
    active = channels // 2
    condition = first.shape[1] - (channels - active)
    hidden = 2 * first.shape[1]
    index = not w_perm.is_floating_point()
    expected = {
        "global_scale": (1, channels),
        "global_offset": (1, channels),
        "w_perm": (channels,) if index else (channels, channels),
        "w_perm_inv": (channels,) if index else (channels, channels),
        "subnet.0.weight": (hidden, first.shape[1]),
        "subnet.0.bias": (hidden,),
        "subnet.2.weight": (2 * active, hidden),
        "subnet.2.bias": (2 * active,),
    }
    misshapen = [
        f"{name} {list(block[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if tuple(block[name].shape) != shape
    ]
    if misshapen:
        _refuse(where, f"has the shapes {_listed(misshapen)}")
    if channels < 2 or condition < 0 or condition % 4:
        _refuse(where, f"has {channels} channels and {condition} of its condition, which must be a multiple of 4")
    damaged = [name for name, tensor in block.items() if not torch.isfinite(tensor).all()]
    if damaged:
        raise CheckpointError(f"{where} holds NaN or Inf in {_listed(damaged)}; its training diverged: train again")
    return channels, condition, _permutation(where, w_perm, w_perm_inv)


def _permutation(where: str, w_perm: Tensor, w_perm_inv: Tensor) -> Permutation:
    if w_perm.ndim == 1:
        p, inverse = w_perm.long(), w_perm_inv.long()
        every = torch.arange(len(p))
        if not torch.equal(p.sort().values, every) or not torch.equal(p[inverse.clamp(0, len(p) - 1)], every):
            _refuse(where, "stores indices that are no permutation, or an inverse of another one")
        return "index"
    return "matrix" if is_permutation_matrix(w_perm) else "rotation"


def _refuse(where: str, reason: str) -> NoReturn:
    raise CheckpointError(f"{where} {reason}: it cannot be converted; train again with `fastbgad train`")


def _is_sequence(value: object) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    return isinstance(value, (list, tuple))


def _listed(names: Iterable[str]) -> str:
    return listed(list(names), _SHOWN) or "nothing"
