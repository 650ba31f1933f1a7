"""Reading files that anybody may have written, writing files whole and never through links, folders of one process."""

import contextlib
import csv
import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any

from crystalframer_jax.errors import UserError
from crystalframer_jax.text import csv_cell

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

# What other systems do not have, or do not need.
NONBLOCK, NOFOLLOW, BINARY = (getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOFOLLOW", "O_BINARY"))
LARGEST_JSON = 256 * 1024**2  # bytes; of files that we write ourselves, all are far smaller


class FileError(UserError, ValueError):
    """A file that is missing, no regular file, too large, or does not hold what it should; the message names it."""


def open_regular(file: Path) -> BufferedReader:
    """Opens a regular file (or a link to one) to read; FileError for anything else, OSError as `open`."""
    descriptor = os.open(file, os.O_RDONLY | NONBLOCK | BINARY)  # else a pipe waits for a writer
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileError(f"{file} is not a regular file")
    return os.fdopen(descriptor, "rb")


def read_bytes(file: Path, most: int) -> bytes:
    """Reads a regular file (or a link to one) of at most `most` bytes; FileError for anything else."""
    try:
        with open_regular(file) as stream:
            size = os.fstat(stream.fileno()).st_size  # as much as is asked for is set aside, however small the file
            content = stream.read(min(most, size) + 1)
    except FileNotFoundError as error:
        raise FileError(f"{file} is missing") from error
    except OSError as error:
        raise FileError(f"{file} cannot be read ({error.strerror})") from error
    if len(content) > most:
        raise FileError(f"{file} is larger than the {most:,} bytes that it may have")
    return content


def parse_json(text: str | bytes, what: object) -> dict[str, Any]:
    """Reads a JSON object; FileError, naming `what` it should be the text of, for anything else."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also what is not UTF-8, and integers of 5,000 digits
        raise FileError(f"{what} is damaged: not JSON ({str(error)[:100]})") from error
    if not isinstance(content, dict):
        raise FileError(f"{what} is damaged: it holds {type(content).__name__}, not an object")
    return content


def read_json(file: Path, most: int = LARGEST_JSON) -> dict[str, Any]:
    """Reads a file with one JSON object; FileError, naming the file, if it is missing or anything else."""
    return parse_json(read_bytes(file, most), file)


def json_text(content: Any, indent: int | None = None) -> str:
    """Writes JSON, with null for numbers that are not finite, which JSON does not have."""

    def valid(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: valid(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [valid(part) for part in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(valid(content), indent=indent, allow_nan=False) + "\n"


def write_json(file: Path, content: Any) -> None:
    """Writes JSON; a reader sees the old content or the new."""
    with replacing(file) as temporary:
        temporary.write_text(json_text(content, indent=1))


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yields a temporary file beside `file`, which takes its place when it is written; nothing is left on failure.

    A link of that name is replaced, what it stands for stays as it is.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)
        temporary.touch(exist_ok=False)
    except OSError as error:  # the name asked for says more
        raise OSError(error.errno, error.strerror, str(file)) from error
    try:
        yield temporary
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def open_to_append(file: Path) -> BufferedWriter:
    """Opens a regular file to append to it, made if it is not there; FileError if the name is a link or a pipe."""
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | NOFOLLOW | NONBLOCK | BINARY, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link; a pipe that nobody reads
            raise FileError(f"{file} is not a regular file; remove it") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileError(f"{file} is not a regular file; remove it")
    return os.fdopen(descriptor, "ab")


def append_line(file: Path, line: str, sync: bool = False) -> None:
    """Appends a line to a regular file, see `open_to_append`; `sync`: returns when it is on the disk."""
    with open_to_append(file) as stream:
        stream.write(line.encode() + b"\n")
        if sync:
            stream.flush()
            os.fsync(stream.fileno())


def write_csv(file: str | Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Writes a table as CSV, creating its folder; a reader sees the old file or all of the new one.

    Text that a spreadsheet would run as a formula gets an apostrophe in front, see `text.csv_cell`; what is no text in
    UTF-8 (half a surrogate pair) is written as Python shows it.
    """
    file = Path(file).expanduser().resolve()  # the file that a link stands for is replaced, not the link
    file.parent.mkdir(parents=True, exist_ok=True)
    with (
        replacing(file) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as stream,
    ):
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerows([csv_cell(value) for value in row] for row in (header, *rows))


def check_replaceable(file: Path, beginning: bytes) -> None:
    """Raises FileError if something else is there than an empty file, or one that begins so: it is not our making."""
    if file.is_file():
        with file.open("rb") as stream:
            if stream.read(len(beginning)) in (b"", beginning):
                return
    if os.path.lexists(file):
        raise FileError(f"{file} exists and is no such file as would be written there; choose another name")


def sha256(file: Path) -> str:
    """Computes the SHA-256 of a file, hexadecimal; FileError if it is not a regular file, an OSError names the file."""
    with open_regular(file) as stream:
        try:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:  # of a failing disk
            raise OSError(error.errno, error.strerror, str(file)) from error


def is_disk_full(error: OSError) -> bool:
    """Tells whether something failed because there is no space left, on the disk or for this user."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def locked(file: Path, if_busy: str | None = None, remedy: str = "choose another folder") -> Iterator[None]:
    """Holds a lock file; while another process has it, waits, or raises UserError with the text `if_busy`.

    The lock ends with the process, whatever ends it; on systems without such locks nothing is held. Raises UserError,
    with the `remedy`, if the folder cannot be written, or if the name is not that of a regular file.
    """
    with contextlib.ExitStack() as stack:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            stream = stack.enter_context(open_to_append(file))
        except OSError as error:
            raise UserError(f"{file.parent} cannot be written ({error.strerror}); {remedy}") from error
        if fcntl is not None:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if if_busy:
                    raise UserError(if_busy) from error
                print(f"waiting for another process to release {file}", flush=True)
                fcntl.flock(stream, fcntl.LOCK_EX)
        yield
