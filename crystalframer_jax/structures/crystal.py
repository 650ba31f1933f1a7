"""Crystals on the host: the `Crystal` type, made from arrays, pymatgen structures or ASE atoms."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from crystalframer_jax.structures.errors import CrystalError, SiteError
from crystalframer_jax.structures.lattice import volume_of
from crystalframer_jax.structures.search import cheap_radius, pairs_within
from crystalframer_jax.text import LONGEST

if TYPE_CHECKING:  # both are slow to import, and ASE is optional
    from ase import Atoms
    from pymatgen.core import Composition, PeriodicSite, Structure

MAX_ATOMIC_NUMBER = 98  # Cf
MOST_ATOMS = 50_000  # of a cell
LONGEST_VECTOR = 1e4  # Å, of a lattice
FAR = 1e4  # Å, from which positions are looked at
FARTHEST_CELL = 1e7  # cells that an atom may be away; beyond, its position has lost its decimals
MIN_DISTANCE = 0.1  # Å; atoms closer than this coincide
MIN_VOLUME = 0.1  # Å^3
OCCUPANCY_TOLERANCE = 1e-3  # how far the total occupancy of a site may exceed 1


@dataclasses.dataclass(frozen=True, eq=False)
class Crystal:
    """A periodic crystal on the host; the arrays are copied, converted and checked on construction.

    Raises:
      CrystalError: no atoms or more than 50,000, wrong shapes, unsupported elements, numbers that are not finite, a
        cell without volume or longer than 10,000 Å, a site with occupancies that are negative or sum above 1, atoms
        closer than 0.1 Å, or 10 million cells away.
    """

    species: np.ndarray  # [n] int32, atomic numbers 1..98; on a disordered site the species of largest occupancy
    positions: np.ndarray  # [n, 3] float64, Cartesian, Å; not wrapped into the cell
    lattice: np.ndarray  # [3, 3] float64, rows are the lattice vectors, Å; of either handedness
    occupancies: np.ndarray | None = None  # [n, 98] float64, column z - 1 for element z; None: every site is one atom
    id: str = ""  # where the crystal came from: file name, record id

    def __post_init__(self) -> None:
        where = self.id or "crystal"
        species = _checked_species(self.species, where)
        n = len(species)
        object.__setattr__(self, "species", species)
        object.__setattr__(self, "lattice", _checked_array(self.lattice, (3, 3), f"{where}: lattice"))
        _check_volume(self.lattice, where)
        object.__setattr__(self, "positions", _checked_array(self.positions, (n, 3), f"{where}: positions"))
        if self.occupancies is not None:
            occupancies = _checked_array(self.occupancies, (n, MAX_ATOMIC_NUMBER), f"{where}: occupancies")
            _check_occupancies(occupancies, where)
            object.__setattr__(self, "occupancies", occupancies)
        _check_distances(species, self.positions, self.lattice, where)

    @property
    def num_atoms(self) -> int:
        """Number of sites of the cell."""
        return len(self.species)

    @property
    def formula(self) -> str:
        """Reduced chemical formula as pymatgen writes it, such as "SrTiO3"."""
        amounts = np.bincount(self.species - 1) if self.occupancies is None else self.occupancies.sum(axis=0)
        return formula_of(amounts)

    @classmethod
    def from_pymatgen(cls, structure: Structure, id: str = "") -> Crystal:
        """Converts a pymatgen `Structure`; oxidation states are dropped, deuterium and tritium are hydrogen.

        Raises:
          CrystalError: as the class; also a `Molecule`, or a lattice that is not periodic in all directions.
        """
        where = id or "pymatgen structure"
        lattice = getattr(structure, "lattice", None)
        if lattice is None or not all(lattice.pbc):
            raise CrystalError(f"{where}: not periodic in all three directions; pass a periodic Structure")
        check_number(len(structure), where)
        return crystal_from_amounts(site_amounts(structure, where), structure.cart_coords, lattice.matrix, id)

    @classmethod
    def from_ase(cls, atoms: Atoms, id: str = "") -> Crystal:
        """Converts ASE `Atoms`: atomic numbers, positions and cell.

        Raises:
          CrystalError: as the class; also a cell that is not periodic in all three directions, or partial
            occupancies in `atoms.info`, where ASE keeps those of a CIF.
        """
        where = id or "ASE Atoms"
        lattice = np.asarray(atoms.cell)
        if not (np.all(atoms.pbc) and np.all(np.any(lattice != 0, axis=1))):
            remedy = 'add a Lattice="..." to extended XYZ, or set atoms.cell and atoms.pbc = True'
            raise CrystalError(f"{where}: not periodic in all three directions; {remedy}")
        occupancy = atoms.info.get("occupancy")
        for site in occupancy.values() if isinstance(occupancy, dict) else ():
            if len(site) != 1 or abs(sum(site.values()) - 1) > 1e-6:
                raise CrystalError(f"{where}: partial occupancies {site}; pass the CIF file or a Structure")
        return cls(atoms.numbers, atoms.positions, lattice, None, id)


def formula_of(amounts: np.ndarray) -> str:
    """Returns the reduced formula, as pymatgen writes it, of how many atoms there are of the elements 1, 2, ... [n]."""
    from pymatgen.core import Composition, Element

    elements = {Element.from_Z(int(z) + 1): float(amounts[z]) for z in np.flatnonzero(amounts)}
    with warnings.catch_warnings():  # of noble gases, which have no electronegativity to sort by
        warnings.simplefilter("ignore")
        return Composition(elements).reduced_formula


def _checked_species(species: Any, where: str) -> np.ndarray:
    species = np.asarray(species)
    if species.size == 0:
        raise CrystalError(f"{where}: no atoms; give a structure with at least one site")
    check_number(species.size, where)
    if species.ndim != 1 or not np.issubdtype(species.dtype, np.integer):
        raise CrystalError(f"{where}: species are {species.dtype}{species.shape}; give atomic numbers [n]")
    for i in np.flatnonzero((species < 1) | (species > MAX_ATOMIC_NUMBER)):
        raise _unsupported(_symbol(species[i]), f"{where}: site {i + 1}")
    return species.astype(np.int32)


def _checked_array(value: Any, shape: tuple[int, ...], what: str) -> np.ndarray:
    try:
        array = np.array(value, dtype=np.float64, order="C")
    except (TypeError, ValueError, OverflowError) as error:
        raise CrystalError(f"{what}: not numbers ({str(error)[:LONGEST]}); give an array of numbers") from error
    if array.shape != shape:
        raise CrystalError(f"{what} must have shape {list(shape)}, got {list(array.shape)}")
    for i in np.flatnonzero(~np.isfinite(array).all(axis=1)):
        raise CrystalError(f"{what}: NaN or infinity in row {i + 1}; correct the numbers")
    return array


def _check_occupancies(occupancies: np.ndarray, where: str) -> None:
    totals = occupancies.sum(axis=1)
    bad = (totals > 1 + OCCUPANCY_TOLERANCE) | (totals <= 0) | (occupancies < 0).any(axis=1)
    for i in np.flatnonzero(bad):
        elements = ", ".join(_symbol(int(z) + 1) for z in np.flatnonzero(occupancies[i]))
        problem = f"occupancies of site {i + 1} ({elements}) sum to {totals[i]:.4g} or are negative"
        raise SiteError(f"{where}: {problem}; make them positive and their sum at most 1", [int(i)])


def check_number(atoms: int, where: str) -> None:
    """Raises `CrystalError` for more atoms than a cell may have."""
    if atoms > MOST_ATOMS:
        raise CrystalError(f"{where}: {atoms:,} atoms, of at most {MOST_ATOMS:,} in a cell; give a smaller cell")


def _check_volume(lattice: np.ndarray, where: str) -> None:
    lengths = [math.hypot(*vector) for vector in lattice.tolist()]
    if max(lengths) > LONGEST_VECTOR:
        raise CrystalError(
            f"{where}: a lattice vector of {max(lengths):.3g} Å, over {LONGEST_VECTOR:,.0f}; give it in Å"
        )
    volume = volume_of(lattice)
    if volume < MIN_VOLUME or volume < 1e-6 * math.prod(lengths):
        problem = f"the cell has no volume ({volume:.3g} Å^3)"
        raise CrystalError(f"{where}: {problem}; give three lattice vectors in Å that are not coplanar")


def _check_distances(species: np.ndarray, positions: np.ndarray, lattice: np.ndarray, where: str) -> None:
    """Raises `CrystalError` for the closest pair of atoms, images included, below `MIN_DISTANCE`."""
    if np.abs(positions).max() > FAR:
        away = np.abs(positions / FAR @ np.linalg.inv(lattice)).max(axis=1) * FAR
        for far in np.flatnonzero(~(away < FARTHEST_CELL)):
            raise CrystalError(f"{where}: site {far + 1} is {away[far]:.3g} cells away; give coordinates near the cell")
    # The search grid is as fine as the radius: a radius near the atomic spacing keeps time and memory linear.
    radius = max(MIN_DISTANCE, min(math.cbrt(volume_of(lattice) / len(positions)), 5.0))
    i, j, _, distance = pairs_within(positions, lattice, cheap_radius(lattice, radius), where)
    close = np.flatnonzero(distance < MIN_DISTANCE)
    if close.size:
        pair = close[distance[close].argmin()]
        a, b = sorted((int(i[pair]), int(j[pair])))
        other = f"site {b + 1} ({_symbol(species[b])})" if a != b else "its periodic image"
        problem = f"site {a + 1} ({_symbol(species[a])}) and {other} are {distance[pair]:.3f} Å apart"
        raise SiteError(f"{where}: {problem}; remove one of them or correct the cell", [a, b])


def _symbol(z: int) -> str:
    from pymatgen.core import Element

    return Element.from_Z(int(z)).symbol if 1 <= z <= 118 else f"of atomic number {z}"


def _unsupported(element: str, where: str) -> CrystalError:
    return CrystalError(f"{where}: element {element} is not supported; use H to Cf (1 to 98)")


def composition_amounts(composition: Composition, where: str) -> np.ndarray:
    """Lists the amount [98] of each element in a pymatgen composition; isotopes and oxidation states are merged."""
    from pymatgen.core import DummySpecies

    amounts = np.zeros(MAX_ATOMIC_NUMBER)
    for specie, amount in composition.items():
        if isinstance(specie, DummySpecies) or specie.Z > MAX_ATOMIC_NUMBER:
            raise _unsupported(specie.symbol, where)
        amounts[specie.Z - 1] += amount
    return amounts


def site_amounts(sites: Iterable[PeriodicSite], where: str) -> np.ndarray:
    """Lists the amount [n, 98] of each element on each site."""
    rows = [composition_amounts(site.species, f"{where}: site {i}") for i, site in enumerate(sites, 1)]
    return np.reshape(rows, (len(rows), MAX_ATOMIC_NUMBER))


def crystal_from_amounts(amounts: np.ndarray, positions: np.ndarray, lattice: np.ndarray, id: str) -> Crystal:
    """Makes the crystal with `amounts` [n, 98] on its sites; `occupancies` is None if every site is one atom."""
    is_atom = (np.abs(amounts.max(axis=1) - 1) <= 1e-6) & ((amounts > 0).sum(axis=1) == 1)
    return Crystal(amounts.argmax(axis=1) + 1, positions, lattice, None if is_atom.all() else amounts, id)
