"""Crystals of CIF: sites, cell and symmetry are looked at here, pymatgen makes the atoms of them."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from crystalframer_jax.structures import cif_syntax
from crystalframer_jax.structures.cif_sites import Site, left_in, sites_of
from crystalframer_jax.structures.cif_syntax import Block
from crystalframer_jax.structures.crystal import (
    FARTHEST_CELL,
    OCCUPANCY_TOLERANCE,
    Crystal,
    CrystalError,
    composition_amounts,
    crystal_from_amounts,
    site_amounts,
)
from crystalframer_jax.structures.errors import SiteError
from crystalframer_jax.structures.reading import UnreadableError, number, parsing, plain, warn
from crystalframer_jax.structures.symmetry import Symmetry, symmetry_of
from crystalframer_jax.text import LONGEST

if TYPE_CHECKING:  # slow to import
    from pymatgen.core import Structure

LONGEST_FORMULA = 1000  # characters
MOST_POSITIONS = 10_000  # sites times operations; pymatgen compares all of them with each other
OCCUPANCY_LIMIT = 1.05  # refined occupancies up to this are scaled to 1
SITE_TOLERANCE = 1.5e-3  # fractional; images of a coordinate written as 0.333 differ by 0.001
CELL = [f"_cell_length_{x}" for x in "abc"] + [f"_cell_angle_{x}" for x in ("alpha", "beta", "gamma")]


def structures_in_cif(text: str, name: str) -> list[Callable[[], Crystal]]:
    """Finds the data blocks with atoms: what makes the crystal of each, or raises CrystalError."""
    blocks = cif_syntax.blocks(text)
    if not blocks:
        raise CrystalError(f"{name}: no atoms; a CIF needs a data_ block with an _atom_site_ loop")
    ids = [f"{name}#{i}" if len(blocks) > 1 else name for i in range(1, len(blocks) + 1)]
    return [functools.partial(_crystal_of, block, id) for block, id in zip(blocks, ids, strict=True)]


def _crystal_of(block: Block, id: str) -> Crystal:
    with parsing(id, "CIF"):
        if block.problem:
            raise block.problem
        cell = _cell(block, id)
        lattice = _lattice(cell)
        try:
            symmetry = symmetry_of(block, lattice)
        except UnreadableError as error:
            raise CrystalError(f"{id}: {error}; {error.remedy}") from error
        except CrystalError as error:
            raise CrystalError(f"{id}: {error}") from error
        _check_number(block, symmetry, id)
        listed, warnings = sites_of(block, lattice, id)
        sites, more = left_in(listed, symmetry.operations, lattice, SITE_TOLERANCE)
        warnings += [*more, *filter(None, [symmetry.warning])]
        if not sites:
            raise UnreadableError("no atoms are left in it", "give a structure with at least one atom")
        structure = _structure(_text(block, cell, symmetry, sites), len(symmetry.operations))
        ordered = sorted(structure, key=lambda s: (s.species.average_electroneg, s.species.formula))
        amounts, fract = site_amounts(ordered, id), np.array([site.frac_coords for site in ordered])
        _check_sites(sites, fract, amounts.sum(axis=1), id)
        rows = {site.number: site for site in sites}
        origins = [rows[int(site.label)] for site in ordered]
    for message in warnings:
        warn(f"{id}: {message}")
    amounts[amounts < 1e-6] = 0  # pymatgen writes an occupancy of 0 as 1e-8
    total = amounts.sum(axis=1, keepdims=True)
    amounts /= np.where((total > 1) & (total <= OCCUPANCY_LIMIT), total, 1)
    present = total[:, 0] > 0
    matrix = structure.lattice.matrix
    try:
        crystal = crystal_from_amounts(amounts[present], fract[present] @ matrix, matrix, id)
    except SiteError as error:
        kept = [origins[i] for i in np.flatnonzero(present)]
        places = {kept[i].group for i in error.sites}
        known = ", ".join(f"{site.label} on line {site.line}" for site in sites if site.group in places)
        few = "; more digits of its coordinates may be needed" if len(places) < len(error.sites) else ""
        raise CrystalError(f"{error} ({known[:LONGEST]}){few}") from error
    _warn_of_formula(block, crystal, amounts, id)
    return crystal


def _cell(block: Block, id: str) -> dict[str, str]:
    """Reads lengths and angles as text, without uncertainties."""
    if missing := [name for name in CELL if name not in block.items]:
        names = ", ".join(missing)
        raise CrystalError(f"{id}: no lattice; add the six items _cell_length_* and _cell_angle_* of a CIF ({names})")
    cell = {}
    for name in CELL:
        item = block.items[name]
        text = plain(item.values[0] if item.values else "").split("(")[0].strip()
        if number(text, f"line {item.line}: {name}") < 0:
            raise UnreadableError(f"line {item.line}: {name} is negative")
        cell[name] = text
    return cell


def _lattice(cell: dict[str, str]) -> np.ndarray:
    """Makes the vectors [3, 3] of a cell, in Å, in the orientation of pymatgen."""
    from pymatgen.core import Lattice

    return np.array(Lattice.from_parameters(*(float(cell[name]) for name in CELL)).matrix)


def _check_number(block: Block, symmetry: Symmetry, id: str) -> None:
    """Raises for more positions than pymatgen can handle in reasonable time."""
    sites = max(len(item.values) for name, item in block.items.items() if name.startswith("_atom_site_"))
    operations = len(symmetry.operations)
    if operations * sites > MOST_POSITIONS:
        problem = f"{sites:,} sites and {operations} symmetry operations are over {MOST_POSITIONS:,} positions"
        raise CrystalError(f"{id}: {problem}; give a POSCAR, or a smaller cell")


def _text(block: Block, cell: dict[str, str], symmetry: Symmetry, sites: list[Site]) -> str:
    """Writes what was understood as a CIF that pymatgen cannot understand otherwise."""
    lines = ["data_x", *(f"{name} {text}" for name, text in cell.items())]
    for name, value in symmetry.items.items():
        lines += [f"{name} '{value}'"] if isinstance(value, str) else ["loop_", name, *(f"'{text}'" for text in value)]
    types = [block.column(f"_atom_type_{name}") for name in ("symbol", "oxidation_number")]
    has_types = bool(types[0]) and len(types[0]) == len(types[1])
    if has_types:  # by which pymatgen orders the sites
        rows = [f"'{symbol}' '{state}'" for symbol, state in zip(*types, strict=True)]
        lines += ["loop_", "_atom_type_symbol", "_atom_type_oxidation_number", *rows]
    lines += ["loop_", "_atom_site_label", "_atom_site_type_symbol"]
    lines += [f"_atom_site_fract_{axis}" for axis in "xyz"] + ["_atom_site_occupancy"]
    for site in sites:
        symbol = site.element
        if site.type_symbol in ("Wat", "O-H"):
            symbol = site.type_symbol
        elif has_types and site.element != "D" and re.match(rf"{site.element}(?![a-z])", site.type_symbol):
            symbol = site.type_symbol  # with the charge
        lines.append(f"{site.number} '{symbol}' {' '.join(site.place)} {site.occupancy}")
    return "\n".join(lines)


def _structure(text: str, operations: int) -> Structure:
    from pymatgen.io.cif import CifParser

    parser = CifParser.from_str(text, site_tolerance=SITE_TOLERANCE, check_cif=False)
    # pymatgen's own check of occupancies counts deuterium and hydrogen of one site twice
    (structure,) = parser.parse_structures(primitive=False, check_occu=False, on_error="raise")
    if len(parser.symmetry_operations) != operations:
        raise UnreadableError("symmetry not understood", "list it as _space_group_symop_operation_xyz")
    return structure


def _check_sites(sites: list[Site], fract: np.ndarray, amounts: np.ndarray, id: str) -> None:
    """Raises for sites that pymatgen did not make.

    `fract` [n, 3] are the fractional coordinates that it found, `amounts` [n] the atoms on each.
    """
    stated = np.zeros(len(fract))
    for site in sites:
        place = np.array([float(x) for x in site.place])
        if not max(map(abs, place)) < FARTHEST_CELL:
            farthest = f"{max(map(abs, place)):.3g} cells away (line {site.line})"
            raise CrystalError(f"{id}: site {site.label} is {farthest}; correct its coordinates")
        offset = fract - place
        offset = np.abs(offset - np.round(offset)).max(axis=1)
        nearest = offset.argmin()
        stated[nearest] += float(site.occupancy)
        if amounts[nearest] < stated[nearest] - OCCUPANCY_TOLERANCE or offset[nearest] > 3 * SITE_TOLERANCE:
            remedy = "give it an _atom_site_type_symbol, three coordinates and an occupancy"
            raise CrystalError(f"{id}: site {site.label} is not understood (line {site.line}); {remedy}")


def _warn_of_formula(block: Block, crystal: Crystal, amounts: np.ndarray, id: str) -> None:
    formula = block.text("_chemical_formula_sum") or "?"
    if not _has_composition(amounts.sum(axis=0), formula):
        warn(f"{id}: the sites make {crystal.formula}, the file states {formula[:100]}")


def _has_composition(found: np.ndarray, formula: str) -> bool:
    """Tells whether amounts [98] have the elements and, to 0.01, the proportions of a formula; true of "?"."""
    from pymatgen.core import Composition

    try:
        stated = composition_amounts(Composition(formula if len(formula) <= LONGEST_FORMULA else "?"), formula)
    except Exception:  # whatever the parser raises, the formula says nothing
        return True
    is_near = np.abs(found / found.sum() - stated / max(stated.sum(), 1e-9)).max() < 0.01
    return bool(is_near and np.array_equal(found > 0, stated > 0))
