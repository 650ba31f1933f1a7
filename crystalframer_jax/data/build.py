"""Columns built in parallel: chunks of work become part files, which survive an interruption and are then joined."""

import functools
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import joblib
import numpy as np
from joblib.externals.loky.process_executor import TerminatedWorkerError
from tqdm import tqdm

from crystalframer_jax.data.records import DataError
from crystalframer_jax.files import open_regular, replacing

Item = TypeVar("Item")
Result = TypeVar("Result")
Columns = dict[str, np.ndarray]

COUNTED_BY = {"atom_offset": "atom_offset", "edge_offset": "edge_offset", "shared_site": "atom_offset"}
SMALL = 5000  # crystals; fewer are faster without worker processes, which take seconds to start


def in_parallel(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    title: str,
    total: int | None,
    workers: int = 0,
    batch_size: int = 1,
    steps: Callable[[Result], int] = lambda _: 1,
    unit: str = "it",
) -> list[Result]:
    """Returns work(item) for every item, in order, by worker processes, which are killed by Ctrl-C.

    `workers` are the processes; 0: one for each core, or none for a `total` of at most SMALL. They are given
    `batch_size` items at a time; twice as many for each process are in memory. What takes longer than a second has a
    bar, on a terminal: it shows the `steps` that results stand for, of `total` (None: not known).
    """
    number = workers or (1 if total is not None and total <= SMALL else joblib.cpu_count())
    ahead = 2 * number * batch_size
    pool = joblib.Parallel(number, return_as="generator", pre_dispatch=ahead, batch_size=batch_size, max_nbytes=None)
    bar = tqdm(total=total, desc=title, unit=unit, dynamic_ncols=True, delay=1, disable=None)
    results: list[Result] = []
    try:
        with pool as parallel, bar as progress:
            try:
                for result in parallel(joblib.delayed(work)(item) for item in items):
                    results.append(result)
                    progress.update(steps(result))
            except KeyboardInterrupt:
                threading.excepthook = lambda _: None  # of threads that miss the workers
                raise
    except TerminatedWorkerError as error:
        raise DataError(
            f"{title}: a worker process was killed, probably for want of memory; go on with crystalframer prepare "
            "--workers=1: what is done is kept"
        ) from error
    return results


def build_parts(
    work: Callable[[list[Item]], Columns],
    chunks: Iterable[list[Item]],
    folder: Path,
    title: str,
    total: int | None,
    workers: int,
) -> list[Path]:
    """Makes part files in `folder`, which is there, in the order of the chunks, but not those that are there already.

    `total` is the number of items in all chunks, None if it is not known. At most twice as many chunks as processes
    (see `in_parallel`) are in memory.
    """
    numbered = ((folder / f"part-{number:06d}.npz", chunk) for number, chunk in enumerate(chunks))
    make = functools.partial(_make_part, work)
    made = in_parallel(make, numbered, title, total, workers, steps=lambda part: part[1], unit=" crystals")
    return [file for file, _ in made]


def _make_part(work: Callable[[list[Item]], Columns], numbered: tuple[Path, list[Item]]) -> tuple[Path, int]:
    """Does a chunk of work, unless its part file is there; returns the file and the size of the chunk."""
    file, chunk = numbered
    if not _is_complete(file):
        with replacing(file) as temporary, temporary.open("wb") as stream:
            np.savez(stream, allow_pickle=False, **work(chunk))
    return file, len(chunk)


def _is_complete(file: Path) -> bool:
    """Tells whether a part file is there and undamaged."""
    try:
        with open_regular(file) as stream, zipfile.ZipFile(stream) as archive:
            return archive.testzip() is None
    except (OSError, EOFError, ValueError, RuntimeError, struct.error, zlib.error, zipfile.BadZipFile):
        return False


def join_parts(parts: Sequence[Path], names: Iterable[str], folder: Path) -> None:
    """Writes each column of the parts, joined, as FOLDER/NAME.npy; one part at a time is in memory.

    What a part counts from its own first atom or neighbor counts from the first of all afterwards. A column has the
    widest of its types.
    """
    for name in names:
        kinds = [(column.shape, column.dtype) for column in (_column(part, name) for part in parts)]
        overlap = int(name.endswith("_offset"))  # the last of a part is the first of the next
        length = sum(shape[0] - overlap for shape, _ in kinds) + overlap
        shape, dtype = (length, *kinds[0][0][1:]), np.result_type(*(dtype for _, dtype in kinds))
        start = 0
        with (folder / f"{name}.npy").open("wb") as stream:  # written in order: a full disk is an error, not a crash
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(stream, header)
            for number, part in enumerate(parts):
                column = _column(part, name)
                if name in COUNTED_BY:
                    column, start = column + start, start + int(_column(part, COUNTED_BY[name])[-1])
                column = column[overlap:] if number else column
                stream.write(np.ascontiguousarray(column, dtype).tobytes())


def _column(part: Path, name: str) -> np.ndarray:
    with np.load(part, allow_pickle=False) as content:
        return content[name]
