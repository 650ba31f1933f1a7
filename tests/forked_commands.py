"""Command lines of scripts/, each in a fork of one process that has imported what takes seconds.

Arguments: a folder, and for each command line its words in JSON: [name of the script, argument, ...]. What the command
lines print is left in the folder as NUMBER.out and NUMBER.err; prints their exit statuses in JSON.
"""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_commands(
    folder: Path, environment: Mapping[str, str], commands: Sequence[Sequence[object]]
) -> list[subprocess.CompletedProcess]:
    """Runs command lines one after the other, in the root of the repository."""
    words = [json.dumps([str(word) for word in command]) for command in commands]
    parent = [sys.executable, __file__, folder, *words]
    statuses = subprocess.run(parent, cwd=ROOT, env=environment, stdout=subprocess.PIPE, timeout=300).stdout
    results = []
    for number, (command, status) in enumerate(zip(commands, json.loads(statuses), strict=True)):
        output, errors = ((folder / f"{number}.{end}").read_text() for end in ("out", "err"))
        results.append(subprocess.CompletedProcess(command, status, output, errors))
    return results


def main(folder: str, *commands: str) -> None:
    import crystalframer_jax.cli.train
    import crystalframer_jax.training.start  # noqa: F401

    statuses = []
    for number, (name, *arguments) in enumerate(map(json.loads, commands)):
        child = os.fork()
        if not child:
            for stream, end in enumerate(("out", "err"), 1):
                os.dup2(os.open(f"{folder}/{number}.{end}", os.O_WRONLY | os.O_CREAT), stream)
            script = f"scripts/{name}.py"
            sys.argv = [script, *arguments]
            runpy.run_path(script, run_name="__main__")
            return  # and ends as the script does
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(json.dumps(statuses))


if __name__ == "__main__":
    main(*sys.argv[1:])
