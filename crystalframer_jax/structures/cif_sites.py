"""The table of sites of a CIF: what each row says, which rows repeat each other or lie near a special position."""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from crystalframer_jax.structures import elements
from crystalframer_jax.structures.cif_syntax import Block, Item
from crystalframer_jax.structures.crystal import FARTHEST_CELL
from crystalframer_jax.structures.errors import CrystalError
from crystalframer_jax.structures.reading import UnreadableError, number, plain

UNKNOWN = ("?", ".")
NEAR = 0.025  # fractional; how far apart rounding to two digits may leave images of a special position
CLOSE = 0.7  # Å; images of one atom that are closer than this stand for one position, unless they are half occupied
ROUNDED = 0.7  # of the last digit of a coordinate; 0.66 is 2/3, but 0.49 is not 1/2
SAME = 1e-3  # by which occupancies of one atom listed twice may differ
TRANSFORM = "_atom_sites_cartn_tran"


@dataclasses.dataclass
class Site:
    """A row of the table of sites."""

    number: int  # of the row, from 1
    label: str  # as in the file, for messages
    line: int
    element: str  # D and T among them
    type_symbol: str  # as in the file, "" if there is none; Wat or O-H if hydrogens without coordinates belong to it
    place: list[str]  # fractional coordinates; text, so that pymatgen reads the digits of the file
    occupancy: str
    group: int = 0  # the number of the first site of the same position


def sites_of(block: Block, lattice: np.ndarray, id: str) -> tuple[list[Site], list[str]]:
    """Reads the rows of the table of sites, and what is to be warned of; raises CrystalError or UnreadableError."""
    items = _columns(block)
    columns = {name: item.values for name, item in items.items()}
    lines = items["fract_x" if "fract_x" in items else "cartn_x"].lines
    columns = {name: values for name, values in columns.items() if len(values) == len(lines)}
    labels, symbols = columns.get("label"), columns.get("type_symbol")
    places = _places(columns, lattice, block)
    occupancies = columns.get("occupancy", ["1"] * len(places))
    flags, hydrogens = columns.get("calc_flag", []), columns.get("attached_hydrogens", [])
    sites: list[Site] = []
    warnings, guessed, lacks_hydrogen = [], [], bool(set(hydrogens) - {"0", *UNKNOWN})
    for row, (line, place, occupancy) in enumerate(zip(lines, places, occupancies, strict=True)):
        label = labels[row] if labels else f"{row + 1} ({symbols[row] if symbols else ''})"
        symbol = symbols[row] if symbols and symbols[row] not in UNKNOWN else ""
        if flags and flags[row].lower() in ("dum", "dummy"):
            warnings.append(f"left out site {label}, which the file calls a dummy (line {line})")
            continue
        named = _named(symbol, label, row, line, id)
        lacks_hydrogen = lacks_hydrogen or bool(named.with_hydrogen)
        if named.warning == elements.TAKEN:
            guessed.append(label)
        elif named.warning:
            warnings.append(f"left out site {label} (line {line}): {named.warning}")
        if set(place) <= set(UNKNOWN) and set(named.elements) <= {"H", "D", "T"}:
            lacks_hydrogen = lacks_hydrogen or bool(named.elements)
            continue
        share = _occupancy(occupancy, label, line, id)
        coordinates = [_coordinate(text, axis, label, line, id) for text, axis in zip(place, "xyz", strict=True)]
        for element, amount in named.elements.items():
            occupied = share if amount == 1 else repr(float(share) * amount)
            written = named.with_hydrogen or symbol
            sites.append(Site(len(sites) + 1, label, line, element, written, coordinates, occupied))
        if symbol and elements.is_mixed(label) and len(named.elements) == 1 and float(share) == 1:
            warnings.append(f"site {label} (line {line}) is named for several elements, but holds {symbol} alone")
    if guessed:
        labels_of = ", ".join(guessed[:5]) + (", ..." if len(guessed) > 5 else "")
        warnings.append(f"{elements.TAKEN} ({labels_of}); give each an _atom_site_type_symbol")
    if lacks_hydrogen:
        warnings.append("left out hydrogens of water or others without coordinates")
    return sites, warnings


