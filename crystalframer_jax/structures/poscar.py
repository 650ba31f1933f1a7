"""Crystals of POSCAR files: lines and numbers are looked at here, pymatgen reads them."""

from __future__ import annotations

import re

import numpy as np

from crystalframer_jax.structures.crystal import Crystal, CrystalError, check_number
from crystalframer_jax.structures.elements import is_element
from crystalframer_jax.structures.reading import NUMBER, UnreadableError, number, parsing, plain
from crystalframer_jax.text import brief

GLUED = re.compile(r"\s*([+-]?\d*\.\d+)\s*([+-]\d*\.\d+|\s[+-]?\d*\.\d+)\s*([+-]\d*\.\d+|\s[+-]?\d*\.\d+)", re.ASCII)


def crystal_of_poscar(text: str, id: str) -> Crystal:
    """Makes the crystal of the text of a POSCAR; raises CrystalError, with the line that is wrong."""
    from pymatgen.io.vasp import Poscar

    lines = [plain(line.split("#")[0].split("!")[0]) for line in text.split("\n")]
    with parsing(id, "POSCAR"):
        _rescale(lines)
        _check_counts(lines, id)
        first, counts = _counted(lines)
        mode = first + max(first - 5, 1)  # as many lines of counts as of names; VASP 4 has no names
        has_flags = lines[mode].strip()[:1] in ("s", "S")
        place = mode + 1 + has_flags
        _check_coordinates(lines, place, sum(counts))
        if first > 5:
            _check_names(lines, first, len(counts), id)
        poscar = Poscar.from_str("\n".join(lines), read_velocities=False)
        if not poscar.true_names:
            raise CrystalError(f"{id}: no element names; write them on line 6, above the numbers of atoms")
        if re.match(r"\s*[-+.\d]\S*\s+[-+.\d]\S*\s+[-+.\d]", "".join(lines[place + sum(counts) :][:1])):
            raise CrystalError(f"{id}: coordinates beyond the {sum(counts)} atoms counted; correct the counts")
    return Crystal.from_pymatgen(poscar.structure, id)


def _rescale(lines: list[str]) -> None:
    """Checks the numbers of the cell; writes scales that pymatgen takes wrongly as one that it does not."""
    scales = lines[1].split()
    scale = [number(text, "line 2: the scale") for text in (scales[:3] if _are_numbers(scales[:3]) else scales[:1])]
    if not scale:
        raise UnreadableError("line 2: there is no scale")
    cell = np.array([_three(lines, i, "a lattice vector") for i in (2, 3, 4)])
    lines[1] = scales[0]
    if len(scale) == 3:  # of x, y and z, as VASP takes them
        if min(scale) <= 0:
            raise UnreadableError("line 2: three scales must be positive", "give one number, or three positive ones")
        lines[1] = "1.0"
        for i, row in enumerate(cell * scale, 2):
            lines[i] = " ".join(map(repr, row.tolist()))
        _rescale_cartesian(lines, scale)
    elif scale[0] < 0:  # the volume of the cell; pymatgen would multiply Cartesian coordinates by it
        lines[1] = f"{np.cbrt(-scale[0] / abs(np.linalg.det(cell))):.17g}"


def _are_numbers(texts: list[str]) -> bool:
    return len(texts) == 3 and all(NUMBER.fullmatch(text) for text in texts)


def _rescale_cartesian(lines: list[str], scale: list[float]) -> None:
    """Multiplies Cartesian coordinates by the scales of x, y and z."""
    first, counts = _counted(lines)
    at = first + max(first - 5, 1)
    at += lines[at].strip()[:1] in ("s", "S")
    if lines[at].strip()[:1] in ("c", "C", "k", "K"):
        for i in range(at + 1, at + 1 + min(sum(counts), len(lines))):
            scaled = [x * s for x, s in zip(_three(lines, i, "a position"), scale, strict=True)]
            lines[i] = " ".join([*map(repr, scaled), *lines[i].split()[3:]])


def _three(lines: list[str], i: int, what: str) -> list[float]:
    """Reads the first three numbers of a line; UnreadableError if there are fewer."""
    texts = lines[i].split()
    if len(texts) < 3 and (glued := GLUED.fullmatch(lines[i])):  # by a format of fixed width
        texts = list(glued.groups())
        lines[i] = " ".join(texts)
    if not texts and not any(map(str.strip, lines[i:])):
        raise UnreadableError("it ends early", "write the structure again")
    if len(texts) < 3:
        raise UnreadableError(f"line {i + 1}: {brief(lines[i].strip())} instead of three numbers of {what}")
    return [number(text, f"line {i + 1}: {what}", finite=False) for text in texts[:3]]


def _check_counts(lines: list[str], id: str) -> None:
    """Raises for numbers of atoms, where pymatgen looks for them, that are negative or too large for the file."""
    _, counts = _counted(lines)
    check_number(max(counts), id)
    check_number(sum(counts), id)
    if min(counts) < 0 or sum(counts) > len(lines):
        raise UnreadableError(f"{sum(counts):,} atoms in {len(lines):,} lines", "correct the counts")


def _counted(lines: list[str]) -> tuple[int, list[int]]:
    """Finds the first line of numbers of atoms, from 0, and all of the numbers."""
    first = next((i for i in range(5, 16) if _is_integer(lines[i].split()[0])), None)
    if first is None:
        raise UnreadableError("no numbers of atoms on line 7", "write them below the names of the elements")
    texts = [text for line in lines[first : max(2 * first - 5, 6)] for text in line.split()]
    for text in texts:
        if not _is_integer(text):
            raise UnreadableError(
                f"line {first + 1}: {brief(text)} is no number of atoms", "give a count for each element"
            )
    return first, [int(text) for text in texts]


def _is_integer(text: str) -> bool:
    try:
        int(text)
    except ValueError:
        return False
    return True


def _check_names(lines: list[str], first: int, number_of_counts: int, id: str) -> None:
    """Raises for what pymatgen passes over: names without a count, and names that are no elements."""
    names = " ".join(lines[5:first]).split()
    if len(names) != number_of_counts:
        raise CrystalError(f"{id}: {len(names)} element names for {number_of_counts} counts; make them agree")
    for name in names:
        symbol = re.split("[_/.]", name)[0]  # of a potential, as in Na_pv or Si/79d9987a
        if not is_element(symbol):
            raise CrystalError(f"{id}: {brief(name)} on line 6 is no element; name the elements as in Na Cl")


def _check_coordinates(lines: list[str], first: int, number_of_atoms: int) -> None:
    for i in range(first, first + number_of_atoms):
        _three(lines, i, "a position")
