"""What is not ours is neither replaced nor removed; after a kill at any step the old or the new set is there."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import forks
import numpy as np
import pytest
from small_sets import CUTOFF, assert_same_dataset, open_small, prepare_small, rows_folder, small_set
from test_files import NOT_OBJECTS
from test_prepare import write_cifs

from crystalframer_jax.cli import prepare as prepare_cli
from crystalframer_jax.cli.evaluate import dataset_of
from crystalframer_jax.cli.prepare import prepare_main
from crystalframer_jax.config import ConfigError, TrainConfig
from crystalframer_jax.data.owned import digest_of
from crystalframer_jax.data.prepare import Preparation
from crystalframer_jax.data.records import DataError
from crystalframer_jax.data.registry import TARGET_SETS
from crystalframer_jax.data.store import load_dataset, read_set
from crystalframer_jax.inference.ensemble import Ensemble

OTHER = small_set(count=20)  # than the one that is there
MINE = b"my only copy"


@pytest.fixture(autouse=True)
def short_rows(monkeypatch):
    monkeypatch.setattr(prepare_cli, "TrainConfig", lambda: TrainConfig(cutoff_radius=CUTOFF))


@pytest.fixture(autouse=True)
def _no_hanging():
    """Ends a test that waits for a pipe."""

    def stop(*_):
        raise AssertionError("hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def contents(folder: Path) -> dict[str, bytes | str]:
    """All that a folder holds: the bytes of files, the targets of links."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def put_file(file: Path, content: bytes = MINE) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


# Sources and the place they are prepared in


@pytest.mark.parametrize(
    ("source", "name", "data_dir"),
    [
        ("perovskites/crystals", "perovskites", "."),  # as it once ended with all files gone
        ("perovskites", "perovskites", "."),
        ("perovskites", "mine", "perovskites"),
        ("perovskites", "mine", "perovskites/data"),
        ("link", "perovskites", "."),
        ("perovskites/crystals", "perovskites", "other"),
        ("perovskites/crystals/table.csv", "perovskites", "."),
    ],
)
def test_a_source_is_never_prepared_inside_itself_or_the_other_way_round(tmp_path, monkeypatch, source, name, data_dir):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "perovskites").mkdir()
    crystals = write_cifs(tmp_path / "perovskites" / "crystals", range(12))
    shutil.copytree(crystals, tmp_path / "perovskites", dirs_exist_ok=True)
    lines = [f"{file.name},1" for file in sorted(crystals.glob("*.cif"))]
    (crystals / "table.csv").write_text("\n".join(["file,e", *lines]))
    (tmp_path / "link").symlink_to("perovskites/crystals")
    (tmp_path / "other").symlink_to(".")
    before = contents(tmp_path)
    with pytest.raises(SystemExit, match=r"error: .*are one inside the other: choose another --data_dir"):
        prepare_main([f"--target_set={name}", f"--source={source}", f"--data_dir={data_dir}"])
    assert contents(tmp_path) == before


# Files of others under the names that we use

FOREIGN = {  # names below the folder of a target set: whether the set can be prepared all the same
    "crystals": False,
    "crystals/a.cif": False,
    "crystals/train.npy": False,
    "crystals/manifest.json": False,
    ".crystals.next": False,
    ".crystals.next/a.cif": False,
    ".crystals.next.made": False,
    ".crystals.old": False,
    ".crystals.old/manifest.json": False,
    "rows-0123456789ab/manifest.json": True,
    "rows-mine/a.cif": True,
    ".rows-mine/a.cif": True,
    ".rows-0123456789ab-by-60.parts/part-000000.npz": True,
    ".crystals-mine/a.cif": True,
    ".crystals-0123456789ab-by-250.parts/part-000000.npz": True,
    ".crystals-mine.parts.made": True,
    "skipped.csv": True,
    ".skipped.csv.made": True,
    "damaged-crystals-1/a.cif": True,
    "../.small.lock": True,
    "notes.txt": True,
}


