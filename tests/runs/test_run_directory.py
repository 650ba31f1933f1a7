"""The run directory as anybody may find it: damaged, foreign, made anew by somebody who meant harm."""

import dataclasses
import json
import os
import random
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from support import primitive
from tiny import tiny_config

from crystalframer_jax.batching.targets import TargetStatistics
from crystalframer_jax.config import ConfigError, validate
from crystalframer_jax.config.hyperparameters import KEYS, NEVER
from crystalframer_jax.errors import UserError
from crystalframer_jax.files import write_json
from crystalframer_jax.inference import ensemble, predictor
from crystalframer_jax.inference.predictor import Predictor, stored_fields
from crystalframer_jax.runs import run_directory
from crystalframer_jax.runs.checkpoints import CheckpointError, Checkpoints
from crystalframer_jax.runs.claims import check_workdir
from crystalframer_jax.runs.run_directory import (
    as_json,
    check_config,
    check_data,
    read_config,
    read_summary,
    sealed,
    store_config,
)
from crystalframer_jax.training.start import train

CONFIG = validate(tiny_config(Path("/data"), num_frame_samples=2))
TARGETS = (TargetStatistics("e_form", "eV/atom", -1.5, 1.2),)
DATA = {"target_set": "small", "digest": "abc", "remark": ""}
NAN, INFINITY = float("nan"), float("inf")


def write_run(folder: Path, seal: bool = True, **meta) -> Path:
    """The run directory of an untrained model, as a training leaves it; `meta`: what its checkpoint tells instead."""
    rng = np.random.default_rng(0)
    shapes = predictor._abstract_model(CONFIG)
    fields = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)
    folder.mkdir()
    write_json(folder / "config.json", as_json(CONFIG))
    write_json(folder / "data.json", DATA)
    told = {"epoch": 0, "seconds": 0.0, "results": [], "targets": [vars(target) for target in TARGETS], "val_mae": {}}
    told |= {"config": as_json(CONFIG), "data": DATA} | meta
    checkpoints = Checkpoints(folder, writable=True)
    checkpoints.save_weights(7, stored_fields(CONFIG, fields), {key: value for key, value in told.items() if value})
    checkpoints.close()
    summary = {"selected_weights": "last", "num_frame_samples": 2, "seconds": 1.5, "mae": {"last": {}}}
    write_json(folder / "summary.json", sealed(summary) if seal else summary)
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def run(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run"))


@pytest.fixture(autouse=True)
def _warnings_of_this_test():
    run_directory.warn.cache_clear()


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) < 1000
    return message


def predictions(folder: Path) -> np.ndarray:
    return Predictor.load(folder).predict(primitive("rock salt"))


# Damage


def with_one_bit_flipped(file: Path, skip: int):
    """Write a file with one bit flipped, for one bit in `skip`: an odd number takes all bits of a byte in turns."""
    content = file.read_bytes()
    for bit in range(0, 8 * len(content), skip):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        yield bit


def test_a_flipped_bit_of_the_configuration_is_found_or_means_nothing(run):
    fixed = [key for key in KEYS if KEYS[key].metadata["change"] == NEVER]
    with_checkpoint = Checkpoints(run).meta(7)
    found = 0
    for bit in with_one_bit_flipped(run / "config.json", 11):
        try:
            config = read_config(run, with_checkpoint)
        except CheckpointError as error:
            assert str(run) in str(error) and "\n" not in str(error), bit
            found += 1
        else:
            assert [getattr(config, key) for key in fixed] == [getattr(CONFIG, key) for key in fixed], bit
    assert found > 1000


def test_a_flipped_bit_of_the_summary_is_found_or_means_nothing(run):
    expected = read_summary(run)
    steering = ("selected_weights", "num_frame_samples")
    found = 0
    for bit in with_one_bit_flipped(run / "summary.json", 3):
        try:
            summary = read_summary(run)
        except CheckpointError as error:
            assert str(run) in str(error) and "\n" not in str(error), bit
            found += 1
        else:
            assert [summary[key] for key in steering] == [expected[key] for key in steering], bit
    assert found > 400


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
def test_a_flipped_bit_never_changes_a_prediction(run, name):
    expected, rng = predictions(run), random.Random(name)
    content = (run / name).read_bytes()
    numbers = [place for place, byte in enumerate(content) if byte in b"0123456789"]  # whose flips are JSON still
    for place in rng.sample(numbers, 12):
        flipped = bytearray(content)
        flipped[place] ^= 1
        (run / name).write_bytes(flipped)
        try:
            np.testing.assert_array_equal(predictions(run), expected)
        except UserError as error:
            assert "\n" not in str(error) and str(run) in str(error)


def test_draws_of_frames_are_those_that_the_checkpoint_and_the_summary_tell(run, capfd):
    write_json(run / "config.json", as_json(CONFIG) | {"num_frame_samples": 7})
    assert Predictor.load(run).config.num_frame_samples == 2
    assert "num_frame_samples=7; the run was made with 2" in capfd.readouterr().err
    write_json(run / "summary.json", sealed({"selected_weights": "last", "num_frame_samples": 5}))
    assert Predictor.load(run).config.num_frame_samples == 5


