"""A level's streams: data-parallel training is set up on the stream that steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import nn

from fastbgad.model.flow import ConditionalFlow
from fastbgad.train.level import LevelTrainer
from tests.fake_cuda import GPU, FakeCuda, fake_cuda
from tests.models import tiny_config

__all__ = ["fake_cuda"]


def test_is_wrapped_on_the_stream_that_steps(fake_cuda: FakeCuda) -> None:
    """After what was asked of the flow before, and before what is asked of it next: loading a state."""
    config = tiny_config()
    flow = ConditionalFlow(config.flow.spec(8))

    def wrap(module: nn.Module) -> nn.Module:
        fake_cuda.log.append(("wrap", fake_cuda.current.name))
        return nn.Sequential(module)

    store: Any = SimpleNamespace(device=GPU, shapes=[(8, 3, 4)], patches=lambda level: None)
    parallel: Any = SimpleNamespace(wrap=wrap)
    trainer = LevelTrainer(0, flow, store, config, parallel)
    assert isinstance(trainer.module, nn.Sequential)
    assert trainer.stream is not None
    level = trainer.stream.name  # type: ignore[attr-defined]
    assert level != "default"
    assert fake_cuda.log == [("wait", level, "default"), ("wrap", level), ("wait", "default", level)]