@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_others_stay_as_they_are(tmp_path, name):
    file = tmp_path / "small" / name
    put_file(file)
    with contextlib.nullcontext() if FOREIGN[name] else pytest.raises(DataError, match="move it away or choose"):
        prepare_small(tmp_path)
    assert file.read_bytes() == MINE
    if FOREIGN[name]:
        prepare_small(tmp_path, OTHER)
        assert len(load_dataset(tmp_path / "small", ("e_form",), CUTOFF).table) == 20
    assert file.read_bytes() == MINE


@pytest.mark.parametrize("name", [name for name in FOREIGN if name not in ("crystals", "skipped.csv")])
def test_files_of_others_beside_a_prepared_set_stay(tmp_path, name):
    before = open_small(tmp_path).digest
    file = tmp_path / "small" / name
    is_replaced = name in ("crystals/manifest.json", "crystals/train.npy")  # damage, as far as one can see
    put_file(file)
    with contextlib.suppress(DataError):
        prepare_small(tmp_path, OTHER)
    kept = tmp_path / "small" / name.replace("crystals/", "damaged-crystals-1/") if is_replaced else file
    assert kept.read_bytes() == MINE
    found = read_set(tmp_path / "small")
    assert (found[0]["digest"] != before) == (FOREIGN[name] or is_replaced)


def test_what_is_ours_by_its_names_only_is_kept_aside(tmp_path, capsys):
    open_small(tmp_path)
    rows, crystals = rows_folder(tmp_path), tmp_path / "small" / "crystals"
    put_file(crystals / "labels.npy")
    put_file(rows / "count.npy")
    assert_same_dataset(open_small(tmp_path), open_small(tmp_path / "elsewhere"))
    assert (tmp_path / "small" / "damaged-crystals-1" / "labels.npy").read_bytes() == MINE
    assert (tmp_path / "small" / f"damaged-{rows.name}-1" / "count.npy").read_bytes() == MINE
    assert f"it is kept as {tmp_path / 'small' / 'damaged-crystals-1'}" in capsys.readouterr().out
    put_file(crystals / "labels.npy")
    prepare_small(tmp_path)
    assert (tmp_path / "small" / "damaged-crystals-2" / "labels.npy").read_bytes() == MINE


def test_a_list_of_skipped_records_is_removed_only_if_it_is_ours(tmp_path):
    bad = small_set(count=12, changes={number: {"species": ["Xx"]} for number in (3, 6, 7, 9, 10)})
    file = tmp_path / "small" / "skipped.csv"
    for _ in range(2):
        with pytest.raises(DataError, match=r"5 of 12 records .*skipped.csv lists them"):
            prepare_small(tmp_path, bad)
    assert prepare_small(tmp_path, bad, Preparation(max_bad_share=0.5)) and not file.exists()
    with pytest.raises(DataError):
        prepare_small(tmp_path, small_set(count=13, changes=bad.source.changes))
    with file.open("a") as stream:
        stream.write("a note of mine\n")
    changed = file.read_bytes()
    assert prepare_small(tmp_path) and file.read_bytes() == changed
    with pytest.raises(DataError, match=r"not listed: another .*skipped\.csv is there"):
        prepare_small(tmp_path, bad)
    assert file.read_bytes() == changed


# Links and pipes


@pytest.mark.parametrize("name", ["crystals", "crystals/ids.npy", "crystals/manifest.json", ".crystals.next", "."])
def test_nothing_is_written_through_links(tmp_path, name):
    outside = tmp_path / "outside"
    put_file(outside / "a.txt")
    open_small(tmp_path)
    path = tmp_path / "small" / name
    if path.exists():
        path.rename(tmp_path / "moved")
    path.symlink_to(outside)
    with pytest.raises(DataError, match=r"move it away|is a link"):
        prepare_small(tmp_path, OTHER)
    assert path.is_symlink() and contents(outside) == {"a.txt": MINE}


