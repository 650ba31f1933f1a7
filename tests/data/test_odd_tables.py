"""Tables as chemists have them: what Excel writes, labels that are no numbers, files with capital suffixes."""

import gzip

import pytest
from user_files import prepared, records, refused, write_cifs

from crystalframer_jax.data.custom import labels
from crystalframer_jax.data.custom.fields import CustomData
from crystalframer_jax.data.custom.source import custom_source
from crystalframer_jax.data.records import BadRecord, DataError, Record


def rows(source) -> list[tuple[str, tuple[float, ...]]]:
    found = list(source.records())
    assert all(isinstance(record, Record) for record in found), found
    return [(record.id, record.labels) for record in found]


EXPECTED = [(record["id"], (record["e_form"],)) for record in records()]


def table(cells, header: str = "", divider: str = ",", end: str = "\n") -> str:
    lines = [header] if header else []
    lines += [f"{record['id']}{divider}{cell}" for record, cell in zip(records(), cells, strict=True)]
    return end.join(lines) + end


NUMBERS = [record["e_form"] for record in records()]


# What is read all the same


@pytest.mark.parametrize(
    "content",
    [
        table(NUMBERS).encode(),
        table(NUMBERS, divider=";").encode(),
        table(NUMBERS, divider="\t").encode(),
        table(NUMBERS, end="\r\n").encode(),
        table(NUMBERS, end="\r").encode(),
        table(NUMBERS).encode("utf-8-sig"),
        table(NUMBERS, end="\r\n").encode("utf-16"),
        ("sep=;\r\n" + table(NUMBERS, divider=";", end="\r\n")).encode(),
        table(NUMBERS, divider=", ").encode(),
        table([f'"{number}"' for number in NUMBERS]).encode(),
        table([f"{number},," for number in NUMBERS]).encode(),
        ("\n\n" + table(NUMBERS, end="\n\n")).encode(),
        table([str(number).replace("-", "\u2212") for number in NUMBERS]).encode(),
    ],
)
@pytest.mark.parametrize("has_header", [False, True])
def test_dialects(tmp_path, content, has_header):
    """With a header as set.csv, without as id_prop.csv."""
    write_cifs(tmp_path)
    if has_header:
        text = content.decode("utf-16" if content[:2] == b"\xff\xfe" else "utf-8-sig")
        divider = next(c for c in ("\t", ";", ",") if c in text)
        marked = text.startswith("sep=")
        start, rest = (text.split("\n", 1)[0] + "\n", text.split("\n", 1)[1]) if marked else ("", text)
        header = divider.join(["id", "e"] + [""] * (rest.strip().splitlines()[0].count(divider) - 1))
        (tmp_path / "set.csv").write_bytes((f"{start}{header}\n" + rest).encode("utf-8-sig"))
        assert rows(custom_source(tmp_path / "set.csv", CustomData())) == EXPECTED
    else:
        (tmp_path / "id_prop.csv").write_bytes(content)
        assert rows(custom_source(tmp_path, CustomData())) == EXPECTED


@pytest.mark.parametrize("suffix", [".CIF", ".cif"])
@pytest.mark.parametrize("cell", ["", ".CIF", ".cif"])
def test_suffixes_in_capital_letters(tmp_path, suffix, cell):
    write_cifs(tmp_path, suffix=suffix)
    lines = [f"{record['id']}{cell},{record['e_form']}" for record in records()]
    (tmp_path / "ID_PROP.CSV").write_text("\n".join(lines))
    source = custom_source(tmp_path, CustomData())
    assert rows(source) == EXPECTED
    assert [record.load().num_atoms for record in source.records()] == [len(r["species"]) for r in records()]


def test_files_in_a_folder_beside_the_table(tmp_path):
    write_cifs(tmp_path / "crystals")
    (tmp_path / "set.csv").write_text(table(NUMBERS, "id,e"))
    assert rows(custom_source(tmp_path / "set.csv", CustomData())) == EXPECTED


