"""The command lines of scripts/: arguments, tables, files of results, errors in one line."""

import argparse
import contextlib
import errno
import io
import logging
import os
import sys
from collections.abc import Iterator

from crystalframer_jax.errors import UserError
from crystalframer_jax.inference.predictor import WEIGHTS
from crystalframer_jax.text import escaped

WEIGHTS_HELP = "default: those that the finished run selected by validation error, else best"

PIPE_CLOSED = 141  # the exit status of a command that SIGPIPE ends


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


def model_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """Makes a parser of what every command that predicts takes: the run, its weights, draws of frames."""
    parser = argparse.ArgumentParser(prog, description=description, allow_abbrev=False)
    run_help = "run directory, of one model or of an ensemble, a checkpoint (RUN/checkpoints/STEP), or a model by name"
    parser.add_argument("run", metavar="RUN", help=run_help)
    parser.add_argument("--weights", choices=WEIGHTS, help=WEIGHTS_HELP)
    samples_help = "average K draws among equally good frames and show their spread; default: as configured for the run"
    parser.add_argument("--num_frame_samples", type=int, metavar="K", help=samples_help)
    return parser


def names(text: str) -> tuple[str, ...]:
    """Reads names separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())
