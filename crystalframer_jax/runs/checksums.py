"""Checksums of a folder: show every flipped bit, and every truncated, missing or additional file."""

import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from crystalframer_jax.files import FileError, read_bytes, sha256

NAME = "SHA256SUMS"  # check it in its folder with: sha256sum -c SHA256SUMS
LARGEST = 64 * 1024**2  # bytes of it: hundreds of thousands of files


def write(folder: Path) -> None:
    """Writes the checksums of a folder, and returns when the disk has all of it: files, folders and checksums."""
    for file in _files(folder):
        sync(file)
    with (folder / NAME).open("x") as stream:
        stream.write(_lines(_digests(folder)))
    sync(folder / NAME)
    for parent, _, _ in os.walk(folder, topdown=False):
        sync(Path(parent))


def problem(folder: Path, under: str = "") -> str | None:
    """Tells what is wrong with the files of a folder, naming one of them; None if they are those of its checksums.

    A link, a pipe or a device in it is wrong, and is not opened. `under`: look only at paths that begin so.
    """
    try:
        if odd := _irregular(folder):
            return f"{odd} is a link or no regular file"
        if not (folder / NAME).exists():
            return f"it has no {NAME}, so it was not finished or comes from an old version"
        content = read_bytes(folder / NAME, LARGEST)
        found = _digests(folder, under)
    except FileError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    lines = re.findall("([0-9a-f]{64})  (.+)\n", content.decode(errors="replace"))
    stored = {name: digest for digest, name in lines}
    if content != _lines(stored).encode():
        return f"{NAME} is damaged"
    stored = {name: digest for name, digest in stored.items() if name.startswith(under)}
    for name in sorted(stored.keys() | found.keys()):
        if name not in found:
            return f"{name!r} is listed in {NAME} and missing"
        if name not in stored:
            return f"{name} is not listed in {NAME}"
        if stored[name] != found[name]:
            return f"{name} is damaged (its SHA-256 is not that of {NAME})"
    return None


def sync(path: Path) -> None:
    """Returns when the disk has a file, or the list of names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of folders on some network file systems
            raise
    finally:
        os.close(descriptor)


def _digests(folder: Path, under: str = "") -> dict[str, str]:
    """Digests the files whose path begins with `under`, but for the checksums; OSError if one cannot be read."""
    names = (file.relative_to(folder).as_posix() for file in _files(folder))
    return {name: sha256(folder / name) for name in names if name != NAME and name.startswith(under)}


def _lines(digests: dict[str, str]) -> str:
    """Writes lines "DIGEST  PATH" as `sha256sum` prints them, sorted by path."""
    return "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))


def _irregular(folder: Path) -> Path | None:
    """Finds what is neither a regular file nor a folder, the folder itself included."""
    kinds = stat.S_ISREG, stat.S_ISDIR
    return next((path for path in _paths(folder) if not any(kind(path.lstat().st_mode) for kind in kinds)), None)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in _paths(folder) if not path.is_dir())


def _paths(folder: Path) -> Iterator[Path]:
    """Walks through a folder, itself first; links are not followed."""

    def fail(error: OSError) -> None:
        raise error

    yield folder
    for parent, folders, names in os.walk(folder, onerror=fail):
        for name in (*folders, *names):
            yield Path(parent, name)
