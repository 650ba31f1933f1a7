"""Crystals on the host: the `Crystal` type, made from pymatgen, ASE, CIF, POSCAR and extended XYZ."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # both are slow to import, and ASE is optional
    from ase import Atoms
    from pymatgen.core import Composition, PeriodicSite, Structure

MAX_ATOMIC_NUMBER = 98  # Cf
MIN_DISTANCE = 0.1  # Å; atoms closer than this coincide
MIN_VOLUME = 0.1  # Å^3
OCCUPANCY_TOLERANCE = 1e-3  # how far the total occupancy of a site may exceed 1

CIF_OCCUPANCY_TOLERANCE = 1.05  # refined occupancies up to this are scaled to 1
CIF_SITE_TOLERANCE = 1.5e-3  # fractional; images of a coordinate written as 0.333 differ by 0.001
SYMOP_ITEM = "equiv_pos_as_xyz|symop_operation_xyz"
GROUP_ITEM = "^_(symmetry|space_group)_.*(name_H|IT_number|Int_Tables)"

ACCEPTED_FILES = "CIF (.cif), POSCAR (POSCAR*, CONTCAR*, .vasp, .poscar), extended XYZ (.extxyz, .xyz)"


class CrystalError(ValueError):
    """A structure that cannot be used; the message is one line naming the file or record and the remedy."""


@dataclasses.dataclass(frozen=True, eq=False)
class Crystal:
    """A periodic crystal on the host; the arrays are copied, converted and checked on construction.

    Attributes:
      species: [n] int32, atomic numbers 1..98; on a disordered site the species of largest occupancy.
      positions: [n, 3] float64, Cartesian, Å; not wrapped into the cell.
      lattice: [3, 3] float64, rows are the lattice vectors, Å; of either handedness.
      occupancies: [n, 98] float64, column z - 1 for element z; None if every site is one whole atom.
      id: where the crystal came from: file name, record id.

    Raises:
      CrystalError: no atoms, wrong shapes, unsupported elements, numbers that are not finite, a cell without
        volume, a site with occupancies that are negative or sum above 1, atoms closer than 0.1 Å.
    """

    species: np.ndarray
    positions: np.ndarray
    lattice: np.ndarray
    occupancies: np.ndarray | None = None
    id: str = ""

    def __post_init__(self) -> None:
        """Converts and checks the arrays."""
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
        from pymatgen.core import Composition, Element

        amounts = np.bincount(self.species - 1) if self.occupancies is None else self.occupancies.sum(axis=0)
        elements = {Element.from_Z(int(z) + 1): float(amounts[z]) for z in np.flatnonzero(amounts)}
        with warnings.catch_warnings():  # of noble gases, which have no electronegativity to sort by
            warnings.simplefilter("ignore")
            return Composition(elements).reduced_formula

    @classmethod
    def from_pymatgen(cls, structure: Structure, id: str = "") -> Crystal:
        """From a pymatgen `Structure`; oxidation states are dropped, deuterium and tritium are hydrogen.

        Raises:
          CrystalError: as the class; also a `Molecule`, or a lattice that is not periodic in all directions.
        """
        where = id or "pymatgen structure"
        lattice = getattr(structure, "lattice", None)
        if lattice is None or not all(lattice.pbc):
            raise CrystalError(f"{where}: not periodic in all three directions; pass a periodic Structure")
        return _from_amounts(_site_amounts(structure, where), structure.cart_coords, lattice.matrix, id)

    @classmethod
    def from_ase(cls, atoms: Atoms, id: str = "") -> Crystal:
        """From ASE `Atoms`: atomic numbers, positions and cell.

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


def as_crystals(item: Crystal | Structure | Atoms | str | os.PathLike[str]) -> list[Crystal]:
    """The crystals of a path, a pymatgen `Structure`, ASE `Atoms` or a `Crystal`; raises `CrystalError`."""
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
    """All crystals of a CIF, POSCAR or extended XYZ file, in the order of the file.

    Cells are kept as given: no reduction, no symmetrisation. The atoms of a CIF are those that pymatgen makes
    of the listed sites and symmetry operations, in its order (by electronegativity), inside the cell; other
    files keep their order and positions. A `UserWarning` tells of a CIF whose sites do not add up to its
    formula, or whose hydrogens have no coordinates.

    Returns:
      Crystals with id "<file name>", or "<file name>#<1-based index>" if the file has several.

    Raises:
      CrystalError: the file cannot be read or parsed, is of another kind, or holds an unusable crystal.
    """
    path = Path(path)
    name = path.name
    suffix = path.suffix.lower()
    text = _read_text(path)
    if suffix == ".cif":
        return [_crystal_of_cif(block, id) for id, block in _with_ids(name, _cif_blocks(text, name))]
    if suffix in (".extxyz", ".xyz"):
        return [Crystal.from_ase(frame, id) for id, frame in _with_ids(name, _read_extxyz(text, name))]
    if suffix in (".vasp", ".poscar") or name.upper().startswith(("POSCAR", "CONTCAR")):
        return [Crystal.from_pymatgen(_read_poscar(text, name), name)]
    raise CrystalError(f"{path}: unknown kind of file; rename it to one of: {ACCEPTED_FILES}")


