"""DeviceTable: a data set kept on the device, where its batches are gathered."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from crystalframer_jax.batching.batch import Batch, PackedRows, fractional_parts, in_two_parts
from crystalframer_jax.batching.shapes import BatchShape, Shared
from crystalframer_jax.batching.table import CrystalTable
from crystalframer_jax.config import BatchParts
from crystalframer_jax.parallel.devices import ONE_DEVICE, Devices
from crystalframer_jax.parallel.processes import largest_of_processes

FRACTION_OF_MEMORY = 0.4  # of the device, that the columns may take; the rest is for training
MOST_EDGES = 2**31 - 1  # they are counted in int32
MOST_AT_ONCE = 16_384  # crystals whose coordinates are computed at once


class Columns(NamedTuple):
    """C crystals with A atoms, E neighbors and T targets, see CrystalTable and PackedRows."""

    atom_offset: Any  # [C + 1] int32
    edge_offset: Any  # [C + 1] int32
    basis: Any  # [C, 3, 3]
    species: Any  # [A] int8
    coarse: Any  # [A, 3] int32
    fine: Any  # [A, 3]
    count: Any  # [A] unsigned
    image: Any  # [E, 3] signed
    reverse: Any  # [E] unsigned
    targets: Any  # [C, T] what is learned of the labels, 0 where unknown
    target_mask: Any  # [C, T] bool


class Chosen(NamedTuple):
    """The crystals of a batch, or of the share of a device in it; with a first axis of K, of K batches."""

    rows: Any  # [B] int32 rows of the table, -1 for padding
    places: Any  # [B] int32 places in the whole batch, 0 for padding


class Chunk(NamedTuple):
    """Batches of one shape for K steps in one dispatch: every array has a first axis of K more."""

    batches: Batch


class DeviceTable:
    """Crystals and labels in the memory of every one of some devices (default: the default device).

    It serves models whose batches hold nothing but atoms, neighbors and labels, and crystals without shared sites;
    `serves` tells. Raises ValueError for others. `columns`: those of `columns_of`, if they are made already.
    """

    def __init__(
        self,
        table: CrystalTable,
        labels: np.ndarray,
        parts: BatchParts,
        devices: Devices = ONE_DEVICE,
        columns: Columns | None = None,
    ):
        if not serves(table, parts):
            raise ValueError(f"batches with {parts}, or of crystals with shared sites, are packed on the host")
        self.devices = devices
        self.columns = devices.replicate(columns or columns_of(table, labels, parts.dtype))
        self._one = devices.each(gather, split=(1,), splits_result=True, static=("shape",))
        self._several = devices.each(_gather_several, split=(1,), splits_result=True, static=("shape",))

    def gather(self, work: Shared) -> Batch:
        """Gathers the very batch that `pack` makes of these crystals and their labels; on every device its share."""
        return self._one(self.columns, self._put(lambda device: _chosen(work, device)), shape=work.shape)

    def gather_several(self, works: Sequence[Shared]) -> Chunk:
        """Gathers such batches of one shape."""

        def chosen(device: int) -> Chosen:
            return jax.tree.map(lambda *x: np.stack(x), *(_chosen(work, device) for work in works))

        return Chunk(self._several(self.columns, self._put(chosen), shape=works[0].shape))

    def _put(self, chosen: Callable[[int], Chosen]) -> Chosen:
        """Puts the crystals of every device of this process there."""
        return self.devices.put(self.devices.stacked([chosen(device) for device in self.devices.of_process]))


def _chosen(work: Shared, device: int) -> Chosen:
    """Returns the crystals of a device, numpy arrays."""
    share, size = work.shares[device], work.shape.num_crystals
    chosen = Chosen(np.full(size, -1, np.int32), np.zeros(size, np.int32))
    chosen.rows[: len(share)] = work.rows[share]
    chosen.places[: len(share)] = share
    return chosen


def serves(table: CrystalTable, parts: BatchParts) -> bool:
    """Tells whether a DeviceTable can make the batches of these crystals."""
    plain = not (parts.cells or parts.lattice_frames or parts.scatter)
    return plain and not len(table.shared_site) and int(table.edge_offset[-1]) <= MOST_EDGES


def device_table_if_it_fits(
    table: CrystalTable, labels: np.ndarray, parts: BatchParts, devices: Devices = ONE_DEVICE
) -> DeviceTable | None:
    """Puts the crystals on the devices; None if one has no room for them (or no memory), or it does not serve.

    Processes that train together find the same.
    """
    memory = min((device.memory_stats() or {}).get("bytes_limit", 0) for device in jax.local_devices())
    columns = columns_of(table, labels, parts.dtype) if memory and serves(table, parts) else None
    lacks_room = columns is None or sum(x.nbytes for x in columns) > FRACTION_OF_MEMORY * memory
    return None if largest_of_processes(int(lacks_room)) else DeviceTable(table, labels, parts, devices, columns)


def _gather_several(columns: Columns, chosen: Chosen, shape: BatchShape) -> Batch:
    return jax.lax.map(lambda one: gather(columns, one, shape), chosen)


def gather(columns: Columns, chosen: Chosen, shape: BatchShape) -> Batch:
    """Gathers the batch of some crystals, bit for bit as `pack` makes it."""
    is_crystal, crystals = chosen.rows >= 0, jnp.maximum(chosen.rows, 0)
    sizes, crystal, atom = _segments(columns.atom_offset, crystals, is_crystal, shape.num_atoms)
    lengths, _, edge = _segments(columns.edge_offset, crystals, is_crystal, shape.edges)
    is_atom = crystal < shape.num_crystals
    is_edge = jnp.arange(shape.edges) < jnp.sum(lengths)
    counts = jnp.where(is_atom, columns.count[atom].astype(jnp.int32), 0)
    order = jnp.argsort(-counts, stable=True)  # longest rows first
    place = jnp.zeros_like(counts).at[order].set(jnp.arange(shape.num_atoms, dtype=jnp.int32))

    def per_atom(values: jax.Array, fill: int = 0) -> jax.Array:
        return _kept(values[order], is_atom[order], fill)

    row_ends = jnp.cumsum(counts, dtype=jnp.int32)
    row = jnp.searchsorted(row_ends, jnp.arange(shape.edges, dtype=jnp.int32), side="right")
    inside = jnp.minimum(crystal, shape.num_crystals - 1)
    first_atom, first_edge = jnp.cumsum(sizes) - sizes, jnp.cumsum(lengths) - lengths
    return Batch(
        species=per_atom(columns.species[atom].astype(jnp.int32)),
        occupancies=None,
        crystal_of_atom=per_atom(crystal, fill=shape.num_crystals),
        atom_in_crystal=per_atom(jnp.arange(shape.num_atoms, dtype=jnp.int32) - first_atom[inside]),
        rows=PackedRows(
            start=per_atom(row_ends - counts),
            crystal_start=per_atom(first_edge[inside]),
            count=per_atom(counts),
            center=_kept(place[jnp.minimum(row, shape.num_atoms - 1)], is_edge),
            image=_kept(columns.image[edge], is_edge),
            reverse=_kept(columns.reverse[edge], is_edge),
            coarse=per_atom(columns.coarse[atom]),
            fine=per_atom(columns.fine[atom]),
            basis=_kept(columns.basis[crystals], is_crystal),
            row_length=shape.row_length,
        ),
        cells=None,
        lattice_frames=None,
        scatter=None,
        crystal_sizes=sizes,
        crystal_place=chosen.places,
        targets=_kept(columns.targets[crystals], is_crystal),
        target_mask=columns.target_mask[crystals] & is_crystal[:, None],
    )


def _segments(
    offset: jax.Array, crystals: jax.Array, is_crystal: jax.Array, length: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Lays segments of a flat column out one after the other, padded to `length`; all int32.

    Their lengths [B], and for every place the segment (B for padding) and the place in the column (0 for padding).
    """
    lengths = jnp.where(is_crystal, offset[crystals + 1] - offset[crystals], 0)
    ends = jnp.cumsum(lengths, dtype=jnp.int32)
    places = jnp.arange(length, dtype=jnp.int32)
    segment = jnp.searchsorted(ends, places, side="right").astype(jnp.int32)
    inside = jnp.minimum(segment, len(crystals) - 1)
    source = offset[crystals][inside] + places - (ends - lengths)[inside]
    return lengths, segment, jnp.where(segment < len(crystals), source, 0)


