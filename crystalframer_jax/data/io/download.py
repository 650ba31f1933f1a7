"""Downloads that survive broken connections, and are only taken for complete when they are."""

import contextlib
import datetime
import os
import re
import time
from collections.abc import Callable, Sequence
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import requests
from tqdm import tqdm

from crystalframer_jax.data.io.requesting import (
    Bounds,
    FailedError,
    PassingError,
    TimeOverError,
    TooLargeError,
    answer,
    next_chunk,
    reason,
)
from crystalframer_jax.data.records import DataError
from crystalframer_jax.files import FileError, open_to_append, read_json, sha256, write_json

LARGEST_FILE = 1 << 30  # bytes that are taken unless a source says otherwise
LARGEST_RECORD = 1 << 16  # bytes of what is written down of a download
LONGEST_S = 6 * 3600  # that one call may take; the next one goes on from there
SETTLED = datetime.timedelta(minutes=1)  # after which a file modified then is no longer modified within that second
BUSY = (408, 429)  # statuses below 500 after which another try may succeed


def download(
    urls: Sequence[str],
    file: Path,
    check: Callable[[Path], None],
    *,
    waits_s: Sequence[float] = (1, 3, 9),
    timeout_s: float = 30,
    longest_s: float = LONGEST_S,
    largest: int = LARGEST_FILE,
) -> Path:
    """Fetches a file from the first of several URLs that gives it, unless it was fetched before and is unchanged.

    Beside `file` its record is kept: URL, size, SHA-256 and date. What has arrived of a file is kept in `.FILE.part`,
    also after an error or a kill, and continued where the server confirms that it is of the same version.
    The caller sees to it that no other process downloads the same file. Connections are by https (http to this machine
    itself only), also where a server sends elsewhere, and nothing is unpacked on the way. A file of that name that was
    not downloaded is not replaced.

    Args:
      urls: forms of the URL of the same content.
      file: where to put it; only a complete file that passed `check` ever gets there.
      check: raises DataError if a file is not what is wanted.
      waits_s: pauses in seconds before new tries at one URL, after which the next URL has its turn. A try that got
        further than all before it starts them anew.
      timeout_s: longest time in seconds without an answer or new data.
      longest_s: longest time in seconds in all.
      largest: bytes that the file may have.

    Returns:
      `file`.

    Raises:
      DataError: no URL gave the file, it cannot be written, or another file is in its place.
    """
    record = file.with_name(f"{file.name}.download.json")
    recorded = _json_object(record)
    is_recorded = all(isinstance(recorded.get(key), str) for key in ("url", "sha256", "date"))
    before = ""
    try:
        if os.path.lexists(file):
            before = sha256(file)
            if recorded.get("size") == file.stat().st_size and recorded.get("sha256") == before:
                return file
            if not is_recorded:
                _require_wanted(file, check)
            tqdm.write(f"{file} is not as {record.name} says; downloading it again")
        elif os.path.lexists(record) and not is_recorded:
            raise _in_the_way(record)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = _Part(file)
        bounds = Bounds(timeout_s, time.monotonic() + longest_s, largest)
        url = _first_that_works(urls, part, check, waits_s, bounds)
        content = {
            "url": url,
            "size": part.size(),
            "sha256": sha256(part.content),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        if before not in ("", content["sha256"]) and not is_recorded:
            raise _in_the_way(file)
        os.replace(part.content, file)
        write_json(record, content)
        part.restart()
    except FileError as error:
        raise _in_the_way(file) from error
    except OSError as error:
        raise DataError(
            f"{file} cannot be written ({error.strerror or error}); make room or name another --data_dir"
        ) from error
    return file


def figshare_urls(file_id: int | str) -> tuple[str, ...]:
    """Gives the URLs of a file on figshare, those that have answered scripts first."""
    return (
        f"https://ndownloader.figshare.com/files/{file_id}",
        f"https://api.figshare.com/v2/file/download/{file_id}",
        f"https://figshare.com/ndownloader/files/{file_id}",
    )


def jarvis_location(name: str) -> tuple[str, tuple[str, ...]]:
    """Gives the JSON file in the archive of a data set of jarvis-tools, and the URLs of the archive.

    Raises:
      DataError: jarvis-tools does not know the data set.
    """
    from jarvis.db.figshare import get_db_info  # imports matplotlib

    locations = get_db_info()
    if name not in locations:
        raise DataError(
            f"{name} is not a data set of the jarvis-tools installed; update it with pip install -U jarvis-tools"
        )
    url, member = locations[name][:2]
    figshare_id = re.search(r"figshare\.com/.*?(\d+)$", url)
    others = figshare_urls(figshare_id[1]) if figshare_id else ()
    return member, tuple(dict.fromkeys((url, *others)))


def _require_wanted(file: Path, check: Callable[[Path], None]) -> None:
    """Raises DataError if a file that was not downloaded is not what is wanted either: it is not replaced."""
    try:
        check(file)
    except DataError as error:
        raise _in_the_way(file) from error


def _in_the_way(path: Path) -> DataError:
    return DataError(f"{path} was not put there by a download, so it is not replaced: move it away, then run again")


def _json_object(file: Path) -> dict[str, Any]:
    """Reads a JSON object; an empty one if there is none that can be read."""
    try:
        return read_json(file, LARGEST_RECORD)
    except FileError:
        return {}


class _Part:
    """What has arrived of a file, and of which version of which URL it is; "" if not known: nothing can be added."""

    def __init__(self, file: Path):
        self.file = file
        self.content = file.with_name(f".{file.name}.part")
        self._origin = file.with_name(f".{file.name}.part.json")
        origin = _json_object(self._origin)
        self.url, self.version = str(origin.get("url", "")), str(origin.get("version", ""))

    def size(self) -> int:
        """Counts the bytes that have arrived."""
        return self.content.stat().st_size if self.content.is_file() and not self.content.is_symlink() else 0

    def restart(self, url: str = "", version: str = "") -> None:
        """Forgets what has arrived, for content of that origin; without a version it cannot be continued later."""
        self._origin.unlink(missing_ok=True)  # first: content is never taken for that of another origin
        self.content.unlink(missing_ok=True)
        self.url, self.version = url, version
        if version:
            write_json(self._origin, {"url": url, "version": version})


def _first_that_works(
    urls: Sequence[str], part: _Part, check: Callable[[Path], None], waits_s: Sequence[float], bounds: Bounds
) -> str:
    """Fills the part and returns the URL that gave it; raises DataError if none does."""
    answers = []
    for url in sorted(urls, key=lambda url: url != part.url):  # the one that the part is of comes first
        furthest, waits = part.size(), list(waits_s)
        while True:  # as the Retry of urllib3 ends where content begins
            try:
                _inspect(part, check, _receive(url, part, bounds))
                return url
            except FailedError as error:
                if part.size() > furthest:
                    furthest, waits = part.size(), list(waits_s)
                if not (isinstance(error, PassingError) and waits):
                    answers.append(f"{url} gave {error}")
                    break
            except TimeOverError as error:
                answers.append(f"{url}: {error}")
                raise _not_given(urls, part, answers) from error
            time.sleep(waits.pop(0))
    raise _not_given(urls, part, answers)


def _not_given(urls: Sequence[str], part: _Part, answers: list[str]) -> DataError:
    return DataError(
        f"{part.file} could not be downloaded: {'; '.join(answers)}; "
        f"fetch one of them with a browser, say {urls[0]}, and hand the file over with --source=PATH"
    )


def _receive(url: str, part: _Part, bounds: Bounds) -> bool:
    """Adds what one request brings to the part; returns whether it was continued. Raises FailedError."""
    headers = {"Accept-Encoding": "identity"}  # so that sizes are those of the file
    start = part.size() if part.url == url and part.version else 0
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": part.version}
    try:
        with answer(url, headers, bounds) as response:
            resumed = start > 0 and response.status_code == 206
            if (resumed and not _continues(response, part)) or (start and response.status_code == 416):
                part.restart()
                raise PassingError("another part than was asked for")
            if not resumed:
                _require_file(response)
                part.restart(url, _version(response))
            try:
                _write(response, part, bounds)
            except TooLargeError:
                part.restart()
                raise
    except requests.RequestException as error:
        raise PassingError(reason(error, bounds.timeout_s)) from error
    return resumed


def _continues(response: requests.Response, part: _Part) -> bool:
    """Tells whether partial content begins where the part ends, and is said to be of its version."""
    starts_there = response.headers.get("Content-Range", "").startswith(f"bytes {part.size()}-")
    return starts_there and _version(response) == part.version


def _require_file(response: requests.Response) -> None:
    status = response.status_code
    if status != 200:
        kind = PassingError if status >= 500 or status in BUSY else FailedError
        raise kind(f"status {status}" + " without a file" * (status == 202))
    if response.headers.get("Content-Type", "").strip().lower().startswith("text/html"):
        raise FailedError("an HTML page")
    if _is_encoded(response):
        raise PassingError("a compressed answer, which was not asked for")


def _is_encoded(response: requests.Response) -> bool:
    """Tells whether the server compresses what it sends: sizes and positions are then not those of the file."""
    return response.headers.get("Content-Encoding", "identity").lower() != "identity"


def _version(response: requests.Response) -> str:
    """Gives what tells versions of the content apart, to the byte; "" if nothing does."""
    etag, modified = response.headers.get("ETag", ""), response.headers.get("Last-Modified", "")
    if _is_encoded(response) or etag.startswith("W/"):  # a weak tag is shared by contents that differ in bytes
        return ""
    with contextlib.suppress(TypeError, ValueError):  # a date that is not one
        age = parsedate_to_datetime(response.headers.get("Date", "")) - parsedate_to_datetime(modified)
        if not etag and age >= SETTLED:
            return modified
    return etag


def _write(response: requests.Response, part: _Part, bounds: Bounds) -> None:
    """Appends what arrives to the part; raises an error if that is less than the server said."""
    start, length = part.size(), response.headers.get("Content-Length", "")
    total = start + int(length) if re.fullmatch(r"\d{1,18}", length) else None
    if of_range := re.search(r"/(\d{1,18})$", response.headers.get("Content-Range", "")):
        total = int(of_range[1])
    bounds.check_size(total or 0)
    bar = {"total": total, "initial": start, "desc": part.file.name, "dynamic_ncols": True, "disable": None}
    size = start
    with open_to_append(part.content) as file, tqdm.wrapattr(file, "write", **bar) as stream:
        while chunk := next_chunk(response):
            size += len(chunk)
            bounds.check_size(size)
            stream.write(chunk)
            bounds.left_s()
    if total is not None and part.size() != total:
        raise PassingError(f"{part.size():,} of {total:,} bytes")


def _inspect(part: _Part, check: Callable[[Path], None], resumed: bool) -> None:
    """Removes the part and raises FailedError if it is not the file wanted, which may be due to its pieces."""
    with part.content.open("rb") as stream:
        start = stream.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    kind = FailedError
    if part.size() == 0:
        what = "an empty file"
    elif start.startswith((b"<!doctype", b"<html")):
        what = "an HTML page"
    else:
        try:
            return check(part.content)
        except DataError as error:
            what, kind = f"another file than expected ({error})", PassingError if resumed else FailedError
    part.restart()
    raise kind(what)
