"""Structure files: CIF, POSCAR, extended XYZ and vasprun.xml, with nothing lost in silence."""

from __future__ import annotations

import codecs
import errno
import functools
import gzip
import io
import os
import stat
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from crystalframer_jax.files import FileError, read_bytes
from crystalframer_jax.structures.bonds import warn_of_close_atoms
from crystalframer_jax.structures.cif import structures_in_cif
from crystalframer_jax.structures.crystal import Crystal, CrystalError
from crystalframer_jax.structures.extxyz import Frame, crystal_of_atoms, crystal_of_frame, frames
from crystalframer_jax.structures.poscar import crystal_of_poscar
from crystalframer_jax.structures.vasprun import crystal_of_vasprun

if TYPE_CHECKING:  # both are slow to import, and ASE is optional
    from ase import Atoms
    from pymatgen.core import Structure

LARGEST_FILE = 256 * 1024**2  # bytes, also when it is unpacked
GZIP = b"\x1f\x8b"
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

ACCEPTED_FILES = (
    "CIF (.cif), POSCAR (POSCAR*, CONTCAR*, .vasp, .poscar), extended XYZ (.extxyz, .xyz), magnetic CIF (.mcif), "
    "vasprun.xml, any of them with .gz"
)
Maker = Callable[[], Crystal]  # makes the crystal of a structure, or raises CrystalError


def as_crystals(item: Crystal | Structure | Atoms | str | os.PathLike[str]) -> list[Crystal]:
    """Makes the crystals of a path, a pymatgen `Structure`, ASE `Atoms` or a `Crystal`; raises `CrystalError`."""
    if isinstance(item, Crystal):
        return [item]
    if isinstance(item, (str, os.PathLike)):
        return read_crystals(item)
    from pymatgen.core import SiteCollection

    if isinstance(item, SiteCollection):
        return [warn_of_close_atoms(Crystal.from_pymatgen(item))]
    if "ase" in sys.modules and isinstance(item, sys.modules["ase"].Atoms):
        return [warn_of_close_atoms(crystal_of_atoms(item, ""))]
    kinds = "a path, a pymatgen Structure, ASE Atoms or a Crystal"
    raise CrystalError(f"cannot make a crystal of {type(item).__name__!r}; pass {kinds}")


def only_crystal(item: Crystal | Structure | Atoms | str | os.PathLike[str]) -> Crystal:
    """Makes the crystal of what `as_crystals` takes; CrystalError if a file holds none or several."""
    crystals = as_crystals(item)
    if len(crystals) != 1:
        raise CrystalError(f"{item}: {len(crystals)} structures; give one of them")
    return crystals[0]


def read_crystals(path: str | os.PathLike[str]) -> list[Crystal]:
    """Reads all crystals of a structure file, see `ACCEPTED_FILES`, in the order of the file.

    Cells are kept as given: no reduction, no symmetrisation. The atoms of a CIF are those that pymatgen makes
    of the listed sites and symmetry operations, in its order (by electronegativity), inside the cell; other
    files keep their order and positions. A `UserWarning` tells of what a file leaves in doubt: sites that do not add
    up to its formula or are listed twice, hydrogens without coordinates, atoms closer than any bond, slabs.

    Returns:
      Crystals with id "<path>", or "<path>#<1-based index>" if the file has several.

    Raises:
      CrystalError: the file cannot be read or parsed, is of another kind, or holds an unusable crystal.
    """
    return [make() for make in structures_in(path)]


def structures_in(path: str | os.PathLike[str]) -> list[Maker]:
    """Finds the structures in a file, see `read_crystals`: what makes the crystal of each, or raises CrystalError.

    Raises:
      CrystalError: the file as a whole cannot be read.
    """
    path = Path(path)
    reader = _reader(path.name)
    text = _text_of(path)
    if reader is None:
        raise CrystalError(f"{path}: unknown kind of file; rename it to one of: {ACCEPTED_FILES}")
    return reader(text, str(path))


def is_structure_file(name: str) -> bool:
    """Tells whether the name of a file is that of a kind that can be read."""
    return _reader(Path(name).name) is not None


