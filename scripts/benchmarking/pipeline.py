"""The input pipeline, measured: preparation, storage, and batches per second without a model, ways taking turns."""

import contextlib
import copy
import dataclasses
import io
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import joblib
import numpy as np

from benchmarking.measure import filled
from crystalframer_jax.data.datasets import folder_of, open_dataset, target_names
from crystalframer_jax.data.loader import TrainingBatches
from crystalframer_jax.data.prepare import Preparation, prepare
from crystalframer_jax.data.registry import TARGET_SETS
from crystalframer_jax.data.store import Dataset, load_dataset
from crystalframer_jax.measuring.cases import BUNDLED, CUTOFF, bundled_source
from crystalframer_jax.measuring.timing import Record

BATCH_SIZES = (64, 256)
PASSES = 5
SECONDS = 2.0  # of each pass at most


def measure_pipeline(target_set: str, data_dir: str = "") -> Record:
    """Measures preparation, storage and batches of a target set.

    Without `data_dir` the bundled crystals are prepared anew in a temporary folder.
    """
    with tempfile.TemporaryDirectory() as temporary:
        results: Record = {"target_set": target_set}
        if target_set == BUNDLED and not data_dir:
            data_dir = temporary
            results["preparation"] = preparation(Path(temporary))
        dataset = open_dataset(target_set, (any_target(target_set, data_dir),), CUTOFF, data_dir)
        results["storage"] = storage(dataset, folder_of(target_set, data_dir))
        results["batches"] = [batches(dataset, size) for size in BATCH_SIZES]
    return results


def any_target(name: str, data_dir: str) -> str:
    """Finds a target of a set; ConfigError if there is no such set."""
    return target_names(name, data_dir)[0]


def preparation(folder: Path) -> dict[str, float]:
    """Measures crystals per second for the bundled set, with one process and with one for each core."""
    known, source, rates = TARGET_SETS[BUNDLED], bundled_source(), {}
    for workers in sorted({1, joblib.cpu_count()}):
        place = folder / f"workers{workers}" / BUNDLED
        with contextlib.redirect_stdout(io.StringIO()):
            start = time.perf_counter()
            prepare(place, source, known, Preparation(workers=workers))
            parsed = time.perf_counter()
            dataset = load_dataset(place, (known.targets[0].name,), CUTOFF, workers)
            end = time.perf_counter()
        processes = f"{workers} process{'es' * (workers > 1)}"
        rates[f"crystals per s, {processes}"] = len(dataset.table) / (parsed - start)
        rates[f"neighbor rows per s, {processes}"] = len(dataset.table) / (end - parsed)
    return rates


def storage(dataset: Dataset, folder: Path) -> dict[str, float]:
    """Counts bytes on disk."""
    table, size = dataset.table, sum(file.stat().st_size for file in folder.glob("crystals/*.npy"))
    edges = int(table.edge_offset[-1])
    return {
        "atoms per crystal": len(table.species) / len(table),
        "neighbors per atom": edges / len(table.species),
        "bytes per crystal": size / len(table),
        "bytes per neighbor": (table.image.nbytes + table.reverse.nbytes) / edges,
    }


def batches(dataset: Dataset, size: int) -> Record:
    """Measures batches per second by every way, taking turns, and how full they are."""

    def loader(source: Dataset, on_device: bool = False) -> TrainingBatches:
        return TrainingBatches(source, size, 1000, seed=0, on_device=on_device)

    in_memory = dataclasses.replace(dataset, table=copy.deepcopy(dataset.table))
    ways = {"from memory": loader(in_memory), "from disk": loader(dataset)}
    if not len(dataset.table.shared_site):
        ways["on the device"] = loader(in_memory, on_device=True)
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(PASSES + 1):  # the first is for compiling
        for way, chosen in ways.items():
            rates[way].append(batches_per_second(chosen.iterate(number * chosen.steps_per_epoch)))
    medians = {way: float(np.median(found[1:])) for way, found in rates.items()}
    return {"crystals": size} | medians | filled(ways["from memory"].fill_factors())


def batches_per_second(source: Iterable[Any]) -> float:
    """Measures how fast batches come, at most SECONDS long; the last one is waited for."""
    start, number, latest = time.perf_counter(), 0, None
    for batch in source:
        number, latest = number + 1, batch
        if time.perf_counter() - start > SECONDS:
            break
    jax.block_until_ready(latest)
    return number / (time.perf_counter() - start)
