"""Preparations of a set of 14 crystals that are killed at every step, for the tests of the store.

Argument: a folder. Prints the number of steps for each scenario (first: after a preparation that failed for bad
records; replaced, damaged: another set is there).
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from small_sets import CUTOFF, open_small, prepare_small, small_set

from crystalframer_jax.data.records import DataError
from crystalframer_jax.data.store import load_dataset, read_set

OLD, NEW = small_set(count=12), small_set(count=14)
FAILING = small_set(count=15, changes={number: {"species": ["Xx"]} for number in range(5)})


def command(place: Path, scenario: str) -> None:
    if scenario == "first":
        with contextlib.suppress(DataError):
            prepare_small(place, FAILING)
    open_small(place, NEW)


def dying(change: Callable, left: list[int]) -> Callable:
    """A function of os that ends the process after some calls of this and others."""

    def call(path, *args, **kwargs):
        change(path, *args, **kwargs)
        if Path(path).suffix != ".npy" or Path(path).stem in ("ids", "count"):  # one of many alike
            left[0] -= 1
        if not left[0]:
            os._exit(9)

    return call


def survives(place: Path, scenario: str, step: int) -> bool:
    """Runs the command in a child that dies after so many changes of names."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    left = [step]
    for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
        setattr(os, name, dying(getattr(os, name), left))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    command(place, scenario)
    os._exit(0)


def main(scenario: str, folder: Path) -> None:
    base = folder / "base"
    mine = {"small/rows-mine/a.cif", "small/notes.txt"}
    if scenario != "first":
        open_small(base, OLD)
    (base / "small" / "rows-mine").mkdir(parents=True)
    for name in mine:
        (base / name).write_bytes(b"mine")
    if scenario == "damaged":
        (base / "small" / "crystals" / "labels.npy").write_bytes(b"mine")
        mine.add("small/damaged-crystals-1/labels.npy")
    step, survived = 0, False
    while not survived:
        step += 1
        place = folder / str(step)
        shutil.copytree(base, place)
        survived = survives(place, scenario, step)
        found = read_set(place / "small")
        assert found[0]["crystals"] in (12, 14) if found else scenario != "replaced", step
        assert not survived or found[0]["crystals"] == 14, step
        command(place, scenario)
        assert len(load_dataset(place / "small", ("e_form",), CUTOFF).table) == 14, step
        assert all((place / name).read_bytes() == b"mine" for name in mine), step
        left = {path.name for path in (place / "small").iterdir()} - {Path(name).parts[1] for name in mine}
        assert len(left) == 2 and {name.split("-")[0] for name in left} == {"crystals", "rows"}, (step, left)
        shutil.rmtree(place)
    print("steps of", scenario, step, flush=True)


if __name__ == "__main__":
    for scenario in ("first", "replaced", "damaged"):
        main(scenario, Path(sys.argv[1]) / scenario)
