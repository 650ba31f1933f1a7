"""Crystals of extended XYZ: frames are divided and looked at here, ASE reads them."""

from __future__ import annotations

import io
import itertools
import re
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from crystalframer_jax.structures.crystal import MOST_ATOMS, Crystal, CrystalError
from crystalframer_jax.structures.elements import is_element
from crystalframer_jax.structures.reading import UnreadableError, number, parsing, plain, warn
from crystalframer_jax.text import brief

if TYPE_CHECKING:  # optional
    from ase import Atoms

LONGEST_COMMENT = 1_000_000  # characters, above the atoms of a frame
LONGEST_COUNT = 18  # digits, of a number of atoms
MOST_COLUMNS = 1000  # of values of an atom
USUAL_COLUMNS = "species:S:1:pos:R:3"
HEADER = re.compile(r"(?:^|\s)(?:Lattice|Properties|pbc)\s*=", re.IGNORECASE)
VECTORS = re.compile(r"""Lattice\s*=\s*["'{\[]([^"'}\]]*)["'}\]]""", re.IGNORECASE)


class Frame(NamedTuple):
    """A frame of extended XYZ, or why there is none."""

    line: int  # its first, from 1
    lines: list[str]  # with their ends as they were given; of a wrong frame the beginning
    problem: str = ""  # with the remedy
    after_blank: bool = False


def frames(lines: Iterable[str]) -> Iterator[Frame]:
    """Divides extended XYZ into frames; after a wrong one it goes on with the next that can be told.

    That is where a number of atoms stands above a comment with Lattice, Properties or pbc.
    """
    source = enumerate(lines, 1)
    ahead: deque[tuple[int, str]] = deque()
    after_blank = False
    while (start := next(_from(ahead, source), None)) is not None:
        if not start[1].strip():
            after_blank = True
            continue
        frame = _frame(start, ahead, source)
        yield frame._replace(after_blank=after_blank)
        after_blank = False


