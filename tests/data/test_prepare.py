"""scripts/prepare_data.py: archives in the layouts of the twelve benchmark targets, and users' own crystals."""

import csv
import dataclasses
import json
import math
import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pymatgen.core import Structure
from small_sets import CUTOFF, assert_same_dataset, raw_records

from crystalframer_jax.cli import prepare as prepare_cli
from crystalframer_jax.cli.prepare import prepare_main
from crystalframer_jax.config import TrainConfig
from crystalframer_jax.data import datasets
from crystalframer_jax.data.registry import TARGET_SETS
from crystalframer_jax.data.splits import SplitFacts, record_hash
from crystalframer_jax.data.store import Dataset, load_dataset

RECORDS = raw_records(60)
FIELDS = {  # of each archive: id and labels
    "jdft_3d-8-18-2021.json": (
        "jid",
        ("formation_energy_peratom", "optb88vdw_total_energy", "optb88vdw_bandgap", "mbj_bandgap", "ehull"),
    ),
    "megnet.json": ("id", ("e_form", "gap pbe")),
    "all_oqmd.json": ("_oqmd_entry_id", ("_oqmd_delta_e", "_oqmd_stability", "_oqmd_band_gap")),
}
ARCHIVE_OF = {
    "jarvis__dft_3d_2021": "jdft_3d-8-18-2021.json",
    "jarvis__dft_3d_2021-mbj_bandgap": "jdft_3d-8-18-2021.json",
    "jarvis__dft_3d_2021-ehull": "jdft_3d-8-18-2021.json",
    "jarvis__megnet": "megnet.json",
    "jarvis__oqmd_3d": "all_oqmd.json",
    "jarvis__oqmd_3d-bandgap": "all_oqmd.json",
}
PICKLED = {"jarvis__megnet-bulk_modulus": "bulk", "jarvis__megnet-shear_modulus": "shear"}


@pytest.fixture(autouse=True)
def short_rows(monkeypatch):
    monkeypatch.setattr(prepare_cli, "TrainConfig", lambda: TrainConfig(cutoff_radius=CUTOFF))


def label_of(number: int, field: str) -> float:
    """A label that tells the record and the field."""
    return number + len(field) / 100


def atoms_of(record: dict[str, Any], cartesian: bool = False) -> dict[str, Any]:
    """A crystal as JARVIS writes it, blanks in element names included."""
    coords = np.array(record["frac_coords"])
    coords = coords @ np.array(record["lattice"]) if cartesian else coords
    return {
        "lattice_mat": record["lattice"],
        "coords": coords.tolist(),
        "elements": [symbol + " " for symbol in record["species"]],
        "cartesian": cartesian,
        "props": [""] * len(record["species"]),
    }


def archive(folder: Path, member: str, changes: dict[int, dict] | None = None) -> Path:
    """An archive in the layout of the real one, with 60 records."""
    id_field, fields = FIELDS[member]
    records = []
    for number, record in enumerate(RECORDS):
        id = 1000 + number if id_field.startswith("_oqmd") else record["id"]
        labels = {field: label_of(number, field) for field in fields}
        content = {id_field: id, "atoms": atoms_of(record, number % 2 == 1), **labels, "desc": [0.1] * 50}
        records.append(content | (changes or {}).get(number, {}))
    file = folder / f"{member}.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as stream:
        stream.writestr(member, json.dumps(records))
    return file


def pickles(folder: Path, word: str) -> Path:
    """The three files of an elastic set."""
    parts = {"train": RECORDS[:40], "val": RECORDS[40:50], "test": RECORDS[50:]}
    for split, records in parts.items():
        contents = [
            {
                "id": record["id"],
                f"{word} modulus": np.float64(label_of(RECORDS.index(record), word)),
                "atoms": atoms_of(record),
            }
            for record in records
        ]
        (folder / f"{word}_megnet_{split}.pkl").write_bytes(pickle.dumps(contents))
    return folder


