"""Batches: crystals packed into padded arrays of a few fixed shapes.

Atoms of a batch are ordered by the length of their neighbor row, so that blocks of neighboring atoms have rows of
about the same length; crystals keep their order. Padding atoms have an empty row and belong to no crystal.

The host packs neighbors as the table has them, one after the other in a few bytes each; `unpacked` makes rows with
displacement vectors of them on the device.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from crystalframer_jax.batching.shapes import ATOM_BLOCK, BatchShape, shared_out, width_of
from crystalframer_jax.batching.table import CrystalTable, lengths_of, ranges_of
from crystalframer_jax.structures.lattice import MOST_FRAMES, lattice_frames

SMALLEST_SCATTER = 1e-12  # Å^2, sum of the eigenvalues; less is rounding
STEPS = 4096  # coarse coordinates are counted in this part of a basis vector


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Neighbor rows of a batch on the device; entries beyond `count` are padding."""

    index: jax.Array  # [N, M] int32 neighbor atom
    vector: jax.Array  # [N, M, 3] p_j + nL - p_i, Å
    square: Any  # [N, M] d^2, Å^2; None in CellRows
    reverse: jax.Array  # [N, M] int32 place (row * M + column) of the reverse neighbor
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
    """Neighbor rows as they come from the host: E neighbors, those of a crystal in the order of the table.

    A fractional coordinate in the reduced basis is coarse / 4096 + fine. Differences of the integers are exact, even
    if they overflow on the way, so that float32 loses nothing far from the origin.
    """

    start: jax.Array  # [N] int32 place of the first neighbor of the atom among the E
    crystal_start: jax.Array  # [N] int32 place of the first neighbor of its crystal
    count: jax.Array  # [N] int32 length of the row
    center: jax.Array  # [E] int32 atom that the neighbor belongs to; any atom for padding
    image: jax.Array  # [E, 3] int8, int16 or int32 lattice image of the neighbor, in units of `basis`
    reverse: jax.Array  # [E] uint16 or uint32 place of the reverse neighbor, counted within the crystal
    coarse: jax.Array  # [N, 3] int32
    fine: jax.Array  # [N, 3] at most 1 / 8192
    basis: jax.Array  # [B, 2, 3, 3] reduced basis of the lattice, rows, Å: rounded, and what the rounding left
    row_length: int = dataclasses.field(metadata={"static": True})  # M


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scatter:
    """Principal axes of the atoms of each cell; computed in float64, because close eigenvalues magnify rounding."""

    values: jax.Array  # [B, 3] eigenvalues of the scatter of the positions, ascending, relative to their sum
    axes: jax.Array  # [B, 3, 3] eigenvectors (columns)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatticeFrames:
    """The equally good frames of lattice vectors, see `lattice_frames`; C = MOST_FRAMES, the rest of them zeros."""

    frames: jax.Array  # [B, C, 3, 3]
    shares: jax.Array  # [B, C] probability of each, if vectors are drawn


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """N atoms (padding included) of B crystals with T targets."""

    species: jax.Array  # [N] int32 atomic number, 0 for padding
    occupancies: jax.Array | None  # [N, 98] of each element, None if every site of the table holds one atom
    crystal_of_atom: jax.Array  # [N] int32, B for padding
    atom_in_crystal: jax.Array  # [N] int32
    rows: Any  # Rows; PackedRows until `unpacked`
    cells: CellRows | None  # if the model attends in reciprocal space
    lattice_frames: LatticeFrames | None  # if the model has lattice frames
    scatter: Scatter | None  # if the model has pca frames
    crystal_sizes: jax.Array  # [B] int32 number of atoms, 0 for padding
    crystal_place: jax.Array  # [B] int32 place of the crystal in the batch that several devices share, 0 for padding
    targets: jax.Array  # [B, T] what is learned of the labels, see targets.to_learn
    target_mask: jax.Array  # [B, T] bool


class Fill(NamedTuple):
    """Fractions of the places of a batch that hold real data."""

    atoms: float
    edges: float
    columns: float  # of the neighbor columns that the lattice sums visit


