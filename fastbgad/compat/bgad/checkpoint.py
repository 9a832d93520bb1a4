"""The official BGAD code's weight files: one `torch.save` of the encoder's state and the list of the decoders'."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CheckpointError
from ...system.files import atomic_path
from ...system.torch_file import read_torch_file
from ...wording import listed

_SHOWN_KEYS = 3

Decoders = nn.Module | Iterable[nn.Module]


def save_weights(
    encoder: nn.Module, decoders: Decoders, output_dir: str | Path, exp_name: str, model_path: str
) -> None:
    """Write `<output_dir>/<exp_name>/weights/<model_path>.pt` atomically.

    The file holds `encoder_state_dict` and `decoder_state_dict`, a list of one state per decoder (or one state where
    `decoders` is a single module). Tensors are written from the CPU, so that a machine without a GPU can read them.

    Raises:
        OutputError: the file cannot be written; an older file stays as it was.
    """
    states = [_state_on_cpu(decoder) for decoder in _as_list(decoders)]
    content = {
        "encoder_state_dict": _state_on_cpu(encoder),
        "decoder_state_dict": states[0] if _is_single(decoders) else states,
    }
    target = Path(output_dir) / exp_name / "weights" / f"{model_path}.pt"
    # Through a file object a full disk is an OSError; through a path it would be a RuntimeError of PyTorch's.
    with atomic_path(target) as temporary, temporary.open("wb") as file:
        torch.save(content, file)


def load_weights(encoder: nn.Module, decoders: Decoders, filename: str | Path) -> None:
    """Load a file of `save_weights`, this one or the official one, into the encoder and the decoders, in place.

    Decoders must fit exactly, where the official code skips tensors that do not and continues with random weights. The
    encoder's tensors are loaded where both sides have the name, since names differ between versions of timm; if there
    is no such name, that is an error. Nothing is loaded unless everything fits. No code in the file is executed.

    Args:
        encoder: the feature extractor.
        decoders: the flows, one per level: fastbgad's or FrEIA's; or a single module.
        filename: the file.

    Raises:
        CheckpointError: no such file, damaged content, or tensors of another architecture.
    """
    path = Path(filename)
    encoder_state, decoder_states = _parts(path, _read(path))
    modules = _as_list(decoders)
    if len(decoder_states) != len(modules):
        raise CheckpointError(
            f"{path} holds {len(decoder_states)} decoders but {len(modules)} were given; set feature_levels to what "
            "the file was written with"
        )
    _check_encoder(path, encoder, encoder_state)
    for level, (module, state) in enumerate(zip(modules, decoder_states, strict=True)):
        _check_decoder(path, level, module, state)
    encoder.load_state_dict(encoder_state, strict=False)
    for module, state in zip(modules, decoder_states, strict=True):
        module.load_state_dict(state)


def _read(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"no weights file {path}; give the path of a file that save_weights wrote")
    return read_torch_file(path, "get the file again, or write it again with save_weights")


def _parts(path: Path, content: Any) -> tuple[Mapping[str, Tensor], list[Mapping[str, Tensor]]]:
    """Return the encoder's state and a list of the decoders' states."""
    content = content if isinstance(content, Mapping) else {}
    encoder, decoders = content.get("encoder_state_dict"), content.get("decoder_state_dict")
    states = [decoders] if isinstance(decoders, Mapping) else decoders
    if not (isinstance(encoder, Mapping) and isinstance(states, list) and all(isinstance(s, Mapping) for s in states)):
        raise CheckpointError(
            f"{path} is no weights file of BGAD: it needs encoder_state_dict and a list decoder_state_dict; give a "
            "file that save_weights wrote"
        )
    return encoder, states


def _check_encoder(path: Path, encoder: nn.Module, state: Mapping[str, Tensor]) -> None:
    expected = encoder.state_dict()
    shared = expected.keys() & state.keys()
    remedy = "use the backbone that the file was written with"
    if expected and not shared:
        raise CheckpointError(f"{path}: no tensor of the encoder has a name that is in the file; {remedy}")
    if problems := _shape_differences(expected, state, shared):
        shown = listed(problems, _SHOWN_KEYS)
        raise CheckpointError(f"{path}: {len(problems)} tensors of the encoder differ: {shown}; {remedy}")


def _check_decoder(path: Path, level: int, decoder: nn.Module, state: Mapping[str, Tensor]) -> None:
    expected = decoder.state_dict()
    problems = [f"{key} is missing" for key in expected if key not in state]
    problems += [f"{key} is not expected" for key in state if key not in expected]
    problems += _shape_differences(expected, state, expected.keys() & state.keys())
    if problems:
        raise CheckpointError(
            f"{path} does not fit decoder {level} in {len(problems)} tensors: {listed(problems, _SHOWN_KEYS)}; use the "
            "flow_arch, coupling_layers, pos_embed_dim and backbone that the file was written with"
        )


def _shape_differences(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], keys: Iterable[str]) -> list[str]:
    """Return one line for each of these keys whose tensors differ in shape."""
    return [
        f"{key} is {_shape(state[key])} instead of {_shape(expected[key])}"
        for key in sorted(keys)
        if _shape(state[key]) != _shape(expected[key])
    ]


def _shape(value: object) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _is_single(decoders: Decoders) -> bool:
    return isinstance(decoders, nn.Module) and not isinstance(decoders, nn.ModuleList)


def _as_list(decoders: Decoders) -> list[nn.Module]:
    # Not by trying to iterate: FrEIA's flows are iterable as well, over their layers.
    return [decoders] if _is_single(decoders) else list(decoders)  # type: ignore[list-item, arg-type]


def _state_on_cpu(module: nn.Module) -> dict[str, Any]:
    state = module.state_dict()
    for key, value in state.items():
        if isinstance(value, Tensor):
            state[key] = value.detach().cpu()
    return state