def prepare(folder: Path, name: str, *flags: str) -> None:
    assert prepare_main([f"--target_set={name}", f"--data_dir={folder / 'data'}", *map(str, flags)]) == 0


def opened(folder: Path, name: str, *targets: str, cutoff: float = CUTOFF) -> Dataset:
    return load_dataset(folder / "data" / name, targets, cutoff)


def failure(folder: Path, name: str, *flags: str) -> str:
    """The message that the command ends with."""
    with pytest.raises(SystemExit) as raised:
        prepare(folder, name, *flags)
    assert str(raised.value).startswith("error: ")
    return str(raised.value)


def assert_crystals(dataset: Dataset, numbers: list[int]) -> None:
    """The table holds these of the RECORDS."""
    for row, number in enumerate(numbers):
        record = RECORDS[number]
        atoms = slice(*dataset.table.atom_offset[row : row + 2])
        lattice = np.array(record["lattice"])
        np.testing.assert_allclose(dataset.table.lattice[row], lattice)
        np.testing.assert_allclose(dataset.table.position[atoms], np.array(record["frac_coords"]) @ lattice, atol=1e-9)
    assert len(dataset.table) == len(numbers)


@pytest.mark.parametrize("name", ARCHIVE_OF)
def test_archives_of_jarvis_tools(tmp_path, name, capsys):
    file = archive(tmp_path, ARCHIVE_OF[name])
    targets = TARGET_SETS[name].targets
    prepare(tmp_path, name, f"--source={file}", "--unofficial")
    dataset = opened(tmp_path, name, *(target.name for target in targets))
    assert_crystals(dataset, list(range(60)))
    for t, target in enumerate(targets):
        assert dataset.labels[:, t].tolist() == [label_of(number, target.field) for number in range(60)]
    order = list(range(60))
    random.Random(123).shuffle(order)
    assert [rows.tolist() for rows in dataset.splits.values()] == [order[:48], order[48:54], order[54:]]
    assert "cannot be compared with published ones" in dataset.remark
    printed = capsys.readouterr().out
    assert "60 crystals" in printed and f"--config.target_set={name}" in printed
    prepare(tmp_path, name, f"--source={tmp_path}", "--unofficial")  # the folder will do
    assert f"{name} is prepared already" in capsys.readouterr().out


@pytest.mark.parametrize("name", PICKLED)
def test_pickles_of_the_elastic_sets(tmp_path, name):
    word = PICKLED[name]
    (target,) = TARGET_SETS[name].targets
    prepare(tmp_path, name, f"--source={pickles(tmp_path, word)}", "--unofficial")
    dataset = opened(tmp_path, name, target.name)
    assert_crystals(dataset, list(range(60)))
    assert dataset.labels[:, 0].tolist() == [label_of(number, word) for number in range(60)]
    assert [rows.tolist() for rows in dataset.splits.values()] == [
        list(range(40)),
        list(range(40, 50)),
        list(range(50, 60)),
    ]


def test_pickles_named_by_their_numbers(tmp_path):
    source = TARGET_SETS["jarvis__megnet-bulk_modulus"].source
    pickles(tmp_path, "bulk")
    for split, number in source.file_ids.items():
        (tmp_path / f"bulk_megnet_{split}.pkl").rename(tmp_path / str(number))
    prepare(tmp_path, "jarvis__megnet-bulk_modulus", f"--source={tmp_path}", "--unofficial")
    (tmp_path / "40258675").unlink()
    message = failure(tmp_path, "jarvis__megnet-bulk_modulus", f"--source={tmp_path}", "--unofficial")
    assert "there is no bulk_megnet_val.pkl or 40258675" in message


@pytest.mark.parametrize("name", ["mp_flla_2015", "jarvis__megnet", "jarvis__megnet-bulk_modulus"])
def test_records_of_known_sets_can_be_sent_to_workers(tmp_path, name):
    archive(tmp_path, "megnet.json")
    pickles(tmp_path, "bulk")
    known = TARGET_SETS[name]
    files = [] if name == "mp_flla_2015" else [known.source.given(tmp_path)]
    record = next(known.source.open(*files, known.targets).records())
    assert pickle.loads(pickle.dumps(record)).load().id == record.id