def _reader(name: str) -> Callable[[str, str], list[Maker]] | None:
    """Returns what reads the structures of a text, given the name of its file."""
    lower = name.lower().removesuffix(".gz")
    if lower.endswith((".cif", ".mcif")):
        return _in_cif
    if lower.endswith((".extxyz", ".xyz")):
        return _in_extxyz
    if lower.endswith((".vasp", ".poscar")) or lower.startswith(("poscar", "contcar")):
        return lambda text, name: [functools.partial(_checked, functools.partial(crystal_of_poscar, text, name))]
    if lower.endswith(".xml"):
        return lambda text, name: [functools.partial(_checked, functools.partial(crystal_of_vasprun, text, name))]
    return None


def _checked(make: Maker) -> Crystal:
    return warn_of_close_atoms(make())


def cif_crystals(text: str, name: str) -> list[Crystal]:
    """Reads the crystals of the text of a CIF file, see `read_crystals`; `name` stands for the path."""
    return [make() for make in _in_cif(text, name)]


def extxyz_crystals(text: str, name: str) -> list[Crystal]:
    """Reads the crystals of the text of an extended XYZ file, see `read_crystals`; `name` stands for the path."""
    return [make() for make in _in_extxyz(text, name)]


def poscar_crystals(text: str, name: str) -> list[Crystal]:
    """Reads the crystal of the text of a POSCAR file, see `read_crystals`; `name` stands for the path."""
    return [_checked(functools.partial(crystal_of_poscar, text, name))]


def _in_cif(text: str, name: str) -> list[Maker]:
    return [functools.partial(_checked, make) for make in structures_in_cif(text, name)]


def _in_extxyz(text: str, name: str) -> list[Maker]:
    found = list(frames(text.split("\n")))
    makers: list[Maker] = []
    for i, frame in enumerate(found, 1):
        if frame.after_blank:
            makers.append(functools.partial(_refuse, f"{name}: empty line before or after frame {i - 1}; remove it"))
        if frame.problem:
            problem, _, remedy = frame.problem.partition("; ")
            where = f"frame {i} on line {frame.line}: {problem}"
            makers.append(functools.partial(_refuse, f"{name}: cannot be read as extended XYZ ({where}); {remedy}"))
        else:
            makers.append(functools.partial(_of_frame, frame, f"{name}#{i}" if len(found) > 1 else name))
    return makers


def _of_frame(frame: Frame, id: str) -> Crystal:
    return warn_of_close_atoms(crystal_of_frame("\n".join(frame.lines), id))


def _refuse(message: str) -> Crystal:
    raise CrystalError(message)


def _text_of(path: Path) -> str:
    """Reads the text of a file, unpacked, in UTF-8 or UTF-16, else with the characters of Windows."""
    try:
        if stat.S_ISDIR(path.stat().st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        content = read_bytes(path, LARGEST_FILE)
    except FileError as error:
        raise CrystalError(f"{path}: cannot be used: {error}; split it, or pass the path of a file") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        reason = getattr(error, "strerror", error)
        raise CrystalError(f"{path}: cannot be read ({reason}); pass the path of a file") from error
    if content.startswith(GZIP):
        content = _unpacked(content, path)
    stream = io.TextIOWrapper(io.BytesIO(content), encoding=_encoding(content), errors="replace")  # as of a text file
    text = stream.read()
    if not text.strip("\ufeff \t\r\n"):
        raise CrystalError(f"{path}: the file is empty; write the structure again")
    return text


def _unpacked(content: bytes, path: Path) -> bytes:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as stream:
            unpacked = stream.read(LARGEST_FILE + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise CrystalError(f"{path}: cannot be unpacked ({error}); copy it again") from error
    if len(unpacked) > LARGEST_FILE:
        raise CrystalError(f"{path}: unpacked it is larger than the {LARGEST_FILE:,} bytes that it may have; split it")
    return unpacked


def _encoding(content: bytes) -> str:
    """Guesses the encoding of a text."""
    for mark, encoding in MARKS.items():
        if content.startswith(mark):
            return encoding
    start = content[:1000]
    if 5 * start.count(0) > 2 * len(start):  # every other byte of ASCII in UTF-16
        return "utf-16-le" if start[1::2].count(0) > start[::2].count(0) else "utf-16-be"
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return "cp1252"
    return "utf-8-sig"
