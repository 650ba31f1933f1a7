"""The scripts as users run them: tables, files of results, and errors of one line."""

import csv
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import forks
import numpy as np
import pytest
from small_sets import literal_split, raw_records
from support import ROOT

from crystalframer_jax import Predictor
from crystalframer_jax.cli.evaluate import evaluate_main
from crystalframer_jax.cli.predict import predict_main
from crystalframer_jax.text import duration, table
from crystalframer_jax.training.logging import read_metrics

NACL, SILICON = "examples/NaCl.cif", "examples/POSCAR_Si"
TINY = [  # one small block and short neighbor rows, on the whole bundled set
    *("--config.num_layers=1", "--config.model_dim=16", "--config.head_num=2", "--config.ff_dim=32"),
    *("--config.embedding_dim=(16,)", "--config.value_pe_dist_real=8", "--config.value_pe_angle_real=8"),
    *("--config.cutoff_radius=4", "--config.batch_size=128", "--config.n_epochs=3", "--config.swa_epochs=1"),
]

POSCAR = "test\n1.0\n{cell}\n{elements}\n{counts}\nDirect\n{coordinates}\n"
FRACT = ("fract_x", "fract_y", "fract_z")
CUBE = "4 0 0\n0 4 0\n0 0 4"
BAD_FILES = {
    "empty.cif": "",
    "unknown-element.vasp": POSCAR.format(cell=CUBE, elements="Xx", counts="1", coordinates="0 0 0"),
    "no-lattice.xyz": "2\n\nNa 0 0 0\nCl 2 2 2\n",
    "nan.vasp": POSCAR.format(cell=CUBE, elements="Na", counts="1", coordinates="nan 0 0"),
    "coinciding.vasp": POSCAR.format(cell=CUBE, elements="Na Cl", counts="1 1", coordinates="0 0 0\n0 0 1"),
    "flat.vasp": POSCAR.format(cell="4 0 0\n0 4 0\n4 4 0", elements="Na", counts="1", coordinates="0 0 0"),
    "no-cell.cif": "data_x\nloop_\n_atom_site_label\n"
    + "".join(f"_atom_site_fract_{x}\n" for x in "xyz")
    + "Na 0 0 0\n",
    "garbage.cif": "\x00\x01\x02 not a structure \x7f",
    "structure.txt": "Na 0 0 0\n",
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """A cache of these tests instead of the user's, and programs as users compile them: they take hundreds of steps."""
    changes = {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cli-caches"))}
    changes |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | changes


def script(environment: dict[str, str], name: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run scripts/NAME.py to its end, in the root of the repository."""
    return forks.run(f"scripts/{name}.py", *arguments, environment=environment)


def assert_one_error(process: subprocess.CompletedProcess, *words: str) -> None:
    """Nothing but one line on stderr, which starts with "error:" and holds the words."""
    (line,) = process.stderr.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert process.returncode not in (0, None) and process.stdout == ""


@dataclasses.dataclass(frozen=True)
class ScriptRun:
    """A run of scripts/train.py: its directory, arguments, output and summary."""

    workdir: Path
    arguments: list[str]
    process: subprocess.CompletedProcess
    summary: dict


@pytest.fixture(scope="module")
def run(tmp_path_factory, environment) -> ScriptRun:
    workdir = tmp_path_factory.mktemp("cli") / "run"
    arguments = ["--config=configs/quickstart.py", f"--workdir={workdir}", *TINY]
    process = script(environment, "train", *arguments)
    assert process.returncode == 0, process.stderr
    return ScriptRun(workdir, arguments, process, json.loads((workdir / "summary.json").read_text()))


def table_rows(text: str, label: str) -> list[list[str]]:
    """The cells of the lines of a table that begin with a label; columns are two blanks or more apart."""
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if line.startswith(label)]


def read_csv(file: Path) -> list[list[str]]:
    with file.open(newline="") as stream:
        return list(csv.reader(stream))


# Training


def test_training_tells_every_epoch_and_ends_with_a_table(run):
    output = run.process.stdout
    assert run.process.stderr == "" and "3,150 train, 393 val, 393 test" in output
    lines = [line for line in output.splitlines() if line.startswith("epoch ")]
    for number, (line, metrics) in enumerate(zip(lines, read_metrics(run.workdir), strict=True), 1):
        error = f"{metrics['val_mae']['e_form']:.4f}"
        assert line.startswith(f"epoch {number}/3  loss {metrics['loss']:.4f}  val MAE e_form {error} eV/atom  lr ")
    selected = run.summary["selected_weights"]
    ((_, *cells),) = table_rows(output, f"e_form (eV/atom), {selected} weights *")
    numbers = [run.summary["mae"][selected][split]["e_form"] for split in ("train", "val", "test")]
    numbers += [run.summary[metric][selected]["test"]["e_form"] for metric in ("rmse", "r2")]
    assert cells == [f"{number:.4f}" for number in numbers]
    ((_, *cells),) = table_rows(output, "e_form (eV/atom), mean predictor")
    baseline = [f"{run.summary['mean_predictor_mae'][s]['e_form']:.4f}" for s in ("train", "val", "test")]
    assert cells == [*baseline, "-", "-"]


@pytest.mark.slow
def test_ctrl_c_saves_a_training_and_ends_it_well(run, environment, tmp_path):
    """The fixture `run` has prepared the data and compiled the programs."""
    workdir = tmp_path / "run"
    arguments = [*run.arguments, f"--workdir={workdir}", "--config.n_epochs=1000"]
    command = [sys.executable, "scripts/train.py", *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            while process.poll() is None and len(read_metrics(workdir)) < 3:
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0 and errors == ""
    assert re.search(r"^epoch +1/1000 ", output, re.MULTILINE)  # also where the output is no terminal
    (last,) = re.findall(r"^stopped by Ctrl-C .*, saved at step (\d+); the same command continues .*run$", output, re.M)
    written = [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    assert max(written) == int(last) >= read_metrics(workdir)[-1]["step"]


def test_a_finished_training_is_reported_again(run, environment):
    again = script(environment, "train", *run.arguments)
    assert again.returncode == 0 and again.stderr == ""
    assert table_rows(again.stdout, "e_form") == table_rows(run.process.stdout, "e_form")
    assert not table_rows(again.stdout, "epoch ")


def test_other_hyperparameters_in_the_same_directory_are_refused(run, environment):
    process = script(environment, "train", *run.arguments, "--config.lr=0.1")
    assert_one_error(process, "lr 0.003 -> 0.1", str(run.workdir))


WRONG = {  # what the error names by the arguments
    "--config.n_epoch=3": ["'n_epoch'", "'n_epochs'"],
    "--config.n_epochs three": ["n_epochs", "three"],
    "--config.lr=fast": ["lr", "fast"],
    "--config.frame_method=maximal": ["frame_method='maximal'", "'max'"],
    "--config.targets=gap": ["'gap'", "e_form", "e_above_hull"],
    "--config=configs/nowhere.py": ["configs/nowhere.py"],
    "--epochs=3": ["epochs"],
    "--config.num_layers=1000000000": ["num_layers=1000000000", "256"],
    "--max_minutes=nan": ["max_minutes", "not a number"],
}


@pytest.fixture(scope="module")
def wrong(run, environment, tmp_path_factory) -> dict[str, tuple[subprocess.CompletedProcess, Path]]:
    """Results and run directories of the WRONG command lines; the fixture `run` has prepared the data."""
    folder = tmp_path_factory.mktemp("wrong")
    workdirs = [folder / f"run-{number}" for number in range(len(WRONG))]
    lines = [(f"--workdir={workdir}", *words.split()) for words, workdir in zip(WRONG, workdirs, strict=True)]
    results = [script(environment, "train", "--config=configs/quickstart.py", *line) for line in lines]
    return dict(zip(WRONG, zip(results, workdirs, strict=True), strict=True))


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_command_lines_of_training_are_told_in_one_line(wrong, arguments):
    process, workdir = wrong[arguments]
    assert_one_error(process, *WRONG[arguments])
    assert not (workdir / "config.json").exists()


# Prediction


@pytest.fixture(scope="module")
def mixed(run, environment, tmp_path_factory) -> tuple[subprocess.CompletedProcess, list[str], Path]:
    """One command with two sound files among unusable ones: its result, the unusable files, the CSV."""
    folder = tmp_path_factory.mktemp("bad")
    for name, content in BAD_FILES.items():
        (folder / name).write_text(content)
    (folder / "folder.cif").mkdir()
    bad = [str(folder / name) for name in (*BAD_FILES, "nowhere.cif", "folder.cif")]
    files = [*bad[:4], NACL, *bad[4:], SILICON]
    output = folder / "results" / "predictions.csv"
    return script(environment, "predict", run.workdir, *files, f"--output={output}"), bad, output


def test_every_unusable_file_is_told_in_one_line(mixed):
    process, bad, _ = mixed
    lines = process.stderr.splitlines()
    assert process.returncode == 1 and len(lines) == len(bad)
    for line, file in zip(lines, bad, strict=True):
        assert line.startswith(f"error: {file}: ")


def test_the_other_files_are_predicted_all_the_same(mixed, run):
    process, _, output = mixed
    expected = Predictor.load(run.workdir).predict([ROOT / NACL, ROOT / SILICON])[:, 0]
    header = table_rows(process.stdout, "structure")
    assert header == [["structure", "formula", "atoms", "e_form (eV/atom)"]]
    rows = table_rows(process.stdout, "examples/")
    assert rows == [[NACL, "NaCl", "8", f"{expected[0]:.4f}"], [SILICON, "Si", "2", f"{expected[1]:.4f}"]]
    assert f"wrote {output}" in process.stdout

    csv_header, *lines = read_csv(output)
    assert csv_header == ["structure", "formula", "atoms", "e_form (eV/atom)", "warnings"]
    assert [line[:3] for line in lines] == [[NACL, "NaCl", "8"], [SILICON, "Si", "2"]]
    np.testing.assert_allclose([float(line[3]) for line in lines], expected, rtol=0, atol=1e-6)


def test_only_unusable_files(run, environment, tmp_path):
    (tmp_path / "empty.cif").write_text("")
    process = script(environment, "predict", run.workdir, tmp_path / "empty.cif", f"--output={tmp_path / 'out.csv'}")
    assert_one_error(process, str(tmp_path / "empty.cif"), "empty")
    assert process.returncode == 1 and not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize("name", ["predict", "evaluate"])
def test_a_run_that_is_not_there(environment, tmp_path, name):
    files = [NACL] if name == "predict" else []
    assert_one_error(script(environment, name, tmp_path / "nowhere", *files), str(tmp_path / "nowhere"))


def test_predicting_in_process_with_chosen_weights(run, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    for weights in ("last", "swa"):
        assert predict_main([str(run.workdir), NACL, f"--weights={weights}"]) == 0
        captured = capsys.readouterr()
        expected = Predictor.load(run.workdir, weights).predict(NACL)[0, 0]
        assert table_rows(captured.out, NACL)[0][-1] == f"{expected:.4f}" and captured.err == ""


@pytest.mark.parametrize("arguments", [[], ["run"], ["run", NACL, "--weights=first"], ["run", NACL, "--out=x"]])
def test_wrong_command_lines_of_prediction(capsys, arguments):
    with pytest.raises(SystemExit) as error:
        predict_main(arguments)
    assert error.value.code == 2 and "usage: predict.py" in capsys.readouterr().err


@pytest.mark.parametrize("main", [predict_main, evaluate_main])
def test_results_that_cannot_be_written(run, tmp_path, monkeypatch, main):
    monkeypatch.chdir(ROOT)
    (tmp_path / "file").write_text("")
    files = [NACL] if main is predict_main else []
    with pytest.raises(SystemExit) as error:
        main([str(run.workdir), *files, f"--output={tmp_path / 'file' / 'out.csv'}"])
    assert str(error.value.code).startswith("error: ") and str(tmp_path / "file") in error.value.code


# Evaluation


@pytest.mark.parametrize("split", ["test", "val"])
def test_evaluation_repeats_the_errors_of_the_summary(run, environment, tmp_path, split):
    output = tmp_path / "evaluated.csv"
    process = script(environment, "evaluate", run.workdir, f"--split={split}", f"--output={output}")
    assert process.returncode == 0 and process.stderr == ""
    error = run.summary["mae"][run.summary["selected_weights"]][split]["e_form"]
    baseline = run.summary["mean_predictor_mae"][split]["e_form"]
    csv_header, *lines = read_csv(output)
    assert csv_header == ["id", "target", "prediction"]
    records = raw_records()
    rows = literal_split(np.ones(len(records), bool))[{"val": 1, "test": 2}[split]]
    assert [line[0] for line in lines] == [records[row]["id"] for row in rows]
    labels, predictions = np.array([line[1:] for line in lines], float).T
    assert labels.tolist() == [records[row]["formation_energy_per_atom"] for row in rows]
    assert np.abs(labels - predictions).mean() == pytest.approx(error, rel=1e-6)

    header = [f"mp_flla_2015, {split}", "unit", "crystals", "MAE", "RMSE", "R2", "mean predictor"]
    assert table_rows(process.stdout, header[0]) == [header]
    squared = np.mean((labels - predictions) ** 2)
    numbers = [f"{x:.4f}" for x in (error, np.sqrt(squared), 1 - squared / labels.var(), baseline)]
    first, *others = table_rows(process.stdout, "e_form")
    assert first == ["e_form", "eV/atom", "393", *numbers]
    assert not others  # no crystal of this set leaks


# Text


def test_tables_align_numbers_to_the_right():
    text = table(["name", "atoms", "MAE (eV)"], [["NaCl", 8, 0.12345], ["long name", 1000, float("nan")]])
    assert text.splitlines() == [
        "name       atoms  MAE (eV)",
        "---------  -----  --------",
        "NaCl           8    0.1235",
        "long name   1000         -",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (247, "4 min 07 s"), (3600, "1 h 00 min"), (11_130, "3 h 05 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
