"""What all commands have in common: errors in one line, closed pipes, Ctrl-C."""

import contextlib
import errno
import io
import logging
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Sequence

from crystalframer_jax.errors import UserError
from crystalframer_jax.text import escaped

PIPE_CLOSED = 141  # the exit status of a command that SIGPIPE ends
MANY = 100  # crystals: work on more of them shows a bar


@contextlib.contextmanager
def reporting_errors(if_interrupted: str = "", leave_at_once: bool = True) -> Iterator[None]:
    """Prints an error that the user can mend in one line and leaves with status 1; with status 130 after Ctrl-C.

    To `leave_at_once` then is for commands with threads that would take minutes to wait for. Others clean up first.
    If nobody reads the output any more, as after `| head -1`, the command ends quietly.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # of a home that cannot be written it does without
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that is no text is shown, and ends nothing
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # else the interpreter does at its end, with a complaint
    except BrokenPipeError:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(PIPE_CLOSED)
    except (UserError, OSError) as error:
        sys.exit("error: " + escaped(" ".join(_told(error).split())))
    except KeyboardInterrupt:
        print(f"\ninterrupted{if_interrupted}", file=sys.stderr, flush=True)
        os._exit(130) if leave_at_once else sys.exit(130)


def _told(error: Exception) -> str:
    """Tells an error of the operating system by the name of its file, without its number."""
    if not isinstance(error, OSError) or error.filename is None:
        return str(error)
    is_forbidden = error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
    return f"{error.filename}: {error.strerror}{'; name a place that you may use' if is_forbidden else ''}"


@reporting_errors()
def parsed(parser: ArgumentParser, argv: Sequence[str] | None) -> Namespace:
    """Parses a command line, None for that of this process."""
    return parser.parse_args(argv)


def tell(errors: Iterable[str]) -> None:
    """Prints what could not be used, a line for each."""
    for error in errors:
        print(f"error: {escaped(' '.join(error.split()))}", file=sys.stderr)


def shows_progress(crystals: int) -> bool:
    """Tells whether work on so many crystals shows a bar."""
    return crystals > MANY and sys.stderr.isatty()
