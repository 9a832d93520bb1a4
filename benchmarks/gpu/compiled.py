"""Time FrEIA's arithmetic under torch.compile, which takes longest to prepare, beside the kernels."""

from __future__ import annotations

from functools import partial

from .case import Case, measure
from .context import Context, Found, Items
from .flow_cases import compiled_flow_case
from .headline import LEVELS, THREE_LEVELS
from .training_cases import compiled_training_case


def items(context: Context) -> Items:
    """Return the cases, the cheapest to compile first."""
    if context.launch_only:  # the kernels in them are those of the stage headline
        return {}
    levels = ((8, 3),) if context.tiny else LEVELS
    depth, rows, device = (2, 40, context.device) if context.tiny else (8, 4096, context.device)

    def run(make: partial[Case]) -> Found:
        return measure(make(), context, {})

    channels, side = levels[0]
    name = f"flow, {side * side} rows of {channels} channels, compiled FrEIA"
    found = {name: partial(run, partial(compiled_flow_case, name, levels[:1], depth, device))}
    name = f"training step, {rows} rows of {channels} channels, compiled FrEIA"
    found[name] = partial(run, partial(compiled_training_case, name, channels, side, rows, depth, device))
    name = f"{THREE_LEVELS}, compiled FrEIA"
    found[name] = partial(run, partial(compiled_flow_case, name, levels, depth, device))
    return found