def test_ids_with_blanks_quoted_commas_and_line_ends_of_windows(tmp_path):
    crystals = write_cifs(tmp_path, 2)
    for number, record in enumerate(crystals):
        (tmp_path / f"{record['id']}.cif").rename(tmp_path / f"my crystal {number}.cif")
    (tmp_path / "set.csv").write_bytes(b'file,"name, as used",e\r\nmy crystal 0,"a, b",1\r\n"my crystal 1","c",2\r\n')
    options = CustomData(id_column="name, as used")
    assert rows(custom_source(tmp_path / "set.csv", options)) == [("a, b", (1.0,)), ("c", (2.0,))]
    by_file = rows(custom_source(tmp_path / "set.csv", CustomData()))
    assert by_file == [("my crystal 0", (1.0,)), ("my crystal 1", (2.0,))]


def test_gzipped_tables(tmp_path):
    write_cifs(tmp_path)
    (tmp_path / "set.csv.gz").write_bytes(gzip.compress(table(NUMBERS, "id,e").encode()))
    assert rows(custom_source(tmp_path / "set.csv.gz", CustomData())) == EXPECTED
    (tmp_path / "bad.csv.gz").write_bytes(gzip.compress(table(NUMBERS, "id,e").encode())[:-20])
    with pytest.raises(DataError, match=r"bad\.csv\.gz is damaged"):
        custom_source(tmp_path / "bad.csv.gz", CustomData())


# Labels that are no numbers

WRONG = [
    ("-0,53", "decimal comma"),
    ("1.2 eV", "without its unit"),
    ("1.2eV/atom", "without its unit"),
    ("300 K", "without its unit"),
    ("12%", "without its unit"),
    ("1,234.5", "separators of thousands"),
    ("1.234,5", "separators of thousands"),
    ("1.2(3)", "without its uncertainty"),
    ("1.2 ± 0.1", "without its uncertainty"),
    ("<0.1", "instead of the bound"),
    ("1.5D-3", "with e instead of the d"),
]


@pytest.mark.parametrize(("cell", "reason"), WRONG)
def test_a_column_of_labels_that_are_no_numbers(tmp_path, cell, reason):
    """The first cell and its line are told, without and with a header, and with --targets."""
    write_cifs(tmp_path)
    shown = repr(cell).replace("'", "")
    (tmp_path / "id_prop.csv").write_text(table([f'"{cell}"'] * 12))
    with pytest.raises(DataError) as raised:
        custom_source(tmp_path, CustomData())
    assert f"id_prop.csv:1: target is '{shown}'" in str(raised.value) and reason in str(raised.value)
    (tmp_path / "set.csv").write_text(table([f'"{cell}"'] * 12, "id,e"))
    for options in (CustomData(), CustomData(targets=("e",))):
        with pytest.raises(DataError) as raised:
            custom_source(tmp_path / "set.csv", options)
        assert f"set.csv:2: e is '{shown}'" in str(raised.value) and reason in str(raised.value)
    (tmp_path / "set.csv").write_text(table([f'"{cell}"'] * 12))
    with pytest.raises(DataError, match=r"set\.csv:1: target is ") as raised:
        custom_source(tmp_path / "set.csv", CustomData())
    assert reason in str(raised.value)


def test_a_table_of_any_name_may_be_laid_out_as_id_prop(tmp_path):
    write_cifs(tmp_path)
    (tmp_path / "mine.csv").write_text(table(NUMBERS))
    assert rows(custom_source(tmp_path / "mine.csv", CustomData())) == EXPECTED


def test_a_column_of_words(tmp_path):
    write_cifs(tmp_path)
    (tmp_path / "id_prop.csv").write_text(table(["metal", "insulator"] * 6))
    with pytest.raises(DataError, match=r"no field holds numbers .* first: .*prop\.csv:1: target is 'metal'; write"):
        custom_source(tmp_path, CustomData())


