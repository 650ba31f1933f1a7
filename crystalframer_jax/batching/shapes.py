"""The few shapes that crystals are packed into: each is one compiled program."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from crystalframer_jax.batching.table import CrystalTable
from crystalframer_jax.config import NO_PARTS, BatchParts, ConfigError
from crystalframer_jax.parallel.devices import share_out

CELL_BLOCK = 8  # the length of cell rows is padded to a multiple of this
ATOM_BLOCK = 32  # atoms are padded to multiples of this, the block size of the lattice sums
COLUMN_BLOCK = 32  # the lattice sums take so many neighbors of each atom at once, if it divides the row length
MOST_PLACES = 2**31 - 1  # of neighbors in a batch, which are counted in int32
EDGE_BLOCK = 256  # neighbors are padded to multiples of this
TRIALS = 500, 128_000  # at most so many random batches, and crystals in them, by which shapes for devices are planned


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """Padded sizes of a batch and what it holds; one compiled program each."""

    num_atoms: int
    row_length: int
    num_crystals: int
    cell_length: int = 0  # atoms of the largest cell, if parts.cells
    parts: BatchParts = NO_PARTS
    num_edges: int = 0  # neighbors of all atoms; 0: as many as the rows can hold

    def __post_init__(self):
        if self.num_atoms * self.row_length > MOST_PLACES:
            raise ConfigError(
                f"{self.num_atoms} atoms with up to {self.row_length} neighbors are too many for one batch; choose a "
                "smaller batch_size or cutoff_radius"
            )

    @property
    def edges(self) -> int:
        """Padded number of neighbors."""
        return self.num_edges or self.num_atoms * self.row_length


def round_up(value: float, least: int) -> int:
    """Returns the next of least * (1, 1.5, 2, 3, 4, 6, 8, ...): few shapes, at most a third of padding."""
    step = least
    while step < value:
        if step + step // 2 >= value:
            return step + step // 2
        step *= 2
    return step


def plan_shapes(
    table: CrystalTable,
    indices: np.ndarray,
    batch_size: int,
    longest_row: int,
    parts: BatchParts = NO_PARTS,
    devices: int = 1,
) -> list[BatchShape]:
    """Plans at most two shapes for the shares of devices in random batches among crystals `indices` [C] of the table.

    The first holds all but about one in five hundred random batches of `batch_size` (mean + 3 standard deviations of
    the numbers of atoms and of neighbors; for several devices, the largest of 500 or less), the second the largest
    share that can occur.
    """
    sizes, edges = table.num_atoms[indices], table.num_edges[indices]
    row_length = round_up(longest_row, ATOM_BLOCK)
    cell_length = round_up(int(sizes.max(initial=1)), CELL_BLOCK) if parts.cells else 0
    crystals = -(-batch_size // devices)
    largest = [int(np.sort(x)[::-1][:crystals].sum()) for x in (sizes, edges)]
    if devices == 1:
        usual = [x.mean() * batch_size + 3 * x.std() * np.sqrt(batch_size) for x in (sizes, edges)]
    else:
        usual = _usual_shares(sizes, edges, batch_size, devices)
    shapes = [
        BatchShape(_blocks(n, ATOM_BLOCK), row_length, crystals, cell_length, parts, _blocks(max(e, 1), EDGE_BLOCK))
        for n, e in (np.minimum(usual, largest), largest)
    ]
    return list(dict.fromkeys(shapes))


def _usual_shares(sizes: np.ndarray, edges: np.ndarray, batch_size: int, devices: int) -> list[float]:
    """Returns the most atoms and neighbors that a device gets in some random batches."""
    rng, most = np.random.default_rng(0), np.zeros(2)
    for _ in range(max(20, min(TRIALS[0], TRIALS[1] // batch_size))):
        batch = rng.integers(len(sizes), size=batch_size)
        shares = share_out(edges[batch], devices)
        most = np.maximum(most, [max(x[batch[share]].sum() for share in shares) for x in (sizes, edges)])
    return most.tolist()


class Shared(NamedTuple):
    """A batch that is shared out among devices."""

    rows: np.ndarray  # of the table
    shares: list[np.ndarray]  # which of them every device gets
    shape: BatchShape  # that holds the largest share


def shared_out(
    table: CrystalTable, rows: np.ndarray, shapes: Sequence[BatchShape] | BatchParts, devices: int = 1
) -> Shared:
    """Shares crystals out by their neighbors; the shape is the first of `shapes` that fits, or one with these parts.

    Raises ValueError if none of the shapes fits.
    """
    sizes, edges = lengths_of(table.atom_offset, rows), lengths_of(table.edge_offset, rows)
    counts = np.asarray(table.count)[ranges_of(table.atom_offset, rows)]
    shares = share_out(edges, devices)
    placed, owner = np.concatenate(shares), np.repeat(np.arange(devices), [len(share) for share in shares])

    def most(numbers: np.ndarray) -> int:
        """Returns the largest sum over a share."""
        return int(np.bincount(owner, numbers[placed], minlength=devices).max())

    needed = BatchShape(
        num_atoms=most(sizes),
        row_length=int(counts.max(initial=1)),
        num_crystals=max(len(share) for share in shares),
        cell_length=int(sizes.max(initial=0)),
        num_edges=most(edges),
    )
    shape = _rounded(needed, shapes) if isinstance(shapes, BatchParts) else fitting_shape(needed, shapes)
    return Shared(rows, shares, shape)


def shape_for(table: CrystalTable, indices: np.ndarray, parts: BatchParts = NO_PARTS) -> BatchShape:
    """Returns a shape that holds these crystals, rounded up so that similar requests need one compiled program."""
    return shared_out(table, indices, parts).shape


def _rounded(needed: BatchShape, parts: BatchParts) -> BatchShape:
    """Returns one of few shapes that hold a batch with these numbers."""
    num_atoms, row_length = round_up(needed.num_atoms, ATOM_BLOCK), round_up(needed.row_length, ATOM_BLOCK)
    num_edges = num_atoms * row_length
    while num_edges % 2 == 0 and num_edges // 2 >= needed.num_edges:
        num_edges //= 2
    cell_length = round_up(needed.cell_length, CELL_BLOCK) if parts.cells else 0
    return BatchShape(num_atoms, row_length, round_up(needed.num_crystals, 1), cell_length, parts, num_edges)


def fitting_shape(needed: BatchShape, shapes: Sequence[BatchShape]) -> BatchShape:
    """Returns the first of `shapes` in which a batch with these numbers fits; ValueError if there is none."""
    for shape in shapes:
        if (
            needed.num_atoms <= shape.num_atoms
            and needed.num_edges <= shape.edges
            and needed.row_length <= shape.row_length
            and needed.num_crystals <= shape.num_crystals
            and (needed.cell_length <= shape.cell_length or not shape.parts.cells)
        ):
            return shape
    raise ValueError(
        f"{needed.num_crystals} crystals with {needed.num_atoms} atoms, {needed.num_edges} neighbors and rows up to "
        f"{needed.row_length} fit none of {shapes}"
    )


def lengths_of(offset: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Returns the lengths of the segments `indices` of a flat column."""
    return np.asarray(offset[indices + 1] - offset[indices])


def ranges_of(offset: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Returns all places of the segments `indices` of a flat column, one segment after the other."""
    starts, lengths = np.asarray(offset[indices]), lengths_of(offset, indices)
    return np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())


def _blocks(number: float, block: int) -> int:
    return block * int(np.ceil(number / block))
