"""Records: the crystals of a source before they are parsed, with their labels."""

import dataclasses
import math
import numbers
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from crystalframer_jax.errors import UserError
from crystalframer_jax.structures.crystal import Crystal, CrystalError


class DataError(UserError, ValueError):
    """Data that cannot be prepared; the message is one line naming the file and the remedy."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One crystal of a source; small, so that worker processes can be sent it and make the crystal.

    Attributes:
      id: name of the crystal in reports and predictions.
      where: file and line or record number, for messages.
      structure: what `crystal_of` understands: a dict, the path of a structure file, a pymatgen Structure, or (for
        what cannot be told apart so) a function without arguments that returns a `Crystal`, which can be pickled.
      labels: one number for each target of the source, NaN where unknown.
      split: "train", "val" or "test" where the source says so.
      group: crystals of a group stay in one split.
    """

    id: str
    where: str
    structure: Any
    labels: tuple[float, ...]
    split: str = ""
    group: str = ""


@dataclasses.dataclass(frozen=True)
class Target:
    """A property to predict: its name here, the field of the source that holds it, and its unit ("" if unknown).

    With `log10` the label is the decimal logarithm of the field; the unit is that of the label.
    """

    name: str
    field: str
    unit: str
    log10: bool = False

    def label(self, value: Any) -> float:
        """The label for a value of the field, NaN if there is none."""
        number = parse_label(value)
        if not self.log10:
            return number
        return math.log10(number) if number > 0 else math.nan


@dataclasses.dataclass(frozen=True)
class Source:
    """Crystals with labels, as they come from files.

    Attributes:
      targets: what the labels are.
      sha256: checksum of everything that `records` reads.
      records: starts a new pass over all records, in the order of the source; a `BadRecord` stands for a line or item
        that is no record at all.
      count: how many there are, if that is known before they are read.
    """

    targets: tuple[Target, ...]
    sha256: str
    records: Callable[[], Iterator["Record | BadRecord"]]
    count: int | None = None


@dataclasses.dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used: where it is and why."""

    id: str
    where: str
    reason: str


def parse_label(value: Any) -> float:
    """A label as a number; NaN for what sources write where there is none: None, 'na', '', infinities."""
    if isinstance(value, bool):
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def crystal_of(record: Record) -> Crystal:
    """The crystal of a record, with its id; raises CrystalError."""
    structure = record.structure
    if isinstance(structure, Mapping):
        return _crystal_of_dict(structure, record.id)
    if isinstance(structure, Path):
        return _crystal_of_file(structure, record.id)
    if callable(structure):
        return dataclasses.replace(structure(), id=record.id)
    try:
        return Crystal.from_pymatgen(structure, record.id)
    except CrystalError:
        raise
    except Exception as error:  # of an object that a pickle has put together wrongly
        raise CrystalError(f"{record.id}: not a pymatgen Structure ({type(error).__name__}: {error})") from error


def _crystal_of_file(path: Path, id: str) -> Crystal:
    from crystalframer_jax.structures.files import read_crystals

    crystals = read_crystals(path)
    if len(crystals) != 1:
        raise CrystalError(f"{path}: has {len(crystals)} structures for one label; split it into files of one each")
    return dataclasses.replace(crystals[0], id=id)


def _crystal_of_dict(structure: Mapping[str, Any], id: str) -> Crystal:
    """From lattice, species, frac_coords, from JARVIS atoms (lattice_mat, elements, coords, cartesian), or from a
    pymatgen Structure.as_dict().
    """
    if "sites" in structure:
        return _crystal_of_pymatgen_dict(structure, id)
    try:
        if "lattice_mat" in structure:
            lattice, symbols, coords = (structure[key] for key in ("lattice_mat", "elements", "coords"))
            cartesian = structure.get("cartesian", False)
        else:
            lattice, symbols, coords = (structure[key] for key in ("lattice", "species", "frac_coords"))
            cartesian = False
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


def _crystal_of_pymatgen_dict(structure: Mapping[str, Any], id: str) -> Crystal:
    from pymatgen.core import Structure

    try:
        parsed = Structure.from_dict(dict(structure))
    except Exception as error:  # whatever the parser raises, the record is at fault
        raise CrystalError(f"{id}: not a pymatgen Structure ({type(error).__name__}: {error})") from error
    return Crystal.from_pymatgen(parsed, id)


def _atomic_number(symbol: Any) -> int:
    """Z of an element symbol (blanks around it are ignored, D and T are hydrogen) or of an atomic number."""
    from pymatgen.core import Element

    if isinstance(symbol, numbers.Integral):
        return int(symbol)
    symbol = str(symbol).strip()
    return 1 if symbol in ("D", "T") else int(Element(symbol).Z)
