"""Predictions for many crystals, and the errors they make."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from crystalframer_jax.batching.batch import Batch, pack
from crystalframer_jax.batching.device_table import DeviceTable
from crystalframer_jax.batching.shapes import BatchShape, Shared, shared_out
from crystalframer_jax.batching.table import CrystalTable
from crystalframer_jax.batching.targets import TargetStatistics, compositions_for, to_label_units
from crystalframer_jax.config import NO_PARTS, BatchParts, ConfigError, TrainConfig
from crystalframer_jax.config.hyperparameters import KEYS
from crystalframer_jax.inference.forward import Forward
from crystalframer_jax.parallel.devices import ONE_DEVICE, Devices

MAX_BATCH_ATOMS = 1024  # a larger crystal is a batch of its own
MAX_BATCH_CRYSTALS = 128
AHEAD = 2  # batches that are packed before their turn


class Predictions(NamedTuple):
    """Predictions in label units, in the order of the crystals."""

    value: np.ndarray  # [C, T] mean over the draws of frames, or median or mean over the models of an ensemble
    spread: np.ndarray  # [C, T] standard deviation over them; 0 if there is one

    @classmethod
    def over(cls, samples: np.ndarray, combine: str = "mean") -> "Predictions":
        """Takes mean or median, and standard deviation (of a sample: divisor S - 1), over the first axis of [S, C, T].

        The median of an even number is the mean of the two in the middle.
        """
        value = np.median(samples, axis=0) if combine == "median" else samples.mean(axis=0)
        return cls(value, samples.std(axis=0, ddof=min(1, len(samples) - 1)))

    def pair(self, over: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns value and spread; None in its place if it is over nothing, see `Predictor.spread_over`."""
        return self.value, self.spread if over else None


def frame_draws(config: TrainConfig, num_frame_samples: int | None = None) -> int:
    """Tells how many draws among equally good frames a prediction averages: as asked for, or (None) as configured.

    1 for models without frames. Raises ConfigError for less than 1, and for more than anybody needs.
    """
    samples = config.num_frame_samples if num_frame_samples is None else num_frame_samples
    most = KEYS["num_frame_samples"].metadata["most"]
    if samples < 1:
        raise ConfigError(f"num_frame_samples={samples} must be at least 1")
    if samples > most:
        raise ConfigError(f"num_frame_samples={samples} is out of bounds: {most:,} is the most that is taken")
    return samples if config.model.uses_frames else 1


def predict_rows(
    forward: Forward,
    variables: Any,
    table: CrystalTable,
    groups: Iterable[np.ndarray],
    statistics: tuple[TargetStatistics, ...],
    shapes: Sequence[BatchShape] | BatchParts = NO_PARTS,
    num_frame_samples: int = 1,
    device_table: DeviceTable | None = None,
    devices: Devices = ONE_DEVICE,
) -> Predictions:
    """Predicts groups of table rows, in their order.

    Every group is one batch, of the first of `shapes` that holds it, or of a shape of its own with the parts given; it
    is shared out among the `devices` that `forward` is compiled for.
    With `num_frame_samples` above 1 the mean is over as many draws among equally good frames, always the same draws
    for the same crystal; otherwise the crystal chooses. Given the same crystals in a
    `device_table`, batches are gathered there; otherwise a thread packs them ahead.
    """
    samples = list(range(num_frame_samples)) if num_frame_samples > 1 else [None]
    variables = devices.replicate(variables)

    def work_of(group: np.ndarray) -> tuple[Shared, Batch | None]:
        work = shared_out(table, group, shapes, devices.count)
        if device_table is not None:
            return work, None
        unknown = np.full((len(group), len(statistics)), np.nan)
        own = [work.shares[device] for device in devices.of_process]
        return work, devices.stacked([pack(table, group[share], work.shape, unknown[share]) for share in own])

    found: list[tuple[Shared, list[jax.Array]]] = []
    for work, packed in map(work_of, groups) if device_table is not None else _ahead(work_of, groups):
        batch = devices.put(packed) if device_table is None else device_table.gather(work)
        found.append((work, [forward(variables, batch, sample) for sample in samples]))
        jax.block_until_ready([draws for _, draws in found[-2:-1]])  # so the devices have one batch to go on with
    results = [np.stack([_in_order(np.asarray(draw), work) for draw in draws]) for work, draws in found]
    empty = np.zeros((len(samples), 0, len(statistics)))
    rows = np.concatenate([np.arange(0), *(work.rows for work, _ in found)])
    outputs = np.concatenate([empty, *results], axis=1)
    return Predictions.over(to_label_units(outputs, statistics, compositions_for(statistics, table, rows)))


def _in_order(predictions: np.ndarray, work: Shared) -> np.ndarray:
    """Puts predictions [devices, B, T], or [B, T] of one device, into the order of the crystals, [C, T]."""
    of_devices = predictions.reshape(-1, *predictions.shape[-2:])
    ordered = np.zeros((len(work.rows), predictions.shape[-1]))
    for found, share in zip(of_devices, work.shares, strict=True):
        ordered[share] = found[: len(share)]
    return ordered


def _ahead(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """Computes `map(function, items)` ahead in a thread."""
    pending: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(1) as thread:
        for item in items:
            pending.append(thread.submit(function, item))
            if len(pending) > AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def groups_of(indices: np.ndarray, size: int) -> list[np.ndarray]:
    """Makes consecutive groups of at most `size`."""
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def groups_by_atoms(table: CrystalTable, devices: int = 1) -> list[np.ndarray]:
    """Makes consecutive groups of all rows of a table, limited in atoms and crystals for each of some devices."""
    groups: list[list[int]] = []
    atoms = 0
    for row, size in enumerate(table.num_atoms):
        if not groups or atoms + size > devices * MAX_BATCH_ATOMS or len(groups[-1]) == devices * MAX_BATCH_CRYSTALS:
            groups, atoms = [*groups, []], 0
        groups[-1].append(row)
        atoms += size
    return [np.array(group) for group in groups]
