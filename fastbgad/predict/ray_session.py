"""Ray for the time of one call: connected or started quietly, and left as it was before."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import BackendError, MissingDependencyError
from ..wording import first_line

# Nothing travels through Ray's object store but numbers of shards. Left to itself, Ray reserves 30 % of the memory.
_OBJECT_STORE_BYTES = 128 * 2**20

# Ray's messages at every start are of no use here; its warnings are, except the one about missing progress bars.
_LOG_LEVELS = {
    "ray": logging.ERROR,
    "ray.data": logging.WARNING,
    "ray.data._internal.progress": logging.ERROR,
}


def require_ray() -> Any:
    """Return the ray package with its data library, or raise `MissingDependencyError`."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingDependencyError("ray", "ray", "--engine ray") from error
    return ray


@contextmanager
def ray_session(address: str | None = None) -> Iterator[Any]:
    """Yield the ray package, initialized. What the block itself has started is shut down at its end.

    Ray's statistics of use are off, and so is its dashboard: nothing needs a network.

    Args:
        address: of a cluster ("auto" for the one that this machine belongs to); None starts Ray on this machine.

    Raises:
        MissingDependencyError: ray is not installed. BackendError: it does not start, or no cluster is there.
    """
    ray = require_ray()
    with _quiet():
        if ray.is_initialized():
            yield ray
            return
        _start(ray, address)
        try:
            yield ray
        finally:
            ray.shutdown()


def _start(ray: Any, address: str | None) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    # Ray's C++ core reports Ray Data's way to start actors as an error on the terminal, every time.
    variables = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
    if address is None:
        options |= {"address": "local", "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    else:
        options["address"] = address
    try:
        with _environment(variables):
            ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError, OSError, TimeoutError) as error:
        reason = first_line(error)
        if address is None:
            raise BackendError(f"Ray does not start on this machine: {reason}") from error
        raise BackendError(
            f"no Ray cluster answers at {address!r}: {reason}; start one with `ray start --head`, set "
            "RAY_AUTH_MODE=token if it asks for a token, or leave --ray-address out to use this machine alone"
        ) from error


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables for the length of the block, unless they are set already."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def _quiet() -> Iterator[None]:
    loggers = {logging.getLogger(name): level for name, level in _LOG_LEVELS.items()}
    before = {logger: logger.level for logger in loggers}
    for logger, level in loggers.items():
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, level in before.items():
            logger.setLevel(level)
