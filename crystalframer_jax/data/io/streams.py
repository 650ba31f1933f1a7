"""Records of JSON files, one at a time, also from inside a zip or gzip archive; nothing is ever extracted."""

import codecs
import contextlib
import gzip
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, NoReturn

import numpy as np

from crystalframer_jax.data.records import DataError

CHUNK_BYTES = 1 << 20  # read at once
MAX_RECORD_CHARS = 64 << 20  # of one record, far more than a crystal with descriptors takes
DEEPEST = 64  # lists and objects in each other; what takes a record apart calls itself for each
MIN_SIZE_LIMIT = 1 << 30  # bytes; up to here an archive may unpack to any size
MAX_EXPANSION = 200  # beyond that, times the size of the archive; crystals in JSON shrink some 6 times

_BLANKS = re.compile(r"[ \t\n\r]*")
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}"]', re.DOTALL)
_NO_CONTAINER = re.compile(r"[^,\]}\s]*")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_LONGEST_TOKEN = 16  # characters after which a number, a literal or an escape that was cut off shows
DAMAGE = (OSError, EOFError, ValueError, RuntimeError, struct.error, zlib.error, zipfile.BadZipFile)


def json_records(file: Path, member: str = "") -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Reads the elements of the JSON array that a file holds, numbered from 1; one element is in memory at a time.

    Args:
      file: a zip archive, a gzip file or plain JSON, told apart by their content. NaN and Infinity may occur.
      member: the file inside a zip archive, "" for its only JSON file; nothing else in it is read.

    Yields:
      The number with the element, or with the reason why it is no record: not an object, with a key twice or a number
      of thousands of digits in it, or nested too deeply.

    Raises:
      DataError: the file is missing, damaged, encrypted or unreasonably large, has no such member, is not one complete
        array, or no element of it can be read.
    """
    with opened(file, member) as (stream, name):
        text = JsonText(stream, name, file)
        yield from text.records()


def json_lines(file: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Reads the records of a file with one JSON object a line, plain or gzipped, with line numbers from 1.

    Blank lines are skipped. A line that is not a JSON object gives the reason instead of a record.

    Raises:
      DataError: the file is missing, damaged, unreasonably large, or has a line longer than `MAX_RECORD_CHARS` bytes.
    """
    with opened(file, None) as (stream, _):
        for number, line in enumerate(iter(lambda: stream.readline(MAX_RECORD_CHARS + 1), b""), 1):
            check_unpacked(stream, file)
            if len(line) > MAX_RECORD_CHARS:
                raise DataError(f"{file}: line {number} is longer than {MAX_RECORD_CHARS:,} bytes; is it JSON lines?")
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                text = line.decode()
                record = _as_record(_checked(_PARSER.decode(text), text))
            except (ValueError, RecursionError) as error:
                record = f"is not JSON ({error})"
            yield number, record


def check_zip(member: str) -> Callable[[Path], None]:
    """Returns a check that a file is a complete zip archive with that member; it unpacks no more than its beginning.

    The check raises DataError. A damaged byte inside the member only shows when `json_records` reads it.
    """

    def check(file: Path) -> None:
        with opened(file, member) as (stream, name):
            if name == str(file):
                raise DataError(f"{file} is not a zip archive; fetch it again")
            if not stream.read(1):
                raise DataError(f"{file}: {member} is empty; fetch the archive again")

    return check


def parse_structure(text: str) -> dict[str, Any]:
    """Reads the JSON object in a text; ValueError, also for one that is nested too deeply or has a key twice."""
    try:
        value = _checked(_PARSER.decode(text), text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(value if isinstance(value, Unreadable) else f"of type {type(value).__name__}")
    return value


class Unreadable(str):
    """Stands for an element that cannot be read, and tells why."""


def _as_record(value: Any) -> dict[str, Any] | str:
    if isinstance(value, Unreadable):
        return f"is not JSON ({value})"
    return value if isinstance(value, dict) else f"is not a JSON object but of type {type(value).__name__}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes a JSON object; ValueError if a key is there twice, as nobody knows which value is meant."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:40]!r} is there twice")
    return found


_PARSER = json.JSONDecoder(object_pairs_hook=_object)