@pytest.mark.parametrize("name", ["crystals/ids.npy", "crystals/manifest.json", "rows/count.npy", "rows/manifest.json"])
def test_pipes_in_a_data_folder_do_not_hang(tmp_path, name):
    open_small(tmp_path)
    path = tmp_path / "small" / name.replace("rows", rows_folder(tmp_path).name)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match=r"small is damaged|move it away"):
        load_dataset(tmp_path / "small", ("e_form",), CUTOFF)
    with pytest.raises(DataError, match="move it away") if name.startswith("crystals") else contextlib.nullcontext():
        prepare_small(tmp_path)
    assert path.is_fifo()


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_lock_that_is_no_file(tmp_path, kind):
    lock, outside = tmp_path / ".small.lock", tmp_path / "outside"
    {"link": lambda: lock.symlink_to(outside), "pipe": lambda: os.mkfifo(lock), "folder": lock.mkdir}[kind]()
    with pytest.raises(Exception, match=r"\.small\.lock is not a regular file|cannot be written"):
        prepare_small(tmp_path)
    assert not outside.exists()


# Manifests of anybody


def forged(**changes) -> bytes:
    """A manifest whose check is right, with other content."""
    content = {"format": 1, "source": "", "key": "", "remark": "", "targets": [], "crystals": 3, "digest": "a"}
    content |= {"sha256": {}} | changes
    return json.dumps(content | {"check": digest_of(content)}).encode()


