"""Batches: crystals packed into padded arrays of a few fixed shapes.

Atoms of a batch are ordered by the length of their neighbour row, so that blocks of neighbouring atoms have rows of
about the same length; crystals keep their order. Padding atoms have an empty row and belong to no crystal.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from crystalframer_jax.config import NO_PARTS, BatchParts
from crystalframer_jax.data.table import CrystalTable
from crystalframer_jax.lattice import lattice_vectors

SMALLEST_SCATTER = 1e-12  # Å^2, sum of the eigenvalues; less is rounding
CELL_BLOCK = 8  # the length of cell rows is padded to a multiple of this
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
class CellRows(Rows):
    """The atoms j of the same cell as rows of every atom i, for attention in reciprocal space.

    Here `vector` [N, S, 3] are the differences of fractional coordinates, reduced to [-1/2, 1/2].
    """

    metric: jax.Array  # [N, 3, 3] b_k . b_l of the reciprocal lattice (2 pi included), 1/Å^2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scatter:
    """Principal axes of the atoms of each cell; computed in float64, because close eigenvalues magnify rounding."""

    values: jax.Array  # [B, 3] eigenvalues of the scatter of the positions, ascending, relative to their sum
    axes: jax.Array  # [B, 3, 3] eigenvectors (columns)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """N atoms (padding included) of B crystals with T targets."""

    species: jax.Array  # [N] int32 atomic number, 0 for padding
    occupancies: jax.Array | None  # [N, 98] share of each element, None if every site holds one atom
    crystal_of_atom: jax.Array  # [N] int32, B for padding
    atom_in_crystal: jax.Array  # [N] int32
    rows: Rows
    cells: CellRows | None  # if the model attends in reciprocal space
    lattice_vectors: jax.Array | None  # [B, K, 3] the short ones in canonical order, if the model has lattice frames
    scatter: Scatter | None  # if the model has pca frames
    crystal_sizes: jax.Array  # [B] int32 number of atoms, 0 for padding
    targets: jax.Array  # [B, T] label units
    target_mask: jax.Array  # [B, T] bool


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """Padded sizes of a batch and what it holds; one compiled program each."""

    num_atoms: int
    row_length: int
    num_crystals: int
    cell_length: int = 0  # atoms of the largest cell, if parts.cells
    parts: BatchParts = NO_PARTS


def round_up(value: float, least: int) -> int:
    """The next of least * (1, 1.5, 2, 3, 4, 6, 8, ...): few shapes, at most a third of padding."""
    step = least
    while step < value:
        if step + step // 2 >= value:
            return step + step // 2
        step *= 2
    return step


def plan_shapes(
    table: CrystalTable, indices: np.ndarray, batch_size: int, longest_row: int, parts: BatchParts = NO_PARTS
) -> list[BatchShape]:
    """At most two shapes for random batches of `batch_size` among the crystals `indices` [C] of the table.

    The first holds all but about one in a thousand random batches (mean + 3 standard deviations of the number of
    atoms), the second the largest batch that can occur.
    """
    sizes = np.sort(table.num_atoms[indices])[::-1]
    largest = int(sizes[:batch_size].sum())
    usual = sizes.mean() * batch_size + 3 * sizes.std() * np.sqrt(batch_size)
    atoms = sorted({_atom_blocks(min(usual, largest)), _atom_blocks(largest)})
    cell_length = round_up(int(sizes.max(initial=1)), CELL_BLOCK) if parts.cells else 0
    return [BatchShape(n, round_up(longest_row, ATOM_BLOCK), batch_size, cell_length, parts) for n in atoms]


def shape_for(table: CrystalTable, indices: np.ndarray, parts: BatchParts = NO_PARTS) -> BatchShape:
    """A shape that holds these crystals, rounded up so that similar requests share a compiled program."""
    rows = _take(table.count, table.atom_offset, indices)
    largest = int(table.num_atoms[indices].max(initial=1))
    return BatchShape(
        round_up(len(rows), ATOM_BLOCK),
        round_up(rows.max(initial=1), ATOM_BLOCK),
        round_up(len(indices), 1),
        round_up(largest, CELL_BLOCK) if parts.cells else 0,
        parts,
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
        if sizes.sum() <= shape.num_atoms
        and longest <= shape.row_length
        and len(indices) <= shape.num_crystals
        and (sizes.max(initial=0) <= shape.cell_length or not shape.parts.cells)
    ]
    if not fitting:
        raise ValueError(
            f"{len(indices)} crystals with {sizes.sum()} atoms and rows up to {longest} fit none of {shapes}"
        )
    shape = fitting[0]
    num_atoms = shape.num_atoms

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
    dtype = shape.parts.dtype
    atom_in_crystal = np.arange(len(crystal)) - first_atom[crystal]
    return Batch(
        species=per_atom(_take(table.species, table.atom_offset, indices).astype(np.int32)),
        occupancies=_occupancies(table, indices, place, num_atoms, dtype),
        crystal_of_atom=per_atom(crystal.astype(np.int32), fill=shape.num_crystals),
        atom_in_crystal=per_atom(atom_in_crystal.astype(np.int32)),
        rows=_rows(table, indices, crystal, counts, place, shape),
        cells=_cells(table, indices, crystal, place, shape) if shape.parts.cells else None,
        lattice_vectors=_lattice_vectors(table, indices, shape) if shape.parts.lattice_vectors else None,
        scatter=_scatter(table, indices, shape) if shape.parts.scatter else None,
        crystal_sizes=padded_sizes.astype(np.int32),
        targets=all_targets.astype(dtype),
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
    levels = [48, 64, 80, 96, 128, 192, 384]
    while levels[-1] < row_length:
        levels.append(2 * levels[-1])
    return (*(level for level in levels if level < row_length), row_length)


def _rows(
    table: CrystalTable,
    indices: np.ndarray,
    crystal: np.ndarray,
    counts: np.ndarray,
    place: np.ndarray,
    shape: BatchShape,
) -> Rows:
    """Padded neighbour rows of the batch, atoms in the order `place`."""
    num_atoms, width = shape.num_atoms, shape.row_length
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
    vector_rows: Any = np.zeros((num_atoms * width, 3), shape.parts.dtype)
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


def _cells(
    table: CrystalTable, indices: np.ndarray, crystal: np.ndarray, place: np.ndarray, shape: BatchShape
) -> CellRows:
    """The atoms of its cell for every atom, in the order of the crystal."""
    sizes, width = table.num_atoms[indices], shape.cell_length
    first_atom = np.cumsum(sizes) - sizes
    lengths = sizes[crystal]
    center = np.repeat(np.arange(len(crystal)), lengths)
    column = np.arange(len(center)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    neighbor = first_atom[crystal[center]] + column
    inverse = np.linalg.inv(table.lattice[indices])
    fractional = np.einsum("ax,axy->ay", _take(table.position, table.atom_offset, indices), inverse[crystal])
    difference = fractional[neighbor] - fractional[center]

    index: Any = np.zeros((shape.num_atoms, width), np.int32)
    vector: Any = np.zeros((shape.num_atoms, width, 3), shape.parts.dtype)
    reverse: Any = np.zeros((shape.num_atoms, width), np.int32)
    count: Any = np.zeros(shape.num_atoms, np.int32)
    metric: Any = np.zeros((shape.num_atoms, 3, 3), shape.parts.dtype)
    index[place[center], column] = place[neighbor]
    vector[place[center], column] = difference - np.rint(difference)
    reverse[place[center], column] = place[neighbor] * width + (center - first_atom[crystal[center]])
    count[place] = lengths
    metric[place] = (4 * np.pi**2 * inverse.swapaxes(1, 2) @ inverse)[crystal]
    return CellRows(index, vector, reverse, count, metric)


def _lattice_vectors(table: CrystalTable, indices: np.ndarray, shape: BatchShape) -> Any:
    """[B, K, 3], zeros for padding."""
    vectors = np.stack([lattice_vectors(lattice) for lattice in table.lattice[indices]])
    padding = ((0, shape.num_crystals - len(indices)), (0, 0), (0, 0))
    return np.pad(vectors, padding).astype(shape.parts.dtype)


def _scatter(table: CrystalTable, indices: np.ndarray, shape: BatchShape) -> Scatter:
    """Zeros for padding; 0 eigenvalues for a single atom."""
    values: Any = np.zeros((shape.num_crystals, 3))
    axes: Any = np.zeros((shape.num_crystals, 3, 3))
    for place, crystal in enumerate(indices):
        position = table.position[table.atom_offset[crystal] : table.atom_offset[crystal + 1]]
        centred = position - position.mean(axis=0)
        values[place], axes[place] = np.linalg.eigh(centred.T @ centred)
    total = values.sum(axis=1, keepdims=True)
    values /= np.where(total > SMALLEST_SCATTER, total, np.inf)
    return Scatter(values.astype(shape.parts.dtype), axes.astype(shape.parts.dtype))


def _occupancies(table: CrystalTable, indices: np.ndarray, place: np.ndarray, num_atoms: int, dtype: str) -> Any:
    """Occupancies [N, 98] if any site of these crystals is shared, else None."""
    if not len(table.shared_site):
        return None
    atoms = _ranges(table.atom_offset, indices)
    at = np.minimum(np.searchsorted(table.shared_site, atoms), len(table.shared_site) - 1)
    shared = table.shared_site[at] == atoms
    if not shared.any():
        return None
    occupancies = np.zeros((num_atoms, 98), dtype)
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