class Hostile:
    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def test_a_hostile_pickle_is_refused_and_runs_nothing(tmp_path):
    pickles(tmp_path, "bulk")
    (tmp_path / "bulk_megnet_val.pkl").write_bytes(pickle.dumps([Hostile(tmp_path / "canary")]))
    message = failure(tmp_path, "jarvis__megnet-bulk_modulus", f"--source={tmp_path}", "--unofficial")
    assert "bulk_megnet_val.pkl" in message and "system" in message
    assert not (tmp_path / "canary").exists()


def facts(rows: list[int], ids: list[str], with_hash: bool = True) -> SplitFacts:
    checksum = record_hash(np.array(rows)) if with_hash else ""
    return SplitFacts(len(rows), ids[rows[0]], ids[rows[-1]], checksum)


@pytest.fixture
def official_subset(tmp_path, monkeypatch) -> Path:
    """An archive of 60 records, of which three have no MBJ gap, registered as the official one."""
    changes = {5: {"mbj_bandgap": "na"}, 17: {"mbj_bandgap": math.nan}, 33: {"mbj_bandgap": None}}
    file = archive(tmp_path, "jdft_3d-8-18-2021.json", changes)
    rows = [number for number in range(60) if number not in changes]
    order = list(range(57))
    random.Random(123).shuffle(order)
    rows = [rows[place] for place in order]
    ids = [record["id"] for record in RECORDS]
    splits = {"train": facts(rows[:45], ids), "val": facts(rows[47:52], ids), "test": facts(rows[52:], ids)}
    name = "jarvis__dft_3d_2021-mbj_bandgap"
    kind = type(TARGET_SETS[name])
    monkeypatch.setattr(kind, "official_splits", property(lambda self: splits if self.name == name else {}))
    monkeypatch.setitem(TARGET_SETS, name, dataclasses.replace(TARGET_SETS[name], num_records=60))
    return file


def test_official_splits_are_verified(tmp_path, official_subset):
    name = "jarvis__dft_3d_2021-mbj_bandgap"
    prepare(tmp_path, name, f"--source={official_subset}")
    dataset = opened(tmp_path, name, "mbj_bandgap")
    assert dataset.remark == "" and {k: len(v) for k, v in dataset.splits.items()} == {"train": 45, "val": 5, "test": 5}
    assert len(dataset.table) == 60 and np.isnan(dataset.labels[[5, 17, 33]]).all()


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({7: {"mbj_bandgap": "na"}}, "train has 44 crystals instead of 45.*labels were corrected"),
        ({7: {"mbj_bandgap": "na"}, 5: {"mbj_bandgap": 1.0}}, "consists of other records.*labels were corrected"),
        (
            {5: {"mbj_bandgap": 1.0}, 17: {"mbj_bandgap": 1.0}, 33: {"mbj_bandgap": 1.0}},
            "train has 48 .* instead of 45",
        ),
    ],
)
def test_other_labels_upstream_are_noticed(tmp_path, official_subset, changes, cause):
    unknown = {number: {"mbj_bandgap": "na"} for number in (5, 17, 33)}
    archive(tmp_path, "jdft_3d-8-18-2021.json", unknown | changes)
    with pytest.raises(SystemExit, match=cause + ".*--unofficial"):
        prepare(tmp_path, "jarvis__dft_3d_2021-mbj_bandgap", f"--source={official_subset}")
    assert not (tmp_path / "data" / "jarvis__dft_3d_2021-mbj_bandgap" / "crystals").exists()


def test_another_release_is_noticed(tmp_path):
    message = failure(tmp_path, "jarvis__megnet", f"--source={archive(tmp_path, 'megnet.json')}")
    assert "the source has 60 records instead of 69,239, so it is another release or a part" in message
    message = failure(tmp_path, "jarvis__oqmd_3d", f"--source={archive(tmp_path, 'all_oqmd.json')}")
    assert "the source has 60 records instead of 817,636, so it is another release or a part" in message


