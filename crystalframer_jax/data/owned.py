"""Folders and files that this program made, told apart from all others: only these are ever replaced or removed.

A finished folder is ours if its manifest verifies and it holds nothing but files that are as the manifest lists them.
What is still in the making is ours if a marker beside it says so, which is written first and removed last. A finished
folder that is damaged, but has names of ours and no others, is moved aside. Anything else stays as it is, and DataError
asks the user to move it away. The caller holds the lock of the target set.

A folder takes the place of another in steps: FOLDER -> .FOLDER.old, .FOLDER.next -> FOLDER, .FOLDER.old is removed.
Readers look at both names, see `read_columns`; `settle` ends what a killed process began.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from crystalframer_jax.data.build import Columns
from crystalframer_jax.data.records import DataError
from crystalframer_jax.files import FileError, json_text, read_bytes, read_json, sha256, write_csv

MANIFEST = "manifest.json"
REPORTS = ("skipped.csv", "leakage.csv", "warnings.csv")
LARGEST_MANIFEST = 16 << 20  # bytes
LARGEST_MARK = 1000
# names in the making
WORK = re.compile(r"\.?(part-\d{6}\.npz|\w+\.npy|(skipped|leakage|warnings)\.csv|manifest\.json)(\.\d+)?")


def digest_of(key: dict[str, Any]) -> str:
    """Returns twelve hexadecimal digits that identify a key."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]


# Finished folders


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Writes the manifest of a folder: some content, the checksums of all its files and a digest of its columns."""
    checksums = {file.name: sha256(file) for file in sorted(folder.iterdir())}
    columns = {name: checksum for name, checksum in checksums.items() if name.endswith(".npy")}
    content = content | {"sha256": checksums, "digest": digest_of(columns)}
    (folder / MANIFEST).write_text(json_text(content | {"check": digest_of(content)}, indent=1))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest of a folder; FileError if there is none or it is not as it was written."""
    manifest = read_json(folder / MANIFEST, LARGEST_MANIFEST)
    check, listed = manifest.pop("check", None), manifest.get("sha256")
    with contextlib.suppress(RecursionError):
        is_as_written = check == digest_of(manifest) and isinstance(manifest.get("digest"), str)
        if is_as_written and isinstance(listed, dict) and not any("/" in name for name in listed):
            return manifest
    raise FileError(f"{folder / MANIFEST} is damaged: not as it was written")


def mapped_columns(folder: Path, names: Iterable[str]) -> Columns:
    """Maps columns into memory, as plain arrays: slices of np.memmap are slow. FileError for what is no array."""
    columns = {}
    for name in names:
        file = folder / f"{name}.npy"
        try:
            columns[name] = np.asarray(np.lib.format.open_memmap(file, mode="r"))
        except OSError:
            raise
        except Exception as error:  # of many kinds, for a damaged header
            raise FileError(f"{file} is damaged: not an array") from error
    return columns


def read_columns(folder: Path, names: Sequence[str]) -> tuple[dict[str, Any], Columns] | None:
    """Reads manifest and memory-mapped columns; None if the folder is missing or not as it was written.

    While another process puts a new folder in its place, this is the old one or the new one.
    """
    for place in (folder, _old(folder)) * 3:
        with contextlib.suppress(OSError, FileError):
            manifest = read_manifest(place)
            is_intact = {f"{name}.npy" for name in names} <= manifest["sha256"].keys() and all(
                sha256(place / name) == checksum for name, checksum in manifest["sha256"].items()
            )
            columns = mapped_columns(place, names) if is_intact else {}
            if read_manifest(place) == manifest:  # else it was replaced meanwhile
                return (manifest, columns) if is_intact else None
    return None


def is_ours(folder: Path) -> bool:
    """Tells whether nothing is lost with a folder: it is empty, or holds only files that are as its manifest lists."""
    with contextlib.suppress(OSError, FileError):
        found = _regular_files(folder)
        listed = read_manifest(folder)["sha256"] if found else {}
        return all(name == MANIFEST or sha256(folder / name) == listed.get(name) for name in found)
    return False


def remove(folder: Path) -> None:
    """Removes a folder if it is ours; what a kill leaves of it is still ours."""
    if is_ours(folder):
        for name in sorted(_regular_files(folder), key=lambda name: name == MANIFEST):  # which is the last
            (folder / name).unlink()
        folder.rmdir()


def _is_damaged(folder: Path, names: Sequence[str]) -> bool:
    """Tells whether a folder with those columns is one of ours but damaged.

    All in it then has names that we write there, and the manifest verifies or, if it is what is damaged, all columns
    are arrays.
    """
    with contextlib.suppress(OSError, FileError):
        if not set(_regular_files(folder)) <= {*(f"{name}.npy" for name in names), *REPORTS, MANIFEST}:
            return False
        with contextlib.suppress(FileError):
            return bool(read_manifest(folder))
        return bool(mapped_columns(folder, names))
    return False