WRONG = {
    "empty": "",
    "null": "null",
    "list": "[]",
    "deep": "[" * 100_000,
    "number": "1e999",
    "long number": '{"seed": ' + "9" * 5000 + "}",
    "latin": b'{"a": "\xff"}',
}


@pytest.mark.parametrize("content", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("name", ["config.json", "summary.json"])
def test_wrong_json_is_an_error_of_one_line(run, name, content):
    (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError) as error:
        Predictor.load(run)
    assert str(run / name) in one_line(error) and "remove it" in one_line(error)


@pytest.mark.parametrize("changes", [{"selected_weights": 3}, {"selected_weights": None}, {"num_frame_samples": "x"}])
@pytest.mark.parametrize("is_sealed", [True, False])
def test_a_summary_of_wrong_types(run, changes, is_sealed):
    summary = {"selected_weights": "last", "num_frame_samples": 2} | changes
    write_json(run / "summary.json", sealed(summary) if is_sealed else summary)
    with pytest.raises(CheckpointError) as error:
        Predictor.load(run)
    assert next(iter(changes)) in one_line(error)


def test_endless_names_of_weights_are_cut(run):
    write_json(run / "summary.json", sealed({"selected_weights": "x" * 100_000}))
    with pytest.raises(CheckpointError, match=r"weights='xxx.*do not exist; allowed: best") as error:
        Predictor.load(run)
    one_line(error)


@pytest.mark.parametrize("size", [3, 10**9, "many", [2]])
def test_the_size_of_an_ensemble_is_within_bounds(run, tmp_path, size):
    shutil.copytree(run, tmp_path / "ensemble" / "member_0")
    write_json(tmp_path / "ensemble" / "config.json", as_json(CONFIG) | {"ensemble_size": size})
    (tmp_path / "ensemble" / "member_99999999999999").mkdir()
    with pytest.raises(CheckpointError) as error:
        ensemble.load_model(tmp_path / "ensemble")
    assert ("member_1" if size == 3 else "ensemble_size=") in one_line(error)


@pytest.mark.parametrize("content", [{}, {"mae": 1}, {"selected_weights": "best"}])
def test_a_summary_without_a_seal_is_of_an_old_version_only(run, content):
    write_json(run / "summary.json", content)
    with pytest.raises(CheckpointError, match=r"summary.json is damaged: its seal"):
        Predictor.load(run)


def test_names_of_steps_are_numbers():
    for name in ("²", "9" * 400):
        assert predictor.run_and_step(f"run/checkpoints/{name}") == (Path(f"run/checkpoints/{name}"), None)


# What the checkpoint knows


def test_without_its_configuration_a_run_has_that_of_the_checkpoint(run, capfd):
    expected = predictions(run)
    (run / "config.json").unlink()
    np.testing.assert_array_equal(predictions(run), expected)
    assert capfd.readouterr().err.count("config.json is missing") == 1  # told once
    for other in ({"head_num": 1}, {"targets": "e_above_hull"}, {"seed": 5}):
        with pytest.raises(ConfigError, match=r"other hyperparameters") as error:
            check_config(validate(tiny_config(Path("/data"), **{"num_frame_samples": 2, **other})), run)
        assert next(iter(other)) in one_line(error)
    check_config(CONFIG, run)
    assert not (run / "config.json").exists()
    store_config(CONFIG, run)
    assert json.loads((run / "config.json").read_text()) == as_json(CONFIG)


@pytest.mark.parametrize("key", ["head_num", "seed", "target_set", "cutoff_radius", "model_dim", "batch_size"])
def test_a_configuration_of_another_run_is_refused(run, key):
    other = {"head_num": 1, "seed": 5, "target_set": "x", "cutoff_radius": 5.0, "model_dim": 18, "batch_size": 4}
    write_json(run / "config.json", as_json(CONFIG) | {key: other[key]})
    for use in (lambda: Predictor.load(run), lambda: check_config(CONFIG, run)):
        with pytest.raises(CheckpointError) as error:
            use()
        assert key in one_line(error) and "remove it" in one_line(error)
    write_json(run / "config.json", as_json(CONFIG) | {"data_dir": "/moved", "lr": 1.0})  # no prediction depends on it
    assert Predictor.load(run).config.data_dir == "/moved"


@pytest.mark.parametrize("content", [None, "null", '{"digest": 3}', '{"digest": "other"}'])
def test_the_data_of_a_run_are_those_that_the_checkpoint_tells(run, content):
    (run / "data.json").unlink()
    if content:
        (run / "data.json").write_text(content)
    same = dataclasses.make_dataclass("Data", ["name", "digest", "remark"])("small", "abc", "")
    with pytest.raises(ConfigError, match=r"was started with other data"):
        check_data(dataclasses.replace(same, digest="other"), run)
    check_data(same, run)
    assert json.loads((run / "data.json").read_text()) == DATA


def test_a_run_of_an_old_version_is_read_with_a_warning(tmp_path, capfd):
    old = write_run(tmp_path / "old", seal=False, config=None, data=None)
    assert Predictor.load(old).targets == TARGETS
    assert capfd.readouterr().err.count("old version") == 1
    (old / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json is missing; put back a copy"):
        Predictor.load(old)


# Meta data that somebody made anew, with their checksums

RESEALED = {
    "no spread": {"targets": [vars(TARGETS[0]) | {"std": 0.0}]},
    "negative spread": {"targets": [vars(TARGETS[0]) | {"std": -1.0}]},
    "infinite mean": {"targets": [vars(TARGETS[0]) | {"mean": INFINITY}]},
    "NaN": {"targets": [vars(TARGETS[0]) | {"std": NAN}]},
    "text": {"targets": [vars(TARGETS[0]) | {"mean": "0"}]},
    "a unit too many": {"targets": [vars(TARGETS[0]) | {"units": "eV"}]},
    "another target": {"targets": [vars(TARGETS[0]) | {"name": "gap"}]},
    "two targets": {"targets": 2 * [vars(TARGETS[0])]},
    "no targets": {"targets": None},
    "targets by name": {"targets": {"e_form": 1.0}},
    "epoch": {"epoch": 1e30},
    "epoch before the first": {"epoch": -2},
    "time": {"seconds": -1.0},
    "results": {"results": [[1.0]]},
    "a list of hyperparameters": {"config": [1]},
    "blocks without end": {"config": as_json(CONFIG) | {"num_layers": 10**9}},
    "a cutoff without end": {"config": as_json(CONFIG) | {"cutoff_radius": 1000.0}},
}


@pytest.mark.parametrize("meta", RESEALED.values(), ids=RESEALED)
def test_meta_data_are_held_to_what_they_can_be(tmp_path, meta):
    folder = write_run(tmp_path / "run", **meta)
    with pytest.raises(UserError) as error:
        Predictor.load(folder)
    assert str(folder) in one_line(error)


# Directories of others

NAMES = ["lock", "config.json", "data.json", "summary.json", "metrics.jsonl", "environment.jsonl", "wandb_id.txt"]
NAMES += ["config_changes.jsonl", "predictions_test.csv", "parity_test.png", "learning_curve.png"]
NAMES += ["suspect_labels.csv"]
NAMES += ["calibration_test_e_form.png", "nonfinite_step_5.json", "checkpoints/a", "damaged_checkpoints/a"]
NAMES += ["tensorboard/events", "wandb/a", "member_0/config.json", "checkpoints/10/a"]


def content_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", [*NAMES, "all of them"])
@pytest.mark.parametrize("ensemble_size", [1, 2])
def test_nothing_of_another_program_is_written_over(tmp_path, name, ensemble_size):
    for taken in NAMES if name == "all of them" else [name]:
        (tmp_path / taken).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / taken).write_text('{"theirs": 1}')
    before = content_of(tmp_path)
    with pytest.raises(ConfigError) as error:
        train(tiny_config(tmp_path / "no-data", ensemble_size=ensemble_size), tmp_path)
    assert str(tmp_path) in one_line(error) and "choose another --workdir" in one_line(error)
    assert content_of(tmp_path) == before


def test_directories_that_a_run_may_have(original, tmp_path):
    check_workdir(tmp_path / "new")
    check_workdir(original)
    (tmp_path / "NOTES.md").write_text("mine")
    (tmp_path / ".hidden").write_text("mine")
    check_workdir(tmp_path)
    (tmp_path / "lock").touch()
    (tmp_path / "checkpoints").mkdir()
    write_json(tmp_path / "data.json", DATA)  # a start that was killed
    check_workdir(tmp_path)
    shutil.copytree(original, tmp_path / "member_0")  # an ensemble that was stopped in its first training
    (tmp_path / "member_1").mkdir()
    check_workdir(tmp_path)
    (tmp_path / "link").symlink_to(original)
    check_workdir(tmp_path / "link")


@pytest.mark.parametrize("name", ["config.json", "lock", "metrics.jsonl", "checkpoints", "tensorboard", "unfinished"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_nothing_is_written_through_links_and_pipes(run, tmp_path, name, kind):
    path = run / "checkpoints" / name if name == "unfinished" else run / name
    elsewhere = tmp_path / "elsewhere"
    if path.exists():
        path.rename(elsewhere)
    else:
        elsewhere.mkdir()
    path.symlink_to(elsewhere) if kind == "link" else os.mkfifo(path)
    before = sorted(elsewhere.rglob("*"))
    with pytest.raises(ConfigError) as error:
        train(tiny_config(tmp_path / "no-data"), run)
    assert str(path) in one_line(error) and ("link" if kind == "link" else "is no f") in one_line(error)
    assert sorted(elsewhere.rglob("*")) == before


@pytest.mark.parametrize("name", ["config.json", "summary.json", "checkpoints/7/SHA256SUMS", "checkpoints/7/model/new"])
@pytest.mark.parametrize("kind", ["link", "pipe", "device"])
def test_nothing_but_regular_files_is_read(run, name, kind):
    path = run / name
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero") if kind == "device" else os.mkfifo(path) if kind == "pipe" else path.symlink_to("/")
    with pytest.raises(CheckpointError) as error:
        Predictor.load(run)
    assert str(path) in one_line(error)