def pack(
    table: CrystalTable,
    indices: np.ndarray,
    shape: BatchShape,
    targets: np.ndarray | None = None,
    places: np.ndarray | None = None,
) -> Batch:
    """Packs crystals `indices` of the table into a shape (numpy arrays); ValueError if it is not large enough.

    `targets` [len(indices), T] are what is learned of the labels, not finite where unknown; without them there is one,
    unknown. `places` are those of the crystals in a batch of which this is a part.
    """
    layout = Layout(table, indices, shape)
    labels = np.full((len(indices), 1), np.nan) if targets is None else targets
    known, parts = np.isfinite(labels), shape.parts
    return Batch(
        species=layout.per_atom(np.asarray(table.species)[layout.atoms], np.int32),
        occupancies=_occupancies(layout),
        crystal_of_atom=layout.per_atom(layout.crystal, np.int32, fill=shape.num_crystals),
        atom_in_crystal=layout.per_atom(np.arange(len(layout.atoms)) - layout.first_atom, np.int32),
        rows=_rows(layout),
        cells=_cells(layout) if parts.cells else None,
        lattice_frames=_lattice_frames(layout) if parts.lattice_frames else None,
        scatter=_scatter(layout) if parts.scatter else None,
        crystal_sizes=layout.per_crystal(layout.sizes, np.int32),
        crystal_place=layout.per_crystal(np.arange(len(indices)) if places is None else places, np.int32),
        targets=layout.per_crystal(np.where(known, labels, 0), parts.dtype),
        target_mask=layout.per_crystal(known, bool),
    )


class Layout:
    """Where A atoms, those of one of C crystals after the other, stand in a batch."""

    def __init__(self, table: CrystalTable, indices: np.ndarray, shape: BatchShape):
        """Raises ValueError if the shape is not large enough."""
        self.table, self.indices, self.shape = table, indices, shape
        self.sizes = lengths_of(table.atom_offset, indices)  # [C]
        self.atoms = ranges_of(table.atom_offset, indices)  # [A] of the table
        self.counts = np.asarray(table.count)[self.atoms].astype(np.int64)  # [A] lengths of the neighbor rows
        shared_out(table, indices, [shape])  # raises it
        self.crystal = np.repeat(np.arange(len(indices)), self.sizes)  # [A] which of the C
        self.first_atom = (np.cumsum(self.sizes) - self.sizes)[self.crystal]  # [A] of the same crystal, which of the A
        self.place = np.empty(len(self.atoms), np.int64)  # [A] of each atom in the batch: longest rows first
        self.place[np.argsort(-self.counts, kind="stable")] = np.arange(len(self.atoms))

    def per_atom(self, values: np.ndarray, dtype: Any, fill: int = 0) -> Any:
        """Puts values [A, ...] into the places of the atoms, [N, ...]."""
        padded = np.full((self.shape.num_atoms, *values.shape[1:]), fill, dtype)
        padded[self.place] = values
        return padded

    def per_crystal(self, values: np.ndarray, dtype: Any) -> Any:
        """Pads values [C, ...] with zeros, [B, ...]."""
        padded = np.zeros((self.shape.num_crystals, *values.shape[1:]), dtype)
        padded[: len(values)] = values
        return padded