def _checked(value: Any, text: str) -> Any:
    """Returns the value that was read of a text, or why it cannot be used: it is nested too deeply."""
    brackets = np.frombuffer(text.encode(errors="surrogatepass").translate(None, _NO_BRACKETS), np.uint8)
    if len(brackets) <= DEEPEST:
        return value
    depth = np.cumsum(np.where((brackets == ord("[")) | (brackets == ord("{")), 1, -1)).max()
    return value if depth <= DEEPEST else Unreadable(f"nested {depth} deep, of at most {DEEPEST}")


def _end(text: str, start: int) -> int | None:
    """Finds where the JSON value ends that begins at `start`, by its brackets; None if the text ends before."""
    if text[start] not in "[{":
        end = _NO_CONTAINER.match(text, start).end()  # type: ignore[union-attr]
        return end if end < len(text) else None
    depth = 0
    for found in _STRING_OR_BRACKET.finditer(text, start):
        if found[0] == '"':  # of a string that is cut off
            return None
        depth += (found[0] in "[{") - (found[0] in "]}")
        if depth == 0:
            return found.end()
    return None


class JsonText:
    """JSON text of which a window is in memory: what was used is dropped, what is needed is read."""

    def __init__(self, stream: BinaryIO, name: str, file: Path):
        self._stream, self._name, self._file = stream, name, file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._parse = json.JSONDecoder(object_pairs_hook=_object).raw_decode
        self._window, self._at, self._ended = "", 0, False
        self._dropped = 0  # characters before the window
        self.parsed = ""  # the text of the value that was read last

    def fail(self, what: str, remedy: str = "fetch it again or repair it") -> NoReturn:
        """Raises DataError that the text `what`, with the position."""
        raise DataError(f"{self._name} {what}, at character {self._dropped + self._at + 1:,}; {remedy}")

    def peek(self) -> str:
        """Gives the next character that is not blank; "" at the end."""
        while True:
            self._at = _BLANKS.match(self._window, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._window) or self._ended:
                return self._window[self._at : self._at + 1]
            self._read_more()

    def take(self, character: str) -> bool:
        """Passes that character, if it is the next that is not blank."""
        found = self.peek() == character
        self._at += found
        return found

    def value(self, number: int) -> Any:
        """Parses the JSON value that begins here, which is record `number`; passes over one that has its end."""
        if not self.peek():
            self.fail(f"ends before record {number}")
        while True:
            near_end = len(self._window) - _LONGEST_TOKEN  # beyond it, what is found may be due to what is not read yet
            try:
                value, end = self._parse(self._window, self._at)
                reason, cut = "", isinstance(value, int | float) and end > near_end  # 1 of 1.5
                if self._ended or not cut:
                    self.parsed, self._at = self._window[self._at : end], end
                    return _checked(value, self.parsed)
            except json.JSONDecodeError as error:
                reason = error.msg
                cut = error.pos > near_end or reason.startswith("Unterminated string")
            except (ValueError, RecursionError) as error:  # too many digits; a key twice; nested too deeply
                reason, found = str(error), _end(self._window, self._at)
                if found is not None:
                    self._at = found
                    return Unreadable(reason)
                cut = not self._ended
            if not cut or self._ended:
                self.fail(f"{'ends within' if cut else 'is not JSON in'} record {number} ({reason})")
            if len(self._window) - self._at > MAX_RECORD_CHARS:
                self.fail(f"has a record {number} of more than {MAX_RECORD_CHARS:,} characters")
            self._read_more()

    def records(self) -> Iterator[tuple[int, dict[str, Any] | str]]:
        """Reads the whole text, which is one array, see `json_records`."""
        if self.peek() != "[":
            self.fail("is not a list of records at its top level", "give a file that is one")
        for number, value in self.elements():
            yield number, _as_record(value)
        if self.peek():
            self.fail("goes on after the end of the list")

    def elements(self) -> Iterator[tuple[int, Any]]:
        """Reads the elements of the array that begins here, numbered from 1; DataError if none of them can be read."""
        self.take("[")
        number, unread, value = 0, 0, None
        goes_on = self.peek() != "]"
        while goes_on:
            number += 1
            value = self.value(number)
            unread += isinstance(value, Unreadable)
            yield number, value
            goes_on = self.take(",")
        if unread and unread == number:
            self.fail(f"is not JSON in record 1 ({value})")
        if not self.take("]"):
            self.fail(f"has no comma and no end of the list after record {number}")

    def members(self) -> Iterator[str]:
        """Reads the keys of the object that begins here; the caller reads the value of each."""
        self.take("{")
        number = 0
        goes_on = self.peek() != "}"
        while goes_on:
            number += 1
            key = self.value(number)
            if not isinstance(key, str) or isinstance(key, Unreadable) or not self.take(":"):
                self.fail(f"has no key in quotes and colon before value {number} of an object")
            yield key
            goes_on = self.take(",")
        if not self.take("}"):
            self.fail(f"has no comma and no end of the object after value {number}")

    def _read_more(self) -> None:
        """Doubles what is unread at least, so that a long record is not parsed once for every chunk of it."""
        unread = self._window[self._at :]
        content = self._stream.read(max(CHUNK_BYTES, len(unread)))
        check_unpacked(self._stream, self._file)
        try:
            new = self._decoder.decode(content, final=not content)
        except UnicodeDecodeError as error:
            read = self._dropped + len(self._window)
            raise DataError(f"{self._name} is not UTF-8 text, after character {read:,}; convert it to UTF-8") from error
        self._dropped += self._at
        self._window, self._at, self._ended = unread + new, 0, not content


