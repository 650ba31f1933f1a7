"""The crystal of a record, from what its source holds: a dict, a structure file, a text, a pymatgen Structure.

Worker processes make the crystals, so all functions are found by their names and are given little.
"""

import contextlib
import dataclasses
import functools
import numbers
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from crystalframer_jax.data.io.streams import parse_structure
from crystalframer_jax.structures.bonds import warn_of_close_atoms
from crystalframer_jax.structures.crystal import (
    MAX_ATOMIC_NUMBER,
    Crystal,
    CrystalError,
    check_number,
    crystal_from_amounts,
)
from crystalframer_jax.structures.extxyz import warn_of_slab
from crystalframer_jax.structures.files import (
    as_crystals,
    cif_crystals,
    extxyz_crystals,
    poscar_crystals,
    read_crystals,
)
from crystalframer_jax.text import LONGEST, brief

PYMATGEN = ("lattice", "sites", "charge")  # keys of Structure.as_dict()
PARAMETERS = ("a", "b", "c", "alpha", "beta", "gamma")  # of a lattice without a matrix
FLAT = ("lattice", "species", "frac_coords")
JARVIS = ("lattice_mat", "elements", "coords", "cartesian")  # the last may be missing: false


def dict_loader(structure: Mapping[str, Any], id: str) -> Callable[[], Crystal]:
    """Returns what makes the crystal of a dict, see `from_dict`; keys that it does not need are left out."""
    needed = {key: structure[key] for key in (*PYMATGEN, *FLAT, *JARVIS) if key in structure}
    return functools.partial(from_dict, needed, id)


def from_dict(structure: Mapping[str, Any], id: str) -> Crystal:
    """Makes the crystal of a pymatgen Structure.as_dict(), of JARVIS atoms, or of lattice, species and frac_coords.

    Only numbers and symbols are read: nothing that a dict names is imported or called. Raises CrystalError.
    """
    if "sites" in structure:
        return _from_sites(structure, id)
    try:
        keys = JARVIS if "lattice_mat" in structure else FLAT
        lattice, symbols, coords = (structure[key] for key in keys[:3])
        cartesian = keys is JARVIS and structure.get("cartesian", False)
        cell, positions = _vectors(lattice, id), _vectors(coords, id)
        species = np.array([_atomic_number(symbol) for symbol in _sequence(symbols, id)])
        if cell.shape != (3, 3) or positions.shape != (len(species), 3):
            raise ValueError(f"lattice {cell.shape} and coordinates {positions.shape} of {len(species)} atoms")
        if not isinstance(cartesian, bool | np.bool_):
            raise ValueError(f"cartesian={brief(cartesian)} is neither true nor false")
    except CrystalError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)[:LONGEST]
        raise CrystalError(f"{id}: not a structure with lattice, species and coordinates ({reason})") from error
    with np.errstate(invalid="ignore", over="ignore"):  # Crystal looks at what comes out
        return warn_of_close_atoms(Crystal(species, positions if cartesian else positions @ cell, cell, id=id))


def _from_sites(structure: Mapping[str, Any], id: str) -> Crystal:
    """Makes the crystal of a pymatgen Structure.as_dict() of what is said of lattice, elements and coordinates."""
    from pymatgen.core import Lattice

    with _not_pymatgen(id):
        given = structure["lattice"]
        pbc = given.get("pbc", (True,) * 3)
        if not any(pbc):
            raise CrystalError(f"{id}: not periodic in all three directions; give a periodic Structure")
        warn_of_slab(pbc, id)
        if "matrix" in given:
            lattice = _vectors(given["matrix"], id)
        else:
            lattice = Lattice.from_parameters(*(float(given[key]) for key in PARAMETERS)).matrix
        sites = _sequence(structure["sites"], id)
        amounts = np.zeros((len(sites), MAX_ATOMIC_NUMBER))
        for number, site in enumerate(sites):
            for part in _sequence(site["species"], id):
                z = _atomic_number(part["element"])
                if z > MAX_ATOMIC_NUMBER:
                    raise CrystalError(
                        f"{id}: site {number + 1}: element {part['element']} is not supported; use H to Cf"
                    )
                amounts[number, z - 1] += float(part["occu"])
        coordinates = _vectors([site["abc"] for site in sites], id)
        # site by site, as pymatgen does it: the bits of a product may depend on the number of rows
        positions = np.reshape([np.dot(row, lattice) for row in coordinates], (-1, 3))
        return warn_of_close_atoms(crystal_from_amounts(amounts, positions, lattice, id))