def _from(ahead: deque[tuple[int, str]], source: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    while ahead:
        yield ahead.popleft()
    yield from source


def _count(text: str) -> int | None:
    text = plain(text).strip()
    return int(text) if re.fullmatch(r"[+-]?\d+", text, re.ASCII) and len(text) <= LONGEST_COUNT else None


def _frame(start: tuple[int, str], ahead: deque[tuple[int, str]], source: Iterator[tuple[int, str]]) -> Frame:
    """Takes the lines of the frame that begins with the line `start`, or passes over them up to the next frame."""
    line, first = start
    count = _count(first)
    if count is None:
        found, remedy = brief(first.strip()[:40]), "correct this line or the number of the frame before"
        return _passed(Frame(line, [first], f"no number of atoms but {found}; {remedy}"), ahead, source)
    if count > MOST_ATOMS:
        problem = f"{count:,} atoms, of at most {MOST_ATOMS:,}; give a smaller cell"
        return _passed(Frame(line, [first], problem), ahead, source)
    if count < 0:
        return _passed(Frame(line, [first], f"{count:,} atoms; correct the number"), ahead, source)
    taken = list(itertools.islice(_from(ahead, source), count + 2))  # one more, to look at
    texts = [first, *(text for _, text in taken[: count + 1])]
    for i in range(1, len(taken) - 1):
        if _begins(taken[i][1], taken[i + 1][1]):  # the next frame, before all atoms of this one
            ahead.extendleft(reversed(taken[i:]))
            return Frame(line, texts[: i + 1], f"{count:,} atoms in {i - 1:,} lines; complete the frame")
    ahead.extendleft(reversed(taken[count + 1 :]))
    if len(taken) < count + 1:
        left = max(len(taken) - 1, 0)
        reason = f"{count:,} atoms in {left:,} lines: the file ends after {left} of {count} atoms; complete the frame"
        return Frame(line, texts, reason)
    if len(texts[1]) > LONGEST_COMMENT:
        return Frame(line, [first], f"a comment of {len(texts[1]):,} characters; shorten it")
    for number_and_line in _from(ahead, source):
        if len(texts) < count + 5 and number_and_line[1].lstrip().startswith("VEC"):
            texts.append(number_and_line[1])
            continue
        following = next(_from(ahead, source), None)
        ahead.extendleft(filter(None, (following, number_and_line)))
        is_header = following is not None and HEADER.search(following[1])  # below a wrong number of the next frame
        if number_and_line[1].strip() and _count(number_and_line[1]) is None and not is_header:
            reason = f"more lines than the {count:,} atoms counted (line {number_and_line[0]}); correct the number"
            return _passed(Frame(line, texts, reason), ahead, source)
        break
    return Frame(line, texts)


def _begins(first: str, second: str) -> bool:
    return _count(first) is not None and HEADER.search(second) is not None


def _passed(frame: Frame, ahead: deque[tuple[int, str]], source: Iterator[tuple[int, str]]) -> Frame:
    """Passes over the lines up to the next frame."""
    before: tuple[int, str] | None = None
    for line in _from(ahead, source):
        if before and _begins(before[1], line[1]):
            ahead.extendleft((line, before))
            break
        before = line
    return frame


def crystal_of_frame(text: str, id: str) -> Crystal:
    """Makes the crystal of the text of a frame; raises CrystalError, with what is wrong."""
    try:
        from ase.io.extxyz import key_val_str_to_dict, read_xyz
    except ImportError as error:
        raise CrystalError(f"{id}: reading extended XYZ needs ASE; pip install ase") from error

    def parsed(comment: str) -> dict[str, Any]:
        values = key_val_str_to_dict(comment)
        columns = str(values.get("Properties", "")).split(":")[2::3]
        if sum(abs(int(number)) for number in columns) > MOST_COLUMNS:
            raise UnreadableError(f"over {MOST_COLUMNS:,} columns in Properties")
        return values

    with parsing(id, "extended XYZ"):
        lines = text.rstrip("\n").split("\n")
        _check_frame(lines, parsed)
        (frame,) = read_xyz(io.StringIO("\n".join(lines)), index=slice(None), properties_parser=parsed)
    return crystal_of_atoms(frame, id)


def _check_frame(lines: list[str], parsed: Any) -> None:
    """Writes elements and numbers of a frame as ASE understands them; UnreadableError for what is none."""
    lines[1] = plain(lines[1])
    if found := VECTORS.search(lines[1]):
        for value in found[1].replace(",", " ").split():
            number(value, "line 2 of the frame: Lattice")
    columns = str(parsed(lines[1]).get("Properties", USUAL_COLUMNS)).split(":")
    starts, at = {}, 0
    for name, size in zip(columns[::3], columns[2::3], strict=False):
        starts[name] = at
        at += int(size)
    species, place = starts.get("species"), starts.get("pos")
    for i in range(2, 2 + int(lines[0])):
        cells = plain(lines[i]).split()
        if len(cells) < at:
            raise UnreadableError(f"atom {i - 1}: {len(cells)} values instead of {at}")
        if species is not None:
            symbol = cells[species].capitalize()
            if not is_element(symbol) and symbol != "X":  # as ASE writes what is no atom
                raise UnreadableError(f"atom {i - 1}: {brief(cells[species])} is no element", "name it as in Na")
            cells[species] = "H" if symbol in ("D", "T") else cells[species]
        for x in cells[place : place + 3] if place is not None else ():
            number(x, f"atom {i - 1}: a position", finite=False)
        lines[i] = " ".join(cells)


def crystal_of_atoms(atoms: Atoms, id: str) -> Crystal:
    """Makes the crystal of ASE Atoms, see `Crystal.from_ase`; slabs and wires with a whole cell are taken as periodic.

    A UserWarning tells of those.
    """
    if np.any(atoms.pbc) and np.all(np.any(np.asarray(atoms.cell) != 0, axis=1)):
        warn_of_slab(atoms.pbc, id)
        atoms = atoms.copy()
        atoms.pbc = True
    return Crystal.from_ase(atoms, id)


def warn_of_slab(pbc: Iterable[bool], id: str) -> None:
    """Warns that something periodic in one or two directions is taken as a crystal."""
    flags = ["T" if flag else "F" for flag in pbc]
    if "F" in flags:
        warn(f"{id or 'ASE Atoms'}: pbc is {' '.join(flags)}; taken as the periodic cell that it has, vacuum included")
