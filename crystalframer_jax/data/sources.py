"""Where the crystals of a target set come from, and how their files are read."""

import dataclasses
import functools
import gzip
import hashlib
import importlib.resources
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from crystalframer_jax.data.records import BadRecord, DataError, Record, Source, Target
from crystalframer_jax.files import sha256

STRUCTURE_FIELDS = ("lattice", "species", "frac_coords")


@dataclasses.dataclass(frozen=True)
class Bundled:
    """A file inside the package: gzipped JSON lines with id, lattice (rows, Å), species, frac_coords and labels."""

    file: str

    def open(self, targets: tuple[Target, ...]) -> Source:
        """The records of the file."""
        file = importlib.resources.files("crystalframer_jax.data").joinpath("bundled", self.file)
        content = file.read_bytes()
        lines = gzip.decompress(content).decode().splitlines()

        def records() -> Iterator[Record]:
            for number, line in enumerate(lines, 1):
                content = json.loads(line)
                structure = {field: content[field] for field in STRUCTURE_FIELDS}
                labels = tuple(target.label(content.get(target.field)) for target in targets)
                yield Record(content["id"], f"{self.file}:{number}", structure, labels)

        return Source(targets, hashlib.sha256(content).hexdigest(), records, len(lines))


@dataclasses.dataclass(frozen=True)
class JarvisArchive:
    """A dataset of jarvis-tools: a zip archive with one JSON array of records, whose crystals are under "atoms"."""

    dataset: str
    id_field: str

    def fetch(self, folder: Path) -> list[Path]:
        """Download the archive into a folder, unless it is there."""
        from crystalframer_jax.data.io.download import download, jarvis_location
        from crystalframer_jax.data.io.streams import check_zip

        member, urls = jarvis_location(self.dataset)
        return [download(urls, folder / f"{member}.zip", check_zip(member))]

    def given(self, path: Path) -> list[Path]:
        """The archive, fetched by hand: a file, or the folder it is in."""
        from crystalframer_jax.data.io.download import jarvis_location

        member, _ = jarvis_location(self.dataset)
        candidates = [path] if path.is_file() else [path / f"{member}.zip", path / member]
        return [_first_file(candidates, path, f"{member}.zip")]

    def open(self, files: list[Path], targets: tuple[Target, ...]) -> Source:
        """The records of the archive, read as a stream."""
        from crystalframer_jax.data.io.download import jarvis_location
        from crystalframer_jax.data.io.streams import json_records

        (file,) = files
        member, _ = jarvis_location(self.dataset)

        def records() -> Iterator[Record | BadRecord]:
            for number, content in json_records(file, member):
                yield _record(content, self.id_field, f"{file.name} record {number}", targets, numbers_only=True)

        return Source(targets, sha256(file), records)


@dataclasses.dataclass(frozen=True)
class FigsharePickles:
    """Three pickles on figshare, one for each split: lists of records whose crystals are under "atoms"."""

    word: str  # that their names have in common
    file_ids: Mapping[str, int]

    def fetch(self, folder: Path) -> list[Path]:
        """Download the three files into a folder, unless they are there."""
        from crystalframer_jax.data.io.download import download, figshare_urls
        from crystalframer_jax.data.io.pickles import load_pickle

        return [
            download(figshare_urls(number), folder / f"{self.word}_megnet_{split}.pkl", lambda file: load_pickle(file))
            for split, number in self.file_ids.items()
        ]

    def given(self, path: Path) -> list[Path]:
        """The three files in a folder, fetched by hand: named by their split or by their number."""
        if not path.is_dir():
            raise DataError(f"{path}: give the folder that holds the three files, {self._names(' and ')}")
        return [self._file(path, split, number) for split, number in self.file_ids.items()]

    def _file(self, folder: Path, split: str, number: int) -> Path:
        """The file of a split: of its exact name or number, or the only one that has the words in its name."""
        name = f"{self.word}_megnet_{split}.pkl"
        others = sorted(f for f in folder.glob("[!.]*.pkl") if split in f.stem and self.word in f.stem)
        exact = [file for file in (folder / name, folder / str(number)) if file.is_file()]
        if not exact and len(others) > 1:
            raise DataError(f"{folder}: which is {name}, {' or '.join(file.name for file in others)}? Leave one there")
        return _first_file(exact or others, folder, f"{name} or {number}")

    def open(self, files: list[Path], targets: tuple[Target, ...]) -> Source:
        """The records of the three files, training first."""
        from crystalframer_jax.data.io.pickles import load_pickle

        load = functools.cache(load_pickle)  # a few MB each

        def records() -> Iterator[Record | BadRecord]:
            for split, file in zip(self.file_ids, files, strict=True):
                contents = load(file)
                if not isinstance(contents, list):
                    raise DataError(f"{file}: not a list of records; fetch the file again")
                for number, content in enumerate(contents):
                    yield _record(content, "id", f"{file.name} record {number}", targets, split)

        checksum = hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()
        return Source(targets, checksum, records)

    def _names(self, last: str) -> str:
        names = [f"{self.word}_megnet_{split}.pkl" for split in self.file_ids]
        return ", ".join(names[:-1]) + last + names[-1]


def _record(
    content: Any, id_field: str, where: str, targets: tuple[Target, ...], split: str = "", numbers_only: bool = False
) -> Record | BadRecord:
    """A record of JARVIS: its id, the crystal under "atoms", labels under their fields.

    With `numbers_only` a label that is a text is none, as for the official splits.
    """
    if not isinstance(content, Mapping):
        return BadRecord("", where, content if isinstance(content, str) else "is not a record")
    id = str(content.get(id_field, ""))
    if not isinstance(content.get("atoms"), Mapping):
        return BadRecord(id, where, 'no crystal under "atoms"')
    structure = {field: content["atoms"].get(field) for field in ("lattice_mat", "elements", "coords", "cartesian")}
    values = (content.get(target.field) for target in targets)
    labels = tuple(
        target.label(None if numbers_only and isinstance(value, str) else value)
        for target, value in zip(targets, values, strict=True)
    )
    return Record(id, where, structure, labels, split)


def _first_file(candidates: list[Path], path: Path, name: str) -> Path:
    """The first of the candidates that is a file; DataError if none is."""
    for file in candidates:
        if file.is_file():
            return file
    raise DataError(f"{path}: there is no {name}; give its path with --source")
