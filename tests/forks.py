"""Python processes that are forked from one that has imported what takes seconds, as `python WORD ...` starts them."""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

import jax

ROOT = Path(__file__).parent.parent
IMPORTED = "crystalframer_jax.cli.train", "crystalframer_jax.cli.predict", "crystalframer_jax.training.start", "pytest"
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(list(IMPORTED))


class Fork:
    """`python WORD ...` in a folder, used as a subprocess.Popen; JAX starts in it as in any process."""

    def __init__(self, *words: object, environment: Mapping[str, str] = os.environ, folder: Path = ROOT):
        reader, writer = FORKS.Pipe(duplex=False)
        descriptor, errors = tempfile.mkstemp()
        self.stdout, self.stderr = (
            os.fdopen(os.dup(reader.fileno()), errors="replace"),
            os.fdopen(descriptor, errors="replace"),
        )
        arguments = writer, errors, dict(environment), str(folder), [str(word) for word in words]
        self._process = FORKS.Process(target=_run, args=arguments)
        self._process.start()
        for connection in (reader, writer):
            connection.close()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """What is left of its output, and all errors; it is killed if it takes longer than so many seconds."""
        timer = threading.Timer(timeout, self.kill)
        timer.start()
        output = "" if self.stdout.closed else self.stdout.read()
        self._process.join()
        timer.cancel()
        self.stdout.close()
        self.stderr.seek(0)
        return output, self.stderr.read()

    def __enter__(self) -> "Fork":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.join()


def run(*words: object, **options) -> subprocess.CompletedProcess:
    """Runs `python WORD ...` to its end; the options are those of a Fork."""
    process = Fork(*words, **options)
    output, errors = process.communicate()
    return subprocess.CompletedProcess(words, process.returncode, output, errors)


def _run(output: Connection, errors: str, environment: Mapping[str, str], folder: str, words: list[str]) -> None:
    """Becomes the process that was asked for: a script, or -c and code."""
    os.dup2(output.fileno(), 1)
    os.dup2(os.open(errors, os.O_WRONLY), 2)
    os.unlink(errors)
    output.close()
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    for name, value in environment.items():
        if name.startswith("JAX_") and value != os.environ.get(name):  # which JAX has read
            kind = type(jax.config._read(name.lower()))
            jax.config.update(name.lower(), int(value) if kind in (bool, int) else value)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    script, sys.argv = words[0], words
    first = folder if script == "-c" else str(Path(script).parent.absolute())
    sys.path[:] = [first, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)), *sys.path]
    status = 0
    try:
        if script == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        status = end.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    atexit._run_exitfuncs()
    sys.exit(status)
