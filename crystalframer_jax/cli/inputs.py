"""Crystals that a command line names: files, folders, patterns, lists on stdin; with labels where there are some."""

import glob
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm.auto import tqdm

from crystalframer_jax.data.custom.source import CONTAINERS, has_table, labelled_in
from crystalframer_jax.inference.shipped import is_model_name
from crystalframer_jax.runs.checkpoints import FOLDER
from crystalframer_jax.structures.crystal import Crystal, CrystalError
from crystalframer_jax.structures.files import is_structure_file
from crystalframer_jax.structures.neighbors import LatticeBox, check_neighbors
from crystalframer_jax.text import escaped

STDIN = "-"


class Read(NamedTuple):
    """A crystal of a file, what was noticed on reading it, and its labels, NaN where unknown."""

    crystal: Crystal
    file: str
    warnings: list[str]
    labels: tuple[float, ...] = ()


def named_files(arguments: Iterable[str]) -> Iterator[str | CrystalError]:
    """Yields the files that are meant: those of folders without a table, of patterns, and of the list on stdin.

    In place of what names none stands an error.
    """
    for argument in map(str, arguments):
        try:
            if argument == STDIN:
                lines = (line.strip() for line in sys.stdin)
                yield from named_files(line for line in lines if line not in ("", STDIN))
            elif is_model_name(argument) or os.path.isdir(os.path.join(argument, FOLDER)):
                problem = f"a model, not a file with crystals; name it by --model={argument}"
                yield CrystalError(f"{argument}: {problem}")
            elif os.path.isdir(argument) and not has_table(Path(argument)):
                yield from _or_error(_in_folder(Path(argument)), f"{argument}: no file with crystals is in it")
            elif glob.has_magic(argument) and not os.path.lexists(argument):
                found = sorted(glob.glob(argument, recursive=True))
                yield from _or_error(found, f"{argument}: no file has such a name; correct the pattern")
            else:
                yield argument
        except OSError as error:
            yield CrystalError(f"{argument}: cannot be read ({error.strerror})")


def _or_error(found: list[str], problem: str) -> list[str] | list[CrystalError]:
    return found or [CrystalError(problem)]


def _in_folder(folder: Path) -> list[str]:
    return sorted(
        str(path)
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and (is_structure_file(path.name) or path.name.lower().endswith(CONTAINERS))
    )


def read_all(
    arguments: Sequence[str], cutoffs: Iterable[float | LatticeBox] = (), fields: tuple[str, ...] = ()
) -> tuple[list[Read], list[str]]:
    """Reads the crystals that arguments name, and a line for each file or structure in it that cannot be used.

    They must have neighbor rows for the `cutoffs`. Labels are the numbers in `fields`, see `labelled_in`.
    """
    read: list[Read] = []
    errors: list[str] = []
    for file in tqdm(list(named_files(arguments)), desc="reading", unit=" files", delay=1, disable=None):
        if isinstance(file, CrystalError):
            errors.append(str(file))
            continue
        with warnings.catch_warnings(record=True) as of_file:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", UserWarning)
            try:
                found = labelled_in(file, fields)
            except (CrystalError, MemoryError) as error:
                errors.append(_line(file, error))
                continue
        for number, (make, labels) in enumerate(found, 1):
            with warnings.catch_warnings(record=True) as of_crystal:
                warnings.simplefilter("ignore")
                warnings.simplefilter("always", UserWarning)
                try:
                    crystal = make()
                    for cutoff in cutoffs:
                        check_neighbors(crystal, cutoff)
                except (CrystalError, MemoryError) as error:
                    errors.append(_line(f"{file}#{number}", error))
                    continue
            texts = [escaped(" ".join(str(warning.message).split())) for warning in (*of_file, *of_crystal)]
            names = [f"{escaped(name)}: " for name in (crystal.id, file)]
            texts = [text.removeprefix(names[0]).removeprefix(names[1]) for text in texts]
            read.append(Read(crystal, file, texts, labels))
    return read, errors


def _line(where: str, error: Exception) -> str:
    return str(error) if isinstance(error, CrystalError) else f"{where}: the memory is too small for it"