def test_duplicate_ids_are_reported(tmp_path, capsys):
    order = list(range(60))
    random.Random(123).shuffle(order)
    held, trained = order[-1], order[0]
    file = archive(tmp_path, "megnet.json", {held: {"id": RECORDS[trained]["id"]}})
    prepare(tmp_path, "jarvis__megnet", f"--source={file}", "--unofficial")
    assert opened(tmp_path, "jarvis__megnet", "e_form").leaked.tolist() == [held]
    assert "1 test crystal is also in training: 1 by id" in capsys.readouterr().out
    with (tmp_path / "data" / "jarvis__megnet" / "crystals" / "leakage.csv").open() as stream:
        ((*line,),) = list(csv.reader(stream))[1:]
    assert line == ["id", "test", RECORDS[trained]["id"], "train", RECORDS[trained]["id"]]


def test_records_without_crystal_or_of_another_type(tmp_path, capsys):
    changes = {3: {"atoms": "na"}, 9: {"atoms": {"elements": ["Fe"]}}, 21: {"atoms": {}}}
    file = archive(tmp_path, "megnet.json", changes)
    content = json.loads(zipfile.ZipFile(file).read("megnet.json"))
    content[30] = None
    file.unlink()
    with zipfile.ZipFile(file, "w") as stream:
        stream.writestr("megnet.json", json.dumps(content))
    flags = f"--source={file}", "--unofficial"
    assert "4 of 60 records cannot be used" in failure(tmp_path, "jarvis__megnet", *flags)
    prepare(tmp_path, "jarvis__megnet", *flags, "--max_bad_share=0.07")
    with (tmp_path / "data" / "jarvis__megnet" / "crystals" / "skipped.csv").open() as stream:
        bad = {row["where"]: row["reason"] for row in csv.DictReader(stream)}
    assert list(bad) == [f"megnet.json.zip record {number}" for number in (4, 10, 22, 31)]
    assert len(opened(tmp_path, "jarvis__megnet", "e_form").table) == 56


def test_the_real_layout_of_jarvis(tmp_path):
    """With CRYSTALFRAMER_EXTRA_DATA naming a folder with a part of the real archive."""
    if "CRYSTALFRAMER_EXTRA_DATA" not in os.environ:
        pytest.skip("CRYSTALFRAMER_EXTRA_DATA names no folder with jdft_3d-8-18-2021.json.zip")
    folder = Path(os.environ["CRYSTALFRAMER_EXTRA_DATA"])
    with zipfile.ZipFile(folder / "jdft_3d-8-18-2021.json.zip") as stream:
        records = json.loads(stream.read("jdft_3d-8-18-2021.json"))
    for name in ("jarvis__dft_3d_2021", "jarvis__dft_3d_2021-mbj_bandgap", "jarvis__dft_3d_2021-ehull"):
        (target, *_) = TARGET_SETS[name].targets
        prepare(tmp_path, name, f"--source={folder}", "--unofficial")
        dataset = opened(tmp_path, name, target.name)
        assert len(dataset.table) == len(records) == 1056
        numbers = [x[target.field] if isinstance(x[target.field], int | float) else math.nan for x in records]
        np.testing.assert_array_equal(dataset.labels[:, 0], numbers)
        assert sum(map(len, dataset.splits.values())) in np.isfinite(numbers).sum() - np.arange(3)
    assert "records instead of 55,723" in failure(tmp_path, "jarvis__dft_3d_2021-ehull", f"--source={folder}")


# Users' own crystals


