"""Columns built in parallel: chunks of work become part files, which survive an interruption and are then joined."""

import contextlib
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import joblib
import numpy as np
from joblib.externals.loky.process_executor import TerminatedWorkerError
from tqdm import tqdm

from crystalframer_jax.data.records import DataError
from crystalframer_jax.files import replacing

Chunk = TypeVar("Chunk")
Columns = dict[str, np.ndarray]

COUNTED_BY = {"atom_offset": "atom_offset", "edge_offset": "edge_offset", "shared_site": "atom_offset"}
SMALL = 5000  # crystals; fewer are faster without worker processes, which take seconds to start


@contextlib.contextmanager
def processes(number: int, what: str, batch_size: int = 1) -> Iterator[joblib.Parallel]:
    """Worker processes, which are killed by Ctrl-C.

    They are given `batch_size` pieces of work at a time, and as many for each process before their turn.
    """
    ahead = 2 * number * batch_size
    parallel = joblib.Parallel(
        number, return_as="generator", pre_dispatch=ahead, batch_size=batch_size, max_nbytes=None
    )
    try:
        with parallel:
            try:
                yield parallel
            except KeyboardInterrupt:
                threading.excepthook = lambda _: None  # of threads that miss the workers
                raise
    except TerminatedWorkerError as error:
        raise DataError(
            f"{what}: a worker process was killed, probably for want of memory; go on with scripts/prepare_data.py "
            "--workers=1: what is done is kept"
        ) from error


def num_processes(total: int | None, workers: int) -> int:
    """Processes for that many crystals: `workers`, or (0) one for each core, or none for few crystals."""
    return workers or (1 if total is not None and total <= SMALL else joblib.cpu_count())


def build_parts(
    work: Callable[[Chunk], Columns],
    chunks: Iterable[tuple[int, Chunk]],
    folder: Path,
    title: str,
    total: int | None,
    workers: int = 0,
) -> list[Path]:
    """Part files in `folder`, in the order of the chunks; those that are there already are not made again.

    Every chunk comes with the number of crystals in it; `total` is their sum, None if it is not known. At most twice as
    many chunks as processes (see `num_processes`) are in memory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = num_processes(total, workers)
    sizes: list[int] = []

    def jobs() -> Iterator[Any]:
        for number, (size, chunk) in enumerate(chunks):
            sizes.append(size)
            yield joblib.delayed(_make_part)(work, chunk, folder / f"part-{number:06d}.npz")

    files: list[Path] = []
    bar = tqdm(total=total, desc=title, unit=" crystals", dynamic_ncols=True, disable=None)
    with processes(number, title) as parallel, bar as progress:
        for file in parallel(jobs()):
            progress.update(sizes[len(files)])
            files.append(file)
    return files


def _make_part(work: Callable[[Chunk], Columns], chunk: Chunk, file: Path) -> Path:
    """Do a chunk of work, unless its part file is there."""
    if not _is_complete(file):
        with replacing(file) as temporary, temporary.open("wb") as stream:
            np.savez(stream, allow_pickle=False, **work(chunk))
    return file


def _is_complete(file: Path) -> bool:
    """Whether a part file is there and undamaged."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def join_parts(parts: Sequence[Path], names: Iterable[str], folder: Path) -> None:
    """Write each column of the parts, joined, as FOLDER/NAME.npy; one part at a time is in memory.

    What a part counts from its own first atom or neighbour counts from the first of all afterwards. A column has the
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
