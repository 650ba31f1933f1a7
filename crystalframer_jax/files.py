"""Files that are never half-written, and folders that one process has to itself."""

import contextlib
import csv
import errno
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from crystalframer_jax.errors import UserError


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
    """Yields a temporary file beside `file`, which takes its place when it is written; nothing is left on failure."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def write_csv(file: str | Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Writes a table as CSV, creating its folder; a reader sees the old file or all of the new one."""
    file = Path(file).expanduser().resolve()  # the file that a link stands for is replaced, not the link
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def sha256(file: Path) -> str:
    """Computes the SHA-256 of a file, hexadecimal; an OSError names the file."""
    with file.open("rb") as stream:
        try:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:  # of a failing disk
            raise OSError(error.errno, error.strerror, str(file)) from error


def is_disk_full(error: OSError) -> bool:
    """Tells whether something failed because there is no space left, on the disk or for this user."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def locked(file: Path, if_busy: str | None = None) -> Iterator[None]:
    """Holds a lock file; while another process has it, waits, or raises UserError with the text `if_busy`.

    The lock ends with the process, whatever ends it. Raises UserError if the folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            stream = stack.enter_context(file.open("a"))
        except OSError as error:
            raise UserError(f"{file.parent} cannot be written ({error.strerror}); choose another folder") from error
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if if_busy:
                raise UserError(if_busy) from error
            print(f"waiting for another process to release {file}", flush=True)
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield
