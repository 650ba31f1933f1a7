"""Predicts with the modules, signals and functions of Python taken away that Windows does not have.

Arguments: run directory, structure file. Prints the prediction.
"""

import asyncio  # noqa: F401  # chosen by the platform, and so are these
import multiprocessing.popen_spawn_posix  # noqa: F401
import os
import signal
import sys

import numpy as np  # noqa: F401
import platformdirs  # noqa: F401

MODULES = ("fcntl", "grp", "pwd", "resource", "termios", "tty", "pty", "syslog")
FUNCTIONS = ("getuid", "geteuid", "getgid", "getegid", "fork", "getpgid", "killpg", "setsid", "uname", "statvfs")
CONSTANTS = ("O_NONBLOCK", "O_NOFOLLOW", "O_DIRECTORY", "O_CLOEXEC", "WNOHANG")
SIGNALS = ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGALRM", "SIGCHLD")


def main() -> None:
    for name in MODULES:
        sys.modules[name] = None  # type: ignore[assignment]
    for name in (*FUNCTIONS, *CONSTANTS):
        delattr(os, name)
    for name in SIGNALS:
        delattr(signal, name)

    import crystalframer_jax.cli.evaluate
    import crystalframer_jax.cli.prepare
    import crystalframer_jax.training.start  # noqa: F401
    from crystalframer_jax import Predictor

    print(float(Predictor.load(sys.argv[1]).predict(sys.argv[2])[0, 0]))


if __name__ == "__main__":
    main()
