"""Text from outside is shown as it is written, not as it would act on a terminal or a spreadsheet."""

import pytest

from crystalframer_jax.text import csv_cell, escaped, table

SHOWN = {
    "mp-1234": "mp-1234",
    "Größe µ 結晶": "Größe µ 結晶",
    "a\x1b[2Jb": "a\\x1b[2Jb",
    "two\nlines": "two\\nlines",
    "lone \udcf3": "lone \\udcf3",
    "right-to-left \u202e": "right-to-left \\u202e",
}


@pytest.mark.parametrize("text", SHOWN)
def test_invisible_characters_are_shown_escaped(text):
    assert escaped(text) == SHOWN[text]
    escaped(text).encode()


def test_formulas_are_quoted_and_numbers_are_not():
    assert [csv_cell(x) for x in ("=A1", "+cmd", "-x", "@x", "\tx")] == ["'=A1", "'+cmd", "'-x", "'@x", "'\tx"]
    assert [csv_cell(x) for x in ("-1.5", "+2e3", -3, None, "a=b")] == ["-1.5", "+2e3", -3, None, "a=b"]


def test_a_table_shows_what_is_invisible():
    lines = table(["a\x1b[2J"], [["b\nc"], ["é"]]).splitlines()
    assert [line.rstrip() for line in lines] == ["a\\x1b[2J", "--------", "b\\nc", "é"]