@contextlib.contextmanager
def opened(file: Path, member: str | None) -> Iterator[tuple[BinaryIO, str]]:
    """Opens the unpacked content of a file, or of that member if it is a zip archive; gives it with its name."""
    with contextlib.ExitStack() as stack:
        try:
            stream: Any = stack.enter_context(file.open("rb"))
            start, name = stream.read(4), str(file)
        except OSError as error:
            raise DataError(f"{file} cannot be read ({error.strerror}); give another file") from error
        if not start:
            raise DataError(f"{file} is empty; fetch it again")
        try:
            stream.seek(0)
            if start in (b"PK\x03\x04", b"PK\x05\x06"):  # zip; the latter has no members
                archive = stack.enter_context(zipfile.ZipFile(stream))
                stream = stack.enter_context(_member(archive, file, member))
                name = f"{file} ({stream.name})"
            elif start[:2] == b"\x1f\x8b":
                stream = stack.enter_context(gzip.GzipFile(fileobj=stream))
            yield stream, name
        except DataError:
            raise
        except DAMAGE as error:
            reason = error or type(error).__name__
            raise DataError(f"{file} is damaged ({reason}); delete it and fetch it again") from error


def _member(archive: zipfile.ZipFile, file: Path, member: str | None) -> IO[bytes]:
    """Opens a member of a zip archive; zipfile itself reads no more of it than the size declared."""
    if member is None:
        raise DataError(f"{file} is a zip archive; unpack it and give the file inside")
    names = archive.namelist()
    if not member:
        found = [name for name in names if name.lower().endswith(".json") and not name.startswith("__MACOSX")]
        if len(found) != 1:
            problem = f"holds {len(found)} JSON files instead of one"
            raise DataError(f"{file}: {problem}; unpack it and name one file or folder")
        member = found[0]
    if member not in names:
        shown = ", ".join(repr(name) for name in names[:5]) + (", ..." if len(names) > 5 else "")
        raise DataError(f"{file} does not hold {member} but {shown or 'nothing'}; give the archive that does")
    info = archive.getinfo(member)
    check_member(info, file)
    return archive.open(info)


def check_member(info: zipfile.ZipInfo, file: Path) -> None:
    """Raises DataError for a member of a zip archive that is encrypted, too large or packed in an unusual way."""
    member = info.filename
    if info.flag_bits & 0x1:
        raise DataError(f"{file}: {member} is encrypted; give an archive without a password")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others unpack without a limit in zipfile
        raise DataError(f"{file}: {member} is packed by method {info.compress_type}; pack it with deflate")
    if info.file_size > (limit := unpacked_limit(file)):
        raise DataError(f"{file}: {member} would unpack to {info.file_size:,} bytes, over {limit:,}; unpack it first")


def unpacked_limit(file: Path) -> int:
    """Returns how many bytes a file may unpack to."""
    return max(MIN_SIZE_LIMIT, MAX_EXPANSION * file.stat().st_size)


def check_unpacked(stream: BinaryIO, file: Path) -> None:
    """Raises DataError if far more of a file has been unpacked than its size suggests."""
    if stream.tell() > unpacked_limit(file):
        raise DataError(f"{file} unpacks to far more than its size suggests; unpack it first")
