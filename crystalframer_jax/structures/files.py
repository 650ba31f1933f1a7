"""Structure files: CIF, POSCAR and extended XYZ, read by pymatgen and ASE, with nothing lost in silence."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import re
import stat
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crystalframer_jax.files import FileError, read_bytes
from crystalframer_jax.structures.crystal import (
    FARTHEST_CELL,
    OCCUPANCY_TOLERANCE,
    Crystal,
    CrystalError,
    check_number,
    composition_amounts,
    crystal_from_amounts,
    site_amounts,
)
from crystalframer_jax.text import LONGEST, escaped

if TYPE_CHECKING:  # both are slow to import, and ASE is optional
    from ase import Atoms
    from pymatgen.core import Structure
    from pymatgen.io.cif import CifParser

LARGEST_FILE = 256 * 1024**2  # bytes
LONGEST_LINE = 20_000  # characters, of a CIF; its standard has 2,048
MOST_QUOTES = 500  # on a line of a CIF, each of which pymatgen may follow to the end
MOST_OPERATIONS = 768  # of symmetry; a space group has 192 at most
LONGEST_FORMULA = 1000  # characters
LONGEST_OPERATION = 200  # characters
MOST_POSITIONS = 10_000  # sites times operations; pymatgen compares all of them with each other
LONGEST_COMMENT = 1_000_000  # characters, above the atoms of a frame
MOST_COLUMNS = 1000  # of values of an atom

CIF_OCCUPANCY_TOLERANCE = 1.05  # refined occupancies up to this are scaled to 1
CIF_SITE_TOLERANCE = 1.5e-3  # fractional; images of a coordinate written as 0.333 differ by 0.001
SYMOP_ITEM = "equiv_pos_as_xyz|symop_operation_xyz"
ANY_SYMOP_ITEM = "symop.*(xyz|centering)|equiv_pos_as_xyz"  # also of magnetic groups
GROUP_ITEM = "^_(symmetry|space_group)_.*(name_H|IT_number|Int_Tables)"

ACCEPTED_FILES = "CIF (.cif), POSCAR (POSCAR*, CONTCAR*, .vasp, .poscar), extended XYZ (.extxyz, .xyz)"


def as_crystals(item: Crystal | Structure | Atoms | str | os.PathLike[str]) -> list[Crystal]:
    """Makes the crystals of a path, a pymatgen `Structure`, ASE `Atoms` or a `Crystal`; raises `CrystalError`."""
    if isinstance(item, Crystal):
        return [item]
    if isinstance(item, (str, os.PathLike)):
        return read_crystals(item)
    from pymatgen.core import SiteCollection

    if isinstance(item, SiteCollection):
        return [Crystal.from_pymatgen(item)]
    if "ase" in sys.modules and isinstance(item, sys.modules["ase"].Atoms):
        return [Crystal.from_ase(item)]
    kinds = "a path, a pymatgen Structure, ASE Atoms or a Crystal"
    raise CrystalError(f"cannot make a crystal of {type(item).__name__!r}; pass {kinds}")


def read_crystals(path: str | os.PathLike[str]) -> list[Crystal]:
    """Reads all crystals of a CIF, POSCAR or extended XYZ file, in the order of the file.

    Cells are kept as given: no reduction, no symmetrisation. The atoms of a CIF are those that pymatgen makes
    of the listed sites and symmetry operations, in its order (by electronegativity), inside the cell; other
    files keep their order and positions. A `UserWarning` tells of a CIF whose sites do not add up to its
    formula, or whose hydrogens have no coordinates.

    Returns:
      Crystals with id "<path>", or "<path>#<1-based index>" if the file has several.

    Raises:
      CrystalError: the file cannot be read or parsed, is of another kind, or holds an unusable crystal.
    """
    return [make() for make in structures_in(path)]


def structures_in(path: str | os.PathLike[str]) -> list[Callable[[], Crystal]]:
    """Finds the structures in a file, see `read_crystals`: what makes the crystal of each, or raises CrystalError.

    Raises:
      CrystalError: the file as a whole cannot be read.
    """
    path = Path(path)
    name = str(path)
    suffix = path.suffix.lower()
    text = _read_text(path)
    if suffix == ".cif":
        return _in_cif(text, name)
    if suffix in (".extxyz", ".xyz"):
        return _in_extxyz(text, name)
    if suffix in (".vasp", ".poscar") or path.name.upper().startswith(("POSCAR", "CONTCAR")):
        return [functools.partial(_crystal_of_poscar, text, name)]
    raise CrystalError(f"{path}: unknown kind of file; rename it to one of: {ACCEPTED_FILES}")


def cif_crystals(text: str, name: str) -> list[Crystal]:
    """Reads the crystals of the text of a CIF file, see `read_crystals`; `name` stands for the path."""
    return [make() for make in _in_cif(text, name)]


def extxyz_crystals(text: str, name: str) -> list[Crystal]:
    """Reads the crystals of the text of an extended XYZ file, see `read_crystals`; `name` stands for the path."""
    return [make() for make in _in_extxyz(text, name)]


def poscar_crystals(text: str, name: str) -> list[Crystal]:
    """Reads the crystal of the text of a POSCAR file, see `read_crystals`; `name` stands for the path."""
    return [_crystal_of_poscar(text, name)]


def _in_cif(text: str, name: str) -> list[Callable[[], Crystal]]:
    return [functools.partial(_crystal_of_cif, block, id) for id, block in _with_ids(name, _cif_blocks(text, name))]


def _in_extxyz(text: str, name: str) -> list[Callable[[], Crystal]]:
    with _parsing(name, "extended XYZ"):
        frames = _frames(text, name)
    return [functools.partial(_crystal_of_frame, frame, id) for id, frame in _with_ids(name, frames)]


def _with_ids(name: str, items: list[str]) -> list[tuple[str, str]]:
    return [(f"{name}#{i}" if len(items) > 1 else name, item) for i, item in enumerate(items, 1)]


def _read_text(path: Path) -> str:
    try:
        if stat.S_ISDIR(path.stat().st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        content = read_bytes(path, LARGEST_FILE)
    except FileError as error:
        raise CrystalError(f"{path}: cannot be used: {error}; split it, or pass the path of a file") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        reason = getattr(error, "strerror", error)
        raise CrystalError(f"{path}: cannot be read ({reason}); pass the path of a file") from error
    text = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig", errors="replace").read()  # as of a text file
    if not text.strip():
        raise CrystalError(f"{path}: the file is empty; write the structure again")
    return text


@contextlib.contextmanager
def _parsing(where: str, kind: str) -> Iterator[None]:
    """Silences the warnings of a parser and turns whatever it raises into a one-line `CrystalError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CrystalError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        known: dict[type, str] = {IndexError: "it ends early", np.linalg.LinAlgError: "the cell has no volume"}
        reason = " ".join(known.get(type(cause), f"{type(cause).__name__}: {cause}"[:LONGEST]).split())
        raise CrystalError(f"{where}: cannot be read as {kind} ({reason}); correct the file") from error


def _frames(text: str, name: str) -> list[str]:
    """Divides extended XYZ into frames; raises for numbers of atoms too large, or for the lines that follow."""
    lines, frames, at = text.split("\n"), [], 0
    while at < len(lines) and lines[at].strip():
        number, left = int(lines[at]), len(lines) - at - 2
        check_number(number, name)
        if not 0 <= number <= left:
            raise ValueError(f"{number:,} atoms in {max(left, 0):,} lines")
        if len(lines[at + 1]) > LONGEST_COMMENT:
            raise ValueError(f"a comment of {len(lines[at + 1]):,} characters")
        end = at + 2 + number
        end += next((i for i, line in enumerate(lines[end : end + 3]) if not line.lstrip().startswith("VEC")), 3)
        frames.append("\n".join(lines[at:end]))
        at = end
    if not frames or any(line.strip() for line in lines[at:]):
        raise CrystalError(f"{name}: empty line before or after frame {len(frames)}; remove it")
    return frames


def _crystal_of_frame(text: str, id: str) -> Crystal:
    try:
        from ase.io.extxyz import key_val_str_to_dict, read_xyz
    except ImportError as error:
        raise CrystalError(f"{id}: reading extended XYZ needs ASE; pip install ase") from error

    def parsed(comment: str) -> dict[str, Any]:
        values = key_val_str_to_dict(comment)
        columns = str(values.get("Properties", "")).split(":")[2::3]
        if sum(abs(int(number)) for number in columns) > MOST_COLUMNS:
            raise ValueError(f"over {MOST_COLUMNS:,} columns in Properties")
        return values

    with _parsing(id, "extended XYZ"):
        (frame,) = read_xyz(io.StringIO(text), index=slice(None), properties_parser=parsed)
        return Crystal.from_ase(frame, id)


def _crystal_of_poscar(text: str, id: str) -> Crystal:
    return Crystal.from_pymatgen(_read_poscar(text, id), id)


def _read_poscar(text: str, name: str) -> Structure:
    from pymatgen.io.vasp import Poscar

    lines = [line.split("#")[0] for line in text.split("\n")]
    with _parsing(name, "POSCAR"):
        scale = float(lines[1])
        if scale < 0:  # the volume of the cell; pymatgen would multiply Cartesian coordinates by it
            volume = abs(np.linalg.det([[float(x) for x in line.split()] for line in lines[2:5]]))
            lines[1] = f"{np.cbrt(-scale / volume):.17g}"
        _check_poscar_counts(lines, name)
        poscar = Poscar.from_str("\n".join(lines), read_velocities=False)
        if not poscar.true_names:
            raise CrystalError(f"{name}: no element names; write them on line 6, above the numbers of atoms")
        _check_poscar_is_whole(lines, len(poscar.structure), name)
    return poscar.structure


def _check_poscar_counts(lines: list[str], name: str) -> None:
    """Raises for numbers of atoms, where pymatgen looks for them, that are negative or too large for the file."""
    number = next((i for i in range(5, 16) if _is_integer(lines[i].split()[0])), 15)
    counts = [int(count) for line in lines[number : max(2 * number - 5, 6)] for count in line.split()]
    check_number(max(counts), name)
    check_number(sum(counts), name)
    if min(counts) < 0 or sum(counts) > len(lines):
        raise ValueError(f"{sum(counts):,} atoms in {len(lines):,} lines")


def _is_integer(text: str) -> bool:
    try:
        int(text)
    except ValueError:
        return False
    return True


def _check_poscar_is_whole(lines: list[str], num_atoms: int, name: str) -> None:
    """Raises for what pymatgen passes over: element names without a count, coordinates beyond the counts."""
    first = next(i for i in range(5, len(lines)) if lines[i].split()[0].isdigit())
    mode = first + max(first - 5, 1)  # as many lines of counts as of names; VASP 4 has no names
    num_names, num_counts = (len(" ".join(part).split()) for part in (lines[5:first], lines[first:mode]))
    if first > 5 and num_names != num_counts:
        raise CrystalError(f"{name}: {num_names} element names for {num_counts} counts; make them agree")
    end = mode + 1 + num_atoms + (lines[mode].strip()[:1] in ("s", "S"))
    if re.match(r"\s*[-+.\d]\S*\s+[-+.\d]\S*\s+[-+.\d]", "".join(lines[end : end + 1])):
        raise CrystalError(f"{name}: coordinates beyond the {num_atoms} atoms counted; correct the counts")


def _cif_blocks(text: str, name: str) -> list[str]:
    """Finds the data blocks that list atoms. Parsed one by one: pymatgen overwrites blocks of equal name."""
    lines = [line for line in text.split("\n") if line.strip()]  # blank ones take the square of their number
    for line in lines:
        if len(line) > LONGEST_LINE or line.count("'") + line.count('"') > MOST_QUOTES:
            raise CrystalError(
                f"{name}: a line of {len(line):,} characters is too long or has too many quotes; break it"
            )
    text = "\n".join(lines)
    blocks = ["data_" + block for block in re.split(r"^\s*data_", text, flags=re.M | re.I)[1:]]
    has_atoms = re.compile(r"^\s*_atom_site[._](label|type_symbol|fract|cartn)", re.M | re.I)
    blocks = [block for block in blocks if has_atoms.search(block)]
    if not blocks:
        raise CrystalError(f"{name}: no atoms; a CIF needs a data_ block with an _atom_site_ loop")
    return blocks


def _crystal_of_cif(block: str, id: str) -> Crystal:
    from pymatgen.io.cif import CifParser

    with _parsing(id, "CIF"):
        parser = CifParser.from_str(block, site_tolerance=CIF_SITE_TOLERANCE, check_cif=False)
        (data,) = parser.as_dict().values()
        if sum(key.startswith(("_cell_length_", "_cell_angle_")) for key in data) < 6:
            raise CrystalError(f"{id}: no lattice; add the six items _cell_length_* and _cell_angle_*")
        if not isinstance(data["_atom_site_label"], list):
            raise CrystalError(f"{id}: the _atom_site_ items are not a table; put them in a loop_")
        _check_cif_counts(data, parser, id)
        # pymatgen's own check of occupancies counts deuterium and hydrogen of one site twice
        (structure,) = parser.parse_structures(primitive=False, check_occu=False, on_error="raise")
        sites = sorted(structure, key=lambda s: (s.species.average_electroneg, s.species.formula))
        amounts, fract = site_amounts(sites, id), np.array([site.frac_coords for site in sites])
        _check_cif_symmetry(data, [operation.rotation_matrix for operation in parser.symmetry_operations], id)
        _check_cif_rows(data, fract, amounts.sum(axis=1), id)
    attached = set(data.get("_atom_site_attached_hydrogens", [])) - {"0", ".", "?"}
    if attached or "implicit_hydrogens" in structure.site_properties:
        warnings.warn(escaped(f"{id}: left out hydrogens of water or others without coordinates"), stacklevel=4)
    amounts[amounts < 1e-6] = 0  # pymatgen writes an occupancy of 0 as 1e-8
    total = amounts.sum(axis=1, keepdims=True)
    amounts /= np.where((total > 1) & (total <= CIF_OCCUPANCY_TOLERANCE), total, 1)
    present = total[:, 0] > 0
    lattice = structure.lattice.matrix
    crystal = crystal_from_amounts(amounts[present], fract[present] @ lattice, lattice, id)
    formula = str(data.get("_chemical_formula_sum", "?"))
    if not _has_composition(amounts.sum(axis=0), formula):
        warnings.warn(escaped(f"{id}: the sites make {crystal.formula}, the file states {formula[:100]}"), stacklevel=4)
    return crystal


def _check_cif_counts(data: dict[str, Any], parser: CifParser, where: str) -> None:
    """Raises for more symmetry operations or sites than pymatgen can multiply in a reasonable time."""
    from pymatgen.io.cif import CifBlock

    number = 1
    for key in data:
        if re.search(ANY_SYMOP_ITEM, key):
            listed = [data[key]] if isinstance(data[key], str) else data[key]
            number *= max(len(listed), 1)
            if number > MOST_OPERATIONS:
                raise CrystalError(
                    f"{where}: {number:,} symmetry operations, of at most {MOST_OPERATIONS}; list each once"
                )
            for text in listed:
                if len(text) > LONGEST_OPERATION or re.search(r"[\d.]{25}", text):
                    raise CrystalError(f"{where}: symmetry operation {text[:40]}... is too long; write it as x,y,z+1/2")
    sites = len(data["_atom_site_label"])
    if number == 1 and sites * 192 > MOST_POSITIONS:  # a group that is named has 192 at most
        number = len(parser.get_symops(CifBlock(data, [], "")))
    positions = number * sites
    if positions > MOST_POSITIONS:
        problem = f"{sites:,} sites and {number} symmetry operations"
        raise CrystalError(
            f"{where}: {problem} are over {MOST_POSITIONS:,} positions; give a POSCAR, or a smaller cell"
        )


def _check_cif_symmetry(data: dict[str, Any], rotations: list[np.ndarray], where: str) -> None:
    """Raises where pymatgen falls back to P1 because it does not understand the symmetry, and loses atoms."""
    listed = [data[key] for key in data if re.search(SYMOP_ITEM, key) and data[key] not in ("?", ".")]
    if listed:
        is_understood = len(rotations) == (1 if isinstance(listed[0], str) else len(listed[0]))
    else:
        groups = [data[key] for key in data if re.search(GROUP_ITEM, key)]
        named = {re.sub(r"[\s_]", "", str(group)).upper() for group in groups} - {"P1", "1", "?", ".", ""}
        is_understood = len(rotations) > 1 or not named
    if not is_understood or not np.allclose(np.abs(np.linalg.det(rotations)), 1):
        raise CrystalError(f"{where}: symmetry not understood; list it as _space_group_symop_operation_xyz")


def _check_cif_rows(data: dict[str, Any], sites: np.ndarray, amounts: np.ndarray, where: str) -> None:
    """Raises for rows pymatgen passes over (unknown element, occupancy ".") or reads as 0 (coordinate ".").

    `sites` [n, 3] are the fractional coordinates that it found, `amounts` [n] the atoms on each.
    """
    from pymatgen.io.cif import str2float

    labels = data["_atom_site_label"]
    coordinates = zip(*(data[f"_atom_site_fract_{axis}"] for axis in "xyz"), strict=True)
    occupancies = data.get("_atom_site_occupancy", ["1"] * len(labels))
    stated = np.zeros(len(sites))
    for label, fract, text in zip(labels, coordinates, occupancies, strict=True):
        place = [str2float(x) for x in fract]
        if not max(map(abs, place)) < FARTHEST_CELL:
            raise CrystalError(
                f"{where}: site {label} is {max(map(abs, place)):.3g} cells away; correct its coordinates"
            )
        offset = sites - place
        offset = np.abs(offset - np.round(offset)).max(axis=1)
        site = offset.argmin()
        occupancy = 1.0 if text in (".", "?") else str2float(text)
        stated[site] += occupancy
        is_short = amounts[site] < stated[site] - OCCUPANCY_TOLERANCE
        if "." in fract or occupancy < 0 or is_short or offset[site] > 3 * CIF_SITE_TOLERANCE:
            remedy = "give it an _atom_site_type_symbol, three coordinates and an occupancy"
            raise CrystalError(f"{where}: site {label} is not understood; {remedy}")


def _has_composition(found: np.ndarray, formula: str) -> bool:
    """Tells whether amounts [98] have the elements and, to 0.01, the proportions of a formula; true of "?"."""
    from pymatgen.core import Composition

    try:
        stated = composition_amounts(Composition(formula if len(formula) <= LONGEST_FORMULA else "?"), formula)
    except Exception:  # whatever the parser raises, the formula says nothing
        return True
    is_near = np.abs(found / found.sum() - stated / max(stated.sum(), 1e-9)).max() < 0.01
    return bool(is_near and np.array_equal(found > 0, stated > 0))
