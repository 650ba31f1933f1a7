"""Every command that writes, in a folder that holds the user's files under every name that we use: they stay."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from official_files import tiny_file
from small_sets import raw_records, small_set
from support import ROOT
from tiny import tiny_runs

from crystalframer_jax.cli import prepare as prepare_cli
from crystalframer_jax.cli.convert import export_main, import_main
from crystalframer_jax.cli.evaluate import evaluate_main
from crystalframer_jax.cli.predict import predict_main
from crystalframer_jax.cli.prepare import prepare_main
from crystalframer_jax.config import TrainConfig
from crystalframer_jax.data.registry import TARGET_SETS
from crystalframer_jax.official.conversion import import_checkpoint

# Names in a folder that is taken for that of a target set, a run and an ensemble.
OF_SETS = ("crystals/a.cif", "crystals/manifest.json", "crystals/skipped.csv", "rows-0123456789ab/manifest.json")
OF_SETS += ("rows-mine/a.cif", ".crystals.next/a.cif", ".crystals.old/a.cif", ".crystals.next.made", "skipped.csv")
OF_SETS += (".skipped.csv.made", ".crystals-mine/a.cif", ".rows-mine/a.cif", ".rows-a-by-9000.parts/part-000000.npz")
OF_RUNS = ("config.json", "summary.json", "data.json", "lock", "metrics.jsonl", "predictions_test.csv", "model.ckpt")
OF_RUNS += ("checkpoints/1/params", "checkpoints/best/params", "member_0/config.json", "parity_test.png")


class Setting:
    """A folder with files of the user, with a run and a checkpoint of the official project outside."""

    def __init__(self, folder: Path, run: Path, checkpoint: Path):
        self.folder, self.run, self.checkpoint = folder, run, checkpoint
        folder.mkdir()
        self.theirs = folder.parent / "theirs"  # a run whose data are where the files are
        shutil.copytree(run, self.theirs)
        config = json.loads((self.theirs / "config.json").read_text())
        (self.theirs / "config.json").write_text(json.dumps(config | {"data_dir": str(folder)}))
        self.source = folder.parent / "mine.jsonl"
        keys = ("id", "lattice", "species", "frac_coords", "e_above_hull")
        lines = [json.dumps({key: record[key] for key in keys}) for record in raw_records(12)]
        self.source.write_text("\n".join(lines))
        self.bad_source = folder.parent / "bad.jsonl"
        self.bad_source.write_text("\n".join(["{}"] * 6 + lines))


def prepared(name: str, source: str = "source") -> Callable[[Setting], object]:
    """Prepares crystals of one's own under a name."""
    return lambda s: prepare_main([f"--target_set={name}", f"--source={getattr(s, source)}", f"--data_dir={s.folder}"])


CASES: dict[str, Callable[[Setting], object]] = {  # all take the folder `small` for theirs
    "prepare a bundled set": lambda s: prepare_main(["--target_set=small", f"--data_dir={s.folder}"]),
    "prepare one's own": prepared("mine"),
    "prepare bad records": prepared("mine", "bad_source"),
    "list": lambda s: prepare_main([f"--data_dir={s.folder}"]),
    "evaluate where the run says": lambda s: evaluate_main([str(s.theirs), "--split=val"]),
    "evaluate there": lambda s: evaluate_main([str(s.run), "--split=val", f"--data_dir={s.folder}"]),
    "predict": lambda s: predict_main([str(s.run), f"{ROOT}/examples/NaCl.cif", f"--output={s.folder}/out.csv"]),
    "import": lambda s: import_main([str(s.checkpoint), f"--workdir={s.folder}/small"]),
    "export": lambda s: export_main([str(s.run), f"{s.folder}/small/model.ckpt"]),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory and the checkpoint that it was imported from."""
    folder = tmp_path_factory.mktemp("imported")
    with tiny_runs(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr(prepare_cli, "TrainConfig", lambda: TrainConfig(cutoff_radius=4.0))
        file = tiny_file(folder)
        import_checkpoint(file, folder / "run", data="small")
        yield folder / "run", file


@pytest.mark.parametrize("case", CASES)
def test_files_of_the_user_stay_as_they_are(tmp_path, run, case):
    setting = Setting(tmp_path / "folder", *run)
    mine = {setting.folder / set / name for name in (*OF_SETS, *OF_RUNS) for set in ("small", "mine")}
    for file in mine | {setting.folder / name for name in (".small.lock", "downloads/a", "notes.txt")}:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"my only {file}")
    with contextlib.suppress(SystemExit):  # all that may happen is an error of one line
        CASES[case](setting)
    for file in mine:
        assert file.read_text() == f"my only {file}"


@pytest.mark.parametrize("name", OF_SETS)
def test_each_of_them_alone(tmp_path, run, name):
    """One file may be in the way where several already stop the command."""
    setting = Setting(tmp_path / "folder", *run)
    for case in [case for case in CASES if case.startswith("prepare")]:
        for set in ("small", "mine"):
            file = setting.folder / set / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("my only copy")
        with contextlib.suppress(SystemExit):
            CASES[case](setting)
        for set in ("small", "mine"):
            assert (setting.folder / set / name).read_text() == "my only copy"


@pytest.mark.parametrize("case", [case for case in CASES if case != "prepare bad records"])
def test_the_commands_do_their_work_elsewhere(tmp_path, run, monkeypatch, case):
    """So that the tests above would notice."""
    monkeypatch.setitem(TARGET_SETS, "small", small_set())
    assert CASES[case](Setting(tmp_path / "folder", *run)) == 0
    assert case in ("list", "evaluate where the run says") or any((tmp_path / "folder").iterdir())
