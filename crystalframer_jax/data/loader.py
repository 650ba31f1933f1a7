"""The input pipeline: batches whose order is a pure function of seed and epoch, prepared ahead of the training."""

import functools
import itertools
from collections.abc import Iterator

import grain
import numpy as np

from crystalframer_jax.batch import Batch, Fill, fill_factors, pack
from crystalframer_jax.config import NO_PARTS, BatchParts, ConfigError
from crystalframer_jax.data.device import DeviceTable, Stretch, device_table_if_it_fits, padded
from crystalframer_jax.data.store import Dataset
from crystalframer_jax.shapes import BatchShape, fitting_shape, plan_shapes


class TrainingBatches:
    """All batches of a training run by step number; every epoch is shuffled, its incomplete last batch dropped.

    `atoms` are the fewest and most atoms (0: no limit) of a crystal to train on, `share` is that of the batches of an
    epoch which are used. `shard` (index, count) is this process among those that train together: each packs its equal
    part of every batch. `on_device` says whether the crystals are kept on the device and gathered there; None: if they
    fit. Neither changes what the batches hold.

    Raises ConfigError if no crystal is left, or if processes cannot share a batch equally.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        n_epochs: int,
        seed: int,
        parts: BatchParts = NO_PARTS,
        atoms: tuple[int, int] = (0, 0),
        share: float = 1.0,
        shard: tuple[int, int] = (0, 1),
        on_device: bool | None = None,
    ):
        self.dataset = dataset
        self.indices = _of_size(dataset, dataset.splits["train"], *atoms)
        self.shard = shard
        self.batch_size = _shared_batch_size(batch_size, len(self.indices), shard[1])
        self.steps_per_epoch = max(1, int(share * (len(self.indices) // self.batch_size)))
        self.n_epochs = n_epochs
        self.seed = seed
        self.parts = parts
        self.on_device = on_device
        self.shapes = batch_shapes(dataset, self.batch_size // shard[1], parts)
        self._order: tuple[int, np.ndarray] | None = None  # the last epoch asked for, and its order

    def __len__(self) -> int:
        return self.steps_per_epoch * self.n_epochs

    def order(self, epoch: int) -> np.ndarray:
        """Crystals of an epoch in the order of training, rows of the table."""
        known = self._order
        if known is None or known[0] != epoch:
            known = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.indices)
            self._order = known
        return known[1]

    def rows(self, step: int) -> np.ndarray:
        """The crystals of a step (this process's part of them), rows of the table."""
        epoch, position = divmod(step, self.steps_per_epoch)
        index, count = self.shard
        part = self.batch_size // count
        start = position * self.batch_size + index * part
        return self.order(epoch)[start : start + part]

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step (numpy arrays)."""
        chosen = self.rows(step)
        return pack(self.dataset.table, chosen, self.shapes, self.dataset.labels[chosen])

    def steps_of_last_epoch(self) -> range:
        """The steps of the last epoch."""
        return range(len(self) - self.steps_per_epoch, len(self))

    def fill_factors(self, batches: int = 8) -> Fill:
        """Shares of the places that hold real data, means over the first batches."""
        factors = [fill_factors(self[step]) for step in range(min(batches, len(self)))]
        return Fill(*np.mean(factors, axis=0).tolist())

    @functools.cached_property
    def device_table(self) -> DeviceTable | None:
        """The crystals on the device, if they are kept there."""
        if self.on_device is None:
            return device_table_if_it_fits(self.dataset.table, self.dataset.labels, self.parts)
        return DeviceTable(self.dataset.table, self.dataset.labels, self.parts) if self.on_device else None

    def iterate(self, first_step: int) -> Iterator[Batch]:
        """The batches from a step on: gathered on the device, or packed ahead by a background thread.

        In the second case it is an iterator of Grain, with get_state and set_state.
        """
        table = self.device_table
        if table is not None:
            return (table.gather(self.rows(step), self.shapes) for step in range(first_step, len(self)))
        steps = grain.MapDataset.source(self)[first_step:]
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))

    def stretches(self, first_step: int, most: int) -> Iterator[Stretch]:
        """The batches from a step on in stretches of `most`, less before the end of an epoch or a change of shape.

        Raises ValueError if the crystals are not kept on the device.
        """
        if self.device_table is None:
            raise ValueError("stretches are gathered on the device, and the crystals are not kept there")
        columns, per_epoch = self.device_table.columns, self.steps_per_epoch
        for epoch in range(first_step // per_epoch, self.n_epochs):
            steps = range(max(first_step, epoch * per_epoch), (epoch + 1) * per_epoch)
            for shape, group in itertools.groupby(steps, self._shape):
                while piece := list(itertools.islice(group, most)):
                    yield Stretch(columns, np.stack([padded(self.rows(step), shape) for step in piece]), shape)

    def _shape(self, step: int) -> BatchShape:
        """The shape of the batch of a step."""
        return fitting_shape(self.dataset.table, self.rows(step), self.shapes)


def _of_size(dataset: Dataset, rows: np.ndarray, fewest: int, most: int) -> np.ndarray:
    """Those rows of the table whose crystals have from `fewest` to `most` atoms."""
    sizes = dataset.table.num_atoms[rows]
    chosen = rows[(sizes >= fewest) & ((sizes <= most) | (most <= 0))]
    if not len(chosen):
        raise ConfigError(
            f"train_filter_min={fewest}, train_filter_max={most}: none of the {len(rows)} training crystals has "
            f"as many atoms (they have {sizes.min(initial=0)} to {sizes.max(initial=0)})"
        )
    return chosen


def _shared_batch_size(batch_size: int, available: int, processes: int) -> int:
    """The batch size, or as many of the `available` crystals as there are; a multiple of the number of processes."""
    if batch_size % processes:
        near = max(batch_size // processes, 1) * processes
        raise ConfigError(
            f"batch_size={batch_size} cannot be shared equally by {processes} processes; choose a multiple of "
            f"{processes}, such as {near}"
        )
    if available < processes:
        raise ConfigError(f"{available} training crystals are too few for {processes} processes; start fewer of them")
    return min(batch_size, available // processes * processes)


def batch_shapes(dataset: Dataset, batch_size: int, parts: BatchParts = NO_PARTS) -> list[BatchShape]:
    """The shapes of all batches of a dataset, training and evaluation alike."""
    everything = np.concatenate(list(dataset.splits.values()))
    return plan_shapes(dataset.table, everything, batch_size, dataset.table.longest_row, parts)
