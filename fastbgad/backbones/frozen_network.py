"""A frozen convolutional network made ready for inference on a CPU: the same function with less to do.

Eager PyTorch runs a batch normalization after every convolution as a separate pass, and converts each convolution's
weights to oneDNN's layout at every call: for wide_resnet50_2 at 256 pixels a third of the time. Here
normalizations are folded into the convolutions before them (`torch.fx`), weights are laid out once, and a ReLU that
alone follows a convolution is part of it. These are the operations that torch.compile's freezing uses on a CPU; nothing
is compiled here.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.tensor_state import TensorState, tensor_state

# In units of a result's largest value: rounding of folded weights, through all layers.
TOLERANCE = 1e-3


@torch.no_grad()
def frozen_network(net: nn.Module, images: Tensor) -> nn.Module:
    """Return a network with the results of `net`, up to rounding, for float32 images of any number.

    Args:
        net: in evaluation mode. It is not changed; later changes of it do not reach the result.
        images: [B, 3, H, W] float32 on the CPU: weights are laid out for this size, and results compared on them.

    Returns:
        The prepared copy; `net` itself where it cannot be traced, where the results differ, or where there is nothing
        to gain (another type or device).
    """
    if net.training or images.device.type != "cpu" or images.dtype != torch.float32:
        return net
    from torch.fx.experimental.optimization import fuse

    try:
        prepared: Any = fuse(net)
        if torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled:
            _pack(prepared, images)
        results, expected = _tensors(prepared(images)), _tensors(net(images))
    except Exception:  # some networks cannot be traced, and the private operators may change: then only speed is lost
        return net
    close = len(results) == len(expected) and all(
        a.shape == b.shape and bool((a - b).abs().max() <= TOLERANCE * b.abs().max())
        for a, b in zip(results, expected, strict=True)
    )
    return prepared if close else net


class PackedConvolution(nn.Module):
    """A convolution with its weights in oneDNN's layout, and perhaps a ReLU."""

    def __init__(self, convolution: nn.Conv2d, relu: bool, input_size: list[int]) -> None:
        super().__init__()
        self.geometry: tuple[str | tuple[int, ...], tuple[int, ...], tuple[int, ...], int] = (
            convolution.padding,
            convolution.stride,
            convolution.dilation,
            convolution.groups,
        )
        weight = convolution.weight.detach().to(memory_format=torch.channels_last)
        self.weight: Any = torch.ops.mkldnn._reorder_convolution_weight(weight, *self.geometry, input_size)
        self.bias: Tensor | None = None if convolution.bias is None else convolution.bias.detach()
        self.activation = "relu" if relu else "none"

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, *self.geometry, self.activation, [], ""
        )


def _pack(graph: torch.fx.GraphModule, images: Tensor) -> None:
    """Replace the convolutions of a traced network, in place."""
    sizes = _InputSizes(graph)
    sizes.run(images)
    modules = dict(graph.named_modules())
    for node in list(graph.graph.nodes):
        convolution = modules.get(node.target) if node.op == "call_module" else None
        if type(convolution) is not nn.Conv2d or isinstance(convolution.padding, str):
            continue
        if convolution.padding_mode != "zeros":
            continue
        user, *others = node.users
        relu = not others and user.op == "call_module" and type(modules[user.target]) is nn.ReLU
        parent, _, name = node.target.rpartition(".")
        setattr(graph.get_submodule(parent), name, PackedConvolution(convolution, relu, sizes.by_module[node.target]))
        if relu:
            user.replace_all_uses_with(node)
            graph.graph.erase_node(user)
    graph.recompile()


class _InputSizes(torch.fx.Interpreter):
    """An interpreter of a traced network that records the size of each module's input."""

    def __init__(self, graph: torch.fx.GraphModule) -> None:
        super().__init__(graph)
        self.by_module: dict[str, list[int]] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        self.by_module.setdefault(target, list(args[0].shape))
        return super().call_module(target, args, kwargs)


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return list(result.values() if isinstance(result, dict) else result)


class FrozenCopy:
    """The prepared copy of one network, made again when the network's tensors change.

    Only changes that PyTorch counts are noticed. Copies and pickles of this object start empty.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Drop the copy."""
        self.network: nn.Module | None = None
        self._state: TensorState = ()

    def of(self, net: nn.Module, images: Tensor) -> nn.Module:
        """Return the prepared copy of `net` for such images, see `frozen_network`."""
        state = tensor_state((*net.parameters(), *net.buffers()))
        if state != self._state or self.network is None:
            self.network, self._state = frozen_network(net, images), state
        return self.network

    def __reduce__(self) -> tuple[type[FrozenCopy], tuple[()]]:
        return FrozenCopy, ()


def with_child(module: nn.Module, name: str, child: nn.Module) -> nn.Module:
    """Return a shallow copy of a module with one child replaced; the module itself is unchanged."""
    copied = copy.copy(module)
    copied._modules = {**module._modules, name: child}
    return copied