def unpacked(batch: Batch) -> Batch:
    """Returns the batch with rows [N, M] and displacement vectors; itself if it has them.

    The vector of a neighbor is exactly zero for the atom itself and minus that of the reverse neighbor.
    """
    rows = batch.rows
    if isinstance(rows, Rows):
        return batch
    rows, crystal = jax.tree.map(jnp.asarray, rows), jnp.asarray(batch.crystal_of_atom)
    start, count, center, fine, coarse = rows.start, rows.count, rows.center, rows.fine, rows.coarse
    slot = center * rows.row_length + jnp.arange(len(center), dtype=jnp.int32) - start[center]  # n * M + m
    reverse = rows.crystal_start[center] + rows.reverse.astype(jnp.int32)
    neighbor = center[reverse]
    steps = coarse[neighbor] - coarse[center] + STEPS * rows.image.astype(jnp.int32)
    with jax.enable_x64(True):  # rounded once: so d^2 has the same bits however the crystal is written down
        fractional = steps.astype(np.float64) / STEPS + (fine[neighbor].astype(np.float64) - fine[center])
        basis = jnp.sum(rows.basis.astype(np.float64), axis=1)[crystal[center]]  # [E, 3, 3]
        x, y, z = fractional.T
        exact = x[:, None] * basis[:, 0] + y[:, None] * basis[:, 1] + z[:, None] * basis[:, 2]
        vector, square = exact.astype(fine.dtype), jnp.sum(exact**2, axis=-1).astype(fine.dtype)

    column = jnp.arange(rows.row_length, dtype=jnp.int32)
    is_real = column < count[:, None]
    edge = jnp.where(is_real, start[:, None] + column, 0)

    def in_rows(x: jax.Array) -> jax.Array:
        return jnp.where(is_real.reshape(*is_real.shape, *(1,) * (x.ndim - 1)), x[edge], 0)

    # Padding refers to the atom itself: what is not finite there, times a weight of 0, then stays where it is.
    index = jnp.where(is_real, neighbor[edge], jnp.arange(len(count), dtype=jnp.int32)[:, None])
    return dataclasses.replace(batch, rows=Rows(index, in_rows(vector), in_rows(square), in_rows(slot[reverse]), count))


def fill_factors(batch: Batch) -> Fill:
    """Returns the fractions of the places of a packed batch that hold real data."""
    count, row_length = np.asarray(batch.rows.count), batch.rows.row_length
    blocks = np.maximum.reduceat(count, np.arange(0, len(count), ATOM_BLOCK))
    width = width_of(row_length)
    visited = np.ceil(blocks / width).sum() * width * ATOM_BLOCK
    edges = count.sum()
    return Fill(float(np.mean(count > 0)), float(edges / len(batch.rows.center)), float(edges / max(visited, 1)))


