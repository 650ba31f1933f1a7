"""Batches: crystals packed into padded arrays of a few fixed shapes.

Atoms of a batch are ordered by the length of their neighbour row, so that blocks of neighbouring atoms have rows of
about the same length; crystals keep their order. Padding atoms have an empty row and belong to no crystal.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from crystalframer_jax.data.table import CrystalTable

ATOM_BLOCK = 32  # atoms are padded to multiples of this, the block size of the lattice sums


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Neighbour rows of a batch on the device; entries beyond `count` are padding."""

    index: jax.Array  # [N, M] int32 neighbour atom
    vector: jax.Array  # [N, M, 3] p_j + nL - p_i, Å
    reverse: jax.Array  # [N, M] int32 place (row * M + column) of the reverse neighbour
    count: jax.Array  # [N] int32 length of the row


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """N atoms (padding included) of B crystals with T targets."""

    species: jax.Array  # [N] int32 atomic number, 0 for padding
    occupancies: jax.Array | None  # [N, 98] share of each element, None if every site holds one atom
    crystal_of_atom: jax.Array  # [N] int32, B for padding
    atom_in_crystal: jax.Array  # [N] int32
    rows: Rows
    crystal_sizes: jax.Array  # [B] int32 number of atoms, 0 for padding
    targets: jax.Array  # [B, T] label units
    target_mask: jax.Array  # [B, T] bool


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """Padded sizes of a batch; one compiled program each."""

    num_atoms: int
    row_length: int
    num_crystals: int


def round_up(value: float, least: int) -> int:
    """The next of least * (1, 1.5, 2, 3, 4, 6, 8, ...): few shapes, at most a third of padding."""
    step = least
    while step < value:
        if step + step // 2 >= value:
            return step + step // 2
        step *= 2
    return step


def plan_shapes(table: CrystalTable, indices: np.ndarray, batch_size: int, longest_row: int) -> list[BatchShape]:
    """At most two shapes for random batches of `batch_size` among the crystals `indices` [C] of the table.

    The first holds all but about one in a thousand random batches (mean + 3 standard deviations of the number of
    atoms), the second the largest batch that can occur.
    """
    sizes = np.sort(table.num_atoms[indices])[::-1]
    largest = int(sizes[:batch_size].sum())
    usual = sizes.mean() * batch_size + 3 * sizes.std() * np.sqrt(batch_size)
    atoms = sorted({_atom_blocks(min(usual, largest)), _atom_blocks(largest)})
    return [BatchShape(n, round_up(longest_row, ATOM_BLOCK), batch_size) for n in atoms]


def shape_for(table: CrystalTable, indices: np.ndarray) -> BatchShape:
    """A shape that holds these crystals, rounded up so that similar requests share a compiled program."""
    rows = _take(table.count, table.atom_offset, indices)
    return BatchShape(
        round_up(len(rows), ATOM_BLOCK), round_up(rows.max(initial=1), ATOM_BLOCK), round_up(len(indices), 1)
    )


def pack(
    table: CrystalTable,
    indices: np.ndarray,
    shapes: list[BatchShape],
    targets: np.ndarray | None = None,
    num_targets: int | None = None,
) -> Batch:
    """Pack crystals `indices` of the table into the first of `shapes` that holds them (numpy arrays).

    `targets` [len(indices), T] are labels in label units, not finite where unknown. Without them T is `num_targets`
    (1 if not given) and the mask is False.
    Raises ValueError if no shape is large enough.
    """
    sizes = table.num_atoms[indices]
    counts = _take(table.count, table.atom_offset, indices)
    longest = int(counts.max(initial=1))
    fitting = [
        shape
        for shape in shapes
        if sizes.sum() <= shape.num_atoms and longest <= shape.row_length and len(indices) <= shape.num_crystals
    ]
    if not fitting:
        raise ValueError(
            f"{len(indices)} crystals with {sizes.sum()} atoms and rows up to {longest} fit none of {shapes}"
        )
    shape = fitting[0]
    num_atoms, width = shape.num_atoms, shape.row_length

    crystal = np.repeat(np.arange(len(indices)), sizes)
    first_atom = np.cumsum(sizes) - sizes
    place = np.empty(len(crystal), np.int64)  # where each atom stands in the batch: longest rows first
    place[np.argsort(-counts, kind="stable")] = np.arange(len(crystal))

    def per_atom(values: np.ndarray, fill: int = 0) -> Any:
        padded = np.full((num_atoms, *values.shape[1:]), fill, values.dtype)
        padded[place] = values
        return padded

    if targets is not None:
        num_targets = targets.shape[1]
    all_targets: Any = np.zeros((shape.num_crystals, num_targets or 1))
    known: Any = np.zeros(all_targets.shape, bool)
    if targets is not None:
        known[: len(indices)] = np.isfinite(targets)
        all_targets[: len(indices)] = np.where(np.isfinite(targets), targets, 0)
    padded_sizes: Any = np.pad(sizes, (0, shape.num_crystals - len(indices)))
    return Batch(
        species=per_atom(_take(table.species, table.atom_offset, indices).astype(np.int32)),
        occupancies=_occupancies(table, indices, place, num_atoms),
        crystal_of_atom=per_atom(crystal.astype(np.int32), fill=shape.num_crystals),
        atom_in_crystal=per_atom((np.arange(len(crystal)) - first_atom[crystal]).astype(np.int32)),
        rows=_rows(table, indices, crystal, counts, place, num_atoms, width),
        crystal_sizes=padded_sizes.astype(np.int32),
        targets=all_targets.astype(np.float32),
        target_mask=known,
    )


