"""What all command lines have in common: --help, a closed pipe, a home that cannot be written, configurations."""

import json
import os
import subprocess
import sys
from pathlib import Path

import forks
import pytest
from support import EXAMPLES, ROOT, random_variables
from tiny import tiny_config

from crystalframer_jax import Predictor
from crystalframer_jax.batching.targets import TargetStatistics
from crystalframer_jax.cli import stored_config, train
from crystalframer_jax.cli.common import PIPE_CLOSED, reporting_errors
from crystalframer_jax.cli.prepare import prepare_main
from crystalframer_jax.config import ConfigError, validate
from crystalframer_jax.configs import default
from crystalframer_jax.files import write_csv, write_json
from crystalframer_jax.inference.predictor import stored_fields
from crystalframer_jax.runs.checkpoints import Checkpoints
from crystalframer_jax.runs.run_directory import as_json, sealed

SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py"))
SHELL = sorted(path.name for path in (ROOT / "scripts").glob("*.sh"))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The run directory of a model with random weights."""
    folder = tmp_path_factory.mktemp("commands") / "run"
    folder.mkdir()
    config = validate(tiny_config(folder / "data", embedding_dim=(16, 8)))
    target = TargetStatistics("e_form", "eV/atom", -1.5, 1.2)
    write_json(folder / "config.json", as_json(config))
    checkpoints = Checkpoints(folder, writable=True)
    meta = {"epoch": 0, "seconds": 0.0, "targets": [vars(target)], "val_mae": {}, "config": as_json(config)}
    checkpoints.save_weights(7, stored_fields(config, random_variables(config.model)), meta)
    checkpoints.close()
    write_json(folder / "summary.json", sealed({"selected_weights": "last"}))
    return folder


# Help


def test_help_of_scripts(tmp_path):
    """With an empty cache: what is started is seen."""
    cache = tmp_path / "cache"
    for name in SCRIPTS:
        process = forks.run(f"scripts/{name}.py", "--help", environment=os.environ | {"XDG_CACHE_HOME": str(cache)})
        assert (process.returncode, process.stderr) == (0, ""), name
        assert len(process.stdout.splitlines()) > 5, name
    assert not (cache / "crystalframer_jax").exists()


@pytest.mark.parametrize("name", SHELL)
def test_help_of_a_shell_script(name, tmp_path):
    (tmp_path / "scripts").mkdir()
    for script in SHELL:  # a checkout of which nothing can be started
        (tmp_path / "scripts" / script).write_text((ROOT / "scripts" / script).read_text())
    for flag in ("--help", "-h"):
        command = ["bash", f"scripts/{name}", flag]
        process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert (process.returncode, process.stderr) == (0, "")
        first = (ROOT / "scripts" / name).read_text().removeprefix("#!/usr/bin/env bash\n").split("\n")[0]
        assert process.stdout.startswith(first.removeprefix("# ") + "\n")
    assert [path.name for path in tmp_path.iterdir()] == ["scripts"]


def test_an_argument_that_quickstart_does_not_know(tmp_path):
    (tmp_path / "scripts").mkdir()
    script = tmp_path / "scripts" / "quickstart.sh"
    script.write_text((ROOT / "scripts" / "quickstart.sh").read_text())
    process = subprocess.run(["bash", script, "--hepl"], capture_output=True, text=True, timeout=60)
    assert process.returncode == 2 and "takes no arguments" in process.stderr


# Pipes


@pytest.mark.parametrize(
    "arguments", [["predict", "RUN", EXAMPLES / "NaCl.cif"], ["prepare_data"], ["train", "--help"]]
)
def test_a_closed_pipe_ends_a_command_quietly(run, arguments):
    name, *others = [run if word == "RUN" else word for word in arguments]
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, ROOT / "scripts" / f"{name}.py", *others]
    process = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert (process.returncode, process.stderr) == (PIPE_CLOSED, "")


def test_other_errors_are_told(capsys):
    with pytest.raises(SystemExit, match=r"^error: .*nowhere"), reporting_errors():
        Path("nowhere").read_text()


# Folders that cannot be written


@pytest.fixture
def no_home(tmp_path, monkeypatch) -> Path:
    """A home below a file, where nobody can make a folder, root neither."""
    (tmp_path / "file").write_text("")
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "file" / name))
    return tmp_path / "file"


def test_a_home_that_cannot_be_written(no_home, monkeypatch):
    with pytest.raises(SystemExit) as error:
        prepare_main(["--target_set=mp_flla_2015"])
    assert str(error.value.code).startswith(f"error: {no_home}")
    assert "--data_dir" in error.value.code and "--config.data_dir" in error.value.code


def test_a_prediction_needs_no_home(run, no_home):
    command = [sys.executable, ROOT / "scripts" / "predict.py", run, EXAMPLES / "NaCl.cif"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (process.returncode, process.stderr) == (0, "") and "NaCl" in process.stdout


def test_a_file_that_cannot_be_written_is_named_itself(tmp_path, monkeypatch):
    def touch(path: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "touch", touch)
    with pytest.raises(PermissionError) as error:
        write_csv(tmp_path / "out.csv", ["a"], [])
    assert error.value.filename == str(tmp_path / "out.csv")


# Configurations


def test_configurations_of_runs(run, monkeypatch):
    """With a blank or "=", by directory or file; other files of JSON that name some hyperparameters are taken too."""
    script = str(Path(stored_config.__file__))
    expected = f"--config={script}:{run / 'config.json'}"
    for words in ([f"--config={run}"], ["--config", str(run)], ["-config", str(run / "config.json")]):
        assert train.with_config_files(["train.py", *words, "--config.lr", "1"]) == [
            *("train.py", expected, "--config.lr", "1")
        ]
    monkeypatch.chdir(ROOT)
    words = ["--config", "configs/jarvis.py:lightweight", "--workdir", "a"]
    assert train.with_config_files(words) == ["--config=configs/jarvis.py:lightweight", *words[2:]]
    found = stored_config.get_config(str(run / "config.json"))
    assert found.embedding_dim == (16, 8) and validate(found) == validate(json.loads((run / "config.json").read_text()))


@pytest.mark.parametrize(
    ("content", "words"), [("{", "damaged"), ('{"lrr": 1}', "'lr'"), ('{"lr": "fast"}', "lr='fast'"), ("[]", "damaged")]
)
def test_configurations_that_are_none(tmp_path, content, words):
    file = tmp_path / "c.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=f"^--config={file}: .*{words}"):
        stored_config.get_config(str(file))
    file.write_text('{"lr": 0.25}')
    assert stored_config.get_config(str(file)).to_dict() == default.get_config().to_dict() | {"lr": 0.25}


@pytest.mark.parametrize("words", [["--config"], ["--config="], ["--config", "FOLDER"], ["--config=FOLDER/a.json"]])
def test_configurations_that_are_not_there(tmp_path, words):
    words = [word.replace("FOLDER", str(tmp_path)) for word in words]
    with pytest.raises(ConfigError, match="there is no such file"):
        train.with_config_files(words)


def test_training_with_the_configuration_of_a_run(run, tmp_path):
    """The whole way through flags: an override comes after it, and the command is recorded as it was given."""
    flags = ["--config", run, f"--workdir={tmp_path / 'new'}", "--config.target_set=nothing", "--config.n_epochs=1"]
    process = forks.run("scripts/train.py", *flags, "--config.swa_epochs=0")
    assert process.returncode == 1 and process.stderr.startswith("error: target_set='nothing' is not known")
    assert str(run / "data") in process.stderr  # which only the configuration of the run says


# Other systems


def test_a_prediction_without_what_windows_lacks(run):
    nacl = EXAMPLES / "NaCl.cif"
    command = [sys.executable, ROOT / "tests" / "without_posix.py", run, nacl]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    assert float(process.stdout) == pytest.approx(Predictor.load(run).predict(nacl)[0, 0], abs=1e-5)
