"""Downloads against a server that breaks, lies and changes its mind."""

import gzip
import hashlib
import http.server
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from crystalframer_jax.data.io.download import download, figshare_urls, jarvis_location
from crystalframer_jax.data.records import DataError

CONTENT = np.random.default_rng(0).bytes(1_000_003)
HALF = 500_000
WAITS = (0.001, 0.001)


class Server:
    """Answers each path from its list of answers, the last of which is repeated; keeps the headers of all requests."""

    def __init__(self) -> None:
        self.answers: dict[str, list[Callable]] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.requests.append((self.path, dict(self.headers)))
                answers = server.answers[self.path]
                answer = answers.pop(0) if len(answers) > 1 else answers[0]
                answer(self)
                self.close_connection = True

            def log_message(self, *args) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def url(self, path: str, *answers: Callable) -> str:
        self.answers[path] = list(answers)
        return f"http://127.0.0.1:{self._server.server_port}{path}"

    def ranges(self) -> list[str | None]:
        return [headers.get("Range") for _, headers in self.requests]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    running = Server()
    yield running
    running.close()


def answer(status: int = 200, body: bytes = CONTENT, sent: int | None = None, **headers: str | None) -> Callable:
    """An answer whose headers promise `body`, of which the first `sent` bytes are sent; None drops a header."""

    def send(handler) -> None:
        handler.send_response(status)
        for name, value in ({"Content_Length": str(len(body)), "Connection": "close"} | headers).items():
            if value is not None:
                handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body if sent is None else body[:sent])

    return send


def honest(etag: str = '"v1"', content: bytes = CONTENT, sent: int | None = None, **headers: str | None) -> Callable:
    """Answers Range with If-Range as servers should."""

    def send(handler) -> None:
        asked = handler.headers.get("Range")
        if asked is None or handler.headers.get("If-Range") != etag:
            return answer(200, content, sent, ETag=etag, **headers)(handler)
        start = int(asked.removeprefix("bytes=").removesuffix("-"))
        reach = {"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        return answer(206, content[start:], sent, ETag=etag, **reach)(handler)

    return send


def reset(handler) -> None:
    """Closes the connection without an answer, by a reset."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    handler.connection.close()
    handler.wfile = open("/dev/null", "wb")  # noqa: SIM115, it only takes the flush after the answer


def is_content(file: Path) -> None:
    if file.read_bytes() != CONTENT:
        raise DataError(f"{file} is not the content")


def anything(file: Path) -> None:
    """Every file will do."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_complete(file: Path) -> None:
    assert file.read_bytes() == CONTENT
    assert names(file.parent) == [file.name, f"{file.name}.download.json"]


def test_a_file_and_its_record(server, tmp_path):
    url = server.url("/a", honest())
    file = tmp_path / "new" / "a.zip"
    assert download([url], file, is_content) == file
    assert_complete(file)
    record = json.loads((tmp_path / "new" / "a.zip.download.json").read_text())
    assert record.pop("date").startswith("20")
    assert record == {"url": url, "size": len(CONTENT), "sha256": hashlib.sha256(CONTENT).hexdigest()}


def test_a_complete_file_is_not_fetched_again(server, tmp_path):
    url = server.url("/a", honest())
    download([url], tmp_path / "a", is_content)
    download([url], tmp_path / "a", is_content)
    assert len(server.requests) == 1


@pytest.mark.parametrize("change", ["content", "size", "record", "no record", "record is a list"])
def test_a_file_that_is_not_as_recorded_is_fetched_again(server, tmp_path, capsys, change):
    url = server.url("/a", honest())
    file = download([url], tmp_path / "a", is_content)
    record = tmp_path / "a.download.json"
    if change == "content":
        file.write_bytes(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))
    elif change == "size":
        file.write_bytes(CONTENT[:-1])
    elif change == "no record":
        record.unlink()
    else:
        record.write_text("{" if change == "record" else "[]")
    capsys.readouterr()
    download([url], file, is_content)
    assert_complete(file)
    assert len(server.requests) == 2
    assert capsys.readouterr().out == f"{file} is not as a.download.json says; downloading it again\n"


