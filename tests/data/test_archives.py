"""Records out of JSON, zip and gzip files, whole, damaged and hostile."""

import gzip
import itertools
import json
import math
import random
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import pytest

from crystalframer_jax.data.io import streams as archives
from crystalframer_jax.data.io.streams import check_zip, json_lines, json_records
from crystalframer_jax.data.records import DataError

MEMBER = "set.json"
RECORDS = [
    {"id": f"crystal-{number}", "é𝄞": 'Ω\\"\n é𝄞', "coords": [[0.5, -1e-7, 3], []], "energy": None, "ok": True}
    for number in range(40)
]


def packed(folder: Path, kind: str, text: str | bytes) -> Path:
    """A file of that kind with the text; its name says nothing about it."""
    content = text.encode() if isinstance(text, str) else text
    file = folder / "data.bin"
    if kind == "zip":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("../../before", "no")
            archive.writestr(MEMBER, content)
            archive.writestr("/after.json", "no")
    else:
        file.write_bytes(gzip.compress(content) if kind == "gzip" else content)
    return file


def read(file: Path) -> list:
    numbered = list(json_records(file, MEMBER))
    assert [number for number, _ in numbered] == list(range(1, len(numbered) + 1))
    return [record for _, record in numbered]


@pytest.fixture(params=["zip", "plain", "gzip"])
def kind(request) -> str:
    return request.param


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_records_of_every_kind_of_file(tmp_path, kind, indent, ascii_only):
    assert read(packed(tmp_path, kind, json.dumps(RECORDS, indent=indent, ensure_ascii=ascii_only))) == RECORDS


@pytest.mark.parametrize("chunk", range(1, 51))
def test_chunk_borders_may_be_anywhere(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(archives, "CHUNK_BYTES", chunk)
    records = [*RECORDS[:3], {"numbers": [1e300, -0.0, 12345678901234567890, 1.5e-7], "literals": [True, False, None]}]
    for ascii_only, indent in itertools.product((True, False), (None, 1)):
        text = "\ufeff \n" + json.dumps(records, ensure_ascii=ascii_only, indent=indent) + " \n"
        assert read(packed(tmp_path, "plain", text)) == records


@pytest.mark.parametrize("chunk", range(1, 51))
def test_elements_that_are_not_objects(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(archives, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(archives, "_as_record", lambda value: value)
    text = '[1.25e+10,12 , -7,"a,]b",NaN,-Infinity,Infinity,true,null,[[1]],1e5,"\\ud834\\udd1e\\\\",12345678.1E-5]'
    assert str(read(packed(tmp_path, "plain", text))) == str(json.loads(text))


def test_the_reason_in_place_of_what_is_no_object(tmp_path):
    found = read(packed(tmp_path, "plain", '[{}, 1, null, "a", [{}]]'))
    types = ["int", "NoneType", "str", "list"]
    assert found == [{}, *(f"is not a JSON object but of type {name}" for name in types)]


def test_literals_that_json_does_not_have(tmp_path, kind):
    (record,) = read(packed(tmp_path, kind, '[{"a": NaN, "b": Infinity, "c": -Infinity}]'))
    assert math.isnan(record["a"])
    assert (record["b"], record["c"]) == (math.inf, -math.inf)


@pytest.mark.parametrize("text", ["[]", " [ \n ] ", "\ufeff[]"])
def test_no_records(tmp_path, kind, text):
    assert read(packed(tmp_path, kind, text)) == []


@pytest.mark.parametrize("chunk", [7, 1 << 20])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1}', "is not a list of records at its top level, at character 1;"),
        ("   ", "is not a list of records at its top level, at character 4;"),
        ("<html>", "is not a list of records"),
        ("[", "ends before record 1, at character 2"),
        ('[{"a": 1}', "no end of the list after record 1, at character 10"),
        ('[{"a": 1},', "ends before record 2, at character 11"),
        ('[{"a": 1}, {"b": "', "ends within record 2"),
        ('[{"a": 1}, {"b"', "ends within record 2"),
        ('[{"a": 1}, tru', "ends within record 2"),
        ('[{"a": 1}] ]', "goes on after the end of the list, at character 12"),
        ('[{"a": 1}][{"a": 1}]', "goes on after the end of the list"),
        ('[{"a": 1} {"a": 1}]', "has no comma and no end of the list after record 1, at character 11"),
        ('[{"a": 1},]', "record 2"),
        ("[,]", "record 1"),
        ('[{"a": 1}, {a: 1, "long enough": "to be no cut"}]', "is not JSON in record 2 (Expecting property name"),
        ('[{"a": "\n", "long enough": "to be no cut"}]', "is not JSON in record 1 (Invalid control character"),
        ('[{"a": ' + "9" * 5000 + "}]", "is not JSON in record 1"),
        ("[" * 100_000, "is not JSON in record 1"),
        (b'[{"a": 1}, {"b": "\xff\xff"}]', "is not UTF-8 text"),
        ("[]".encode("utf-16"), "is not UTF-8 text"),
    ],
    ids=str,
)
def test_text_that_is_no_list(tmp_path, monkeypatch, kind, text, says, chunk):
    monkeypatch.setattr(archives, "CHUNK_BYTES", chunk)
    file = packed(tmp_path, kind, text)
    with pytest.raises(DataError) as raised:
        read(file)
    message = str(raised.value)
    assert message.startswith(f"{file} ({MEMBER}) " if kind == "zip" else f"{file} ")
    assert says in message
    assert "\n" not in message