def _kept(values: jax.Array, is_real: jax.Array, fill: int = 0) -> jax.Array:
    """Returns `values` [n, ...] with `fill` where not `is_real` [n]."""
    return jnp.where(is_real.reshape(-1, *(1,) * (values.ndim - 1)), values, jnp.asarray(fill, values.dtype))


def columns_of(table: CrystalTable, labels: np.ndarray, dtype: str) -> Columns:
    """Returns the columns as numpy arrays."""
    known = np.isfinite(labels)
    parts = []
    for start in range(0, max(len(table), 1), MOST_AT_ONCE):
        offset = np.asarray(table.atom_offset[start : start + MOST_AT_ONCE + 1])
        position = np.asarray(table.position[offset[0] : offset[-1]])
        crystal = np.repeat(np.arange(len(offset) - 1), np.diff(offset))
        basis = np.asarray(table.basis[start : start + MOST_AT_ONCE])
        parts.append(fractional_parts(position, crystal, basis, dtype))
    coarse, fine = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Columns(
        atom_offset=table.atom_offset.astype(np.int32),
        edge_offset=table.edge_offset.astype(np.int32),
        basis=in_two_parts(table.basis, dtype),
        species=np.asarray(table.species),
        coarse=coarse,
        fine=fine,
        count=np.asarray(table.count),
        image=np.asarray(table.image),
        reverse=np.asarray(table.reverse),
        targets=np.where(known, labels, 0).astype(dtype),
        target_mask=known,
    )