BAD = {
    "empty 202": (answer(202, b""), "status 202 without a file"),
    "202 with a file": (answer(202), "status 202"),
    "empty 200": (answer(200, b""), "an empty file"),
    "204": (answer(204, b""), "status 204"),
    "206 that was not asked for": (answer(206), "status 206"),
    "403": (answer(403, b"no"), "status 403"),
    "404": (answer(404, b"no"), "status 404"),
    "HTML by type": (answer(200, b"hello", Content_Type="text/html; charset=utf-8"), "an HTML page"),
    "HTML by doctype": (answer(200, b"\n <!DOCTYPE html><p>"), "an HTML page"),
    "HTML by tag": (answer(200, b"\xef\xbb\xbf<HTML>"), "an HTML page"),
    "503": (answer(503, b""), "status 503"),
    "reset": (reset, "no connection"),
    "half": (answer(sent=HALF), "a failure (ChunkedEncodingError)"),
    "longer length": (answer(Content_Length=str(len(CONTENT) + 1)), "a failure (ChunkedEncodingError)"),
    "shorter length": (answer(Content_Length="1000"), "another file than expected"),
    "another file": (answer(200, b"PK"), "another file than expected"),
    "broken chunks": (answer(Transfer_Encoding="chunked", Content_Length=None), "a failure (ChunkedEncodingError)"),
}


@pytest.mark.parametrize("case", BAD)
def test_the_next_url_is_tried(server, tmp_path, case):
    bad = server.url("/bad", BAD[case][0])
    good = server.url("/good", honest())
    download([bad, good], tmp_path / "a", is_content, waits_s=WAITS)
    assert_complete(tmp_path / "a")
    assert json.loads((tmp_path / "a.download.json").read_text())["url"] == good


@pytest.mark.parametrize("case", BAD)
def test_what_no_url_gives_is_an_error_with_the_remedy(server, tmp_path, case):
    bad, said = BAD[case]
    urls = [server.url("/bad", bad), server.url("/gone", answer(404, b""))]
    with pytest.raises(DataError) as raised:
        download(urls, tmp_path / "a", is_content, waits_s=WAITS)
    message = str(raised.value)
    assert message.startswith(f"{tmp_path / 'a'} could not be downloaded: {urls[0]} gave {said}")
    assert f"{urls[1]} gave status 404" in message
    assert message.endswith(f"with a browser, say {urls[0]}, and hand the file over with --source=PATH")
    assert "\n" not in message
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "a.download.json").exists()


@pytest.mark.parametrize("failure", [reset, answer(503, b""), answer(500, b"<html>"), answer(429, b""), answer(sent=0)])
def test_a_passing_failure_is_tried_again(server, tmp_path, failure):
    url = server.url("/a", failure, failure, honest())
    download([url], tmp_path / "a", is_content, waits_s=WAITS)
    assert_complete(tmp_path / "a")


def test_refusals_are_not_tried_again(server, tmp_path):
    url = server.url("/a", answer(404, b""))
    with pytest.raises(DataError):
        download([url], tmp_path / "a", is_content, waits_s=WAITS)
    assert len(server.requests) == 1


def test_nobody_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/a"
        with pytest.raises(DataError, match=r"gave no connection; fetch .* --source=PATH"):
            download([url, url], tmp_path / "a", is_content, waits_s=WAITS)
    assert names(tmp_path) == []


def test_a_silent_server(server, tmp_path):
    done = threading.Event()
    url = server.url("/a", lambda handler: done.wait(5) and None)
    with pytest.raises(DataError, match=r"no answer within 0\.1 s"):
        download([url], tmp_path / "a", is_content, waits_s=(), timeout_s=0.1)
    done.set()


def test_a_broken_download_is_continued(server, tmp_path):
    url = server.url("/a", honest(sent=HALF), honest(sent=1000), honest())
    download([url], tmp_path / "a", is_content, waits_s=WAITS)
    assert_complete(tmp_path / "a")
    starts = [int(asked.removeprefix("bytes=").removesuffix("-")) for asked in server.ranges()[1:] if asked]
    assert len(starts) == 2
    assert 0 < starts[0] <= starts[1] <= HALF + 1000
    assert server.requests[1][1]["If-Range"] == '"v1"'


def test_a_try_that_gets_further_renews_the_waits(server, tmp_path):
    url = server.url("/a", *[honest(sent=100_000)] * 9, honest())
    download([url], tmp_path / "a", is_content, waits_s=(0.001,))
    assert_complete(tmp_path / "a")