def test_text_that_is_cut_anywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "CHUNK_BYTES", 16)
    text = json.dumps(RECORDS[:2], ensure_ascii=False).encode()
    for length in range(len(text)):
        with pytest.raises(DataError):
            read(packed(tmp_path, "plain", text[:length]))


@pytest.mark.parametrize("kind", ["zip", "gzip"])
def test_files_that_are_cut_anywhere(tmp_path, kind):
    file = packed(tmp_path, kind, json.dumps([{"x": random.Random(n).random()} for n in range(2000)]))
    content = file.read_bytes()
    for length in random.Random(0).sample(range(1, len(content)), 60):
        file.write_bytes(content[:length])
        with pytest.raises(DataError, match=r"is damaged|is not a list|UTF-8"):  # a few bytes do not show what it is
            read(file)
        if kind == "zip":
            with pytest.raises(DataError):
                check_zip(MEMBER)(file)


@pytest.mark.parametrize("kind", ["zip", "gzip"])
def test_a_changed_byte_never_gives_other_records(tmp_path, kind):
    records = [{"x": random.Random(n).random()} for n in range(500)]
    file = packed(tmp_path, kind, json.dumps(records))
    content = file.read_bytes()
    rng = random.Random(1)
    for _ in range(300):
        place = rng.randrange(len(content))
        file.write_bytes(content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :])
        try:
            found = read(file)
        except DataError as error:
            assert str(file) in str(error)
        else:
            assert found == records


@pytest.mark.parametrize("kind", ["zip", "gzip"])
def test_a_wrong_checksum(tmp_path, kind):
    text = json.dumps([{"x": 1.5}])
    file = packed(tmp_path, kind, text)
    crc = struct.pack("<I", zlib.crc32(text.encode()))
    file.write_bytes(file.read_bytes().replace(crc, b"abcd"))
    with pytest.raises(DataError, match=r"is damaged \(.*CRC.*\); delete it and fetch it again"):
        read(file)


def test_an_empty_file(tmp_path):
    file = tmp_path / "a.json"
    file.touch()
    for reader in (read, lambda file: list(json_lines(file)), check_zip(MEMBER)):
        with pytest.raises(DataError, match=r"a\.json is empty; fetch it again"):
            reader(file)


def test_no_file(tmp_path):
    with pytest.raises(DataError, match=r"no\.json cannot be read \(No such file"):
        read(tmp_path / "no.json")
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path)


# Zip archives


def test_only_the_named_member_is_read(tmp_path):
    file = tmp_path / "a.zip"
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("../set.json", "/set.json", "folder/set.json", "set.json/", "C:\\set.json", "SET.JSON"):
            archive.writestr(name, "[]")
    with pytest.raises(DataError) as raised:
        read(file)
    assert f"does not hold {MEMBER} but '../set.json', '/set.json', 'folder/set.json'" in str(raised.value)
    assert "SET.JSON" not in str(raised.value)  # the sixth
    with pytest.raises(DataError, match="does not hold"):
        check_zip(MEMBER)(file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip"]


def test_an_archive_without_members(tmp_path):
    file = tmp_path / "a.zip"
    zipfile.ZipFile(file, "w").close()
    with pytest.raises(DataError, match=r"does not hold set\.json but nothing"):
        read(file)


def test_an_encrypted_member(tmp_path):
    file = packed(tmp_path, "zip", "[]")
    content = bytearray(file.read_bytes())
    for header, flags in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        place = -1
        while (place := content.find(header, place + 1)) >= 0:
            content[place + flags] |= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"set\.json is encrypted"):
        read(file)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_without_a_limit(tmp_path, method):
    file = tmp_path / "a.zip"
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr(MEMBER, "[]")
    with pytest.raises(DataError, match=f"packed by method {method}"):
        read(file)


