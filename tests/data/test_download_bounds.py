"""Downloads take no more bytes, time, redirects or trust than they should, and replace no file of another."""

import datetime
import gzip
import io
import json
import os
import time
from email.utils import format_datetime

import pytest
import requests
from test_download import CONTENT, HALF, Server, answer, anything, assert_complete, honest, is_content, names, server

from crystalframer_jax.cli.prepare import prepare_main
from crystalframer_jax.data.io import requesting
from crystalframer_jax.data.io.download import download
from crystalframer_jax.data.records import DataError

__all__ = ["server"]  # a fixture

MINE = b"my only copy"


def endless(handler) -> None:
    """Sends zeros without end, and does not say how many."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(2_000):
        handler.wfile.write(bytes(1 << 16))


def endless_chunks(handler) -> None:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    for _ in range(2_000):
        handler.wfile.write(b"10000\r\n" + bytes(1 << 16) + b"\r\n")


@pytest.mark.parametrize(
    "bad", [endless, endless_chunks, answer(200, b"a", Content_Length="1000000000000"), answer(200, bytes(300_000))]
)
def test_no_more_than_a_file_may_have(server: Server, tmp_path, bad):
    url = server.url("/a", bad)
    with pytest.raises(DataError, match="gave more than the 200,000 bytes that the file may have"):
        download([url], tmp_path / "a", anything, waits_s=(), largest=200_000)
    assert not (tmp_path / "a").exists()
    assert names(tmp_path) == []
    server.url("/a", answer(200, b"right"))
    assert download([url], tmp_path / "a", anything, largest=200_000).read_bytes() == b"right"


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "x-unknown"])
def test_nothing_is_unpacked(server: Server, tmp_path, encoding):
    """300 kB may stand for 300 MB."""
    bomb = gzip.compress(bytes(30_000_000))
    url = server.url("/a", answer(body=bomb, Content_Encoding=encoding))
    with pytest.raises(DataError, match="a compressed answer"):
        download([url], tmp_path / "a", anything, waits_s=())
    assert names(tmp_path) == []


def slow_body(handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    drip(handler, b"x" * 1000)


def slow_head(handler) -> None:
    drip(handler, b"HTTP/1.1 200 OK\r\nA: " + b"x" * 1000)


def drip(handler, content: bytes) -> None:
    """Sends a byte at a time, each of them soon enough."""
    try:
        for number in range(len(content)):
            handler.wfile.write(content[number : number + 1])
            handler.wfile.flush()
            time.sleep(0.1)
    except OSError:  # the other side has gone
        pass


@pytest.mark.parametrize("slow", [slow_body, slow_head])
def test_no_longer_than_a_download_may_take(server: Server, tmp_path, slow):
    url, other = server.url("/a", slow), server.url("/b", honest())
    start = time.monotonic()
    with pytest.raises(DataError, match=r"takes too long; the same command goes on from here|no answer within"):
        download([url, other], tmp_path / "a", anything, waits_s=(), longest_s=0.5)
    assert time.monotonic() - start < 20


def test_tries_that_get_further_end_as_well(server: Server, tmp_path):
    url = server.url("/a", *[honest(sent=10)] * 10_000)
    with pytest.raises(DataError, match="takes too long"):
        download([url], tmp_path / "a", is_content, waits_s=(0.001,), longest_s=0.5)


@pytest.mark.parametrize(
    "target",
    ["http://example.org/a", "http://127.0.0.1:9/a", "//example.org/a", "file:///etc/passwd", "ftp://127.0.0.1/a"],
)
def test_redirects_lead_to_https_only(server: Server, tmp_path, target):
    url = server.url("/a", answer(302, b"", Location=target))
    with pytest.raises(DataError) as error:
        download([url], tmp_path / "a", anything, waits_s=())
    assert f"{url} gave a redirect that is not to https" in str(error.value)


@pytest.mark.parametrize("url", ["http://example.org/a", "file:///etc/passwd", "ftp://example.org/a"])
def test_urls_are_https(tmp_path, url):
    with pytest.raises(DataError, match="which is not https"):
        download([url], tmp_path / "a", anything, waits_s=())


class Answered:
    """A session that answers by a table: URL -> (status, headers)."""

    table: dict[str, tuple[int, dict[str, str]]]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def get(self, url, **kwargs):
        assert not kwargs["allow_redirects"]
        response = requests.Response()
        response.status_code, headers = self.table[url]
        response.headers.update(headers)
        response.url, response.raw = url, io.BytesIO()
        return response

    def get_redirect_target(self, response):
        return response.headers.get("Location") if response.is_redirect else None


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("http://127.0.0.1/a", "a redirect that is not to https"),  # not even to this machine
        ("http://example.org/b", "a redirect that is not to https"),
        ("file:///etc/passwd", "a redirect that is not to https"),
        ("https://other.example.org/b", "status 404"),
        ("/b", "status 404"),
        ("/a", "a failure (TooManyRedirects)"),
    ],
)
def test_https_stays_https(tmp_path, monkeypatch, target, said):
    monkeypatch.setattr(requesting, "_Session", Answered)
    Answered.table = {
        "https://example.org/a": (302, {"Location": target}),
        "https://example.org/b": (404, {}),
        "https://other.example.org/b": (404, {}),
    }
    with pytest.raises(DataError) as error:
        download(["https://example.org/a"], tmp_path / "a", anything, waits_s=())
    assert f"https://example.org/a gave {said}" in str(error.value)


def test_what_comes_with_a_redirect_is_not_read(server: Server, tmp_path):
    def send(handler) -> None:
        handler.send_response(302)
        handler.send_header("Location", "/real")
        handler.end_headers()
        for _ in range(1_000):
            handler.wfile.write(bytes(1 << 16))
            sent.append(1)

    sent: list[int] = []
    server.url("/real", honest())
    download([server.url("/a", send)], tmp_path / "a", is_content, waits_s=())
    assert_complete(tmp_path / "a")
    assert len(sent) < 1_000


def rest(**headers: str | None):
    """The rest of a part, whatever version is asked for."""

    def send(handler) -> None:
        start = int(handler.headers["Range"][6:-1])
        reach = f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"
        answer(206, CONTENT[start:], Content_Range=reach, **headers)(handler)

    return send


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"ETag": '"v1"'}, {}),
        ({"ETag": '"v1"'}, {"ETag": 'W/"v1"'}),
        ({"ETag": '"v1"'}, {"Last_Modified": "Wed, 18 Aug 2021 00:00:00 GMT"}),
        ({"ETag": '"v1"'}, {"ETag": '"v1"', "Content_Encoding": "gzip"}),
        ({"Last_Modified": "Wed, 18 Aug 2021 00:00:00 GMT"}, {}),
    ],
    ids=["none", "weak", "of another kind", "compressed", "none of Last-Modified"],
)
def test_a_rest_that_does_not_say_its_version_is_dropped(server: Server, tmp_path, first, second):
    old = bytes(len(CONTENT))
    url = server.url("/a", answer(200, old, sent=HALF, **first), rest(**second), honest('"v2"'))
    download([url], tmp_path / "a", anything, waits_s=(0.001, 0.001))
    assert server.ranges()[1] is not None and server.ranges()[2] is None
    assert_complete(tmp_path / "a")


def test_a_date_of_this_minute_is_no_version(server: Server, tmp_path):
    """The file may change again within the second."""
    now = format_datetime(datetime.datetime.now(datetime.UTC), usegmt=True)
    url = server.url("/a", answer(200, sent=HALF, Last_Modified=now), honest())
    download([url], tmp_path / "a", is_content, waits_s=(0.001,))
    assert server.ranges() == [None, None]


# Files of others


def test_a_file_that_was_not_downloaded_is_not_replaced(server: Server, tmp_path):
    url = server.url("/a", honest())
    (tmp_path / "a").write_bytes(MINE)
    with pytest.raises(DataError, match="/a was not put there by a download, so it is not replaced: move it away"):
        download([url], tmp_path / "a", is_content)
    with pytest.raises(DataError, match="/a was not put there by a download"):
        download([url], tmp_path / "a", anything)  # which would do as well, but is another one
    assert (tmp_path / "a").read_bytes() == MINE
    (tmp_path / "a").unlink()
    download([url], tmp_path / "a", is_content)
    assert_complete(tmp_path / "a")


@pytest.mark.parametrize("text", [MINE, b"[" * 100_000, b'{"url": 1}'])
def test_a_record_of_another_is_not_replaced(server: Server, tmp_path, text):
    (tmp_path / "a.download.json").write_bytes(text)
    with pytest.raises(DataError, match=r"a\.download\.json was not put there by a download"):
        download([server.url("/a", honest())], tmp_path / "a", is_content)
    assert (tmp_path / "a.download.json").read_bytes() == text


@pytest.mark.parametrize("name", ["a", ".a.part", ".a.part.json", "a.download.json"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_links_and_pipes_in_the_folder_of_downloads(server: Server, tmp_path, name, kind):
    outside, folder = tmp_path / "outside", tmp_path / "downloads"
    folder.mkdir()
    outside.write_bytes(MINE)
    if kind == "link":
        (folder / name).symlink_to(outside)
    else:
        os.mkfifo(folder / name)
    try:
        download([server.url("/a", honest())], folder / "a", is_content, waits_s=())
        assert_complete(folder / "a")
        assert json.loads((folder / "a.download.json").read_text())["size"] == len(CONTENT)
    except DataError as error:
        assert name in ("a", "a.download.json")
        assert f"{name} was not put there by a download" in str(error)
    assert outside.read_bytes() == MINE


def test_a_folder_that_is_a_link(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "downloads").symlink_to("outside")
    with pytest.raises(SystemExit, match="downloads is a link, through which nothing is written"):
        prepare_main(["--target_set=jarvis__megnet", f"--data_dir={tmp_path}"])
    assert names(tmp_path / "outside") == []
