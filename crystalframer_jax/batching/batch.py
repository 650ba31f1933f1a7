"""Batches: crystals packed into padded arrays of a few fixed shapes.

Atoms of a batch are ordered by the length of their neighbour row, so that blocks of neighbouring atoms have rows of
about the same length; crystals keep their order. Padding atoms have an empty row and belong to no crystal.

The host packs neighbours as the table has them, one after the other in a few bytes each; `unpacked` makes rows with
displacement vectors of them on the device.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from crystalframer_jax.batching.shapes import ATOM_BLOCK, BatchShape, fitting_shape, lengths_of, ranges_of
from crystalframer_jax.batching.table import CrystalTable
from crystalframer_jax.structures.lattice import COMBINATIONS, lattice_vectors

SMALLEST_SCATTER = 1e-12  # Å^2, sum of the eigenvalues; less is rounding
STEPS = 4096  # coarse coordinates are counted in this part of a basis vector


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
class PackedRows:
    """Neighbour rows as they come from the host: E neighbours, those of a crystal in the order of the table.

    A fractional coordinate in the reduced basis is coarse / 4096 + fine. Differences of the integers are exact, even
    if they overflow on the way, so that float32 loses nothing far from the origin.
    """

    start: jax.Array  # [N] int32 place of the first neighbour of the atom among the E
    crystal_start: jax.Array  # [N] int32 place of the first neighbour of its crystal
    count: jax.Array  # [N] int32 length of the row
    center: jax.Array  # [E] int32 atom that the neighbour belongs to; any atom for padding
    image: jax.Array  # [E, 3] int8, int16 or int32 lattice image of the neighbour, in units of `basis`
    reverse: jax.Array  # [E] uint16 or uint32 place of the reverse neighbour, counted within the crystal
    coarse: jax.Array  # [N, 3] int32
    fine: jax.Array  # [N, 3] at most 1 / 8192
    basis: jax.Array  # [B, 3, 3] reduced basis of the lattice, rows, Å
    row_length: int = dataclasses.field(metadata={"static": True})  # M


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
    occupancies: jax.Array | None  # [N, 98] share of each element, None if every site of the table holds one atom
    crystal_of_atom: jax.Array  # [N] int32, B for padding
    atom_in_crystal: jax.Array  # [N] int32
    rows: Any  # Rows; PackedRows until `unpacked`
    cells: CellRows | None  # if the model attends in reciprocal space
    lattice_vectors: jax.Array | None  # [B, K, 3] the short ones in canonical order, if the model has lattice frames
    scatter: Scatter | None  # if the model has pca frames
    crystal_sizes: jax.Array  # [B] int32 number of atoms, 0 for padding
    crystal_place: jax.Array  # [B] int32 place of the crystal in the batch that several devices share, 0 for padding
    targets: jax.Array  # [B, T] label units
    target_mask: jax.Array  # [B, T] bool


class Fill(NamedTuple):
    """Shares of the places of a batch that hold real data."""

    atoms: float
    edges: float
    columns: float  # of the neighbour columns that the lattice sums visit


def pack(
    table: CrystalTable,
    indices: np.ndarray,
    shapes: Sequence[BatchShape],
    targets: np.ndarray | None = None,
    num_targets: int | None = None,
    places: np.ndarray | None = None,
) -> Batch:
    """Pack crystals `indices` of the table into the first of `shapes` that holds them (numpy arrays).

    `targets` [len(indices), T] are labels in label units, not finite where unknown. Without them T is `num_targets`
    (1 if not given) and the mask is False. `places` are those of the crystals in a batch of which this is a part.
    Raises ValueError if no shape is large enough.
    """
    shape = fitting_shape(table, indices, shapes)
    sizes, atoms = lengths_of(table.atom_offset, indices), ranges_of(table.atom_offset, indices)
    counts = np.asarray(table.count)[atoms].astype(np.int64)
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
    padding = (0, shape.num_crystals - len(indices))
    padded_sizes: Any = np.pad(sizes, padding)
    padded_places: Any = np.pad(np.arange(len(indices)) if places is None else places, padding)
    dtype = shape.parts.dtype
    atom_in_crystal = np.arange(len(crystal)) - first_atom[crystal]
    return Batch(
        species=per_atom(np.asarray(table.species)[atoms].astype(np.int32)),
        occupancies=_occupancies(table, atoms, place, num_atoms, dtype),
        crystal_of_atom=per_atom(crystal.astype(np.int32), fill=shape.num_crystals),
        atom_in_crystal=per_atom(atom_in_crystal.astype(np.int32)),
        rows=_rows(table, indices, crystal, counts, place, shape, per_atom),
        cells=_cells(table, indices, crystal, place, shape) if shape.parts.cells else None,
        lattice_vectors=_lattice_vectors(table, indices, shape) if shape.parts.lattice_vectors else None,
        scatter=_scatter(table, indices, shape) if shape.parts.scatter else None,
        crystal_sizes=padded_sizes.astype(np.int32),
        crystal_place=padded_places.astype(np.int32),
        targets=all_targets.astype(dtype),
        target_mask=known,
    )


def unpacked(batch: Batch) -> Batch:
    """The batch with rows [N, M] and displacement vectors; itself if it has them.

    The vector of a neighbour is exactly zero for the atom itself and minus that of the reverse neighbour.
    """
    rows = batch.rows
    if isinstance(rows, Rows):
        return batch
    start, count, center, basis, fine, coarse = (
        jnp.asarray(x) for x in (rows.start, rows.count, rows.center, rows.basis, rows.fine, rows.coarse)
    )
    crystal_start, crystal = jnp.asarray(rows.crystal_start), jnp.asarray(batch.crystal_of_atom)
    slot = center * rows.row_length + jnp.arange(len(center), dtype=jnp.int32) - start[center]  # n * M + m
    reverse = crystal_start[center] + jnp.asarray(rows.reverse).astype(jnp.int32)
    neighbor = center[reverse]
    steps = coarse[neighbor] - coarse[center] + STEPS * jnp.asarray(rows.image).astype(jnp.int32)
    fractional = steps.astype(fine.dtype) / STEPS + (fine[neighbor] - fine[center])
    basis = basis[crystal[center]]  # [E, 3, 3]; sums of products, because a matrix product may round its factors
    x, y, z = fractional.T
    vector = x[:, None] * basis[:, 0] + y[:, None] * basis[:, 1] + z[:, None] * basis[:, 2]

    column = jnp.arange(rows.row_length, dtype=jnp.int32)
    is_real = column < count[:, None]
    edge = jnp.where(is_real, start[:, None] + column, 0)

    def in_rows(x: jax.Array) -> jax.Array:
        return jnp.where(is_real.reshape(*is_real.shape, *(1,) * (x.ndim - 1)), x[edge], 0)

    # Padding refers to the atom itself: what is not finite there, times a weight of 0, then stays where it is.
    index = jnp.where(is_real, neighbor[edge], jnp.arange(len(count), dtype=jnp.int32)[:, None])
    return dataclasses.replace(batch, rows=Rows(index, in_rows(vector), in_rows(slot[reverse]), count))


def fill_factors(batch: Batch) -> Fill:
    """Shares of the places of a packed batch that hold real data."""
    count, row_length = np.asarray(batch.rows.count), batch.rows.row_length
    blocks = np.maximum.reduceat(count, np.arange(0, len(count), ATOM_BLOCK))
    levels = np.array([0, *row_levels(row_length)])
    visited = levels[np.searchsorted(levels, blocks)].sum() * ATOM_BLOCK
    return Fill(
        float(np.mean(count > 0)), float(count.sum() / len(batch.rows.center)), float(count.sum() / max(visited, 1))
    )


def row_levels(row_length: int) -> tuple[int, ...]:
    """Row lengths for which the lattice sums are compiled; a block of atoms uses the first that holds its rows."""
    levels = [48, 64, 80, 96, 128, 192, 384]
    while levels[-1] < row_length:
        levels.append(2 * levels[-1])
    return (*(level for level in levels if level < row_length), row_length)


def fractional_parts(
    position: np.ndarray, crystal: np.ndarray, basis: np.ndarray, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """Coarse int32 and fine coordinates [A, 3] of atoms at `position` [A, 3] Å, `basis` [C, 3, 3], see PackedRows.

    The bits do not depend on what other atoms there are.
    """
    inverse = np.linalg.inv(basis)[crystal]
    fractional = sum(position[:, axis, None] * inverse[:, axis] for axis in range(3))
    steps = np.rint(fractional * STEPS)
    coarse = steps.astype(np.int64).astype(np.int32)  # overflows, see PackedRows
    return coarse, (fractional - steps / STEPS).astype(dtype)


def _rows(
    table: CrystalTable,
    indices: np.ndarray,
    crystal: np.ndarray,
    counts: np.ndarray,
    place: np.ndarray,
    shape: BatchShape,
    per_atom: Callable[..., Any],
) -> PackedRows:
    """The neighbours of the crystals, one after the other, atoms in the order `place`."""
    lengths = lengths_of(table.edge_offset, indices)
    number = int(lengths.sum())
    center: Any = np.zeros(shape.edges, np.int32)
    center[:number] = np.repeat(place.astype(np.int32), counts)
    basis = table.basis[indices]
    position = np.asarray(table.position)[ranges_of(table.atom_offset, indices)]
    coarse, fine = fractional_parts(position, crystal, basis, shape.parts.dtype)
    padded_basis: Any = np.zeros((shape.num_crystals, 3, 3), shape.parts.dtype)
    padded_basis[: len(indices)] = basis
    return PackedRows(
        start=per_atom((np.cumsum(counts) - counts).astype(np.int32)),
        crystal_start=per_atom((np.cumsum(lengths) - lengths)[crystal].astype(np.int32)),
        count=per_atom(counts.astype(np.int32)),
        center=center,
        image=_joined(table.image, table.edge_offset, indices, shape.edges),
        reverse=_joined(table.reverse, table.edge_offset, indices, shape.edges),
        coarse=per_atom(coarse),
        fine=per_atom(fine),
        basis=padded_basis,
        row_length=shape.row_length,
    )


def _cells(
    table: CrystalTable, indices: np.ndarray, crystal: np.ndarray, place: np.ndarray, shape: BatchShape
) -> CellRows:
    """The atoms of its cell for every atom, in the order of the crystal."""
    sizes, width = lengths_of(table.atom_offset, indices), shape.cell_length
    first_atom = np.cumsum(sizes) - sizes
    lengths = sizes[crystal]
    center = np.repeat(np.arange(len(crystal)), lengths)
    column = np.arange(len(center)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    neighbor = first_atom[crystal[center]] + column
    inverse = np.linalg.inv(table.lattice[indices])
    fractional = np.einsum("ax,axy->ay", table.position[ranges_of(table.atom_offset, indices)], inverse[crystal])
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
    vectors: Any = np.zeros((shape.num_crystals, len(COMBINATIONS), 3))
    for place, lattice in enumerate(table.lattice[indices]):
        vectors[place] = lattice_vectors(lattice)
    return vectors.astype(shape.parts.dtype)


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


def _occupancies(table: CrystalTable, atoms: np.ndarray, place: np.ndarray, num_atoms: int, dtype: str) -> Any:
    """Occupancies [N, 98] of these atoms if any site of the whole table is shared, else None.

    So all batches of a table, and all shares of a batch, are of the same structure.
    """
    if not len(table.shared_site):
        return None
    at = np.minimum(np.searchsorted(table.shared_site, atoms), len(table.shared_site) - 1)
    shared = table.shared_site[at] == atoms
    occupancies = np.zeros((num_atoms, 98), dtype)
    occupancies[place, table.species[atoms] - 1] = 1
    occupancies[place[shared]] = table.shared_occupancy[at[shared]]
    return occupancies


def _joined(column: np.ndarray, offset: np.ndarray, indices: np.ndarray, length: int) -> Any:
    """The segments `indices` of a flat column, joined and padded with zeros to `length`."""
    column = np.asarray(column)  # a plain view of a memory map: many slices of it take no time
    joined = np.empty((length, *column.shape[1:]), column.dtype)
    starts, ends = offset[indices].tolist(), offset[indices + 1].tolist()
    number = sum(ends) - sum(starts)
    if len(indices):
        slices = [column[start:end] for start, end in zip(starts, ends, strict=True)]
        np.concatenate(slices, out=joined[:number])
    joined[number:] = 0
    return joined