@pytest.mark.parametrize(("cell", "reason"), WRONG)
def test_one_cell_that_is_no_number(tmp_path, cell, reason):
    write_cifs(tmp_path)
    (tmp_path / "set.csv").write_text(table([*NUMBERS[:5], f'"{cell}"', *NUMBERS[6:]], "id,e"))
    found = list(custom_source(tmp_path / "set.csv", CustomData()).records())
    (bad,) = (record for record in found if isinstance(record, BadRecord))
    assert bad.where.endswith("set.csv:7") and repr(cell) in bad.reason and reason in bad.reason
    assert len(found) == 12


def test_a_column_that_looks_like_a_target_is_told(tmp_path, capsys):
    write_cifs(tmp_path / "source")
    lines = ["id,e,gap,formula,note", *(f"{id},{label[0]},1.5 eV,NaCl,2H" for id, label in EXPECTED)]
    (tmp_path / "source" / "set.csv").write_text("\n".join(lines))
    made = prepared(tmp_path / "data", tmp_path / "source" / "set.csv", capsys)
    assert "warning: no target, although it looks like one:" in made.text and "set.csv:2: gap is '1.5 eV'" in made.text
    assert "gap is '1.5 eV'" in (made.folder / "warnings.csv").read_text()


@pytest.mark.parametrize("marker", ["NaN", "--", "", "na", "N/A", "null", "?", "#N/A", "<NA>", "inf", "-Infinity"])
def test_unknown_labels_are_counted(tmp_path, capsys, marker):
    write_cifs(tmp_path / "source")
    (tmp_path / "source" / "set.csv").write_text(table([marker, *NUMBERS[1:]], "id,e"))
    made = prepared(tmp_path / "data", tmp_path / "source" / "set.csv", capsys)
    assert "11 labels" in made.text and "1 without a label" in made.text
    assert EXPECTED[0][0] not in made.ids("train") + made.ids("val") + made.ids("test")


def test_a_decimal_comma_among_commas(tmp_path):
    """-0,53 in a table divided by commas is no pair of labels."""
    write_cifs(tmp_path)
    (tmp_path / "id_prop.csv").write_text(table([f"{number:.6f}".replace(".", ",") for number in NUMBERS]))
    with pytest.raises(DataError, match=r"id_prop\.csv:1: .* would be two labels; are they decimal commas"):
        custom_source(tmp_path, CustomData())
    (tmp_path / "set.csv").write_text(table([f"{number:.6f}".replace(".", ",") for number in NUMBERS], "id,e"))
    with pytest.raises(DataError, match=r"set\.csv:2: 3 cells instead of 2; .*are they decimal commas"):
        custom_source(tmp_path / "set.csv", CustomData())
    (tmp_path / "id_prop.csv").write_text(table(["3,12"] * 12))  # two labels, both whole numbers
    assert len(custom_source(tmp_path, CustomData()).targets) == 2


def test_numbers_of_rows_are_no_targets(tmp_path):
    write_cifs(tmp_path)
    lines = [f"{i},{id},{i},{i},{label[0]}" for i, (id, label) in enumerate(EXPECTED)]
    (tmp_path / "set.csv").write_text("\n".join(["Unnamed: 0,id,index,level_0,e", *lines]))
    assert [target.name for target in custom_source(tmp_path / "set.csv", CustomData()).targets] == ["e"]


def test_what_looks_like_a_label():
    """Names, formulas and paths do not."""
    for value in ("NaCl", "mp-10", "P 21/c", "2/m", "a.cif", "", None, 1.5, [1], "3 (calc)", "1 2 3 4\n5", "x" * 10**6):
        assert labels.complaint(value) == "", value


# Crystals listed twice


def duplicated(tmp_path, capsys, extra: list[str]):
    write_cifs(tmp_path / "source", 30)
    lines = [f"{record['id']},{record['e_form']}" for record in records(30)]
    (tmp_path / "source" / "id_prop.csv").write_text("\n".join([*lines, *extra]))
    return prepared(tmp_path / "data", tmp_path / "source", capsys)