def test_a_download_is_continued_by_the_next_call(server, tmp_path):
    other = server.url("/other", answer(404, b""))
    url = server.url("/a", honest(sent=HALF))
    with pytest.raises(DataError):
        download([other, url], tmp_path / "a", is_content, waits_s=())
    assert names(tmp_path) == [".a.part", ".a.part.json"]
    arrived = (tmp_path / ".a.part").stat().st_size
    assert 0 < arrived <= HALF
    server.url("/a", honest())
    download([other, url], tmp_path / "a", is_content, waits_s=())
    assert server.requests[-1][0] == "/a"  # the URL that the part is of comes first
    assert server.requests[-2][0] == "/a"
    assert server.ranges()[-1] == f"bytes={arrived}-"
    assert_complete(tmp_path / "a")


def test_last_modified_serves_where_there_is_no_etag(server, tmp_path):
    date = "Wed, 18 Aug 2021 00:00:00 GMT"
    url = server.url("/a", answer(sent=HALF, Last_Modified=date), honest())
    with pytest.raises(DataError):
        download([url], tmp_path / "a", is_content, waits_s=())
    download([url], tmp_path / "a", is_content, waits_s=())
    assert server.requests[1][1]["If-Range"] == date
    assert_complete(tmp_path / "a")


@pytest.mark.parametrize("headers", [{}, {"ETag": 'W/"v1"'}, {"ETag": '"v1"', "Content_Encoding": "gzip"}])
def test_what_has_no_strong_version_is_not_continued(server, tmp_path, headers):
    body = gzip.compress(CONTENT) if "Content_Encoding" in headers else CONTENT
    url = server.url("/a", answer(body=body, sent=HALF, **headers), honest())
    download([url], tmp_path / "a", is_content, waits_s=WAITS)
    assert server.ranges() == [None, None]
    assert_complete(tmp_path / "a")


def partial(start: int, etag: str = '"v1"', status: int = 206) -> Callable:
    reach = f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"
    return answer(status, CONTENT[start:], ETag=etag, Content_Range=reach)


@pytest.mark.parametrize(
    "second",
    [
        honest('"v2"'),
        answer(200),
        answer(416, b"", Content_Range="bytes */5"),
        partial(7),
        answer(206, CONTENT),
        answer(206, CONTENT, Content_Range="nonsense"),
        lambda handler: partial(int(handler.headers["Range"][6:-1]), '"v2"')(handler),
    ],
    ids=["new ETag", "no ranges", "416", "wrong start", "no start", "no range", "ignores If-Range"],
)
def test_a_part_of_another_version_is_dropped(server, tmp_path, second):
    old = bytes(len(CONTENT))
    url = server.url("/a", honest('"v1"', old, sent=HALF), second, honest('"v2"'))
    download([url], tmp_path / "a", is_content, waits_s=WAITS)
    assert server.ranges()[1] is not None
    assert_complete(tmp_path / "a")


def test_a_part_damaged_on_disk_is_dropped(server, tmp_path):
    url = server.url("/a", honest(sent=HALF))
    with pytest.raises(DataError):
        download([url], tmp_path / "a", is_content, waits_s=())
    part = tmp_path / ".a.part"
    part.write_bytes(bytes(part.stat().st_size))
    server.url("/a", honest())
    download([url], tmp_path / "a", is_content, waits_s=WAITS)
    assert [asked is not None for asked in server.ranges()] == [False, True, False]
    assert_complete(tmp_path / "a")


@pytest.mark.parametrize("origin", [None, "", "[]", '{"url": 1}'])
def test_a_part_of_unknown_origin_is_dropped(server, tmp_path, origin):
    (tmp_path / ".a.part").write_bytes(b"of something else")
    if origin is not None:
        (tmp_path / ".a.part.json").write_text(origin)
    download([server.url("/a", honest())], tmp_path / "a", is_content)
    assert server.ranges() == [None]
    assert_complete(tmp_path / "a")


def test_a_part_of_another_url_is_dropped(server, tmp_path):
    with pytest.raises(DataError):
        download([server.url("/old", honest(content=bytes(HALF), sent=1000))], tmp_path / "a", is_content, waits_s=())
    download([server.url("/a", honest())], tmp_path / "a", is_content)
    assert server.ranges()[-1] is None
    assert_complete(tmp_path / "a")


