"""What a training set held, and what crystals are unlike all of it."""

import dataclasses
from typing import Any

import numpy as np

from crystalframer_jax.batching.table import CrystalTable
from crystalframer_jax.structures.crystal import Crystal
from crystalframer_jax.structures.lattice import volume_of

VOLUME_MARGIN, SIZE_MARGIN = 1.5, 2.0  # factors by which a crystal may leave the range of the training set unremarked


@dataclasses.dataclass(frozen=True)
class Coverage:
    """Elements and ranges (smallest, largest) of the crystals of a training set."""

    elements: tuple[int, ...]  # atomic numbers, ascending
    volume_per_atom: tuple[float, float]  # Å^3, of a site
    num_atoms: tuple[int, int]

    @classmethod
    def of(cls, table: CrystalTable, rows: np.ndarray) -> "Coverage":
        """Looks through the rows of a table, of which there is at least one."""
        sizes = table.num_atoms[rows]
        volumes = np.abs(np.linalg.det(table.lattice[rows])) / sizes
        is_used = np.zeros(len(table), bool)
        is_used[rows] = True
        is_atom = np.repeat(is_used, table.num_atoms)
        shared = table.shared_occupancy[is_atom[table.shared_site]]
        elements = {*np.unique(table.species[is_atom]).tolist(), *(np.flatnonzero(shared.any(axis=0)) + 1).tolist()}
        return cls(
            tuple(sorted(elements)), (float(volumes.min()), float(volumes.max())), (int(sizes.min()), int(sizes.max()))
        )

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Coverage":
        """Makes it of the fields as JSON has them."""
        return cls(**{name: tuple(values) for name, values in content.items()})

    def doubts(self, crystal: Crystal) -> list[str]:
        """Tells in what a crystal is unlike all of the training set; mostly nothing."""
        found = []
        if unseen := sorted(_elements_of(crystal) - set(self.elements)):
            found.append(f"not among the elements of the training set: {', '.join(map(_symbol, unseen))}")
        volume = volume_of(crystal.lattice) / crystal.num_atoms
        smallest, largest = self.volume_per_atom
        if not smallest / VOLUME_MARGIN <= volume <= largest * VOLUME_MARGIN:
            found.append(f"{volume:.3g} Å^3 an atom, far from the {smallest:.3g} to {largest:.3g} of the training set")
        fewest, most = self.num_atoms
        if not fewest / SIZE_MARGIN <= crystal.num_atoms <= most * SIZE_MARGIN:
            found.append(f"{crystal.num_atoms:,} atoms, far from the {fewest:,} to {most:,} of the training set")
        return found


def _elements_of(crystal: Crystal) -> set[int]:
    if crystal.occupancies is None:
        return set(np.unique(crystal.species).tolist())
    return set((np.flatnonzero(crystal.occupancies.any(axis=0)) + 1).tolist())


def _symbol(number: int) -> str:
    from pymatgen.core import Element  # slow to import

    return Element.from_Z(number).symbol