def test_contradicting_labels_are_left_out(tmp_path, capsys):
    first, second = (record["id"] for record in records(2))
    made = duplicated(tmp_path, capsys, [f"{first},9.9", f"{second},8.8", f"{second},8.8"])
    used = made.ids("train") + made.ids("val") + made.ids("test")
    assert first not in used and second not in used and len(set(used)) == 26  # 28, of which rounding leaves two
    assert "5 with contradicting labels" in made.text and "contradicting labels (" in made.text
    skipped = (made.folder / "skipped.csv").read_text()
    found = [line.split(",")[0] for line in skipped.splitlines()[1:]]
    assert found.count(first) == 2 and found.count(second) == 3
    assert "9.9 at" in skipped and "id_prop.csv:31" in skipped


def test_copies_are_kept_once(tmp_path, capsys):
    first = records(1)[0]
    made = duplicated(tmp_path, capsys, [f"{first['id']},{first['e_form']!r}0"])
    used = made.ids("train") + made.ids("val") + made.ids("test")
    assert len(used) == len(set(used)) == 30
    assert "1 listed twice" in made.text and "id_prop.csv:1, which is used" in (made.folder / "skipped.csv").read_text()


def test_other_crystals_of_the_same_id_stay(tmp_path, capsys):
    """As the frames of a trajectory."""
    write_cifs(tmp_path / "source", 20)
    lines = ["file,id,e", *(f"{record['id']},same,{record['e_form']}" for record in records(20))]
    (tmp_path / "source" / "set.csv").write_text("\n".join(lines))
    made = prepared(tmp_path / "data", tmp_path / "source" / "set.csv", capsys)
    assert sum(len(made.columns[split]) for split in ("train", "val", "test")) == 20


# Labels that grow with the cell


@pytest.mark.parametrize("count", [60, 400])
def test_extensive_targets_are_told(tmp_path, capsys, count):
    write_cifs(tmp_path / "source", count)
    lines = ["id,per_atom,total"]
    for number, record in enumerate(records(count)):
        energy = -5 + 2 * ((7 * number) % 11 - 5) / 5
        lines.append(f"{record['id']},{energy},{energy * len(record['species'])}")
    (tmp_path / "source" / "set.csv").write_text("\n".join(lines))
    made = prepared(tmp_path / "data", tmp_path / "source" / "set.csv", capsys)
    assert "warning: total grows with the number of atoms" in made.text and "divide the labels" in made.text
    assert "per_atom grows" not in made.text
    assert "total grows" in (made.folder / "warnings.csv").read_text()


def test_what_is_left_out_of_random_splits_is_counted(tmp_path, capsys):
    write_cifs(tmp_path / "source", 24)
    (tmp_path / "source" / "id_prop.csv").write_text("\n".join(f"{r['id']},{r['e_form']}" for r in records(24)))
    made = prepared(tmp_path / "data", tmp_path / "source", capsys)
    assert "1 crystal is in no split: 1 left over" in made.text


def test_a_warning_of_a_structure_is_kept(tmp_path, capsys):
    write_cifs(tmp_path / "source", 12)
    first = records(1)[0]["id"]
    with (tmp_path / "source" / f"{first}.cif").open("a") as file:
        file.write("_chemical_formula_sum 'Xe9 Ne1'\n")
    (tmp_path / "source" / "id_prop.csv").write_text(table(NUMBERS))
    made = prepared(tmp_path / "data", tmp_path / "source", capsys)
    assert "UserWarning" not in made.text and "warnings of 1 of 12 records (crystals/warnings.csv), first:" in made.text
    told = (made.folder / "warnings.csv").read_text().splitlines()
    assert told[0] == "id,where,warning" and told[1].startswith(f"{first},") and "the file states Xe9 Ne1" in told[1]


def test_one_line_for_what_cannot_be_prepared(tmp_path):
    write_cifs(tmp_path / "source")
    (tmp_path / "source" / "id_prop.csv").write_text(table(["metal"] * 12))
    message = refused(tmp_path / "data", tmp_path / "source")
    assert "id_prop.csv:1: target is 'metal'; write a number with a decimal point, or na" in message
