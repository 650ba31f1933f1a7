"""CrystalTable: many crystals with their neighbor rows in flat columns (host memory or memory-mapped files).

A neighbor takes about five bytes. Its lattice image is counted in a reduced basis, in which images are small however
oblique the given cell is. The neighbor atom is not written down: it is the atom whose row holds the reverse
neighbor.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from crystalframer_jax.structures.crystal import MAX_ATOMIC_NUMBER, Crystal
from crystalframer_jax.structures.lattice import reduction
from crystalframer_jax.structures.neighbors import LatticeBox, NeighborRows, neighbor_rows

ATOM_BITS = 28  # of sizes, that count atoms


@dataclasses.dataclass(frozen=True)
class CrystalTable:
    """C crystals with A atoms and E neighbors in all; every array may be a memory map."""

    ids: np.ndarray  # [C] str
    atom_offset: np.ndarray  # [C + 1] int64: the atoms of crystal c are atom_offset[c]:atom_offset[c + 1]
    edge_offset: np.ndarray  # [C + 1] int64, likewise for neighbors
    lattice: np.ndarray  # [C, 3, 3] float64, rows, Å
    species: np.ndarray  # [A] int8 atomic number (of the main species where a site is shared)
    position: np.ndarray  # [A, 3] float64 Cartesian, Å
    count: np.ndarray  # [A] uint16 or uint32 length of the neighbor row
    basis: np.ndarray  # [C, 3, 3] float64, rows, Å: a reduced (LLL) basis of the lattice
    image: np.ndarray  # [E, 3] int8, int16 or int32 lattice image of the neighbor, in units of `basis`
    reverse: np.ndarray  # [E] uint16 or uint32 place of the reverse neighbor, counted within its crystal
    shared_site: np.ndarray  # [S] int64 atoms (among the A) that are shared or partially occupied, ascending
    shared_occupancy: np.ndarray  # [S, 98] float64 their occupancies

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_atoms(self) -> np.ndarray:
        """Atoms of each crystal, [C]."""
        return np.diff(self.atom_offset)

    @property
    def num_edges(self) -> np.ndarray:
        """Neighbors of all atoms of each crystal, [C]."""
        return np.diff(self.edge_offset)

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """Neighbors and atoms of each crystal in one number, [C] int64; sums hold both sums, see `edges_and_atoms`."""
        return (self.num_edges.astype(np.int64) << ATOM_BITS) + self.num_atoms

    @property
    def longest_row(self) -> int:
        """Length of the longest neighbor row of the table."""
        return int(self.count.max(initial=1))


def edges_and_atoms(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the neighbors and atoms of crystals, or of groups of crystals, from (sums of) their sizes."""
    return sizes >> ATOM_BITS, sizes & ((1 << ATOM_BITS) - 1)


COLUMNS = tuple(field.name for field in dataclasses.fields(CrystalTable))
ROW_COLUMNS = ("edge_offset", "count", "basis", "image", "reverse")  # what depends on the neighbor rows
CRYSTAL_COLUMNS = tuple(name for name in COLUMNS if name not in ROW_COLUMNS)
TYPES = {  # of columns that take the narrowest type which holds them; of two types NumPy's result_type is the wider
    "count": (np.uint16, np.uint32),
    "image": (np.int8, np.int16, np.int32),
    "reverse": (np.uint16, np.uint32),
}


def make_table(crystals: Sequence[Crystal], rows: Sequence[NeighborRows]) -> CrystalTable:
    """Lays crystals and their neighbor rows out in columns."""
    return CrystalTable(**crystal_columns(crystals), **row_columns(crystals, rows))


def table_of(crystals: Sequence[Crystal], cutoff: float | LatticeBox) -> CrystalTable:
    """Makes a table of crystals with their neighbor rows."""
    return make_table(crystals, [neighbor_rows(crystal, cutoff) for crystal in crystals])


