"""What structure files leave in doubt is kept in the report of a target set, as clean as predictions print it."""

import csv
import shutil
import warnings

from support import ROOT

from crystalframer_jax.cli.prepare import prepare_main

ODD = ROOT / "tests" / "structures" / "odd_files"
DOUBTFUL = {
    "attached_hydrogens.cif": "left out hydrogens of water or others without coordinates",
    "vacancy_va.cif": "left out site Va1 (line 18): Va is no atom but a vacancy",
    "POSCAR_in_nanometres": "closer than any bond",
}


def prepared(folder, names):
    """The warnings of a set of those files and sound ones."""
    source = folder / "source"
    source.mkdir()
    sound = [f"sound{i}.cif" for i in range(12)]
    for i, name in enumerate(sound):
        text = (ODD / "unicode_minus.cif").read_text(encoding="utf-8").replace("_a 6.0", f"_a {6 + i / 10}")
        (source / name).write_text(text, encoding="utf-8")
    for name in names:
        shutil.copy(ODD / name, source)
    (source / "id_prop.csv").write_text("".join(f"{name},{i}\n" for i, name in enumerate([*sound, *names])))
    arguments = ["--target_set=odd", f"--source={source}", f"--data_dir={folder / 'data'}", "--workers=1"]
    with warnings.catch_warnings(record=True) as stray:
        warnings.simplefilter("always")
        assert not prepare_main(arguments)
    assert not [warning for warning in stray if issubclass(warning.category, UserWarning)]
    return folder / "data" / "odd" / "crystals" / "warnings.csv"


def test_warnings_are_kept(tmp_path, capsys):
    file = prepared(tmp_path, list(DOUBTFUL))
    with file.open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["id"] for row in rows] == [name.removesuffix(".cif") for name in DOUBTFUL]
    for row, text in zip(rows, DOUBTFUL.values(), strict=True):
        assert text in row["warning"] and row["id"] in row["warning"]
    printed = capsys.readouterr()
    assert "UserWarning" not in printed.out + printed.err
    assert "warnings of 3 of 15 records (crystals/warnings.csv), first: " in printed.out + printed.err


def test_there_is_no_report_without_warnings(tmp_path, capsys):
    assert not prepared(tmp_path, []).exists()
