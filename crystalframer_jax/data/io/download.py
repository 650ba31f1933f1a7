"""Downloads that survive broken connections, and are only taken for complete when they are."""

import datetime
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import requests
from tqdm import tqdm

from crystalframer_jax.data.records import DataError
from crystalframer_jax.files import sha256, write_json

CHUNK_BYTES = 1 << 16
BUSY = (408, 429)  # statuses below 500 after which another try may succeed


def download(
    urls: Sequence[str],
    file: Path,
    check: Callable[[Path], None],
    *,
    waits_s: Sequence[float] = (1, 3, 9),
    timeout_s: float = 30,
) -> Path:
    """Fetch a file from the first of several URLs that gives it, unless it was fetched before and is unchanged.

    Beside `file` its record is kept: URL, size, SHA-256 and date. What has arrived of a file is kept in `.FILE.part`,
    also after an error or a kill, and continued where the server confirms that it is of the same version.
    The caller sees to it that no other process downloads the same file.

    Args:
      urls: forms of the URL of the same content.
      file: where to put it; only a complete file that passed `check` ever gets there.
      check: raises DataError if a file is not what is wanted.
      waits_s: pauses in seconds before new tries at one URL, after which the next URL has its turn. A try that got
        further than all before it starts them anew.
      timeout_s: longest time in seconds without an answer or new data.

    Returns:
      `file`.

    Raises:
      DataError: no URL gave the file, or it cannot be written.
    """
    record = file.with_name(f"{file.name}.download.json")
    if file.exists():
        if _is_as_recorded(file, record):
            return file
        tqdm.write(f"{file} is not as {record.name} says; downloading it again")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = _Part(file)
        url = _first_that_works(urls, part, check, waits_s, timeout_s)
        content = {
            "url": url,
            "size": part.size(),
            "sha256": sha256(part.content),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        os.replace(part.content, file)
        write_json(record, content)
        part.remove()
    except OSError as error:
        raise DataError(
            f"{file} cannot be written ({error.strerror or error}); make room or choose another folder, then run again"
        ) from error
    return file


def figshare_urls(file_id: int | str) -> tuple[str, ...]:
    """The URLs of a file on figshare, those that have answered scripts first."""
    return (
        f"https://ndownloader.figshare.com/files/{file_id}",
        f"https://api.figshare.com/v2/file/download/{file_id}",
        f"https://figshare.com/ndownloader/files/{file_id}",
    )


def jarvis_location(name: str) -> tuple[str, tuple[str, ...]]:
    """The JSON file in the archive of a data set of jarvis-tools, and the URLs of the archive.

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


class _NoFileError(Exception):
    """A URL that does not give the file; the text says what it gave."""


class _BrokenError(Exception):
    """A try that failed while another may succeed; the text says how."""


class _Part:
    """What has arrived of a file, and of which version of which URL it is."""

    def __init__(self, file: Path):
        self.file = file
        self.content = file.with_name(f".{file.name}.part")
        self._origin = file.with_name(f".{file.name}.part.json")

    def origin(self) -> dict[str, str]:
        """`url` and the `version` that the server named; empty if they are not known, so nothing can be added."""
        try:
            origin = json.loads(self._origin.read_text())
            return {key: str(origin[key]) for key in ("url", "version")}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def size(self) -> int:
        """Bytes that have arrived."""
        return self.content.stat().st_size if self.content.exists() else 0

    def restart(self, url: str, version: str) -> None:
        """Begin anew, with that origin; without a version of the server it cannot be continued later."""
        self.remove()
        if version:
            write_json(self._origin, {"url": url, "version": version})

    def remove(self) -> None:
        """Forget all that has arrived."""
        self._origin.unlink(missing_ok=True)  # first: content is never taken for that of another origin
        self.content.unlink(missing_ok=True)


def _is_as_recorded(file: Path, record: Path) -> bool:
    try:
        recorded = json.loads(record.read_text())
        return bool(recorded["size"] == file.stat().st_size and recorded["sha256"] == sha256(file))
    except (OSError, ValueError, KeyError, TypeError):  # no record, or none that can be read
        return False


def _first_that_works(
    urls: Sequence[str], part: _Part, check: Callable[[Path], None], waits_s: Sequence[float], timeout_s: float
) -> str:
    """Fills the part; the URL that gave it. Raises DataError if none does."""
    begun = part.origin().get("url")
    answers = []
    for url in sorted(urls, key=lambda url: url != begun):  # the one that the part is of comes first
        try:
            _fetch(url, part, check, waits_s, timeout_s)
            return url
        except _NoFileError as error:
            answers.append(f"{url} gave {error}")
    raise DataError(
        f"{part.file} could not be downloaded: {'; '.join(answers)}; "
        f"fetch one of them with a browser, say {urls[0]}, and hand the file over with --source=PATH"
    )


def _fetch(url: str, part: _Part, check: Callable[[Path], None], waits_s: Sequence[float], timeout_s: float) -> None:
    """Fills the part from one URL, in several tries. Raises _NoFileError."""
    furthest, waits = part.size(), list(waits_s)
    while True:
        try:
            resumed = _receive(url, part, timeout_s)
            return _inspect(part, check, resumed)
        except _BrokenError as error:
            if part.size() > furthest:
                furthest, waits = part.size(), list(waits_s)
            if not waits:
                raise _NoFileError(str(error)) from error
        time.sleep(waits.pop(0))


def _receive(url: str, part: _Part, timeout_s: float) -> bool:
    """One request, with what arrives added to the part; whether it was continued. Raises _NoFileError, _BrokenError."""
    headers = {"Accept-Encoding": "identity"}  # so that sizes are those of the file
    origin, start = part.origin(), part.size()
    if origin.get("url") == url and start:
        headers |= {"Range": f"bytes={start}-", "If-Range": origin["version"]}
    try:
        with requests.get(url, headers=headers, stream=True, timeout=timeout_s) as response:
            resumed = "Range" in headers and response.status_code == 206
            if "Range" in headers and (response.status_code == 416 or (resumed and not _continues(response, part))):
                part.remove()
                raise _BrokenError("another part than was asked for")
            if not resumed:
                _require_file(response)
                part.restart(url, _version(response))
            _write(response, part)
    except requests.RequestException as error:
        raise _BrokenError(_reason(error, timeout_s)) from error
    return resumed


def _continues(response: requests.Response, part: _Part) -> bool:
    """Whether partial content begins where the part ends, and is of its version."""
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    same_version = _version(response) in ("", part.origin()["version"])  # it need not be repeated
    return found is not None and int(found[1]) == part.size() and same_version and not _is_encoded(response)


def _require_file(response: requests.Response) -> None:
    status = response.status_code
    if status >= 500 or status in BUSY:
        raise _BrokenError(f"status {status}")
    if status != 200:
        raise _NoFileError(f"status {status}" + " without a file" * (status == 202))
    if response.headers.get("Content-Type", "").strip().lower().startswith("text/html"):
        raise _NoFileError("an HTML page")


def _is_encoded(response: requests.Response) -> bool:
    """Whether the server compresses what it sends, so that sizes and positions are not those of the file."""
    return response.headers.get("Content-Encoding", "identity").lower() != "identity"


def _version(response: requests.Response) -> str:
    """What tells versions of the content apart; "" if nothing does."""
    etag = response.headers.get("ETag", "")
    if _is_encoded(response) or etag.startswith("W/"):  # a weak tag is shared by contents that differ in bytes
        return ""
    return etag or response.headers.get("Last-Modified", "")


def _write(response: requests.Response, part: _Part) -> None:
    """Append what arrives to the part. Raises _BrokenError if that is not all."""
    total = _total(response, part.size())
    progress = tqdm(
        total=total,
        initial=part.size(),
        desc=part.file.name,
        unit="B",
        unit_scale=True,
        dynamic_ncols=True,
        disable=None,
    )
    with progress, part.content.open("ab") as stream:
        for chunk in response.iter_content(CHUNK_BYTES):
            stream.write(chunk)
            progress.update(len(chunk))
    if total is not None and part.size() != total:
        raise _BrokenError(f"{part.size():,} of {total:,} bytes")


def _total(response: requests.Response, start: int) -> int | None:
    """Size of the whole file in bytes, if the server says it."""
    of_range = re.search(r"/(\d+)$", response.headers.get("Content-Range", ""))
    if of_range:
        return int(of_range[1])
    length = response.headers.get("Content-Length", "")
    return start + int(length) if length.isdigit() and not _is_encoded(response) else None


def _inspect(part: _Part, check: Callable[[Path], None], resumed: bool) -> None:
    """Raises _NoFileError if what has arrived is not the file wanted, _BrokenError if that may be due to its parts."""
    try:
        with part.content.open("rb") as stream:
            start = stream.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
        if part.size() == 0:
            raise _NoFileError("an empty file")
        if start.startswith((b"<!doctype", b"<html")):
            raise _NoFileError("an HTML page")
        check(part.content)
    except DataError as error:
        part.remove()
        kind = _BrokenError if resumed else _NoFileError
        raise kind(f"another file than expected ({error})") from error
    except _NoFileError:
        part.remove()
        raise


def _reason(error: requests.RequestException, timeout_s: float) -> str:
    if isinstance(error, requests.Timeout):
        return f"no answer within {timeout_s:g} s"
    if isinstance(error, requests.exceptions.SSLError):
        return "no trusted connection (TLS)"
    if isinstance(error, requests.exceptions.ProxyError):
        return "no connection through the proxy"
    return "no connection" if isinstance(error, requests.ConnectionError) else f"a failure ({type(error).__name__})"
