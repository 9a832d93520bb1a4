"""`python -m fastbgad` and the `fastbgad` script."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

from .errors import FastBGADError, InterruptedTraining, Notice


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 for wrong input or configuration, 130 after Ctrl-C."""
    # Imported here, so that a missing extra gets its message too.
    try:
        from .cli.parser import parse
    except FastBGADError as error:
        print(f"fastbgad: {error}", file=sys.stderr)
        return 2
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return parse(sys.argv[1:] if arguments is None else arguments).run()
    except InterruptedTraining as interruption:
        print(f"\nfastbgad: {interruption}", file=sys.stderr)
        return 130
    except FastBGADError as error:
        print(f"fastbgad: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nfastbgad: interrupted", file=sys.stderr)
        return 130


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    if not issubclass(category, Notice):
        print(f"fastbgad: warning: {message}", file=sys.stderr)
        return
    from .system.ranks import find_rank

    # Processes that were started together make the same choice: one of them prints it.
    if find_rank().is_first:
        print(f"fastbgad: note: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
