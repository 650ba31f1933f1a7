"""CrystalTable: many crystals with their neighbour rows in flat columns (host memory or memory-mapped files)."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from crystalframer_jax.crystal import Crystal
from crystalframer_jax.neighbors import NeighborRows


@dataclasses.dataclass(frozen=True)
class CrystalTable:
    """C crystals with A atoms and E neighbours in all; every array may be a memory map."""

    ids: np.ndarray  # [C] str
    atom_offset: np.ndarray  # [C + 1] int64: the atoms of crystal c are atom_offset[c]:atom_offset[c + 1]
    edge_offset: np.ndarray  # [C + 1] int64, likewise for neighbours
    lattice: np.ndarray  # [C, 3, 3] float64, rows, Å
    species: np.ndarray  # [A] int8 atomic number (of the main species where a site is shared)
    position: np.ndarray  # [A, 3] float64 Cartesian, Å
    count: np.ndarray  # [A] int32 length of the neighbour row
    neighbor: np.ndarray  # [E] int32 neighbour atom, counted within its crystal
    image: np.ndarray  # [E, 3] int16 lattice image of the neighbour
    reverse: np.ndarray  # [E] int32 place of the reverse neighbour, counted within its crystal
    shared_site: np.ndarray  # [S] int64 atoms (among the A) that are shared or partially occupied, ascending
    shared_occupancy: np.ndarray  # [S, 98] float64 their occupancies

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_atoms(self) -> np.ndarray:
        """Atoms of each crystal, [C]."""
        return np.diff(self.atom_offset)

    @property
    def longest_row(self) -> int:
        """Length of the longest neighbour row of the table."""
        return int(self.count.max(initial=1))


COLUMNS = tuple(field.name for field in dataclasses.fields(CrystalTable))


def make_table(crystals: Sequence[Crystal], rows: Sequence[NeighborRows]) -> CrystalTable:
    """Lay crystals and their neighbour rows out in columns."""
    shared = [_shared_sites(crystal) for crystal in crystals]
    sizes = np.array([crystal.num_atoms for crystal in crystals], dtype=np.int64)
    atom_offset = _offsets(sizes)
    sites = [site + start for (site, _), start in zip(shared, atom_offset[:-1], strict=True)]
    return CrystalTable(
        ids=np.array([crystal.id for crystal in crystals], dtype=np.str_),
        atom_offset=atom_offset,
        edge_offset=_offsets(np.array([len(row.index) for row in rows], dtype=np.int64)),
        lattice=np.array([crystal.lattice for crystal in crystals], dtype=np.float64).reshape(-1, 3, 3),
        species=_join([crystal.species for crystal in crystals], np.int8),
        position=_join([crystal.positions for crystal in crystals], np.float64, (3,)),
        count=_join([row.count for row in rows], np.int32),
        neighbor=_join([row.index for row in rows], np.int32),
        image=_join([row.image for row in rows], np.int16, (3,)),
        reverse=_join([row.reverse for row in rows], np.int32),
        shared_site=_join(sites, np.int64),
        shared_occupancy=_join([occupancy for _, occupancy in shared], np.float64, (98,)),
    )


def _shared_sites(crystal: Crystal) -> tuple[np.ndarray, np.ndarray]:
    """Sites that are not simply one atom of one element, and their occupancies."""
    if crystal.occupancies is None:
        return np.zeros(0, np.int64), np.zeros((0, 98))
    whole = crystal.occupancies[np.arange(crystal.num_atoms), crystal.species - 1] == 1.0
    return np.flatnonzero(~whole), crystal.occupancies[~whole]


def _offsets(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])


def _join(parts: list[np.ndarray], dtype: type, shape: tuple[int, ...] = ()) -> np.ndarray:
    """Concatenate into one column of `dtype`; a value that the type cannot hold is an error."""
    joined = np.concatenate(parts) if parts else np.zeros((0, *shape))
    column: np.ndarray = joined.astype(dtype)
    if np.issubdtype(dtype, np.integer) and not np.array_equal(column, joined):
        raise OverflowError(f"values up to {np.abs(joined).max()} do not fit {np.dtype(dtype)}")
    return column
