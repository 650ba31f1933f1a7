"""The crystals that benchmarks and tests of kernels run on, by name."""

import dataclasses
import functools

import numpy as np

from crystalframer_jax.batching.batch import Batch, pack
from crystalframer_jax.batching.shapes import BatchShape
from crystalframer_jax.batching.table import make_table
from crystalframer_jax.config import NO_PARTS, BatchParts, ConfigError, TrainConfig
from crystalframer_jax.data.datasets import open_dataset
from crystalframer_jax.data.loader import TrainingBatches
from crystalframer_jax.data.records import Record, crystal_of
from crystalframer_jax.data.registry import TARGET_SETS
from crystalframer_jax.data.sources import Bundled
from crystalframer_jax.structures.crystal import Crystal
from crystalframer_jax.structures.neighbors import neighbor_rows

BUNDLED = "mp_flla_2015"
TARGET = "e_form"
UNIT_CELL = "mp-4342"  # KNbO3 of the bundled set: a tetragonal perovskite, 5 atoms
DISPLACEMENT = 0.05  # Å, standard deviation of the atoms of a supercell along each axis: no symmetry remains
SEED = 0


@dataclasses.dataclass(frozen=True)
class Case:
    """Crystals to measure with: a training batch of the bundled set, or one supercell."""

    name: str
    batch_size: int = 0  # crystals of the bundled set; 0: a supercell
    repeats: tuple[int, int, int] = (1, 1, 1)  # of the cell of UNIT_CELL

    def batch(self, parts: BatchParts = NO_PARTS, data_dir: str = "") -> Batch:
        """The packed batch (numpy), with neighbours within the radius of the default configuration.

        A batch of the bundled set is the first of a training with seed 0, in the shape that training plans; the set is
        prepared in `data_dir` (empty: the user's cache folder) if need be. A supercell is packed into a shape that
        fits exactly, so that its cost is that of its atoms.
        """
        cutoff = TrainConfig().cutoff
        if self.batch_size:
            dataset = open_dataset(BUNDLED, (TARGET,), cutoff, data_dir)
            return TrainingBatches(dataset, self.batch_size, 1, SEED, parts)[0]
        crystal = supercell(unit_cell(), self.repeats)
        table = make_table([crystal], [neighbor_rows(crystal, cutoff)])
        shape = BatchShape(
            crystal.num_atoms, table.longest_row, 1, crystal.num_atoms * parts.cells, parts, len(table.image)
        )
        return pack(table, np.array([0]), [shape], np.zeros((1, 1)))


CASES = {
    case.name: case
    for case in (
        Case("bundled-4", batch_size=4),
        Case("bundled-64", batch_size=64),
        Case("bundled-256", batch_size=256),
        Case("bundled-1024", batch_size=1024),
        Case("supercell-40", repeats=(2, 2, 2)),
        Case("supercell-100", repeats=(5, 2, 2)),
        Case("supercell-1000", repeats=(8, 5, 5)),
        Case("supercell-10000", repeats=(20, 10, 10)),
    )
}
SMALL = ("bundled-4", "supercell-40")  # for tests


def find_case(name: str) -> Case:
    """A case by name; ConfigError naming the allowed ones."""
    if name not in CASES:
        raise ConfigError(f"case {name!r} is not available; allowed: {', '.join(CASES)}")
    return CASES[name]


@functools.cache
def unit_cell() -> Crystal:
    """The crystal UNIT_CELL of the bundled set."""
    known = TARGET_SETS[BUNDLED]
    assert isinstance(known.origin, Bundled)
    records = (record for record in known.origin.open(known.targets).records() if isinstance(record, Record))
    return crystal_of(next(record for record in records if record.id == UNIT_CELL))


def supercell(crystal: Crystal, repeats: tuple[int, int, int]) -> Crystal:
    """The crystal repeated along its lattice vectors, its atoms then displaced at random (always alike)."""
    images = np.stack(np.meshgrid(*map(np.arange, repeats), indexing="ij"), -1).reshape(-1, 3)
    positions = (crystal.positions[None] + (images @ crystal.lattice)[:, None]).reshape(-1, 3)
    positions += DISPLACEMENT * np.random.default_rng(SEED).normal(size=positions.shape)
    lattice = crystal.lattice * np.array(repeats)[:, None]
    return Crystal(np.tile(crystal.species, len(images)), positions, lattice, id=f"{crystal.id}x{len(images)}")
