"""Context of an item: facts of the run that it belongs to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .events import Events

if TYPE_CHECKING:
    import torch

# "cuda": a GPU. Without one: "interpreter" checks values on the CPU, "stand-in" compiles and runs nothing.
Driver = Literal["cuda", "interpreter", "stand-in"]

Found = dict[str, Any]
Items = Mapping[str, Callable[[], Found]]


@dataclass
class Context:
    """Describe how the items of a stage run.

    Attributes:
        driver: what launches kernels.
        out: the run's output folder.
        tiny: small sizes, for runs without a GPU.
        launch_only: launch the kernels and nothing else, to have them compiled.
        only: run only items whose name holds one of these texts; without texts all of them.
        tiles: a file of tuned tile sizes to use; "" for those that ship.
        skip: (item, step) that crashed before.
    """

    driver: Driver
    out: Path
    tiny: bool = False
    launch_only: bool = False
    only: list[str] = field(default_factory=list)
    tiles: str = ""
    skip: list[tuple[str, str]] = field(default_factory=list)
    events: Events | None = None
    item: str = ""  # the one that runs
    step: str = ""  # its part that runs

    @property
    def device(self) -> torch.device:
        import torch

        return torch.device("cuda" if self.driver == "cuda" else "cpu")

    @property
    def values(self) -> bool:
        """Return whether kernels compute anything."""
        return self.driver != "stand-in"

    def wants(self, item: str) -> bool:
        """Return whether the run asks for this item."""
        return not self.only or any(text in item for text in self.only)

    def may(self, step: str) -> bool:
        """Announce a part of the item; returns whether it may run, which one that crashed before may not."""
        if (self.item, step) in self.skip:
            return False
        self.step = step
        if self.events is not None:
            self.events.step(step)
        return True

    def spoiled(self) -> bool:
        """Return whether nothing can be launched on the device any more."""
        return self.driver == "cuda" and device_is_spoiled()

    def as_json(self) -> str:
        """Return everything but the pipe as JSON, for `from_json` in another process."""
        fields = {key: getattr(self, key) for key in ("driver", "tiny", "launch_only", "only", "tiles", "skip")}
        return json.dumps({**fields, "out": str(self.out)})

    @classmethod
    def from_json(cls, text: str) -> Context:
        fields = json.loads(text)
        skip = [(item, step) for item, step in fields.pop("skip")]
        return cls(**{**fields, "out": Path(fields["out"])}, skip=skip)


def device_is_spoiled() -> bool:
    """Return whether nothing can be launched on this process's GPU any more, as after an illegal access."""
    import torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except Exception:
        return True
    return False


def first_line(error: BaseException) -> str:
    """Return the kind of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
