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

from crystalframer_jax.data.io.download import LARGEST_FILE, download, figshare_urls, jarvis_location
from crystalframer_jax.data.io.streams import check_zip, json_records
from crystalframer_jax.data.records import BadRecord, DataError, Record, Source, Target, text_of
from crystalframer_jax.data.structures import dict_loader
from crystalframer_jax.files import sha256


@dataclasses.dataclass(frozen=True)
class Bundled:
    """A file inside the package: gzipped JSON lines with id, lattice (rows, Å), species, frac_coords and labels.

    With `test_fold`, the lines whose "fold" it is are for test; of the others, one of ten is for validation, which one
    the checksum of its id decides.
    """

    file: str
    test_fold: int | None = None

    def open(self, targets: tuple[Target, ...]) -> Source:
        """Opens the file."""
        file = importlib.resources.files("crystalframer_jax.data").joinpath("bundled", self.file)
        content = file.read_bytes()
        lines = gzip.decompress(content).decode().splitlines()

        def records() -> Iterator[Record]:
            for number, line in enumerate(lines, 1):
                content = json.loads(line)
                labels = tuple(target.label(content.get(target.field)) for target in targets)
                split = self._split(content["id"], content.get("fold"))
                yield Record(content["id"], f"{self.file}:{number}", dict_loader(content, content["id"]), labels, split)

        return Source(targets, hashlib.sha256(content).hexdigest(), records, len(lines))

    def _split(self, id: str, fold: int | None) -> str:
        if self.test_fold is None:
            return ""
        is_val = int(hashlib.sha256(id.encode()).hexdigest(), 16) % 10 == 0
        return "test" if fold == self.test_fold else "val" if is_val else "train"


@dataclasses.dataclass(frozen=True)
class JarvisArchive:
    """A dataset of jarvis-tools: a zip archive with one JSON array of records, whose crystals are under "atoms"."""

    dataset: str
    id_field: str
    largest: int = LARGEST_FILE  # bytes that the archive may have

    def fetch(self, folder: Path) -> list[Path]:
        """Downloads the archive into a folder, unless it is there."""
        member, urls = jarvis_location(self.dataset)
        return [download(urls, folder / f"{member}.zip", check_zip(member), largest=self.largest)]

    def given(self, path: Path) -> list[Path]:
        """Finds the archive, fetched by hand: a file, or the folder it is in."""
        member, _ = jarvis_location(self.dataset)
        candidates = [path] if path.is_file() else [path / f"{member}.zip", path / member]
        return [_first_file(candidates, path, f"{member}.zip")]

    def open(self, files: list[Path], targets: tuple[Target, ...]) -> Source:
        """Opens the archive, which is read as a stream."""
        (file,) = files
        member, _ = jarvis_location(self.dataset)

        def records() -> Iterator[Record | BadRecord]:
            for number, content in json_records(file, member):
                yield _record(content, self.id_field, f"{file.name} record {number}", targets)

        return Source(targets, sha256(file), records, paths=(file,))


@dataclasses.dataclass(frozen=True)
class FigsharePickles:
    """Three pickles on figshare, one for each split: lists of records whose crystals are under "atoms"."""

    word: str  # that their names have in common
    file_ids: Mapping[str, int]

    def fetch(self, folder: Path) -> list[Path]:
        """Downloads the three files into a folder, unless they are there."""
        from crystalframer_jax.data.io.pickles import load_pickle  # imports pymatgen

        return [
            download(figshare_urls(number), folder / self._name(split), lambda file: load_pickle(file))
            for split, number in self.file_ids.items()
        ]

    def given(self, path: Path) -> list[Path]:
        """Finds the three files in a folder, fetched by hand: named by their split or by their number."""
        if not path.is_dir():
            *others, last = map(self._name, self.file_ids)
            raise DataError(f"{path}: give the folder that holds the three files, {', '.join(others)} and {last}")
        return [self._file(path, split, number) for split, number in self.file_ids.items()]

    def _file(self, folder: Path, split: str, number: int) -> Path:
        """Finds the file of a split: of its exact name or number, or the only one that has the words in its name."""
        name = self._name(split)
        others = sorted(f for f in folder.glob("[!.]*.pkl") if split in f.stem and self.word in f.stem)
        exact = [file for file in (folder / name, folder / str(number)) if file.is_file()]
        if not exact and len(others) > 1:
            raise DataError(f"{folder}: which is {name}, {' or '.join(file.name for file in others)}? Leave one there")
        return _first_file(exact or others, folder, f"{name} or {number}")

    def open(self, files: list[Path], targets: tuple[Target, ...]) -> Source:
        """Opens the three files, training first."""
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
        return Source(targets, checksum, records, paths=tuple(files))

    def _name(self, split: str) -> str:
        return f"{self.word}_megnet_{split}.pkl"


def _record(
    content: Any, id_field: str, where: str, targets: tuple[Target, ...], split: str = ""
) -> Record | BadRecord:
    """Makes a record of JARVIS: its id, the crystal under "atoms", labels under their fields; a text is no label."""
    if not isinstance(content, Mapping):
        return BadRecord("", where, content if isinstance(content, str) else "is not a record")
    id = text_of(content.get(id_field))
    if not isinstance(content.get("atoms"), Mapping):
        return BadRecord(id, where, 'no crystal under "atoms"')
    found = ((target, content.get(target.field)) for target in targets)
    labels = tuple(target.label(None if isinstance(value, str) else value) for target, value in found)
    atoms = {"cartesian": None, **content["atoms"]}  # which must be said here
    return Record(id, where, dict_loader(atoms, id), labels, split)


def _first_file(candidates: list[Path], path: Path, name: str) -> Path:
    """Returns the first of the candidates that is a file; DataError if none is."""
    found = next((file for file in candidates if file.is_file()), None)
    if found is None:
        raise DataError(f"{path}: there is no {name}; give its path with --source")
    return found
