"""The SHA-256 manifest of a folder: shows every flipped bit, and every truncated, missing or additional file."""

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from crystalframer_jax.files import sha256

NAME = "SHA256SUMS"  # check it in its folder with: sha256sum -c SHA256SUMS


def text_of(folder: Path, under: str = "") -> str:
    """Lines "DIGEST  PATH" as `sha256sum` prints them, sorted by path, of all files but the manifest.

    `under`: only paths that begin so. Raises OSError if one of them cannot be read.
    """
    names = sorted(file.relative_to(folder).as_posix() for file in _files(folder))
    return "".join(f"{sha256(folder / name)}  {name}\n" for name in names if name != NAME and name.startswith(under))


def write(folder: Path) -> None:
    """Write the manifest of a folder, and return when the disk has all of it: files, folders and manifest."""
    for file in _files(folder):
        sync(file)
    with (folder / NAME).open("x") as stream:
        stream.write(text_of(folder))
    sync(folder / NAME)
    for parent, _, _ in os.walk(folder, topdown=False):
        sync(Path(parent))


def problem(folder: Path, under: str = "") -> str | None:
    """What is wrong with the files of a folder, naming one of them; None if they are those of its manifest.

    `under`: look only at paths that begin so.
    """
    try:
        lines = (folder / NAME).read_bytes().decode().split("\n")
        stored = "\n".join(line for line in lines if not line or line[66:].startswith(under))
        found = text_of(folder, under)
    except FileNotFoundError as error:
        if error.filename == str(folder / NAME):
            return f"it has no {NAME}, so it was not finished or comes from an old version"
        return _cannot_be_read(error)
    except UnicodeDecodeError:
        return f"{NAME} is damaged"
    except OSError as error:
        return _cannot_be_read(error)
    if not all(re.fullmatch("[0-9a-f]{64}  .+", line) for line in lines[:-1]) or lines[-1]:
        return f"{NAME} is damaged"
    return None if stored == found else _difference(_digests(stored), _digests(found))


def sync(path: Path) -> None:
    """Return when the disk has a file, or the list of names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of folders on some network file systems
            raise
    finally:
        os.close(descriptor)


def _files(folder: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise error

    for parent, _, names in os.walk(folder, onerror=fail):
        for name in names:
            yield Path(parent, name)


def _digests(text: str) -> dict[str, str]:
    return {line[66:]: line[:66] for line in text.split("\n") if line}


def _difference(stored: dict[str, str], found: dict[str, str]) -> str:
    for name in sorted(stored.keys() | found.keys()):
        if name not in found:
            return f"{name!r} is listed in {NAME} and missing"
        if name not in stored:
            return f"{name} is not listed in {NAME}"
        if stored[name] != found[name]:
            return f"{name} is damaged (its SHA-256 is not that of {NAME})"
    return f"{NAME} is damaged"


def _cannot_be_read(error: OSError) -> str:
    return f"{error.filename} cannot be read ({error.strerror})"