def fractional_parts(
    position: np.ndarray, crystal: np.ndarray, basis: np.ndarray, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """Returns coarse int32 and fine coordinates [A, 3] of atoms at `position` [A, 3] Å, see PackedRows.

    The bits do not depend on what other atoms there are.
    """
    inverse = np.linalg.inv(basis)[crystal]
    fractional = sum(position[:, axis, None] * inverse[:, axis] for axis in range(3))
    steps = np.rint(fractional * STEPS)
    coarse = steps.astype(np.int64).astype(np.int32)  # overflows, see PackedRows
    return coarse, (fractional - steps / STEPS).astype(dtype)


def in_two_parts(values: np.ndarray, dtype: str) -> np.ndarray:
    """Returns float64 values [n, ...] as rounded to `dtype`, and what the rounding left, [n, 2, ...]."""
    rounded = values.astype(dtype)
    return np.stack([rounded, (values - rounded).astype(dtype)], axis=1)


def _rows(layout: Layout) -> PackedRows:
    """Packs the neighbors of the crystals, one after the other."""
    table, indices, shape, counts = layout.table, layout.indices, layout.shape, layout.counts
    dtype, lengths, basis = shape.parts.dtype, lengths_of(table.edge_offset, indices), table.basis[indices]
    center: Any = np.zeros(shape.edges, np.int32)
    center[: counts.sum()] = np.repeat(layout.place.astype(np.int32), counts)
    coarse, fine = fractional_parts(np.asarray(table.position)[layout.atoms], layout.crystal, basis, dtype)
    return PackedRows(
        start=layout.per_atom(np.cumsum(counts) - counts, np.int32),
        crystal_start=layout.per_atom((np.cumsum(lengths) - lengths)[layout.crystal], np.int32),
        count=layout.per_atom(counts, np.int32),
        center=center,
        image=_joined(table.image, table.edge_offset, indices, shape.edges),
        reverse=_joined(table.reverse, table.edge_offset, indices, shape.edges),
        coarse=layout.per_atom(coarse, np.int32),
        fine=layout.per_atom(fine, dtype),
        basis=layout.per_crystal(in_two_parts(basis, dtype), dtype),
        row_length=shape.row_length,
    )


def _cells(layout: Layout) -> CellRows:
    """Packs the atoms of its cell for every atom, in the order of the crystal."""
    place, crystal, first_atom = layout.place, layout.crystal, layout.first_atom
    width, dtype = layout.shape.cell_length, layout.shape.parts.dtype
    lengths = layout.sizes[crystal]
    center = np.repeat(np.arange(len(crystal)), lengths)
    column = np.arange(len(center)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    neighbor = first_atom[center] + column
    inverse = np.linalg.inv(layout.table.lattice[layout.indices])
    fractional = np.einsum("ax,axy->ay", layout.table.position[layout.atoms], inverse[crystal])
    difference = fractional[neighbor] - fractional[center]

    def in_rows(values: np.ndarray, dtype: Any) -> Any:
        padded = np.zeros((layout.shape.num_atoms, width, *values.shape[1:]), dtype)
        padded[place[center], column] = values
        return padded

    return CellRows(
        index=in_rows(place[neighbor], np.int32),
        vector=in_rows(difference - np.rint(difference), dtype),
        square=None,
        reverse=in_rows(place[neighbor] * width + (center - first_atom[center]), np.int32),
        count=layout.per_atom(lengths, np.int32),
        metric=layout.per_atom((4 * np.pi**2 * inverse.swapaxes(1, 2) @ inverse)[crystal], dtype),
    )


def _lattice_frames(layout: Layout) -> LatticeFrames:
    """Packs the frames of every lattice."""
    parts, number = layout.shape.parts, len(layout.indices)
    frames, shares = np.zeros((number, MOST_FRAMES, 3, 3)), np.zeros((number, MOST_FRAMES))
    for row, lattice in enumerate(layout.table.lattice[layout.indices]):
        found, share = lattice_frames(lattice, parts.tie_tolerance)
        frames[row, : len(found)], shares[row, : len(found)] = found, share
    return LatticeFrames(layout.per_crystal(frames, parts.dtype), layout.per_crystal(shares, parts.dtype))


def _scatter(layout: Layout) -> Scatter:
    """Returns the scatter of every crystal: zeros for padding, 0 eigenvalues for a single atom."""
    positions = np.split(layout.table.position[layout.atoms], np.cumsum(layout.sizes)[:-1])
    centered = [position - position.mean(axis=0) for position in positions if len(position)]
    values, axes = np.linalg.eigh(np.reshape([x.T @ x for x in centered], (-1, 3, 3)))
    total = values.sum(axis=1, keepdims=True)
    values /= np.where(total > SMALLEST_SCATTER, total, np.inf)
    dtype = layout.shape.parts.dtype
    return Scatter(layout.per_crystal(values, dtype), layout.per_crystal(axes, dtype))


def _occupancies(layout: Layout) -> Any:
    """Returns the occupancies [N, 98] of the atoms if any site of the whole table is shared, else None.

    So all batches of a table, and all shares of a batch, are of the same structure.
    """
    table, atoms, place = layout.table, layout.atoms, layout.place
    if not len(table.shared_site):
        return None
    at = np.minimum(np.searchsorted(table.shared_site, atoms), len(table.shared_site) - 1)
    shared = table.shared_site[at] == atoms
    occupancies = np.zeros((layout.shape.num_atoms, 98), layout.shape.parts.dtype)
    occupancies[place, table.species[atoms] - 1] = 1
    occupancies[place[shared]] = table.shared_occupancy[at[shared]]
    return occupancies


def _joined(column: np.ndarray, offset: np.ndarray, indices: np.ndarray, length: int) -> Any:
    """Joins the segments `indices` of a flat column, padded with zeros to `length`."""
    column = np.asarray(column)  # a plain view of a memory map: many slices of it take no time
    joined = np.zeros((length, *column.shape[1:]), column.dtype)
    segments = [column[start:end] for start, end in zip(offset[indices], offset[indices + 1], strict=True)]
    np.concatenate([column[:0], *segments], out=joined[: sum(map(len, segments))])
    return joined
