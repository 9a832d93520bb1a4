"""One-line messages of kernels that cannot be compiled or launched."""

from __future__ import annotations


def reason(error: BaseException) -> str:
    """Return why a kernel could not be compiled or launched: the end of its innermost cause's message."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("Repro command")]
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
