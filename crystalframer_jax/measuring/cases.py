"""The crystals that benchmarks and tests of kernels run on, by name."""

import functools
from typing import NamedTuple

import numpy as np

from crystalframer_jax.batching.batch import Batch, pack
from crystalframer_jax.batching.shapes import BatchShape
from crystalframer_jax.batching.table import make_table
from crystalframer_jax.config import NO_PARTS, BatchParts, TrainConfig
from crystalframer_jax.data.datasets import open_dataset
from crystalframer_jax.data.loader import TrainingBatches
from crystalframer_jax.data.records import Record, Source
from crystalframer_jax.data.registry import TARGET_SETS
from crystalframer_jax.data.sources import Bundled
from crystalframer_jax.data.store import Dataset
from crystalframer_jax.structures.crystal import Crystal
from crystalframer_jax.structures.neighbors import LatticeBox, neighbor_rows

BUNDLED = "mp_flla_2015"
TARGET = "e_form"
UNIT_CELL = "mp-4342"  # KNbO3 of the bundled set: a tetragonal perovskite, 5 atoms
CUTOFF = TrainConfig().cutoff
DISPLACEMENT = 0.05  # Å, standard deviation of the atoms of a supercell along each axis: no symmetry remains
SEED = 0


class Case(NamedTuple):
    """Crystals to measure with: a training batch of the bundled set, or one supercell."""

    name: str
    batch_size: int = 0  # crystals of the bundled set; 0: a supercell
    repeats: tuple[int, int, int] = (1, 1, 1)  # of the cell of UNIT_CELL

    def batch(self, data_dir: str = "") -> Batch:
        """Packs the batch (numpy), with neighbors within the radius of the default configuration.

        A batch of the bundled set is the first of a training with seed 0, in the shape that training plans.
        """
        if self.batch_size:
            return TrainingBatches(bundled_set(data_dir), self.batch_size, 1, SEED)[0]
        return packed(supercell(unit_cell(), self.repeats), CUTOFF)


SUPERCELLS = {40: (2, 2, 2), 100: (5, 2, 2), 1000: (8, 5, 5), 10000: (20, 10, 10)}  # by the number of atoms
ALL = [Case(f"bundled-{size}", size) for size in (4, 64, 256, 1024)]
ALL += [Case(f"supercell-{atoms}", repeats=repeats) for atoms, repeats in SUPERCELLS.items()]
CASES = {case.name: case for case in ALL}
SMALL = ("bundled-4", "supercell-40")  # for tests


def bundled_set(data_dir: str = "") -> Dataset:
    """Opens the bundled set, prepared in `data_dir` (empty: the user's cache folder) if need be."""
    return open_dataset(BUNDLED, (TARGET,), CUTOFF, data_dir)


def bundled_source() -> Source:
    """Opens the files of the bundled set."""
    known = TARGET_SETS[BUNDLED]
    assert isinstance(known.source, Bundled)
    return known.source.open(known.targets)


def packed(crystal: Crystal, cutoff: float | LatticeBox, parts: BatchParts = NO_PARTS) -> Batch:
    """Packs one crystal into a shape that fits exactly, so that its cost is that of its atoms."""
    table = make_table([crystal], [neighbor_rows(crystal, cutoff)])
    atoms = crystal.num_atoms
    shape = BatchShape(atoms, table.longest_row, 1, atoms * parts.cells, parts, len(table.image))
    return pack(table, np.array([0]), shape, np.zeros((1, 1)))


@functools.cache
def unit_cell() -> Crystal:
    """Reads the crystal UNIT_CELL of the bundled set."""
    records = (record for record in bundled_source().records() if isinstance(record, Record))
    return next(record for record in records if record.id == UNIT_CELL).load()


def supercell(crystal: Crystal, repeats: tuple[int, int, int]) -> Crystal:
    """Repeats a crystal along its lattice vectors and displaces its atoms at random (always alike)."""
    images = np.stack(np.meshgrid(*map(np.arange, repeats), indexing="ij"), -1).reshape(-1, 3)
    positions = (crystal.positions[None] + (images @ crystal.lattice)[:, None]).reshape(-1, 3)
    positions += DISPLACEMENT * np.random.default_rng(SEED).normal(size=positions.shape)
    lattice = crystal.lattice * np.array(repeats)[:, None]
    return Crystal(np.tile(crystal.species, len(images)), positions, lattice, id=f"{crystal.id}x{len(images)}")
