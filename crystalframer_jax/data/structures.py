"""The crystal of a record, from what its source holds: a dict, a structure file, a text, a pymatgen Structure.

Worker processes make the crystals, so all functions are found by their names and are given little.
"""

import dataclasses
import functools
import numbers
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from crystalframer_jax.structures.crystal import Crystal, CrystalError
from crystalframer_jax.structures.files import cif_crystals, extxyz_crystals, read_crystals

PYMATGEN = ("lattice", "sites", "charge")  # keys of Structure.as_dict()
FLAT = ("lattice", "species", "frac_coords")
JARVIS = ("lattice_mat", "elements", "coords", "cartesian")  # the last may be missing: false


def dict_loader(structure: Mapping[str, Any], id: str) -> Callable[[], Crystal]:
    """Returns what makes the crystal of a dict, see `from_dict`; keys that it does not need are left out."""
    needed = {key: structure[key] for key in (*PYMATGEN, *FLAT, *JARVIS) if key in structure}
    return functools.partial(from_dict, needed, id)


def from_dict(structure: Mapping[str, Any], id: str) -> Crystal:
    """Makes the crystal of a pymatgen Structure.as_dict(), of JARVIS atoms, or of lattice, species and frac_coords.

    Raises CrystalError.
    """
    if "sites" in structure:
        return from_pymatgen(structure, id)
    try:
        keys = JARVIS if "lattice_mat" in structure else FLAT
        lattice, symbols, coords = (structure[key] for key in keys[:3])
        cartesian = keys is JARVIS and structure.get("cartesian", False)
        cell, positions = np.array(lattice, dtype=np.float64), np.array(coords, dtype=np.float64)
        species = np.array([_atomic_number(symbol) for symbol in symbols])
        if cell.shape != (3, 3) or positions.shape != (len(species), 3):
            raise ValueError(f"lattice {cell.shape} and coordinates {positions.shape} of {len(species)} atoms")
        if not isinstance(cartesian, bool | np.bool_):
            raise ValueError(f"cartesian={cartesian!r} is neither true nor false")
    except (KeyError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise CrystalError(f"{id}: not a structure with lattice, species and coordinates ({reason})") from error
    return Crystal(species, positions if cartesian else positions @ cell, cell, id=id)


def from_pymatgen(structure: Any, id: str) -> Crystal:
    """Makes the crystal of a pymatgen Structure, perhaps one that a pickle has put together wrongly, or of its dict.

    Raises CrystalError.
    """
    from pymatgen.core import Structure

    try:
        parsed = Structure.from_dict(dict(structure)) if isinstance(structure, Mapping) else structure
        return Crystal.from_pymatgen(parsed, id)
    except CrystalError:
        raise
    except Exception as error:  # whatever the parser raises, the record is at fault
        raise CrystalError(f"{id}: not a pymatgen Structure ({type(error).__name__}: {error})") from error


def from_file(path: Path, id: str) -> Crystal:
    """Reads the crystal of a structure file; raises CrystalError, also if the file has several."""
    return _single(read_crystals(path), str(path), id, "split it into files of one each")


def from_text(text: str, where: str, is_cif: bool, id: str) -> Crystal:
    """Makes the crystal of the text of a CIF or of one frame of extended XYZ; raises CrystalError, naming `where`."""
    crystals = (cif_crystals if is_cif else extxyz_crystals)(text, where)
    return _single(crystals, where, id, "make it one")


def _single(crystals: list[Crystal], where: str, id: str, remedy: str) -> Crystal:
    if len(crystals) != 1:
        raise CrystalError(f"{where}: has {len(crystals)} structures for one label; {remedy}")
    return dataclasses.replace(crystals[0], id=id)


def _atomic_number(symbol: Any) -> int:
    """Returns Z of an element symbol (blanks around it are ignored, D and T are hydrogen) or of an atomic number."""
    from pymatgen.core import Element

    return int(symbol) if isinstance(symbol, numbers.Integral) else int(Element(str(symbol).strip()).Z)