def crystal_columns(crystals: Sequence[Crystal]) -> dict[str, np.ndarray]:
    """Makes the CRYSTAL_COLUMNS of some crystals."""
    atom_offset = np.cumsum([0, *(crystal.num_atoms for crystal in crystals)], dtype=np.int64)
    shared = [_shared_sites(crystal, start) for crystal, start in zip(crystals, atom_offset[:-1], strict=True)]
    return {
        "ids": np.array([crystal.id for crystal in crystals], dtype=np.str_),
        "atom_offset": atom_offset,
        "lattice": np.array([crystal.lattice for crystal in crystals], dtype=np.float64).reshape(-1, 3, 3),
        "species": _join([crystal.species for crystal in crystals], np.int8),
        "position": _join([crystal.positions for crystal in crystals], np.float64, (3,)),
        "shared_site": _join([sites for sites, _ in shared], np.int64),
        "shared_occupancy": _join([occupancy for _, occupancy in shared], np.float64, (98,)),
    }


def row_columns(crystals: Sequence[Crystal], rows: Sequence[NeighborRows]) -> dict[str, np.ndarray]:
    """Makes the ROW_COLUMNS of some crystals with their neighbor rows."""
    reduced = [reduction(crystal.lattice) for crystal in crystals]
    bases = [matrix @ crystal.lattice for matrix, crystal in zip(reduced, crystals, strict=True)]
    inverse = [np.rint(np.linalg.inv(matrix)).astype(np.int64) for matrix in reduced]
    images = [row.image @ matrix for row, matrix in zip(rows, inverse, strict=True)]
    return {
        "edge_offset": np.cumsum([0, *(len(row.index) for row in rows)], dtype=np.int64),
        "count": _narrow("count", _join([row.count for row in rows], np.int64)),
        "basis": np.array(bases, dtype=np.float64).reshape(-1, 3, 3),
        "image": _narrow("image", _join(images, np.int64, (3,))),
        "reverse": _narrow("reverse", _join([row.reverse for row in rows], np.int64)),
    }


def amounts_of(table: CrystalTable, rows: np.ndarray) -> np.ndarray:
    """Returns how many atoms of each element rows of a table hold, [C, 98] in the order of atomic numbers."""
    atom = ranges_of(table.atom_offset, rows)
    crystal = np.repeat(np.arange(len(rows)), lengths_of(table.atom_offset, rows))
    is_shared = np.isin(atom, table.shared_site)
    amounts = np.zeros((len(rows), MAX_ATOMIC_NUMBER))
    np.add.at(amounts, (crystal[~is_shared], table.species[atom[~is_shared]].astype(np.int64) - 1), 1)
    shared = np.searchsorted(table.shared_site, atom[is_shared])
    np.add.at(amounts, crystal[is_shared], table.shared_occupancy[shared])
    return amounts


def compositions_of(table: CrystalTable, rows: np.ndarray) -> np.ndarray:
    """Returns the shares of the elements in the atoms of rows of a table, [C, 98] in the order of atomic numbers."""
    amounts = amounts_of(table, rows)
    return np.divide(amounts, amounts.sum(axis=1, keepdims=True), out=amounts)


def lengths_of(offset: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Returns the lengths of the segments `indices` of a flat column."""
    return np.asarray(offset[indices + 1] - offset[indices])


def ranges_of(offset: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Returns all places of the segments `indices` of a flat column, one segment after the other."""
    starts, lengths = np.asarray(offset[indices]), lengths_of(offset, indices)
    return np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())


def narrowest(column: str, lowest: int, highest: int) -> np.dtype:
    """Returns the narrowest of the TYPES of a column that holds the values from `lowest` to `highest`.

    Raises OverflowError if none does.
    """
    for kind in TYPES[column]:
        if np.iinfo(kind).min <= lowest and highest <= np.iinfo(kind).max:
            return np.dtype(kind)
    raise OverflowError(f"{column}: values from {lowest} to {highest} do not fit {np.dtype(TYPES[column][-1])}")


def _narrow(column: str, values: np.ndarray) -> np.ndarray:
    return values.astype(narrowest(column, int(values.min(initial=0)), int(values.max(initial=0))))


def _shared_sites(crystal: Crystal, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sites, counted from `first`, that are not simply one atom of one element, and their occupancies."""
    if crystal.occupancies is None:
        return np.zeros(0, np.int64), np.zeros((0, 98))
    whole = crystal.occupancies[np.arange(crystal.num_atoms), crystal.species - 1] == 1.0
    return first + np.flatnonzero(~whole), crystal.occupancies[~whole]


def _join(parts: list[np.ndarray], dtype: type, shape: tuple[int, ...] = ()) -> np.ndarray:
    return np.concatenate([np.zeros((0, *shape), dtype), *parts]).astype(dtype)