def write_cifs(folder: Path, numbers: range) -> Path:
    """A folder of CIF files with id_prop.csv."""
    folder.mkdir()
    lines = []
    for number in numbers:
        record = RECORDS[number]
        structure = Structure(record["lattice"], record["species"], record["frac_coords"])
        structure.to(str(folder / f"{record['id']}.cif"))
        lines.append(f"{record['id']},{record['e_above_hull']}")
    (folder / "id_prop.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_a_folder_of_cif_files(tmp_path, capsys):
    source = write_cifs(tmp_path / "mine", range(30))
    prepare(tmp_path, "my_crystals", f"--source={source}", "--targets=e_hull", "--units=eV/atom")
    dataset = datasets.open_dataset("my_crystals", ("e_hull",), CUTOFF, str(tmp_path / "data"))
    assert dataset.table.ids.tolist() == [record["id"] for record in RECORDS[:30]]
    assert dataset.labels[:, 0].tolist() == [record["e_above_hull"] for record in RECORDS[:30]]
    assert dataset.targets[0].unit == "eV/atom" and [len(rows) for rows in dataset.splits.values()] == [24, 3, 3]
    assert "--config.target_set=my_crystals --config.targets=e_hull" in capsys.readouterr().out


def test_a_bad_file_does_not_keep_the_others_back(tmp_path):
    source = write_cifs(tmp_path / "mine", range(30))
    (source / f"{RECORDS[11]['id']}.cif").write_text("data_x\n")
    (source / f"{RECORDS[12]['id']}.cif").unlink()
    prepare(tmp_path, "mine", f"--source={source}", "--max_bad_share=0.1")
    with (tmp_path / "data" / "mine" / "crystals" / "skipped.csv").open() as stream:
        bad = list(csv.DictReader(stream))
    assert [row["id"] for row in bad] == [RECORDS[11]["id"], RECORDS[12]["id"]]
    assert all("id_prop.csv" in row["where"] for row in bad)
    assert len(opened(tmp_path, "mine", "target").table) == 28


def test_splits_and_groups_of_ones_own(tmp_path):
    lines = []
    for number, record in enumerate(RECORDS[:40]):
        structure = {key: record[key] for key in ("lattice", "species", "frac_coords")}
        split = "test" if number % 8 == 0 else "val" if number % 8 == 1 else "train"
        lines.append(
            json.dumps({"id": record["id"], **structure, "gap": number, "split": split, "family": number // 5})
        )
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(lines))
    prepare(tmp_path, "given", f"--source={file}", "--targets=gap")
    given = opened(tmp_path, "given", "gap")
    assert given.splits["test"].tolist() == list(range(0, 40, 8))
    assert given.splits["val"].tolist() == list(range(1, 40, 8))
    prepare(tmp_path, "grouped", f"--source={file}", "--targets=gap", "--group_column=family")
    grouped = opened(tmp_path, "grouped", "gap")
    families = [set((rows // 5).tolist()) for rows in grouped.splits.values()]
    assert sum(map(len, families)) == 8 and all(map(len, families))
    prepare(tmp_path, "seeded", f"--source={file}", "--targets=gap", "--split_column=", "--split_seed=4")
    order = list(range(40))
    random.Random(4).shuffle(order)
    assert opened(tmp_path, "seeded", "gap").splits["train"].tolist() == order[:32]


def test_crystals_lost_from_official_splits_are_told(tmp_path, official_subset):
    unknown = {number: {"mbj_bandgap": "na"} for number in (5, 17, 33)}
    archive(tmp_path, "jdft_3d-8-18-2021.json", unknown | {40: {"atoms": {}}})
    name = "jarvis__dft_3d_2021-mbj_bandgap"
    prepare(tmp_path, name, f"--source={official_subset}")
    dataset = opened(tmp_path, name, "mbj_bandgap")
    assert sum(map(len, dataset.splits.values())) == 54
    assert "1 crystals of the official splits could not be used" in dataset.remark


def test_labels_that_are_texts_are_none_in_an_archive(tmp_path, official_subset):
    unknown = {number: {"mbj_bandgap": "1.0"} for number in (5, 17, 33)}
    archive(tmp_path, "jdft_3d-8-18-2021.json", unknown)
    prepare(tmp_path, "jarvis__dft_3d_2021-mbj_bandgap", f"--source={official_subset}")  # as if they were missing


def test_elastic_files_that_are_not_the_ones(tmp_path):
    pickles(tmp_path, "bulk")
    (tmp_path / ".bulk_megnet_train.pkl.part").write_bytes(b"")
    (tmp_path / "._bulk_megnet_val.pkl").write_bytes(b"")
    (tmp_path / "bulk_megnet_test (1).pkl").write_bytes(b"")
    prepare(tmp_path, "jarvis__megnet-bulk_modulus", f"--source={tmp_path}", "--unofficial")
    (tmp_path / "bulk_megnet_test.pkl").rename(tmp_path / "bulk_megnet_test (2).pkl")
    message = failure(tmp_path, "jarvis__megnet-bulk_modulus", f"--source={tmp_path}", "--unofficial")
    assert "which is bulk_megnet_test.pkl, bulk_megnet_test (1).pkl or bulk_megnet_test (2).pkl?" in message


@pytest.mark.parametrize("flag", ["--max_bad_share=2", "--max_bad_share=nan", "--workers=-1"])
def test_flags_out_of_range(tmp_path, flag, capsys):
    with pytest.raises(SystemExit) as error:
        prepare(tmp_path, "mp_flla_2015", flag)
    assert error.value.code == 2 and flag.split("=")[0] in capsys.readouterr().err


def test_what_cannot_be_asked_for(tmp_path):
    with pytest.raises(SystemExit, match="name the target set"):
        prepare_main([f"--source={tmp_path}"])
    assert "leave --split_seed out, or add --unofficial" in failure(tmp_path, "jarvis__megnet", "--split_seed=4")
    contradiction = "--group_column=a", "--split_column=b", f"--source={tmp_path}"
    assert "contradict each other" in failure(tmp_path, "mine", *contradiction)
    assert "name your crystals with --source" in failure(tmp_path, "mine")
    assert "no such file or folder" in failure(tmp_path, "mine", f"--source={tmp_path / 'nowhere'}")
    assert "comes with the package" in failure(tmp_path, "mp_flla_2015", f"--source={tmp_path}")
    assert "--targets is for your own crystals" in failure(tmp_path, "jarvis__megnet", "--targets=e_form")
    assert "there is no megnet.json.zip" in failure(tmp_path, "jarvis__megnet", f"--source={tmp_path}")
    assert "must be a name" in failure(tmp_path, "a/b", f"--source={tmp_path}")


def test_the_list_of_target_sets(tmp_path, capsys):
    source = write_cifs(tmp_path / "mine", range(12))
    prepare(tmp_path, "my_crystals", f"--source={source}")
    capsys.readouterr()
    assert prepare_main([f"--data_dir={tmp_path / 'data'}"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert set(TARGET_SETS) | {"my_crystals"} < set(lines)
    assert lines["my_crystals"].endswith("12 crystals") and lines["jarvis__megnet"].endswith("not prepared")
    assert lines["mp_flla_2015"].endswith("bundled") and "e_form (eV/atom)" in lines["mp_flla_2015"]


def test_the_same_crystals_from_an_archive_and_from_files(tmp_path):
    """The store does not depend on the format they come in."""
    prepare(tmp_path, "jarvis__megnet", f"--source={archive(tmp_path, 'megnet.json')}", "--unofficial")
    lines = []
    for number, record in enumerate(RECORDS):
        labels = {"e_form": label_of(number, "e_form"), "bandgap": label_of(number, "gap pbe")}
        lines.append(json.dumps({"id": record["id"], "atoms": atoms_of(record, number % 2 == 1), **labels}))
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    prepare(tmp_path, "mine", f"--source={tmp_path / 'mine.jsonl'}", "--targets=e_form,bandgap")
    first, second = opened(tmp_path, "jarvis__megnet", "bandgap"), opened(tmp_path, "mine", "bandgap")
    assert_same_dataset(first, dataclasses.replace(second, digest=first.digest))