def _regular_files(folder: Path) -> list[str]:
    """Lists a folder; FileError if it is a link, or holds anything but regular files."""
    with os.scandir(folder) as entries:
        found = list(entries)
    if folder.is_symlink() or not all(entry.is_file(follow_symlinks=False) for entry in found):
        raise FileError(f"{folder} holds more than files")
    return [entry.name for entry in found]


def require_place(folder: Path, names: Sequence[str]) -> None:
    """Raises DataError if a folder with those columns could not be put there without a loss."""
    if os.path.lexists(folder) and not is_ours(folder) and not _is_damaged(folder, names):
        raise _in_the_way(folder)
    for path in (_old(folder), folder.with_name(f".{folder.name}.next")):  # what is ours was settled, or has a marker
        if os.path.lexists(path) and path not in begun(folder.parent):
            raise _in_the_way(path)


def put(new: Path, folder: Path, names: Sequence[str]) -> None:
    """Puts a folder with those columns that was begun (see `begin`) in the place of another, if there is one."""
    if is_ours(folder):
        os.rename(folder, _old(folder))
    elif _is_damaged(folder, names):
        number = next(n for n in itertools.count(1) if not os.path.lexists(_aside(folder, n)))
        os.rename(folder, _aside(folder, number))
        tqdm.write(f"{folder} was damaged; it is kept as {_aside(folder, number)}, remove that if you do not need it")
    elif os.path.lexists(folder):
        raise _in_the_way(folder)
    os.replace(new, folder)
    _marker(new).unlink()
    remove(_old(folder))


def settle(folder: Path) -> None:
    """Ends replacements that were killed, of anything in a folder: the old one comes back or goes."""
    for old in folder.glob(".*.old"):
        current = old.with_name(old.name[1:].removesuffix(".old"))
        if is_ours(old):
            if os.path.lexists(current) or not os.listdir(old):
                remove(old)
            else:
                os.rename(old, current)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _aside(folder: Path, number: int) -> Path:
    return folder.with_name(f"damaged-{folder.name}-{number}")


def _in_the_way(path: Path) -> DataError:
    return DataError(
        f"{path} was not put there by this program (or damaged beyond recognition), so it stays: move it away "
        "or choose another --data_dir, then run again"
    )


# What is in the making


def begin(folder: Path) -> None:
    """Makes a folder to work in, or goes on with the one that was begun; DataError if something else has its name."""
    found, text = _mark(folder), _mark_text(folder)
    if found != text:
        if os.path.lexists(folder) or not text.startswith(found):  # a kill may have cut it short
            raise _in_the_way(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        _marker(folder).write_text(text)
    folder.mkdir(exist_ok=True)
    if folder.is_symlink():
        raise _in_the_way(folder)


def begun(folder: Path) -> list[Path]:
    """Lists what was begun in a folder."""
    paths = [marker.with_suffix("") for marker in sorted(folder.glob(".*.made"))]
    return [path for path in paths if _mark(path) == _mark_text(path)]


def discard(folder: Path) -> None:
    """Removes a folder if it was begun; DataError if something that we do not write is in it."""
    if _mark(folder) != _mark_text(folder):
        return
    if os.path.lexists(folder):
        try:
            found = _regular_files(folder)
        except FileError as error:
            raise _in_the_way(folder) from error
        if other := next((name for name in found if not WORK.fullmatch(name)), None):
            raise _in_the_way(folder / other)
        for name in found:
            (folder / name).unlink()
        folder.rmdir()
    _marker(folder).unlink()


def write_report(file: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> bool:
    """Writes a CSV file that `remove_report` may remove; False if there is a file of that name that is not ours."""
    remove_report(file)
    if os.path.lexists(file) or os.path.lexists(_marker(file)):
        return False
    work = file.with_name(f".{file.name}.next")
    discard(work)
    begin(work)
    write_csv(work / file.name, header, rows)
    _marker(file).write_text(_mark_text(file, sha256(work / file.name)))
    os.rename(work / file.name, file)
    discard(work)
    return True


def remove_report(file: Path) -> None:
    """Removes a file of `write_report`, unless it was changed since."""
    mark = _mark(file)
    with contextlib.suppress(OSError, FileError):
        if not file.is_symlink() and mark == _mark_text(file, sha256(file)):
            file.unlink()
    text = _mark_text(file).strip()
    if mark and (mark.startswith(text) or text.startswith(mark)) and not os.path.lexists(file):
        _marker(file).unlink()


def _marker(path: Path) -> Path:
    return path.with_name(f".{path.name.removeprefix('.')}.made")


def _mark_text(path: Path, checksum: str = "") -> str:
    return f"{path.name} was made by crystalframer_jax, which may remove it {checksum}".strip() + "\n"


def _mark(path: Path) -> str:
    """Reads the marker of a file or folder; "" if there is none."""
    marker = _marker(path)
    if not os.path.lexists(marker):
        return ""
    try:
        return "a link" if marker.is_symlink() else read_bytes(marker, LARGEST_MARK).decode(errors="replace")
    except FileError as error:
        return str(error)
