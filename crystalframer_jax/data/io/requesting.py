"""Requests within bounds: of time and size, to https only, with nothing unpacked and no redirect read."""

import http.client
import time
from collections.abc import Generator
from queue import Empty, Queue
from threading import Thread
from typing import Any, NamedTuple
from urllib.parse import urljoin, urlsplit

import requests
import urllib3

CHUNK_BYTES = 1 << 16
MAX_REDIRECTS = 5
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")  # that may do without TLS


class FailedError(Exception):
    """A try that did not give the file; the text says what it gave."""


class PassingError(FailedError):
    """One after which another try may succeed."""


class TooLargeError(FailedError):
    """One whose file is larger than it may be."""


class TimeOverError(Exception):
    """The time is over; no other URL is tried."""


class Bounds(NamedTuple):
    """What a download may take."""

    timeout_s: float  # without an answer or new data
    end: float  # on the monotonic clock
    largest: int  # bytes

    def left_s(self) -> float:
        """Returns the seconds left; raises TimeOverError if there are none."""
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeOverError("it takes too long; the same command goes on from here")
        return left

    def check_size(self, size: int) -> None:
        """Raises TooLargeError if a file is larger than it may be."""
        if size > self.largest:
            raise TooLargeError(f"more than the {self.largest:,} bytes that the file may have")


class _Session(requests.Session):
    """A session that leaves redirects alone: it would read all that comes with them, even if it does not follow."""

    def resolve_redirects(self, *_: Any, **__: Any) -> Generator[Any, None, None]:
        yield from ()


def answer(url: str, headers: dict[str, str], bounds: Bounds) -> requests.Response:
    """Asks for a URL, and for those that it is redirected to; the content is still to be read."""
    with _Session() as session:
        for _ in range(MAX_REDIRECTS + 1):
            parts = urlsplit(url)
            if parts.scheme != "https" and (parts.scheme, parts.hostname in LOCAL_HOSTS) != ("http", True):
                raise FailedError(f"{parts.scheme}://{parts.hostname}, which is not https")
            response = _head_of(session, url, headers, bounds)
            target = session.get_redirect_target(response)
            if target is None:
                return response
            response.close()  # what comes with it is not read
            url = urljoin(url, target)
            if urlsplit(url).scheme != "https" and urlsplit(url)[:2] != parts[:2]:
                raise FailedError("a redirect that is not to https")
    raise requests.TooManyRedirects


def _head_of(session: requests.Session, url: str, headers: dict[str, str], bounds: Bounds) -> requests.Response:
    """Sends a request; in a thread, as a server that sends its headers slowly cannot be interrupted otherwise."""
    found: Queue[requests.Response | Exception] = Queue()

    def ask() -> None:
        try:
            found.put(session.get(url, headers=headers, stream=True, timeout=bounds.timeout_s, allow_redirects=False))
        except Exception as error:  # raised below
            found.put(error)

    Thread(target=ask, daemon=True).start()
    try:
        answer = found.get(timeout=min(bounds.left_s(), 2 * bounds.timeout_s))
    except Empty as error:
        bounds.left_s()  # if that is what is over, it says so
        raise requests.Timeout from error
    if isinstance(answer, Exception):
        raise answer
    return answer


def next_chunk(response: requests.Response) -> bytes:
    """Reads what has arrived, without waiting for more than that; errors are those of requests."""
    try:
        return response.raw.read1(CHUNK_BYTES, decode_content=False)
    except urllib3.exceptions.ReadTimeoutError as error:
        raise requests.Timeout from error
    except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError, ValueError) as error:
        raise requests.exceptions.ChunkedEncodingError(error) from error


def reason(error: requests.RequestException, timeout_s: float) -> str:
    """Tells in a few words why a request failed."""
    reasons = {
        requests.Timeout: f"no answer within {timeout_s:g} s",
        requests.exceptions.SSLError: "no trusted connection (TLS)",
        requests.exceptions.ProxyError: "no connection through the proxy",
        requests.ConnectionError: "no connection",
        requests.RequestException: f"a failure ({type(error).__name__})",
    }
    return next(reason for kind, reason in reasons.items() if isinstance(error, kind))
