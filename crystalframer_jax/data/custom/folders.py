"""Folders of structure files, on the disk or zipped; what is in an archive is read from it, never unpacked."""

import contextlib
import functools
import gzip
import io
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from crystalframer_jax.data.io.streams import DAMAGE, check_member, unpacked_limit
from crystalframer_jax.data.records import DataError
from crystalframer_jax.data.structures import from_bytes, from_file
from crystalframer_jax.files import open_regular
from crystalframer_jax.structures.crystal import Crystal, CrystalError

PLAIN = (".cif", ".vasp", ".poscar", ".extxyz", ".xyz", ".mcif")
SUFFIXES = (*PLAIN, *(f"{suffix}.gz" for suffix in PLAIN), ".xml", ".xml.gz")
POSCAR_PREFIXES = ("POSCAR", "CONTCAR")
PLACES = ("", "crystals/", "structures/", "cif/", "cifs/", "poscars/")  # where files are looked for, beside a table
MOST_MEMBERS = 1_000_000
LONGEST_MEMBER = 1000  # characters of a name
LARGEST_MEMBER = 64 << 20  # bytes


class Folder(Protocol):
    """What holds the structure files that a table names."""

    name: str  # for messages
    path: Path  # of the folder or archive

    def has(self, name: str) -> bool:
        """Tells whether there is a file of that name."""

    def loader(self, name: str, id: str) -> Callable[[], Crystal]:
        """Returns what makes the crystal of a file, in any process, or raises CrystalError."""

    def file(self, name: str) -> Path | None:
        """Returns the path of a file, None if it is part of an archive."""


class DiskFolder:
    """A folder."""

    def __init__(self, path: Path):
        self.path, self.name = path, str(path)

    def has(self, name: str) -> bool:
        """Tells whether there is a file of that name."""
        return os.path.isfile(os.path.join(self.path, name))

    def loader(self, name: str, id: str) -> Callable[[], Crystal]:
        """Returns what makes the crystal of a file."""
        return functools.partial(from_file, self.path / name, id)

    def file(self, name: str) -> Path | None:
        """Returns the path of a file."""
        return self.path / name


class ZipFolder:
    """A zip archive, or a folder inside it. Names only choose members, and sizes are bounded."""

    def __init__(self, path: Path, inner: str = ""):
        self.path, self.inner = path, inner
        self.name = f"{path} ({inner})" if inner else str(path)
        state = path.stat()
        self._archive, self._members = _opened(path, state.st_mtime_ns, state.st_size)

    def names(self) -> list[str]:
        """Lists the files, those of the Mac's Finder and hidden ones aside, with their folders."""
        found = (name[len(self.inner) :] for name in self._members if name.startswith(self.inner))
        return sorted(name for name in found if name and not name.endswith("/") and not _is_hidden(name))

    def has(self, name: str) -> bool:
        """Tells whether there is a structure file of that name."""
        return is_structure(name) and self.inner + name in self._members

    def read(self, name: str, most: int) -> bytes:
        """Reads a member of at most `most` bytes; DataError if it is larger, damaged or encrypted."""
        info = self._members[self.inner + name]
        if info.file_size > most:
            raise DataError(f"{self.path}: {name} would unpack to {info.file_size:,} bytes, over {most:,}")
        with reading(self.path):
            check_member(info, self.path)
            with self._archive.open(info) as member:
                return member.read(most + 1)

    def loader(self, name: str, id: str) -> Callable[[], Crystal]:
        """Returns what makes the crystal of a member, which is read here."""
        where = f"{self.path}: {name}"
        try:
            return functools.partial(from_bytes, self.read(name, LARGEST_MEMBER), where, id)
        except DataError as error:
            return functools.partial(fail, str(error))

    def file(self, name: str) -> Path | None:
        """Returns None: the checksum of the archive covers it."""
        return None