def test_redirects_are_followed_with_the_range(server, tmp_path):
    server.url("/real", honest(sent=HALF), honest())
    url = server.url("/a", answer(302, b"", Location="/real"))
    download([url], tmp_path / "a", is_content, waits_s=WAITS)
    assert [path for path, _ in server.requests] == ["/a", "/real", "/a", "/real"]
    assert server.ranges()[3] is not None
    assert_complete(tmp_path / "a")


def test_redirects_in_a_circle(server, tmp_path):
    url = server.url("/a", answer(302, b"", Location="/a"))
    with pytest.raises(DataError, match="TooManyRedirects"):
        download([url], tmp_path / "a", is_content, waits_s=())


@pytest.mark.parametrize("body", [CONTENT, b"x" * 10])
def test_a_compressed_answer_is_refused(server, tmp_path, body):
    url = server.url("/a", answer(body=gzip.compress(body), Content_Encoding="gzip"))
    with pytest.raises(DataError, match=r"gave a compressed answer, which was not asked for; fetch .* --source=PATH"):
        download([url], tmp_path / "a", anything, waits_s=())
    assert names(tmp_path) == [] and server.requests[0][1]["Accept-Encoding"] == "identity"


def test_the_old_file_stays_until_there_is_a_new_one(server, tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(DataError):
        download([server.url("/a", answer(sent=HALF))], tmp_path / "a", is_content, waits_s=())
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_folder_that_cannot_be_written(server, tmp_path):
    (tmp_path / "folder").write_text("a file")
    with pytest.raises(DataError, match="cannot be written"):
        download([server.url("/a", honest())], tmp_path / "folder" / "a", is_content)


def test_figshare_urls():
    assert figshare_urls(12) == (
        "https://ndownloader.figshare.com/files/12",
        "https://api.figshare.com/v2/file/download/12",
        "https://figshare.com/ndownloader/files/12",
    )


@pytest.mark.parametrize(
    ("name", "member", "figshare_id"),
    [
        ("dft_3d_2021", "jdft_3d-8-18-2021.json", 29204826),
        ("megnet", "megnet.json", 26724977),
        ("oqmd_3d_no_cfid", "all_oqmd.json", 26790182),
    ],
)
def test_locations_of_jarvis_tools(name, member, figshare_id):
    assert jarvis_location(name) == (member, figshare_urls(figshare_id))


def test_an_url_that_is_not_of_figshare_stays_alone(monkeypatch):
    from jarvis.db import figshare

    found = {
        "a": ["https://example.org/files/1", "a.json"],
        "b": ["https://figshare.com/ndownloader/files/7", "b.json"],
    }
    monkeypatch.setattr(figshare, "get_db_info", lambda: found)
    assert jarvis_location("a") == ("a.json", ("https://example.org/files/1",))
    first, second, its_own = figshare_urls(7)
    assert jarvis_location("b") == ("b.json", (its_own, first, second))


def test_a_name_that_jarvis_tools_does_not_know():
    with pytest.raises(DataError, match="dft_4d is not a data set of the jarvis-tools"):
        jarvis_location("dft_4d")


def in_pieces(size: int, says_length: bool) -> Callable:
    """Answers a range with `size` bytes at most, in the whole range that it claims if it does not say the length."""

    def send(handler) -> None:
        start = int(handler.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        piece = CONTENT[start : start + size]
        last = (start + len(piece) if says_length else len(CONTENT)) - 1
        length = {} if says_length else {"Content_Length": None}
        reach = {"Content_Range": f"bytes {start}-{last}/{len(CONTENT)}"}
        answer(206, piece, ETag='"v1"', **reach, **length)(handler)

    return send


@pytest.mark.parametrize("says_length", [True, False])
def test_partial_content_that_ends_early_is_gone_on_with(server, tmp_path, says_length):
    """The size of the whole is that of Content-Range; nothing is missing, whatever the check of the content allows."""
    size = len(CONTENT) // 4
    url = server.url("/a", honest(sent=size), in_pieces(size, says_length))
    assert_complete(download([url], tmp_path / "a", anything, waits_s=[0.0, 0.0]))
    assert len(server.ranges()) == 4 + (len(CONTENT) % 4 > 0)