def from_pymatgen(structure: Any, id: str) -> Crystal:
    """Makes the crystal of a pymatgen Structure, perhaps one that a pickle has put together wrongly.

    Raises CrystalError.
    """
    with _not_pymatgen(id):
        return warn_of_close_atoms(Crystal.from_pymatgen(structure, id))


@contextlib.contextmanager
def _not_pymatgen(id: str) -> Iterator[None]:
    """Turns whatever a wrong Structure raises into CrystalError: the record is at fault."""
    try:
        yield
    except CrystalError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:LONGEST]
        raise CrystalError(f"{id}: not a pymatgen Structure ({reason})") from error


def _sequence(value: Any, id: str) -> Any:
    """Returns a list or array of an entry for each atom; ValueError for something else, CrystalError if longer."""
    if not isinstance(value, list | tuple | np.ndarray):
        raise ValueError(f"{type(value).__name__} instead of a list")
    check_number(len(value), id)
    return value


def _vectors(value: Any, id: str) -> np.ndarray:
    """Reads vectors [n, 3]; unlike np.array, it does not follow lists into each other."""
    rows = _sequence(value, id)
    if not all(isinstance(row, list | tuple | np.ndarray) for row in rows):
        raise ValueError("a vector is not a list")
    return np.array([(float(x), float(y), float(z)) for x, y, z in rows], dtype=np.float64).reshape(-1, 3)


def from_file(path: Path, id: str) -> Crystal:
    """Reads the crystal of a structure file; raises CrystalError, also if the file has several."""
    return _single(read_crystals(path), str(path), id, "split it into files of one each")


def from_text(text: str, where: str, kind: str, id: str) -> Crystal:
    """Makes the crystal of a text, a "cif", "poscar" or one frame of "extxyz"; raises CrystalError, naming `where`."""
    readers = {"cif": cif_crystals, "poscar": poscar_crystals, "extxyz": extxyz_crystals}
    return _single(readers[kind](text, where), where, id, "make it one")


def from_bytes(content: bytes, where: str, id: str) -> Crystal:
    """Makes the crystal of the content of a CIF, POSCAR or extended XYZ file, told apart by the end of `where`."""
    suffix = where.lower().rpartition(".")[2]
    kind = "cif" if suffix in ("cif", "mcif") else "extxyz" if suffix in ("extxyz", "xyz") else "poscar"
    return from_text(content.decode("utf-8-sig", errors="replace").replace("\r\n", "\n"), where, kind, id)


def from_json(text: str, where: str, id: str) -> Crystal:
    """Makes the crystal of a structure that is written as JSON, see `from_dict`; raises CrystalError."""
    try:
        structure = parse_structure(text)
    except ValueError as error:
        reason = str(error)[:LONGEST]
        raise CrystalError(f"{where}: the text of its structure is not JSON ({reason}); correct it") from error
    return from_dict(structure, id)


def from_arrays(numbers: bytes, positions: bytes, cell: list[list[float]], pbc: list[bool], id: str) -> Crystal:
    """Makes the crystal of what ASE stores: int32 atomic numbers, float64 positions; raises CrystalError."""
    from ase import Atoms

    species = np.frombuffer(numbers, "<i4")
    check_number(len(species), id)
    try:
        atoms = Atoms(species, np.frombuffer(positions, "<f8").reshape(-1, 3), cell=cell, pbc=pbc)
    except (TypeError, ValueError, OverflowError) as error:
        raise CrystalError(f"{id}: not a structure of ASE ({str(error)[:LONGEST]}); write it again") from error
    try:
        (crystal,) = as_crystals(atoms)
    except CrystalError as error:
        raise CrystalError(f"{id}: {error}") from error
    return dataclasses.replace(crystal, id=id)


def _single(crystals: list[Crystal], where: str, id: str, remedy: str) -> Crystal:
    if len(crystals) != 1:
        raise CrystalError(f"{where}: has {len(crystals)} structures for one label; {remedy}")
    return dataclasses.replace(crystals[0], id=id)


def _atomic_number(symbol: Any) -> int:
    """Returns Z of an element symbol (blanks around it are ignored, D and T are hydrogen) or of an atomic number."""
    if isinstance(symbol, str):
        return _number_of(symbol)
    if not isinstance(symbol, numbers.Integral):
        raise ValueError(f"{type(symbol).__name__} instead of an element")
    return int(symbol)


@functools.lru_cache(maxsize=1000)
def _number_of(symbol: str) -> int:
    from pymatgen.core import Element

    return int(Element(symbol.strip()).Z)