@functools.lru_cache(maxsize=2)
def _opened(path: Path, modified: int, size: int) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]:
    """Opens an archive, whose list of members takes long to read, and checks that list."""
    with reading(path):
        archive = zipfile.ZipFile(open_regular(path))
    infos = archive.infolist()
    if len(infos) > MOST_MEMBERS:
        raise DataError(f"{path} holds {len(infos):,} files, of at most {MOST_MEMBERS:,}; unpack it first")
    long = next((info.filename for info in infos if len(info.filename) > LONGEST_MEMBER), "")
    if long:
        raise DataError(f"{path} holds a file whose name has {len(long):,} characters; rename it")
    total, limit = sum(info.file_size for info in infos), unpacked_limit(path)
    if total > limit:
        raise DataError(f"{path} would unpack to {total:,} bytes, over {limit:,}; unpack it first")
    members = {info.filename: info for info in infos}
    if len(members) < len(infos):
        raise DataError(f"{path} holds two files of the same name; pack it again")
    return archive, members


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def fail(problem: str) -> Crystal:
    """Raises CrystalError, in place of what would make a crystal."""
    raise CrystalError(problem)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what a damaged archive raises into DataError."""
    try:
        yield
    except (DataError, UnicodeError):
        raise
    except DAMAGE as error:
        raise DataError(f"{path} is damaged ({error or type(error).__name__}); delete it and fetch it again") from error


def find_structure(folder: Folder, cell: str) -> str:
    """Finds the file of that name, else the one of that name with a suffix, or with POSCAR_ before it; "" if none.

    It is in the folder, or in a folder of structures inside; suffixes may be in capital letters.
    """
    if not 0 < len(cell) <= LONGEST_MEMBER or "\0" in cell:
        return ""
    return next((place + name for place in PLACES for name in _candidates(cell) if folder.has(place + name)), "")


def _candidates(cell: str) -> Iterator[str]:
    """Lists the names that a file may have."""
    guesses = [f"{cell}{suffix}" for suffix in SUFFIXES] + [f"POSCAR_{cell}", f"POSCAR-{cell}"]
    if suffix := suffix_of(cell):
        stem = cell[: -len(suffix)]
        yield from (cell, stem + suffix.upper(), stem + suffix.lower(), *guesses)
    elif Path(cell).name.upper().startswith(POSCAR_PREFIXES):
        yield from (cell, *guesses)
    else:
        yield from (*guesses, *(f"{cell}{suffix.upper()}" for suffix in SUFFIXES), cell)


def is_structure(name: str) -> bool:
    """Tells whether a member of an archive is a structure file, by its name."""
    last = name.rpartition("/")[2]
    return last.lower().endswith(PLAIN) or last.upper().startswith(POSCAR_PREFIXES)


def suffix_of(name: str) -> str:
    """Returns the suffix of a structure file as it is written; "" if it has none."""
    return next(
        (name[-len(suffix) :] for suffix in sorted(SUFFIXES, key=len, reverse=True) if name.lower().endswith(suffix)),
        "",
    )


@contextlib.contextmanager
def text_of_table(
    file: Path, folder: Folder, member: str = "", errors: str = "strict", newline: str | None = ""
) -> Iterator[io.TextIOWrapper]:
    """Opens text: a file, also gzipped, or a member of an archive; DataError if it is damaged."""
    with contextlib.ExitStack() as stack:
        if isinstance(folder, ZipFolder):
            stream: BinaryIO = io.BytesIO(folder.read(member, LARGEST_MEMBER))
        else:
            stream = stack.enter_context(file.open("rb"))
        start = stream.read(3)
        stream.seek(0)
        if start[:2] == b"\x1f\x8b":
            stream = stack.enter_context(gzip.GzipFile(fileobj=stream))  # type: ignore[assignment]
        encoding = "utf-16" if start[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        with reading(file):
            yield io.TextIOWrapper(stream, encoding=encoding, errors=errors, newline=newline)
