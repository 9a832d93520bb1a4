"""`python -m fastbgad` and the `fastbgad` script."""

from __future__ import annotations

import codecs
import os
import sys
import warnings
from collections.abc import Sequence

from .errors import FastBGADError, InterruptedTraining, Notice
from .wording import printable

_ESCAPE = "fastbgad.printable"
_PIPE_CLOSED = 141  # as of a program that the signal SIGPIPE ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 for wrong input or configuration, 130 after Ctrl-C.

    141 if nobody reads the output to its end.
    """
    _let_streams_escape()
    # Imported here, so that a missing extra gets its message too.
    try:
        from .cli.parser import parse
    except FastBGADError as error:
        print(f"fastbgad: {error}", file=sys.stderr)
        return 2
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = parse(sys.argv[1:] if arguments is None else arguments).run()
            sys.stdout.flush()
            return code
    except InterruptedTraining as interruption:
        print(f"\nfastbgad: {interruption}", file=sys.stderr)
        return 130
    except FastBGADError as error:
        print(f"fastbgad: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nfastbgad: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has seen enough, as `head` has. What is still in the buffer must not raise at exit again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED


def _let_streams_escape() -> None:
    """Let stdout and stderr escape what they cannot encode: names that are not UTF-8, or all but ASCII."""
    codecs.register_error(_ESCAPE, _escape)
    for stream in (sys.stdout, sys.stderr):
        # Streams that a caller put in place may lack it.
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            reconfigure(errors=_ESCAPE)


def _escape(error: UnicodeError) -> tuple[str, int]:
    """Return the replacement of text that cannot be encoded, as error handlers of `codecs` do."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = printable(error.object[error.start : error.end])
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end


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