def fill_factors(batch: Batch) -> tuple[float, float]:
    """Share of the atom slots, and of the neighbour columns that the lattice sums visit, that hold real data."""
    count = np.asarray(batch.rows.count)
    blocks = np.maximum.reduceat(count, np.arange(0, len(count), ATOM_BLOCK))
    levels = np.array([0, *row_levels(batch.rows.index.shape[1])])
    visited = levels[np.searchsorted(levels, blocks)].sum() * ATOM_BLOCK
    return float(np.mean(count > 0)), float(count.sum() / max(visited, 1))


def row_levels(row_length: int) -> tuple[int, ...]:
    """Row lengths for which the lattice sums are compiled; a block of atoms uses the first that holds its rows."""
    levels = (48, 64, 80, 96, 128, 192, 384)
    return (*(level for level in levels if level < row_length), row_length)


def _rows(
    table: CrystalTable,
    indices: np.ndarray,
    crystal: np.ndarray,
    counts: np.ndarray,
    place: np.ndarray,
    num_atoms: int,
    width: int,
) -> Rows:
    """Padded neighbour rows of the batch, atoms in the order `place`."""
    sizes, lengths = table.num_atoms[indices], np.diff(table.edge_offset)[indices]
    center = np.repeat(np.arange(len(crystal)), counts)
    of_crystal = crystal[center]
    first_edge = np.cumsum(lengths) - lengths
    column = np.arange(len(center)) - np.repeat(np.cumsum(counts) - counts, counts)
    slot = place[center] * width + column
    neighbor = _take(table.neighbor, table.edge_offset, indices) + (np.cumsum(sizes) - sizes)[of_crystal]
    position = _take(table.position, table.atom_offset, indices)
    image = _take(table.image, table.edge_offset, indices).astype(np.float64)
    lattice = table.lattice[indices]
    vector = position[neighbor] - position[center]
    for axis in range(3):
        vector += image[:, axis, None] * lattice[:, axis][of_crystal]
    reverse = slot[_take(table.reverse, table.edge_offset, indices) + first_edge[of_crystal]]

    index_rows: Any = np.zeros(num_atoms * width, np.int32)
    vector_rows: Any = np.zeros((num_atoms * width, 3), np.float32)
    reverse_rows: Any = np.zeros(num_atoms * width, np.int32)
    count_rows: Any = np.zeros(num_atoms, np.int32)
    index_rows[slot] = place[neighbor]
    vector_rows[slot] = vector
    reverse_rows[slot] = reverse
    count_rows[place] = counts
    return Rows(
        index_rows.reshape(num_atoms, width),
        vector_rows.reshape(num_atoms, width, 3),
        reverse_rows.reshape(num_atoms, width),
        count_rows,
    )


def _occupancies(table: CrystalTable, indices: np.ndarray, place: np.ndarray, num_atoms: int) -> Any:
    """Occupancies [N, 98] if any site of these crystals is shared, else None."""
    if not len(table.shared_site):
        return None
    atoms = _ranges(table.atom_offset, indices)
    at = np.minimum(np.searchsorted(table.shared_site, atoms), len(table.shared_site) - 1)
    shared = table.shared_site[at] == atoms
    if not shared.any():
        return None
    occupancies = np.zeros((num_atoms, 98), np.float32)
    occupancies[place, table.species[atoms] - 1] = 1
    occupancies[place[shared]] = table.shared_occupancy[at[shared]]
    return occupancies


def _ranges(offset: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """All places of the segments `indices` of a flat column, one segment after the other."""
    starts, lengths = offset[indices], np.diff(offset)[indices]
    return np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())


def _take(column: np.ndarray, offset: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """The segments `indices` of a flat column, joined."""
    return column[_ranges(offset, indices)]


def _atom_blocks(atoms: float) -> int:
    return ATOM_BLOCK * int(np.ceil(atoms / ATOM_BLOCK))
