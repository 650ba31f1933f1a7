"""The input pipeline: batches whose order is a pure function of seed and epoch, packed in a background thread."""

from collections.abc import Iterator

import grain
import numpy as np

from crystalframer_jax.batch import Batch, BatchShape, fill_factors, pack, plan_shapes
from crystalframer_jax.config import NO_PARTS, BatchParts, ConfigError
from crystalframer_jax.data.store import Dataset


class TrainingBatches:
    """All batches of a training run by step number; every epoch is shuffled, its incomplete last batch dropped.

    `atoms` are the fewest and most atoms (0: no limit) of a crystal to train on, `share` is that of the batches of an
    epoch which are used. Raises ConfigError if no crystal is left.
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
    ):
        self.dataset = dataset
        self.indices = _of_size(dataset, dataset.splits["train"], *atoms)
        self.batch_size = min(batch_size, len(self.indices))
        self.steps_per_epoch = max(1, int(share * (len(self.indices) // self.batch_size)))
        self.n_epochs = n_epochs
        self.seed = seed
        self.shapes = batch_shapes(dataset, self.batch_size, parts)
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
        """The crystals of a step, rows of the table."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return self.order(epoch)[position * self.batch_size : (position + 1) * self.batch_size]

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step (numpy arrays)."""
        chosen = self.rows(step)
        return pack(self.dataset.table, chosen, self.shapes, self.dataset.labels[chosen])

    def steps_of_last_epoch(self) -> range:
        """The steps of the last epoch."""
        return range(len(self) - self.steps_per_epoch, len(self))

    def fill_factors(self, batches: int = 8) -> tuple[float, float]:
        """Shares of atom slots and of neighbour columns that hold real data, means over the first batches."""
        factors = [fill_factors(self[step]) for step in range(min(batches, len(self)))]
        atoms, neighbors = np.mean(factors, axis=0)
        return float(atoms), float(neighbors)

    def iterate(self, first_step: int) -> Iterator[Batch]:
        """The batches from a step on, prepared ahead by a background thread."""
        steps = grain.MapDataset.source(self)[first_step:]
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


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


def batch_shapes(dataset: Dataset, batch_size: int, parts: BatchParts = NO_PARTS) -> list[BatchShape]:
    """The shapes of all batches of a dataset, training and evaluation alike."""
    everything = np.concatenate(list(dataset.splits.values()))
    return plan_shapes(dataset.table, everything, batch_size, dataset.table.longest_row, parts)
