"""Files from anybody are read within bounds; files are written whole, and never through links."""

import os

import pytest

from crystalframer_jax.files import (
    FileError,
    append_line,
    parse_json,
    read_bytes,
    read_json,
    replacing,
    write_csv,
    write_json,
)

NOT_OBJECTS = {
    "null": b"null",
    "a list": b"[]",
    "deep": b"[" * 100_000,
    "an integer of 5,000 digits": b'{"a": ' + b"9" * 5_000 + b"}",
    "a high bit": b'{"a\xf3": 1}',
    "empty": b"",
}


@pytest.mark.parametrize("kind", NOT_OBJECTS)
def test_what_is_no_json_object_is_one_line_that_names_the_file(tmp_path, kind):
    file = tmp_path / "config.json"
    file.write_bytes(NOT_OBJECTS[kind])
    with pytest.raises(FileError, match=r"config\.json is damaged") as error:
        read_json(file)
    assert "\n" not in str(error.value)
    with pytest.raises(FileError, match="line 3 is damaged"):
        parse_json(NOT_OBJECTS[kind], "line 3")


def test_only_regular_files_of_a_limited_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"12345")
    with pytest.raises(FileError, match="pipe is not a regular file"):
        read_bytes(tmp_path / "pipe", 10)
    with pytest.raises(FileError, match=r"not a regular file|cannot be read"):
        read_bytes(tmp_path, 10)
    with pytest.raises(FileError, match="larger than the 4 bytes"):
        read_bytes(tmp_path / "large", 4)
    with pytest.raises(FileError, match="none is missing"):
        read_bytes(tmp_path / "none", 4)
    assert read_bytes(tmp_path / "large", 5) == b"12345"
    assert read_bytes(tmp_path / "large", 2**60) == b"12345"  # takes the memory of what is there


def test_nothing_is_written_through_a_link(tmp_path):
    outside, folder = tmp_path / "outside.txt", tmp_path / "run"
    outside.write_text("mine")
    folder.mkdir()
    for name in ("summary.json", f".summary.json.{os.getpid()}", "environment.jsonl"):
        (folder / name).symlink_to(outside)
    write_json(folder / "summary.json", {"a": 1})
    assert read_json(folder / "summary.json") == {"a": 1} and not (folder / "summary.json").is_symlink()
    with pytest.raises(FileError, match=r"environment\.jsonl is not a regular file"):
        append_line(folder / "environment.jsonl", "line")
    os.mkfifo(folder / "log.jsonl")
    with pytest.raises(FileError, match=r"log\.jsonl is not a regular file"):
        append_line(folder / "log.jsonl", "line")
    assert outside.read_text() == "mine"
    append_line(folder / "new.jsonl", "first")
    append_line(folder / "new.jsonl", "second")
    assert (folder / "new.jsonl").read_text() == "first\nsecond\n"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"a": 1})
    with pytest.raises(RuntimeError), replacing(file) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(file) == {"a": 1} and list(tmp_path.iterdir()) == [file]


def test_spreadsheets_see_no_formulas(tmp_path):
    write_csv(tmp_path / "a.csv", ["id", "value"], [["=1+1", -1.5], ["@SUM", "-2e3"], ["plain", None]])
    assert (tmp_path / "a.csv").read_text().split("\n") == ["id,value", "'=1+1,-1.5", "'@SUM,-2e3", "plain,", ""]


def test_the_header_of_a_table_is_no_formula_either(tmp_path):
    write_csv(tmp_path / "table.csv", ["=A1 (eV)", "b"], [])
    assert (tmp_path / "table.csv").read_text() == "'=A1 (eV),b\n"


def test_text_that_is_no_text_in_utf8_does_not_keep_a_table_from_being_written(tmp_path):
    write_csv(tmp_path / "table.csv", ["id"], [["a\udc80"], ["\ud800"], ["é"]])
    assert (tmp_path / "table.csv").read_text(encoding="utf-8") == "id\na\\udc80\n\\ud800\né\n"
