"""Measure the input pipeline: preparation, storage, and batches per second without a model.

Rates are medians of several passes; the ways that are compared take turns, so that a machine which is busy for a while
slows all of them.
"""

import contextlib
import dataclasses
import json
import mmap
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import joblib
import numpy as np

from benchmarking.cases import BUNDLED
from crystalframer_jax.config import ConfigError, TrainConfig
from crystalframer_jax.data.datasets import folder_of, open_dataset
from crystalframer_jax.data.loader import TrainingBatches
from crystalframer_jax.data.prepare import Preparation, prepare
from crystalframer_jax.data.registry import TARGET_SETS
from crystalframer_jax.data.sources import Bundled
from crystalframer_jax.data.store import Dataset, data_folder, load_dataset

CUTOFF = TrainConfig().cutoff
BATCH_SIZES = (64, 256)
PASSES = 5
SECONDS = 2.0  # of each pass at most


def measure_pipeline(target_set: str, data_dir: str = "") -> dict[str, Any]:
    """Preparation, storage and batches of a target set.

    Without `data_dir` the bundled crystals are prepared anew in a temporary folder.
    """
    with tempfile.TemporaryDirectory() as temporary:
        results: dict[str, Any] = {"target_set": target_set}
        if target_set == BUNDLED and not data_dir:
            data_dir = temporary
            results["preparation"] = preparation(Path(temporary))
        dataset = open_dataset(target_set, (any_target(target_set, data_dir),), CUTOFF, data_dir)
        results["storage"] = storage(dataset, data_folder(data_dir) / target_set)
        results["batches"] = [batches(dataset, size) for size in BATCH_SIZES]
    return results


def any_target(name: str, data_dir: str) -> str:
    """A target of a set; ConfigError if there is no such set."""
    if name in TARGET_SETS:
        return TARGET_SETS[name].targets[0].name
    manifest = folder_of(name, data_dir) / "crystals" / "manifest.json"
    if not manifest.is_file():
        raise ConfigError(f"target_set={name!r} is not known, and not prepared in {manifest.parent.parent.parent}")
    return json.loads(manifest.read_text())["targets"][0]["name"]


def preparation(folder: Path) -> dict[str, float]:
    """Crystals per second for the bundled set, with one process and with one for each core."""
    known = TARGET_SETS[BUNDLED]
    rates = {}
    for workers in sorted({1, joblib.cpu_count()}):
        place = folder / f"workers{workers}" / known.name
        assert isinstance(known.origin, Bundled)
        source = known.origin.open(known.targets)
        count = source.count or 0
        with silence():
            start = time.perf_counter()
            prepare(place, source, known, Preparation(workers=workers))
            parsed = time.perf_counter()
            load_dataset(place, (known.targets[0].name,), CUTOFF, workers)
            end = time.perf_counter()
        rates[f"crystals per s, {workers} process{'es' * (workers > 1)}"] = count / (parsed - start)
        rates[f"neighbor rows per s, {workers} process{'es' * (workers > 1)}"] = count / (end - parsed)
    return rates


def storage(dataset: Dataset, folder: Path) -> dict[str, float]:
    """Bytes on disk."""
    crystals, edges = len(dataset.table), int(dataset.table.edge_offset[-1])
    columns = {"crystals": 0, "rows": 0}
    for file in folder.rglob("*.npy"):
        columns[file.parent.name.split("-")[0]] += file.stat().st_size
    return {
        "atoms per crystal": len(dataset.table.species) / crystals,
        "neighbors per atom": edges / len(dataset.table.species),
        "bytes per crystal": sum(columns.values()) / crystals,
        "bytes per neighbor": (dataset.table.image.nbytes + dataset.table.reverse.nbytes) / edges,
    }


def batches(dataset: Dataset, size: int) -> dict[str, Any]:
    """Batches per second by every way, taking turns, and how full they are."""
    in_memory = dataclasses.replace(dataset, table=copied(dataset.table))
    ways = {
        "from memory": (in_memory, False),
        "from disk, cached": (dataset, False),
        "from disk, cold": (dataset, False),
        "on the device": (in_memory, True),
    }
    loaders = {
        name: TrainingBatches(source, size, 1000, seed=0, on_device=on_device)
        for name, (source, on_device) in ways.items()
        if not on_device or not len(dataset.table.shared_site)
    }
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for number in range(PASSES + 1):  # the first is for compiling
        for name, loader in loaders.items():
            if name == "from disk, cold":
                drop_cached_pages(dataset)
            rate = batches_per_second(loader.iterate(number * loader.steps_per_epoch))
            rates[name] += [rate] if number else []
    fill = next(iter(loaders.values())).fill_factors()
    medians = {name: float(np.median(found)) for name, found in rates.items()}
    return {"crystals": size, "batches per s": medians, "fill": fill._asdict()}


def batches_per_second(source: Iterable[Any]) -> float:
    """How fast batches come, at most SECONDS long; the last one is waited for."""
    start, number, latest = time.perf_counter(), 0, None
    for batch in source:
        number, latest = number + 1, batch
        if time.perf_counter() - start > SECONDS:
            break
    jax.block_until_ready(latest)
    return number / (time.perf_counter() - start)


def copied(columns: Any) -> Any:
    """A table in memory of its own."""
    names = [field.name for field in dataclasses.fields(columns)]
    return dataclasses.replace(columns, **{name: np.array(getattr(columns, name)) for name in names})


def drop_cached_pages(dataset: Dataset) -> None:
    """Make the system forget what it has read of the files behind the columns."""
    for field in dataclasses.fields(dataset.table):
        mapped: Any = getattr(dataset.table, field.name).base
        is_mapped = isinstance(mapped, np.memmap)
        if is_mapped and hasattr(mmap, "MADV_DONTNEED"):
            mapped._mmap.madvise(mmap.MADV_DONTNEED)
            with open(mapped.filename, "rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def silence() -> Any:
    """Without messages on standard output."""
    with open(os.devnull, "w") as stream, contextlib.redirect_stdout(stream):
        yield