def _checked_species(species: Any, where: str) -> np.ndarray:
    species = np.asarray(species)
    if species.size == 0:
        raise CrystalError(f"{where}: no atoms; give a structure with at least one site")
    if species.ndim != 1 or not np.issubdtype(species.dtype, np.integer):
        raise CrystalError(f"{where}: species are {species.dtype}{species.shape}; give atomic numbers [n]")
    for i in np.flatnonzero((species < 1) | (species > MAX_ATOMIC_NUMBER)):
        raise _unsupported(_symbol(species[i]), f"{where}: site {i + 1}")
    return species.astype(np.int32)


def _checked_array(value: Any, shape: tuple[int, ...], what: str) -> np.ndarray:
    array = np.array(value, dtype=np.float64, order="C")
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
        raise CrystalError(f"{where}: {problem}; make them positive and their sum at most 1")


def _check_volume(lattice: np.ndarray, where: str) -> None:
    volume = abs(np.linalg.det(lattice))
    if volume < MIN_VOLUME or volume < 1e-6 * np.linalg.norm(lattice, axis=1).prod():
        problem = f"the cell has no volume ({volume:.3g} Å^3)"
        raise CrystalError(f"{where}: {problem}; give three lattice vectors in Å that are not coplanar")


def _check_distances(species: np.ndarray, positions: np.ndarray, lattice: np.ndarray, where: str) -> None:
    """Raises `CrystalError` for the closest pair of atoms, images included, below `MIN_DISTANCE`."""
    from pymatgen.optimization.neighbors import find_points_in_spheres

    wrapped = np.ascontiguousarray((positions @ np.linalg.inv(lattice) % 1.0) @ lattice)
    # The search grid is as fine as the radius: a radius near the atomic spacing keeps time and memory linear.
    size = np.cbrt(abs(np.linalg.det(lattice)))
    radius = max(MIN_DISTANCE, size / 200, min(size / np.cbrt(len(positions)), 5.0))
    i, j, image, distance = find_points_in_spheres(
        wrapped, wrapped, r=float(radius), pbc=np.ones(3, dtype=np.int64), lattice=lattice, tol=1e-8
    )
    close = np.flatnonzero(((i != j) | image.any(axis=1)) & (distance < MIN_DISTANCE))
    if close.size:
        pair = close[distance[close].argmin()]
        a, b = sorted((int(i[pair]), int(j[pair])))
        other = f"site {b + 1} ({_symbol(species[b])})" if a != b else "its periodic image"
        problem = f"site {a + 1} ({_symbol(species[a])}) and {other} are {distance[pair]:.3f} Å apart"
        raise CrystalError(f"{where}: {problem}; remove one of them or correct the cell")


def _symbol(z: int) -> str:
    from pymatgen.core import Element

    return Element.from_Z(int(z)).symbol if 1 <= z <= 118 else f"of atomic number {z}"


def _unsupported(element: str, where: str) -> CrystalError:
    return CrystalError(f"{where}: element {element} is not supported; use H to Cf (1 to 98)")


def _amounts(composition: Composition, where: str) -> np.ndarray:
    """[98] amount of each element in a pymatgen composition; isotopes and oxidation states are merged."""
    from pymatgen.core import DummySpecies

    amounts = np.zeros(MAX_ATOMIC_NUMBER)
    for specie, amount in composition.items():
        if isinstance(specie, DummySpecies) or specie.Z > MAX_ATOMIC_NUMBER:
            raise _unsupported(specie.symbol, where)
        amounts[specie.Z - 1] += amount
    return amounts


def _site_amounts(sites: Iterable[PeriodicSite], where: str) -> np.ndarray:
    """[n, 98] amount of each element on each site."""
    rows = [_amounts(site.species, f"{where}: site {i}") for i, site in enumerate(sites, 1)]
    return np.reshape(rows, (len(rows), MAX_ATOMIC_NUMBER))


def _from_amounts(amounts: np.ndarray, positions: np.ndarray, lattice: np.ndarray, id: str) -> Crystal:
    """The crystal with `amounts` [n, 98] on its sites; `occupancies` is None if every site is one atom."""
    is_atom = (np.abs(amounts.max(axis=1) - 1) <= 1e-6) & ((amounts > 0).sum(axis=1) == 1)
    return Crystal(amounts.argmax(axis=1) + 1, positions, lattice, None if is_atom.all() else amounts, id)


def _with_ids(name: str, items: list[Any]) -> list[tuple[str, Any]]:
    return [(f"{name}#{i}" if len(items) > 1 else name, item) for i, item in enumerate(items, 1)]


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise CrystalError(f"{path}: cannot be read ({error.strerror}); pass the path of a file") from error
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
        known: dict[type, str] = {
            IndexError: "it ends early",
            np.linalg.LinAlgError: "the cell has no volume",
        }
        reason = " ".join(known.get(type(cause), f"{type(cause).__name__}: {cause}").split())
        raise CrystalError(f"{where}: cannot be read as {kind} ({reason}); correct the file") from error