def _columns(block: Block) -> dict[str, Item]:
    """Finds the columns of the table of sites; raises if there is no table, or one without places or elements."""
    found = {}
    for name, item in block.items.items():
        column = name.removeprefix("_atom_site_")
        if column != name and not column.startswith(("aniso_", "moment_", "fourier_")):
            found[column] = item
    if not {"label", "type_symbol"} & found.keys():
        raise UnreadableError("the table of sites says nothing of elements", "add a column _atom_site_type_symbol")
    kind = "fract" if any(name.startswith("fract_") for name in found) else "cartn"
    missing = [f"_atom_site_{kind}_{axis}" for axis in "xyz" if f"{kind}_{axis}" not in found]
    if missing:
        raise UnreadableError(f"the table of sites has no column {', '.join(missing)}", "add it")
    needed = {"label", "type_symbol", "occupancy", *(f"{kind}_{axis}" for axis in "xyz")} & found.keys()
    numbers = {len(found[name].values) for name in needed}
    if len(numbers) > 1:
        raise UnreadableError("the _atom_site_ items are not a table", "put them in a loop_")
    if numbers == {0}:
        raise UnreadableError("the table of sites is empty", "add a row for each site")
    return found


def _named(symbol: str, label: str, row: int, line: int, id: str) -> elements.Named:
    try:
        return elements.of_type_symbol(symbol) if symbol not in ("", label) else elements.of_label(label)
    except UnreadableError as error:
        if "not supported" in str(error):
            message = f"site {row + 1}: {error} ({label} on line {line})"
        else:
            message = f"site {label} is not understood (line {line}: {error})"
        raise CrystalError(f"{id}: {message}; {error.remedy}") from error


def _occupancy(text: str, label: str, line: int, id: str) -> str:
    """Reads an occupancy as text without uncertainty; 1 if it is not known."""
    written = "1" if text == "?" else re.sub(r"\([^()]*\)?$", "", plain(text)).strip()
    if text == "." or (elements.NUMBER.fullmatch(written) and float(written) < 0):
        remedy = "give it an _atom_site_type_symbol, three coordinates and an occupancy"
        raise CrystalError(f"{id}: site {label} is not understood (line {line}: occupancy {text}); {remedy}")
    number(written, f"line {line}: the occupancy of site {label}")
    return written


def _coordinate(text: str, axis: str, label: str, line: int, id: str) -> str:
    """Reads a fractional coordinate as text without uncertainty; 1/3 is one, too."""
    if text == ".":
        remedy = "give it an _atom_site_type_symbol, three coordinates and an occupancy"
        raise CrystalError(f"{id}: site {label} is not understood (line {line}: coordinate {axis} is '.'); {remedy}")
    written = re.sub(r"\([^()]*\)?$", "", plain(text)).strip()
    what = f"line {line}: coordinate {axis} of site {label}"
    if fraction := re.fullmatch(r"([+-]?\d{1,3})/(\d{1,3})", written, re.ASCII):
        return repr(int(fraction[1]) / int(fraction[2])) if int(fraction[2]) else str(number(text, what))
    number(text if "(" not in text else written, what)
    return written


def _places(columns: dict[str, list[str]], lattice: np.ndarray, block: Block) -> list[tuple[str, str, str]]:
    """Lists the fractional coordinates of the rows, from Cartesian ones if there are no others."""
    if "fract_x" in columns:
        return list(zip(*(columns[f"fract_{axis}"] for axis in "xyz"), strict=True))
    rows = list(zip(*(columns[f"cartn_{axis}"] for axis in "xyz"), strict=True))
    given = [[block.text(f"{TRANSFORM}_matrix_{i}{j}") for j in (1, 2, 3)] for i in (1, 2, 3)]
    shift = np.zeros(3)
    if all(all(row) for row in given):
        matrix = np.array([[number(text, f"{TRANSFORM}_matrix") for text in row] for row in given])  # Cartesian = M x
        shift = np.array(
            [number(block.text(f"{TRANSFORM}_vector_{i}") or "0", f"{TRANSFORM}_vector") for i in (1, 2, 3)]
        )
    elif np.allclose(lattice @ lattice.T, np.diag(np.diag(lattice @ lattice.T)), atol=1e-6):
        matrix = np.diag(np.sqrt(np.diag(lattice @ lattice.T)))
    else:
        reason = "coordinates are Cartesian, and nothing says how their axes lie in a cell that is not rectangular"
        raise UnreadableError(reason, "give fractional coordinates, _atom_site_fract_x, _y and _z")
    inverse = np.linalg.inv(matrix)
    places = []
    for row in rows:
        if set(row) & set(UNKNOWN):
            places.append(row)
            continue
        place = inverse @ (np.array([number(text.split("(")[0], "a Cartesian coordinate") for text in row]) - shift)
        x, y, z = (repr(round(value, 12)) for value in place.tolist())
        places.append((x, y, z))
    return places


# Rows that repeat each other, and rounded special positions


