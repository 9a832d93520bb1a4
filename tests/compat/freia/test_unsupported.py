"""Flows, options and inputs that `fastbgad.accelerate` refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fastbgad
from fastbgad.errors import ConfigError, FeatureError, UnsupportedFlowError

from ...flows import subnet
from .freia_flows import flow_of, inputs

pytestmark = pytest.mark.usefixtures("few_rows_are_enough")


def unsupported_flows() -> dict[str, tuple[Any, str]]:
    import FrEIA.framework as Ff
    import FrEIA.modules as Fm

    def block(make: Any = subnet, channels: int = 6, **options: Any) -> Any:
        flow = Ff.SequenceINN(channels)
        flow.append(Fm.AllInOneBlock, subnet_constructor=make, **options)
        return flow

    def mixed() -> Any:
        flow = block()
        flow.append(Fm.AllInOneBlock, subnet_constructor=subnet, affine_clamping=3.0)
        return flow

    def other_module() -> Any:
        flow = block()
        flow.append(Fm.PermuteRandom)
        return flow

    def two_conditions() -> Any:
        flow = Ff.SequenceINN(6)
        for which in (0, 1):
            flow.append(Fm.AllInOneBlock, cond=which, cond_shape=(8,), subnet_constructor=subnet)
        return flow

    def another_clamp() -> Any:
        flow = block()
        flow.module_list[0]._affine = lambda x, a: (x * torch.exp(0.2 * torch.atan(0.1 * a[:, : x.shape[1]])), 0)
        return flow

    def not_orthogonal() -> Any:
        flow = block(permute_soft=True)
        with torch.no_grad():
            flow.module_list[0].w_perm.mul_(2)
        return flow

    def hidden_change() -> Any:
        """A subclass that computes something else while its attributes are those of an AllInOneBlock."""

        class AllInOneBlock(Fm.AllInOneBlock):
            def forward(self, x: Any, c: Any = (), rev: bool = False, jac: bool = True) -> Any:
                out, log_det = super().forward(x, c, rev, jac)
                return (2 * out[0],), log_det

        flow = Ff.SequenceINN(6)
        flow.append(AllInOneBlock, subnet_constructor=subnet)
        return flow

    def poisoned() -> Any:
        flow = block()
        with torch.no_grad():
            flow.module_list[0].global_offset[0, 0] = torch.nan
        return flow

    def maps() -> Any:
        flow = Ff.SequenceINN(6, 4, 4)
        flow.append(Fm.AllInOneBlock, subnet_constructor=lambda i, o: nn.Conv2d(i, o, 1))
        return flow

    deep = lambda i, o: nn.Sequential(nn.Linear(i, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, o))  # noqa: E731
    gelu = lambda i, o: nn.Sequential(nn.Linear(i, 2 * i), nn.GELU(), nn.Linear(2 * i, o))  # noqa: E731
    narrow = lambda i, o: nn.Sequential(nn.Linear(i, 5), nn.ReLU(), nn.Linear(5, o))  # noqa: E731
    bare = lambda i, o: nn.Sequential(nn.Linear(i, 2 * i, bias=False), nn.ReLU(), nn.Linear(2 * i, o))  # noqa: E731
    return {
        "GIN": (block(gin_block=True), "GIN"),
        "Householder": (block(learned_householder_permutation=2), "learned"),
        "reverse": (block(reverse_permutation=True), "reverse_permutation"),
        "deep subnet": (block(deep), "only Linear, ReLU, Linear"),
        "gelu subnet": (block(gelu), "GELU"),
        "narrow subnet": (block(narrow), "5 hidden units"),
        "subnet without bias": (block(bare), "no bias"),
        "mixed clamps": (mixed(), r"module_list.1 .*clamp=3.0"),
        "other module": (other_module(), "PermuteRandom"),
        "two conditions": (two_conditions(), "takes condition 1"),
        "another clamp": (another_clamp(), "neither"),
        "not orthogonal": (not_orthogonal(), "not orthogonal"),
        "computes something else": (hidden_change(), "something else"),
        "not finite": (poisoned(), "not finite"),
        "maps": (maps(), "2-dimensional maps"),
        "odd condition": (_odd_condition(), "multiple of 4"),
    }


def _odd_condition() -> Any:
    import FrEIA.framework as Ff
    import FrEIA.modules as Fm

    flow = Ff.SequenceINN(6)
    flow.append(Fm.AllInOneBlock, cond=0, cond_shape=(7,), subnet_constructor=subnet)
    return flow


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", list(unsupported_flows()))
def test_unsupported_flows_stay_as_they_were(name: str) -> None:
    flow, reason = unsupported_flows()[name]
    both = nn.ModuleList([flow_of("soft", 4, 0), flow])
    before = [(module, type(module), dict(vars(module))) for module in both.modules()]
    with pytest.raises(UnsupportedFlowError, match=reason):
        fastbgad.accelerate(both)
    for module, cls, attributes in before:
        assert type(module) is cls
        assert vars(module).keys() == attributes.keys()


def test_clear_errors() -> None:
    with pytest.raises(UnsupportedFlowError, match="contains no flow"):
        fastbgad.accelerate(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="impl is 'fast'"):
        fastbgad.accelerate(flow_of("soft", 4, 0), impl="fast")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="matmul_precision is 'int8'"):
        fastbgad.accelerate(flow_of("soft", 4, 0), matmul_precision="int8")  # type: ignore[arg-type]
    flow = fastbgad.accelerate(flow_of("soft", 4, 8))
    x, c = inputs(4, 8, 5)
    with pytest.raises(FeatureError, match="needs a condition"):
        flow(x)
    with pytest.raises(FeatureError, match="5 feature rows but a condition of 4"):
        flow(x, [c[0][:4]])
    with pytest.raises(FeatureError, match="takes a condition of 8 channels, got 128"):
        flow(x, [fastbgad.positional_rows(1, 5)])
    with pytest.raises(FeatureError, match=r"\[N, 4\]"):
        flow(x[:, :3], c)


def test_explicit_impl_never_falls_back() -> None:
    flow = fastbgad.accelerate(flow_of("soft", 4, 8), impl="triton")
    x, c = inputs(4, 8, 5)
    with pytest.raises(fastbgad.FastBGADError, match='impl="triton": the kernels compute in float32'):
        flow(x, c)
    x, c = inputs(4, 8, 5, torch.float32)
    reference = fastbgad.accelerate(flow_of("soft", 4, 8).float(), impl="reference")
    assert torch.allclose(reference(x, c)[0], flow_of("soft", 4, 8).float()(x, c)[0], atol=1e-5)