WRONG = NOT_OBJECTS | {
    "no fields": b"{}",
    "targets of another kind": forged(targets=[7]),
    "targets without names": forged(targets=[{"name": None, "field": "", "unit": "", "log10": False}]),
    "unknown fields": forged(targets=[{"naem": ""}]),
    "a text for a number": forged(crystals="many"),
    "a list for a text": forged(remark=[]),
    "files elsewhere": forged(sha256={"../../outside": "0"}),
    "files in a list": forged(sha256=[]),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_broken_manifest_costs_its_own_line_only(tmp_path, capsys, kind):
    open_small(tmp_path)
    shutil.copytree(tmp_path / "small", tmp_path / "another")
    manifest = tmp_path / "small" / "crystals" / "manifest.json"
    manifest.write_bytes(WRONG[kind])
    assert prepare_main([f"--data_dir={tmp_path}"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["small"].endswith("damaged") and lines["another"].endswith("60 crystals")
    with pytest.raises(DataError, match=r"small is damaged in .*; run crystalframer prepare"):
        load_dataset(tmp_path / "small", ("e_form",), CUTOFF)
    assert prepare_small(tmp_path) and len(open_small(tmp_path).table) == 60


ALTERED = {
    "crystals/labels": np.zeros((60, 1)),
    "crystals/test": np.array([3, 60]),
    "crystals/train": np.array([0, -1]),
    "crystals/leaked": np.array([0.5]),
    "crystals/atom_offset": np.arange(61)[::-1],
    "crystals/ids": np.array(["a"]),
    "crystals/lattice": np.zeros(5),
    "crystals/species": np.array(7),
    "rows/edge_offset": np.arange(61),
    "rows/count": np.zeros(3, np.uint16),
}


@pytest.mark.parametrize("name", ALTERED)
def test_columns_that_do_not_fit_each_other_are_damage(tmp_path, name):
    """Though their manifest verifies."""
    open_small(tmp_path)
    file = tmp_path / "small" / f"{name.replace('rows', rows_folder(tmp_path).name)}.npy"
    np.save(file, ALTERED[name])
    manifest = json.loads((file.parent / "manifest.json").read_text())
    manifest["sha256"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    del manifest["check"]
    (file.parent / "manifest.json").write_text(json.dumps(manifest | {"check": digest_of(manifest)}))
    if name.startswith("crystals"):
        with pytest.raises(DataError, match=r"small is damaged in .*; run crystalframer prepare"):
            load_dataset(tmp_path / "small", ("e_form",), CUTOFF)
        assert prepare_small(tmp_path)
    expected = open_small(tmp_path / "elsewhere")
    assert_same_dataset(load_dataset(tmp_path / "small", ("e_form",), CUTOFF), expected)


def test_text_of_a_manifest_is_escaped(tmp_path, capsys):
    target = {"name": "e\x1b[2J", "field": "", "unit": "", "log10": False}
    put_file(tmp_path / "mine" / "crystals" / "manifest.json", forged(targets=[target]))
    assert prepare_main([f"--data_dir={tmp_path}"]) == 0
    assert r"e\x1b[2J" in capsys.readouterr().out


def test_a_broken_manifest_of_a_benchmark_is_an_error_of_one_line(tmp_path):
    from benchmarking.pipeline import any_target

    put_file(tmp_path / "mine" / "crystals" / "manifest.json", b"[]")
    with pytest.raises(ConfigError, match="'mine' is not known, and not prepared"):
        any_target("mine", str(tmp_path))


# The data of a run of anybody


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(TARGET_SETS, "small", small_set())
    return tmp_path / "cache" / "crystalframer_jax"


def model_of(data_dir: Path, target_set: str = "small", digest: str = ""):
    config = types.SimpleNamespace(target_set=target_set, targets=("e_form",), data_dir=str(data_dir))
    return types.SimpleNamespace(config=config, cutoff=CUTOFF, data_digest=digest, origin="")


def foreign_tree(folder: Path) -> None:
    for name in ("crystals/a.cif", ".rows-a/a.cif", ".crystals-a/a.cif", "skipped.csv"):
        put_file(folder / "small" / name)


def without_rows(folder: Path) -> None:
    prepare_small(folder)


def with_damaged_rows(folder: Path) -> None:
    open_small(folder)
    put_file(rows_folder(folder) / "count.npy")


def with_others(folder: Path) -> None:
    open_small(folder, OTHER)


STATES = [foreign_tree, without_rows, with_damaged_rows, with_others, lambda folder: None]


@pytest.mark.parametrize("make", STATES, ids=["foreign files", "no rows", "damaged rows", "other crystals", "nothing"])
def test_nothing_is_written_where_a_run_says(tmp_path, cache, make, capsys):
    make(tmp_path / "theirs")
    before = contents(tmp_path / "theirs")
    dataset = dataset_of(model_of(tmp_path / "theirs"), "run")
    assert len(dataset.table) == 60 and (cache / "small" / "crystals").is_dir()
    assert contents(tmp_path / "theirs") == before
    assert f"the data are those of {cache / 'small'}" in capsys.readouterr().out


def test_complete_data_of_a_run_are_read_where_they_are(tmp_path, cache):
    expected = open_small(tmp_path / "theirs")
    before = contents(tmp_path / "theirs")
    assert_same_dataset(dataset_of(model_of(tmp_path / "theirs"), "run"), expected)
    assert contents(tmp_path / "theirs") == before and not cache.exists()


@pytest.mark.parametrize("name", ["mine", "jarvis__megnet"])
def test_data_that_only_the_run_names_are_completed_where_the_user_says(tmp_path, cache, name):
    prepare_small(tmp_path / "theirs")
    (tmp_path / "theirs" / "small").rename(tmp_path / "theirs" / name)
    before = contents(tmp_path / "theirs")
    with pytest.raises(DataError, match=f"add --data_dir={tmp_path / 'theirs'} to have it completed"):
        dataset_of(model_of(tmp_path / "theirs", name), "run")
    assert contents(tmp_path / "theirs") == before
    assert len(dataset_of(model_of(tmp_path / "nowhere", name), "run", str(tmp_path / "theirs")).table) == 60
    assert len(dataset_of(model_of(tmp_path / "theirs", name), "run").table) == 60


@pytest.mark.parametrize("place", ["theirs", "nowhere"])
def test_other_data_than_those_of_the_training_are_no_test_of_it(tmp_path, cache, capsys, place):
    """Where the run says, or in the cache: refused, but with a warning if the user names them."""
    digest = open_small(tmp_path / "theirs").digest
    same, other = (model_of(tmp_path / place, digest=trained_on) for trained_on in (digest, "0123456789ab"))
    assert len(dataset_of(same, "run").table) == 60
    with pytest.raises(DataError, match=rf"trained on other data .*small \(0123456789ab, here {digest}\).*--data_dir"):
        dataset_of(other, "run")
    assert capsys.readouterr().err == ""
    assert len(dataset_of(other, f"run {place}", str(tmp_path / "theirs")).table) == 60
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: run") and "0123456789ab" in line
    assert len(dataset_of(same, "run", str(tmp_path / "theirs")).table) == 60 and capsys.readouterr().err == ""


def test_members_of_an_ensemble_are_held_to_their_data_each(tmp_path, cache):
    same, other = model_of(tmp_path, digest=open_small(tmp_path).digest), model_of(tmp_path, digest="0123456789ab")
    ensemble = object.__new__(Ensemble)
    ensemble.members, ensemble.names, ensemble.config = (same, other), "01", same.config
    with pytest.raises(DataError, match=r"trained on other data .*0123456789ab"):
        dataset_of(ensemble, "run")


@pytest.mark.parametrize("data_dir", ["a\0b", "~nobody-of-this-name/data", "x" * 5_000, "/proc/self/mem", "/root/\x1b"])
def test_a_data_dir_that_is_none_is_no_traceback(cache, data_dir):
    with contextlib.suppress(ConfigError, DataError):
        assert len(dataset_of(model_of(data_dir), "run").table) == 60
    with pytest.raises((ConfigError, DataError)) as error:
        dataset_of(model_of(data_dir, "mine"), "run")
    assert str(error.value).isprintable()


# Replacements that are watched or killed


@pytest.fixture
def between_steps(monkeypatch) -> Iterator[list[Callable[[], None]]]:
    """Calls what is put into this list before and after every change of a name."""
    watchers: list[Callable[[], None]] = []

    def watched(change):
        def call(*args, **kwargs):
            for watch in watchers:
                watch()
            change(*args, **kwargs)
            for watch in watchers:
                watch()

        return call

    for name in ("rename", "replace", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    yield watchers
    watchers.clear()


def test_a_reader_sees_the_old_or_the_new_set(tmp_path, between_steps):
    sizes = []
    prepare_small(tmp_path)
    between_steps.append(lambda: sizes.append(read_set(tmp_path / "small")[0]["crystals"]))
    prepare_small(tmp_path, OTHER)
    assert sizes == sorted(sizes, reverse=True) and set(sizes) == {60, 20}


def test_a_reader_in_the_gap_gets_rows_as_well(tmp_path, between_steps):
    opened = []
    open_small(tmp_path)
    gap = tmp_path / "small" / ".crystals.old"

    def watch() -> None:
        if gap.exists() and not (tmp_path / "small" / "crystals").exists():
            opened.append(load_dataset(tmp_path / "small", ("e_form",), CUTOFF))

    between_steps.append(watch)
    prepare_small(tmp_path, OTHER)
    assert len(opened) == 2 and all(len(dataset.table) == 60 for dataset in opened)


def test_a_kill_at_any_step_leaves_the_old_or_the_new_and_the_next_call_mends_all(tmp_path):
    result = forks.run("tests/prepare_killed.py", tmp_path)
    assert result.returncode == 0, result.stderr
    steps = [line.split()[2:] for line in result.stdout.splitlines() if line.startswith("steps of")]
    assert [name for name, _ in steps] == ["first", "replaced", "damaged"]
    assert all(int(number) > 15 for _, number in steps)