def _read_extxyz(text: str, name: str) -> list[Atoms]:
    try:
        from ase.io.extxyz import read_xyz
    except ImportError as error:
        raise CrystalError(f"{name}: reading extended XYZ needs ASE; pip install ase") from error
    file = io.StringIO(text)
    with _parsing(name, "extended XYZ"):
        frames = list(read_xyz(file, index=slice(None)))
    if not frames or file.read().strip():  # ASE stops at the first empty line
        raise CrystalError(f"{name}: empty line before or after frame {len(frames)}; remove it")
    return frames


def _read_poscar(text: str, name: str) -> Structure:
    from pymatgen.io.vasp import Poscar

    lines = [line.split("#")[0] for line in text.split("\n")]
    with _parsing(name, "POSCAR"):
        scale = float(lines[1])
        if scale < 0:  # the volume of the cell; pymatgen would multiply Cartesian coordinates by it
            volume = abs(np.linalg.det([[float(x) for x in line.split()] for line in lines[2:5]]))
            lines[1] = f"{np.cbrt(-scale / volume):.17g}"
        poscar = Poscar.from_str("\n".join(lines), read_velocities=False)
        if not poscar.true_names:
            raise CrystalError(f"{name}: no element names; write them on line 6, above the numbers of atoms")
        _check_poscar_is_whole(lines, len(poscar.structure), name)
    return poscar.structure


def _check_poscar_is_whole(lines: list[str], num_atoms: int, name: str) -> None:
    """Raises for what pymatgen passes over: element names without a count, coordinates beyond the counts."""
    first = next(i for i in range(5, len(lines)) if lines[i].split()[0].isdigit())
    mode = first + max(first - 5, 1)  # as many lines of counts as of names; VASP 4 has no names
    num_names, num_counts = (len(" ".join(part).split()) for part in (lines[5:first], lines[first:mode]))
    if first > 5 and num_names != num_counts:
        raise CrystalError(f"{name}: {num_names} element names for {num_counts} counts; make them agree")
    end = mode + 1 + num_atoms + (lines[mode].strip()[:1] in ("s", "S"))
    if re.match(r"\s*[-+.\d]+\S*\s+[-+.\d]+\S*\s+[-+.\d]", "".join(lines[end : end + 1])):
        raise CrystalError(f"{name}: coordinates beyond the {num_atoms} atoms counted; correct the counts")


# CIF


def _cif_blocks(text: str, name: str) -> list[str]:
    """The data blocks that list atoms. Parsed one by one: pymatgen overwrites blocks of equal name."""
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
        # pymatgen's own check of occupancies counts deuterium and hydrogen of one site twice
        (structure,) = parser.parse_structures(primitive=False, check_occu=False, on_error="raise")
        sites = sorted(structure, key=lambda s: (s.species.average_electroneg, s.species.formula))
        amounts, fract = _site_amounts(sites, id), np.array([site.frac_coords for site in sites])
        _check_cif_symmetry(data, [operation.rotation_matrix for operation in parser.symmetry_operations], id)
        _check_cif_rows(data, fract, amounts.sum(axis=1), id)
    attached = set(data.get("_atom_site_attached_hydrogens", [])) - {"0", ".", "?"}
    if attached or "implicit_hydrogens" in structure.site_properties:
        warnings.warn(f"{id}: left out hydrogens of water or others without coordinates", stacklevel=4)
    amounts[amounts < 1e-6] = 0  # pymatgen writes an occupancy of 0 as 1e-8
    total = amounts.sum(axis=1, keepdims=True)
    amounts /= np.where((total > 1) & (total <= CIF_OCCUPANCY_TOLERANCE), total, 1)
    present = total[:, 0] > 0
    lattice = structure.lattice.matrix
    crystal = _from_amounts(amounts[present], fract[present] @ lattice, lattice, id)
    formula = str(data.get("_chemical_formula_sum", "?"))
    if not _has_composition(amounts.sum(axis=0), formula):
        warnings.warn(f"{id}: the sites make {crystal.formula}, the file states {formula}", stacklevel=4)
    return crystal


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
        offset = sites - [str2float(x) for x in fract]
        offset = np.abs(offset - np.round(offset)).max(axis=1)
        site = offset.argmin()
        occupancy = 1.0 if text in (".", "?") else str2float(text)
        stated[site] += occupancy
        is_short = amounts[site] < stated[site] - OCCUPANCY_TOLERANCE
        if "." in fract or occupancy < 0 or is_short or offset[site] > 3 * CIF_SITE_TOLERANCE:
            remedy = "give it an _atom_site_type_symbol, three coordinates and an occupancy"
            raise CrystalError(f"{where}: site {label} is not understood; {remedy}")


def _has_composition(found: np.ndarray, formula: str) -> bool:
    """Whether amounts [98] have the elements and, to 0.01, the proportions of a formula; true of "?"."""
    from pymatgen.core import Composition

    try:
        stated = _amounts(Composition(formula), formula)
    except ValueError:
        return True
    is_near = np.abs(found / found.sum() - stated / max(stated.sum(), 1e-9)).max() < 0.01
    return bool(is_near and np.array_equal(found > 0, stated > 0))
