"""The input pipeline: batches whose order is a pure function of seed and epoch, prepared ahead of the training."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import grain
import jax
import numpy as np

from crystalframer_jax.batching.batch import Batch, Fill, fill_factors, pack
from crystalframer_jax.batching.device_table import Chunk, DeviceTable, device_table_if_it_fits
from crystalframer_jax.batching.shapes import BatchShape, Shared, plan_shapes, shared_as_planned
from crystalframer_jax.batching.table import edges_and_atoms
from crystalframer_jax.config import NO_PARTS, BatchParts, ConfigError
from crystalframer_jax.data.store import Dataset
from crystalframer_jax.parallel.devices import ONE_DEVICE, Devices


@dataclasses.dataclass(eq=False, repr=False)
class TrainingBatches:
    """All batches of a training run by step number; every epoch is shuffled, its incomplete last batch dropped.

    `atoms` are the fewest and most atoms (0: no limit) of a crystal to train on, `fraction` is that of the batches of
    an epoch which are used. Every batch is shared out among `devices` by its neighbors. `on_device` says whether the
    crystals are kept on the devices and gathered there; None: if they fit. Neither changes what the batches hold.
    `learned` [C, T] is what is learned of the labels of all crystals of the dataset; None: the labels themselves.

    Raises ConfigError if no crystal is left.
    """

    dataset: Dataset
    batch_size: int
    n_epochs: int
    seed: int
    parts: BatchParts = NO_PARTS
    atoms: tuple[int, int] = (0, 0)
    fraction: float = 1.0
    on_device: bool | None = None
    devices: Devices = ONE_DEVICE
    learned: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Chooses the crystals, and plans epochs and shapes."""
        self.indices = rows_to_train_on(self.dataset, *self.atoms)
        self.batch_size = min(self.batch_size, len(self.indices))
        self.steps_per_epoch = max(1, int(self.fraction * (len(self.indices) // self.batch_size)))
        self.shapes = _planned(self.dataset, self.indices, self.batch_size, self.parts, self.devices.count, len(self))
        self._order = -1, self.indices, self.indices  # the last epoch asked for, its order, the sizes of its crystals

    def __len__(self) -> int:
        return self.steps_per_epoch * self.n_epochs

    @property
    def labels(self) -> np.ndarray:
        """The targets of the batches, for all crystals of the dataset, [C, T]."""
        return self.dataset.labels if self.learned is None else self.learned

    def order(self, epoch: int) -> np.ndarray:
        """Returns the crystals of an epoch in the order of training, rows of the table."""
        return self._ordered(epoch)[0]

    def rows(self, step: int) -> np.ndarray:
        """Returns the crystals of a step, rows of the table."""
        return self._rows_and_sizes(step)[0]

    def shared(self, step: int) -> Shared:
        """Returns the crystals of a step and what every device gets of them."""
        return shared_as_planned(*self._rows_and_sizes(step), self.shapes, self.devices.count)

    def _rows_and_sizes(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        epoch, position = divmod(step, self.steps_per_epoch)
        rows, sizes = self._ordered(epoch)
        batch = slice(position * self.batch_size, (position + 1) * self.batch_size)
        return rows[batch], sizes[batch]

    def _ordered(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the crystals of an epoch in the order of training, and their sizes."""
        found, rows, sizes = self._order
        if found != epoch:
            rows = np.random.default_rng([self.seed, epoch]).permutation(self.indices)
            sizes = self.dataset.table.sizes.take(rows)
            self._order = epoch, rows, sizes
        return rows, sizes

    def __getitem__(self, step: int) -> Batch:
        """Returns the batch of a step (numpy arrays), as `Devices.put` takes it."""
        return self.devices.stacked(self.parts_of(step))

    def parts_of(self, step: int) -> list[Batch]:
        """Returns the shares that the devices of this process have in the batch of a step (numpy arrays)."""
        table, labels, work = self.dataset.table, self.labels, self.shared(step)
        of_process = [work.shares[device] for device in self.devices.of_process]
        return [pack(table, work.rows[share], work.shape, labels[work.rows[share]], share) for share in of_process]

    def imbalance(self, batches: int = 8) -> float:
        """Returns the most neighbors of a device, divided by their mean over the devices; mean of the first batches."""
        works = map(self.shared, range(min(batches, len(self))))
        loads = [edges_and_atoms(work.shares.loads)[0] for work in works]
        return float(np.mean(np.max(loads, axis=1) / np.mean(loads, axis=1)))

    def fill_factors(self, batches: int = 32) -> Fill:
        """Returns the fractions of the places that hold real data, means over the first batches."""
        factors = [fill_factors(part) for step in range(min(batches, len(self))) for part in self.parts_of(step)]
        return Fill(*np.mean(factors, axis=0).tolist())

    def describe(self) -> str:
        """Tells how the crystals are packed, and shared by the devices, in one line."""
        fill, usual = self.fill_factors(), self.shapes[:-1] or self.shapes
        atoms = " or ".join(f"{n:,}" for n in dict.fromkeys(shape.num_atoms for shape in usual))
        edges = " or ".join(f"{n:,}" for n in dict.fromkeys(shape.edges for shape in usual))
        packed = (
            f"{atoms} atom slots ({fill.atoms:.0%} filled) with {edges} for neighbors ({fill.edges:.0%} filled)"
            f"{', gathered on the device' if self.device_table else ''}"
        )
        if self.devices.count == 1:
            return f"batches of {self.batch_size} crystals in {packed}"
        processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
        return (
            f"batches of {self.batch_size} crystals, shared by {self.devices.count} devices{processes}: "
            f"{usual[0].num_crystals} crystals each in {packed}; the busiest has {self.imbalance():.3f} times the mean "
            "number of neighbors"
        )

    @functools.cached_property
    def device_table(self) -> DeviceTable | None:
        """The crystals on the devices, if they are kept there."""
        crystals = self.dataset.table, self.labels, self.parts, self.devices
        if self.on_device is None:
            return device_table_if_it_fits(*crystals)
        return DeviceTable(*crystals) if self.on_device else None

    def iterate(self, first_step: int) -> Iterator[Batch]:
        """Iterates over the batches from a step on, on the devices: gathered there, or packed ahead by a thread."""
        table = self.device_table
        if table is not None:
            return (table.gather(self.shared(step)) for step in range(first_step, len(self)))
        return map(self.devices.put, self.packed(first_step))

    def packed(self, first_step: int) -> Iterator[Batch]:
        """Iterates over the batches from a step on as numpy arrays: by Grain, with get_state and set_state."""
        steps = grain.MapDataset.source(self)[first_step:]
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))

    def dispatches(self, first_step: int, steps_each: int) -> Iterator[Batch | Chunk]:
        """The batches from a step on as they are dispatched: in chunks if the crystals are on the devices.

        One by one if there are several usual shapes, which change from batch to batch: chunks would be rare.
        """
        chunked = self.device_table is not None and steps_each > 1 and len(self.shapes) <= 2
        return self.chunks(first_step, steps_each) if chunked else self.iterate(first_step)

    def chunks(self, first_step: int, steps_each: int) -> Iterator[Chunk | Batch]:
        """Iterates over the batches from a step on, gathered on the devices in chunks of `steps_each`.

        What is left before the end of an epoch or a change of shape comes batch by batch: every length of a chunk
        would be another compiled program. Raises ValueError if the crystals are not kept on the devices.
        """
        table, per_epoch = self.device_table, self.steps_per_epoch
        if table is None:
            raise ValueError("chunks are gathered on the device, and the crystals are not kept there")
        for epoch in range(first_step // per_epoch, self.n_epochs):
            steps = range(max(first_step, epoch * per_epoch), (epoch + 1) * per_epoch)
            for _, group in itertools.groupby(map(self.shared, steps), lambda work: work.shape):
                while piece := list(itertools.islice(group, steps_each)):
                    if len(piece) == steps_each:
                        yield table.gather_several(piece)
                    else:
                        yield from map(table.gather, piece)


def rows_to_train_on(dataset: Dataset, fewest: int, most: int) -> np.ndarray:
    """Returns the rows of the training crystals that have from `fewest` to `most` atoms; ConfigError if none has."""
    rows = dataset.splits["train"]
    sizes = dataset.table.num_atoms[rows]
    chosen = rows[(sizes >= fewest) & ((sizes <= most) | (most <= 0))]
    if not len(chosen):
        raise ConfigError(
            f"train_filter_min={fewest}, train_filter_max={most}: none of the {len(rows)} training crystals has "
            f"as many atoms (they have {sizes.min(initial=0)} to {sizes.max(initial=0)})"
        )
    return chosen


def batch_shapes(dataset: Dataset, batch_size: int, parts: BatchParts = NO_PARTS, devices: int = 1) -> list[BatchShape]:
    """Plans the shapes of batches for predicting the crystals of a dataset, shared out among some devices."""
    everything = np.concatenate(list(dataset.splits.values()))
    return _planned(dataset, everything, batch_size, parts, devices, -(-len(everything) // batch_size))


def _planned(
    dataset: Dataset, rows: np.ndarray, batch_size: int, parts: BatchParts, devices: int, batches: int
) -> list[BatchShape]:
    return plan_shapes(dataset.table, rows, batch_size, dataset.table.longest_row, parts, devices, batches)