def left_in(
    sites: list[Site], operations: list[np.ndarray], lattice: np.ndarray, tolerance: float
) -> tuple[list[Site], list[str]]:
    """Returns the sites without those that are there already, special positions made exact, and warnings of both.

    An atom is there already if a row before it, or its image by an operation, has the same place, element and
    occupancy, and both together were too much or came from different coordinates. Places are the same within
    `tolerance` (fractional). Hydrogen is listed as D where it shares the site of oxygen: pymatgen would take it as
    bound to that oxygen, without coordinates.
    """
    warnings = [text for site in sites if (text := _snap(site, operations, lattice, tolerance))]
    kept: list[Site] = []
    removed: list[tuple[str, Site]] = []
    groups: dict[int, list[Site]] = {}
    for site, same in zip(sites, _same_places(sites, operations, tolerance), strict=True):
        site.group = min((sites[i].group for i in same), default=site.number)
        before = groups.setdefault(site.group, [])
        again = next((other for other in before if _is_again(site, other, tolerance)), None)
        if again is None:
            before.append(site)
            kept.append(site)
        else:
            removed.append((again.label, site))
    if removed:
        also = ", ".join(f"{site.label} on line {site.line} is {label}" for label, site in removed[:3])
        also += ", ..." if len(removed) > 3 else ""
        problem = f"sites are listed twice, or listed and generated by symmetry ({also})"
        warnings.append(f"{problem}: left out {len(removed):,}")
    for group in groups.values():
        if {site.element for site in group} == {"H", "O"}:
            for site in group:
                site.element = "D" if site.element == "H" else site.element
    return kept, warnings


def _same_places(sites: list[Site], operations: list[np.ndarray], tolerance: float) -> list[set[int]]:
    """Finds for each site the numbers, from 0, of those before it that have its place or one of its images."""
    from scipy.spatial import KDTree

    places = np.array([[float(x) for x in site.place] for site in sites]).reshape(-1, 3)
    places = np.where(np.abs(places) < FARTHEST_CELL, places, 0.0)  # others are refused later
    tree = KDTree(places % 1 % 1, boxsize=1.0)
    same: list[set[int]] = [set() for _ in sites]
    for operation in operations:
        images = (places @ operation[:, :3].T + operation[:, 3]) % 1 % 1
        for site, near in enumerate(tree.query_ball_point(images, tolerance, p=np.inf)):
            same[site].update(other for other in near if other < site)
    return same


def _is_again(site: Site, other: Site, tolerance: float) -> bool:
    """Tells whether a site of the same position stands for the same atom, not for more of the element on the site."""
    shares = float(site.occupancy), float(other.occupancy)
    if site.element != other.element or abs(shares[0] - shares[1]) > SAME:
        return False
    offset = [float(a) - float(b) for a, b in zip(site.place, other.place, strict=True)]
    is_image = any(abs(x - round(x)) > tolerance for x in offset)
    return is_image or site.label == other.label or sum(shares) > 1 + SAME


def _snap(site: Site, operations: list[np.ndarray], lattice: np.ndarray, tolerance: float) -> str:
    """Moves a rounded place onto the special position that the symmetry has there; returns a warning if it did."""
    digits = [max(len(text.partition(".")[2]), 2) if "e" not in text.lower() else 9 for text in site.place]
    if min(digits) > 2 or float(site.occupancy) <= 0.5 or max(abs(float(x)) for x in site.place) > 100:
        return ""
    place = np.array([float(x) for x in site.place])
    offsets = np.array([op[:, :3] @ place + op[:, 3] - place for op in operations])
    shifts = np.round(offsets)
    offsets -= shifts
    near = np.abs(offsets).max(axis=1) <= NEAR
    near &= np.linalg.norm(offsets @ lattice, axis=1) < CLOSE
    if not (np.abs(offsets[near]) > tolerance).any():
        return ""
    special = place + offsets[near].mean(axis=0)
    moved = [operations[i][:, :3] @ special + operations[i][:, 3] - shifts[i] for i in np.flatnonzero(near)]
    is_rounding = np.abs(special - place) <= ROUNDED * 10.0 ** -np.array(digits)
    if not (is_rounding.all() and np.allclose(moved, special, atol=1e-9)):
        return ""
    before = " ".join(site.place)
    site.place = [text if abs(x - y) < 1e-9 else repr(float(x))
                  for text, x, y in zip(site.place, special, place, strict=True)]  # fmt: skip
    after = " ".join(f"{x:.4f}".rstrip("0").rstrip(".") for x in special)
    return f"site {site.label} (line {site.line}) at {before} was read as {after}, where symmetry puts it"