@pytest.mark.parametrize("kind", ["zip", "gzip"])
def test_a_bomb(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(archives, "MIN_SIZE_LIMIT", 1 << 16)
    monkeypatch.setattr(archives, "CHUNK_BYTES", 1 << 12)
    file = packed(tmp_path, kind, b"[" + b" " * 20_000_000 + b"]")
    assert 200 * file.stat().st_size < 20_000_000
    tracemalloc.start()
    with pytest.raises(DataError, match="unpack"):
        read(file)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_a_member_larger_than_it_declares(tmp_path):
    text = "[" + json.dumps({"x": "y" * 1000}) + " " * 100_000 + "]"
    file = packed(tmp_path, "zip", text)
    declared = struct.pack("<I", 2000)
    file.write_bytes(file.read_bytes().replace(struct.pack("<I", len(text)), declared))
    with pytest.raises(DataError, match=r"is damaged \(.*CRC"):
        read(file)


def test_check_of_an_archive(tmp_path):
    file = packed(tmp_path, "zip", json.dumps(RECORDS))
    check_zip(MEMBER)(file)
    with pytest.raises(DataError, match=r"does not hold other\.json"):
        check_zip("other.json")(file)
    with pytest.raises(DataError, match=r"set\.json is empty"):
        check_zip(MEMBER)(packed(tmp_path, "zip", ""))
    for kind, text in (("plain", "<html>"), ("gzip", "[]"), ("plain", "PK")):
        with pytest.raises(DataError, match="is not a zip archive"):
            check_zip(MEMBER)(packed(tmp_path, kind, text))


# Long files and long records


def test_memory_does_not_grow_with_the_file(tmp_path):
    line = json.dumps({"id": "crystal", "text": "0.125 " * 5000})
    count = 50_000_000 // len(line)
    array, lines = tmp_path / "a.json.gz", tmp_path / "a.jsonl.gz"
    with gzip.open(array, "wt", 1) as first, gzip.open(lines, "wt", 1) as second:
        first.write("[")
        for number in range(count):
            first.write("," * (number > 0) + line)
            second.write(line + "\n")
        first.write("]")
    tracemalloc.start()
    for records in (json_records(array, MEMBER), json_lines(lines)):
        assert sum(1 for _ in records) == count
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * archives.CHUNK_BYTES


def test_a_record_longer_than_many_chunks_is_parsed_a_few_times(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "CHUNK_BYTES", 64)
    record = {"numbers": [0.5] * 100_000}
    file = packed(tmp_path, "plain", json.dumps([record, record]))
    parsed = []

    class Counting(json.JSONDecoder):
        def raw_decode(self, text, start=0):
            parsed.append(len(text) - start)
            return super().raw_decode(text, start)

    monkeypatch.setattr(archives.json, "JSONDecoder", Counting)
    assert read(file) == [record, record]
    assert sum(parsed) < 6 * file.stat().st_size


@pytest.mark.parametrize("text", ['[{"a": "' + "b" * 5000 + '"}]', "[[" + "1," * 5000 + "1]]", "[" + "1" * 3000])
def test_a_record_that_is_too_long(tmp_path, monkeypatch, text):
    monkeypatch.setattr(archives, "CHUNK_BYTES", 64)
    monkeypatch.setattr(archives, "MAX_RECORD_CHARS", 1000)
    with pytest.raises(DataError, match="has a record 1 of more than 1,000 characters, at character 2"):
        read(packed(tmp_path, "plain", text))


# JSON lines


@pytest.mark.parametrize("kind", ["plain", "gzip"])
def test_lines(tmp_path, kind):
    text = "\ufeff" + '{"a": "é"}\r\n\n  \n{"a": NaN}\n{"a": \nnull\n[1]\n{"b": 1} {"c": 2}\n' + '{"d": 4}'
    found = dict(json_lines(packed(tmp_path, kind, text)))
    assert list(found) == [1, 4, 5, 6, 7, 8, 9]
    assert (found[1], found[9]) == ({"a": "é"}, {"d": 4})
    assert math.isnan(found[4]["a"])
    assert found[5].startswith("is not JSON (Expecting value")
    assert found[6] == "is not a JSON object but of type NoneType"
    assert found[7] == "is not a JSON object but of type list"
    assert found[8].startswith("is not JSON (Extra data")


def test_lines_that_break_the_parser(tmp_path):
    lines = [b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b'{"a": "\xff"}', b'{"a": 1}']
    found = dict(json_lines(packed(tmp_path, "plain", b"\n".join(lines))))
    assert [type(record) for record in found.values()] == [str, str, str, dict]


def test_lines_of_a_damaged_file(tmp_path):
    file = packed(tmp_path, "gzip", json.dumps({"a": 1}) + "\n")
    file.write_bytes(file.read_bytes()[:-6])
    with pytest.raises(DataError, match="is damaged"):
        list(json_lines(file))


def test_a_line_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_RECORD_CHARS", 1000)
    with pytest.raises(DataError, match="line 2 is longer than 1,000 bytes"):
        list(json_lines(packed(tmp_path, "plain", "{}\n" + "1" * 1001 + "\n")))


def test_lines_of_a_zip_archive(tmp_path):
    with pytest.raises(DataError, match="is a zip archive; unpack it"):
        list(json_lines(packed(tmp_path, "zip", "{}")))
