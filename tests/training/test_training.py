"""Training runs: what they leave, what they refuse, and what they do when numbers are not finite."""

import csv
import dataclasses
import errno
import json
import re
import shutil
import struct
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from small_sets import raw_records
from support import EXAMPLES, ROOT
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tiny import assert_equal_trees, assert_same_run, nan_at, open_tiny, stored_state, tiny_config, tiny_runs

from crystalframer_jax.batching.targets import TargetStatistics, standardise, to_label_units
from crystalframer_jax.cli import train as cli
from crystalframer_jax.cli.arguments import train_parser
from crystalframer_jax.config import ConfigError, validate
from crystalframer_jax.data.loader import TrainingBatches
from crystalframer_jax.data.records import Target
from crystalframer_jax.errors import UserError
from crystalframer_jax.files import locked
from crystalframer_jax.inference.predictor import Predictor
from crystalframer_jax.parallel.interruption import TrainingInterrupted
from crystalframer_jax.reporting import plots, predictions
from crystalframer_jax.runs import checksums
from crystalframer_jax.runs.checkpoints import CheckpointError, Checkpoints
from crystalframer_jax.runs.run_directory import as_json, warn
from crystalframer_jax.training import start
from crystalframer_jax.training.logging import MetricsLog, read_metrics
from crystalframer_jax.training.loop import Options, Run, TrainingError
from crystalframer_jax.training.start import train
from crystalframer_jax.training.step import make_train_step
from crystalframer_jax.training.validation import Evaluator


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """Where the runs of this file are, with the setting that they need."""
    with tiny_runs():
        yield tmp_path_factory.mktemp("training")


def changed(config: ConfigDict, **changes) -> ConfigDict:
    config = config.copy_and_resolve_references()
    config.update(changes)
    return config


NEVER = 10**6  # a step that no run takes


def new_run(config: ConfigDict, workdir: Path) -> Run:
    """A run that has not started."""
    run = Run(validate(config), workdir, open_tiny(config))
    run.checkpoints.close()
    return run


@pytest.fixture(scope="module")
def finished(folder):
    """(configuration, directory, summary) of a run that nothing disturbed."""
    config = tiny_config(folder / "data")
    return config, folder / "finished", train(config, folder / "finished")


@pytest.fixture(scope="module")
def finished_without_nan(folder):
    """(configuration, directory) of such a run whose loss could be NaN: then it is rounded differently."""
    config = tiny_config(folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        nan_at(patch, NEVER)
        train(config, folder / "finished-without-nan")
    return config, folder / "finished-without-nan"


# Statistics


def test_statistics_are_mean_and_population_deviation_of_known_labels():
    target = Target("gap", "band_gap", "eV")
    labels = np.array([1.0, np.nan, 4.0, 1.0])
    expected = {"scale_bias": (2, 2**0.5), "bias": (2, 1), "scale": (0, 6**0.5), "no": (0, 1)}
    for how, (mean, std) in expected.items():
        statistics = TargetStatistics.of(target.name, target.unit, labels, how)
        assert (statistics.name, statistics.unit) == ("gap", "eV")
        assert (statistics.mean, statistics.std) == (pytest.approx(mean), pytest.approx(std)), how
    for labels in ([1.0, 1.0], [np.nan], []):
        with pytest.raises(ValueError, match="gap"):
            TargetStatistics.of(target.name, target.unit, np.array(labels))


def test_standardising_and_back():
    statistics = (TargetStatistics("a", "eV", 2.0, 0.5), TargetStatistics("b", "GPa", -100.0, 20.0))
    labels = np.array([[2.0, -100.0], [3.0, -60.0]])
    standard = standardise(jnp.array(labels, jnp.float32), statistics)
    np.testing.assert_array_equal(standard, [[0, 0], [2, 2]])
    np.testing.assert_array_equal(to_label_units(np.asarray(standard), statistics), labels)


# Runs


def test_a_run_with_the_options_of_the_compiler_that_users_have(folder, monkeypatch):
    """In no other test are programs made with these options where training and prediction ask for them."""
    config = tiny_config(folder / "data", n_epochs=1, swa_epochs=0)
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        with tiny_runs():  # no program of another test
            train(config, folder / "optimised")
            assert np.isfinite(Predictor.load(folder / "optimised").predict(EXAMPLES / "NaCl.cif")).all()
    finally:
        jax.config.update("jax_disable_most_optimizations", True)


def test_what_a_run_leaves(finished, folder):
    config, workdir, summary = finished
    assert json.loads((workdir / "summary.json").read_text()) == summary
    assert json.loads((workdir / "config.json").read_text()) == json.loads(config.to_json())
    assert list((workdir / "tensorboard").glob("events*"))
    metrics = read_metrics(workdir)
    assert [line["epoch"] for line in metrics] == [0, 1, 2]
    assert [line["step"] for line in metrics] == [3, 6, 9]
    rates = [2e-3 * (20 / (20 + t)) ** 0.5 for t in (2, 5, 6)]  # averaging starts at step 6
    np.testing.assert_allclose([line["lr"] for line in metrics], rates, rtol=1e-6)
    assert summary["test"]["e_form"]["mae"] == summary["mae"][summary["selected_weights"]]["test"]["e_form"]
    by_val = {name: errors["val"]["e_form"] for name, errors in summary["mae"].items()}
    assert by_val[summary["selected_weights"]] <= by_val["swa"] and {"last", "swa"} <= by_val.keys()
    assert by_val["last"] == metrics[-1]["val_mae"]["e_form"]
    losses = [line["val_loss"] for line in metrics]
    assert summary["score_history"] == pytest.approx(
        {"val": losses[-1], "min": min(losses), "avr50": np.mean(losses), "mean_min10": np.mean(losses)}
        | {"min_avr50": min(np.mean(losses[:n]) for n in (1, 2, 3))}
    )
    for plot in ("parity_test.png", "learning_curve.png"):
        assert (workdir / plot).read_bytes().startswith(b"\x89PNG")


def test_a_run_tells_how_long_it_waited_for_batches(finished, folder, monkeypatch, capsys):
    """Three steps an epoch, with batches that take 0.2 s each."""
    iterate = TrainingBatches.iterate

    def slowly(self, first_step):
        for batch in iterate(self, first_step):
            time.sleep(0.2)
            yield batch

    monkeypatch.setattr(TrainingBatches, "iterate", slowly)
    train(finished[0], folder / "waiting")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    metrics = read_metrics(folder / "waiting")
    assert len(lines) == len(metrics) == 3
    for line, epoch in zip(lines, metrics, strict=True):
        share, seconds = epoch["waiting_share"], 3 * 16 / epoch["crystals_per_s"]
        assert 0.6 <= share * seconds < seconds
        assert line.endswith(f"crystals/s  waited {share:.0%} for data")
    assert all(0 <= epoch["waiting_share"] < 1 for epoch in read_metrics(finished[1]))


def test_the_predictions_of_a_run_make_its_errors(finished):
    config, workdir, summary = finished
    dataset = open_tiny(config)
    rows = list(csv.DictReader((workdir / "predictions_test.csv").open()))
    assert [row["id"] for row in rows] == list(dataset.table.ids[dataset.splits["test"]])
    target, prediction = (np.array([float(row[name]) for row in rows]) for name in ("target", "prediction"))
    np.testing.assert_array_equal(target, dataset.labels[dataset.splits["test"], 0])
    errors = summary["test"]["e_form"]
    assert errors["mae"] == pytest.approx(np.abs(prediction - target).mean())
    assert errors["rmse"] == pytest.approx(np.sqrt(np.mean((prediction - target) ** 2)))
    assert errors["r2"] == pytest.approx(1 - np.sum((prediction - target) ** 2) / np.sum((target - target.mean()) ** 2))


def test_what_a_run_says_of_its_environment(finished):
    _, workdir, _ = finished
    (first, *_) = map(json.loads, (workdir / "environment.jsonl").read_text().splitlines())
    assert first["versions"]["jax"] == jax.__version__ and "cpu" in first["device"]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert first["git_commit"].removesuffix("+changes") == commit


def test_the_mean_predictor_of_the_summary(finished):
    config, _, summary = finished
    splits = open_tiny(config).splits
    labels = np.array([record["formation_energy_per_atom"] for record in raw_records(60)])
    for split, rows in splits.items():
        expected = np.abs(labels[rows] - labels[splits["train"]].mean()).mean()
        assert summary["mean_predictor_mae"][split]["e_form"] == pytest.approx(expected, rel=1e-12)
    assert summary["test"]["e_form"]["mean_predictor_mae"] == summary["mean_predictor_mae"]["test"]["e_form"]


def step_counts(checkpoints: Checkpoints) -> tuple:
    try:
        return checkpoints.last(), checkpoints.best()
    finally:
        checkpoints.close()


@pytest.mark.parametrize("step", [pytest.param(3, marks=pytest.mark.slow), 4, pytest.param(5, marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_stops_the_run(finished_without_nan, folder, monkeypatch, step):
    """At every place of the second epoch; the run goes on from the checkpoint of the first as if nothing had been."""
    config, expected = finished_without_nan
    workdir = folder / f"nan-{step}"
    with monkeypatch.context() as patch:
        nan_at(patch, step)
        with pytest.raises(TrainingError, match=rf"not finite at step {step} \(epoch 2\).*--skip_nonfinite"):
            train(config, workdir)
    assert step_counts(Checkpoints(workdir)) == (3, 3)
    report = json.loads((workdir / f"nonfinite_step_{step}.json").read_text())
    run = new_run(config, folder / "unused")
    ids = run.dataset.table.ids[run.batches.rows(step)]
    assert [crystal["id"] for crystal in report["crystals"]] == list(ids) and len(ids) == 16
    assert report["last_good_checkpoint"] == 3 and (report["step"], report["loss"]) == (step, "nan")
    assert all(np.isfinite(crystal["loss"]) for crystal in report["crystals"])  # the NaN was put into their mean
    assert report["norms"]["output"]["gradient"] == "nan" and report["norms"]["output"]["parameters"] > 0
    labels = run.dataset.labels[run.batches.rows(step), 0]
    assert [crystal["e_form"] for crystal in report["crystals"]] == list(labels)
    with monkeypatch.context() as patch:
        nan_at(patch, NEVER)
        train(config, workdir)
    assert_same_run(config, workdir, expected)


def test_skipped_steps_change_nothing_but_the_count(finished, folder, monkeypatch):
    config, _, _ = finished
    with monkeypatch.context() as patch:
        nan_at(patch, 4)
        run = new_run(config, folder / "unused")
        before = run.initial_state()
        skipping = make_train_step(run.recipe, run.loss(None), 1)
        state = jax.tree.map(lambda x: x + jnp.asarray(4, x.dtype) if x.ndim == 0 else x + 0, before)
        state, result = skipping(dataclasses.replace(state, skipped_steps=jnp.array(0)), run.batches[4])
    assert not result["finite"] and (int(state.step), int(state.skipped_steps)) == (5, 1)
    assert_equal_trees(state.params, before.params)
    assert_equal_trees(state.swa_params, before.swa_params)


@pytest.mark.slow
def test_a_run_that_has_skipped_steps_goes_on_with_the_same_permission_only(finished, folder, monkeypatch):
    config, _, _ = finished
    nan_at(monkeypatch, 2)
    train(config, folder / "permission", Options(skip_nonfinite=1))
    longer = changed(config, n_epochs=4)
    with pytest.raises(TrainingError, match=r"has skipped 1 steps .* go on with --skip_nonfinite=1 or more"):
        train(longer, folder / "permission", Options(["n_epochs"]))
    assert train(longer, folder / "permission", Options(["n_epochs"], skip_nonfinite=1))["skipped_steps"] == 1


def test_skipping_is_counted_and_limited(finished, folder, monkeypatch, capsys):
    config, _, _ = finished
    nan_at(monkeypatch, 4)
    summary = train(config, folder / "skipping", Options(skip_nonfinite=1))
    assert [line["skipped_steps"] for line in read_metrics(folder / "skipping")] == [0, 1, 1]
    assert summary["skipped_steps"] == 1 and summary["steps"] == 9
    output = capsys.readouterr().out
    assert "epoch 2: skipped a step with loss nan" in output and "1 steps that were not finite were skipped" in output


@pytest.mark.filterwarnings("ignore:Mean of empty slice")
def test_predictions_that_are_not_finite_stop_the_run(finished, folder, monkeypatch):
    config, expected, _ = finished
    predict = Evaluator.predict

    def broken(self, weights, rows, *args):
        predictions = predict(self, weights, rows, *args)
        return np.where(np.arange(len(rows))[:, None] == 1, np.nan, predictions)

    workdir = folder / "invalid"
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "predict", broken)
        with pytest.raises(TrainingError, match=r"validation loss is not finite after epoch 1 \(1 of 6 predictions"):
            train(config, workdir)
    train(config, workdir)
    assert_same_run(config, workdir, expected)


@pytest.fixture(scope="module")
def too_fast(folder) -> tuple[Path, str]:
    """Directory and error of a run that diverged before its first checkpoint."""
    with pytest.raises(TrainingError) as error:
        train(tiny_config(folder / "data", lr=1e30), folder / "too-fast")
    return folder / "too-fast", str(error.value)


def test_divergence_in_the_first_epoch_names_the_step(too_fast):
    workdir, message = too_fast
    assert re.search(r"not finite at step \d+ \(epoch 1\).*smaller lr", message)
    with pytest.raises(CheckpointError):
        Predictor.load(workdir)


def test_a_run_without_a_checkpoint_may_start_again_with_other_hyperparameters(too_fast, folder):
    """What the error advises can be done; nothing was trained yet, so nothing is lost."""
    train(tiny_config(folder / "data"), too_fast[0])


def test_a_run_with_other_hyperparameters_is_refused_and_left_alone(finished):
    config, workdir, _ = finished
    files = {path: path.read_bytes() for path in workdir.iterdir() if path.is_file()}
    with pytest.raises(ConfigError) as error:
        train(changed(config, lr=1e-3, head_num=1), workdir)
    for part in (str(workdir), "lr 0.002 -> 0.001", "head_num 2 -> 1", "--workdir"):
        assert part in str(error.value)
    assert {path: path.read_bytes() for path in workdir.iterdir() if path.is_file()} == files


@pytest.mark.parametrize(
    ("allowed", "words"),
    [
        ([], "(lr 0.002 -> 0.001, n_epochs 3 -> 4); choose another --workdir, or go on with them by --resume_with_"),
        (["lr"], "n_epochs 3 -> 4"),
        (["lr", "n_epoch"], "there is no hyperparameter n_epoch"),
    ],
)
def test_changes_must_all_be_listed(finished, allowed, words):
    config, workdir, _ = finished
    with pytest.raises(ConfigError) as error:
        train(changed(config, lr=1e-3, n_epochs=4), workdir, Options(resume_with_changes=allowed))
    assert words in str(error.value)


def test_the_model_and_the_data_of_a_run_cannot_change(finished):
    config, workdir, _ = finished
    for key, value in {"head_num": 1, "batch_size": 8, "ema_decay": 0.9, "loss_func": "MSE"}.items():
        with pytest.raises(ConfigError, match=rf"{key} cannot change within a run.*pretrained_model={workdir}"):
            train(changed(config, **{key: value}), workdir, Options(resume_with_changes=[key]))


def test_a_finished_run_goes_on_with_more_epochs_and_another_rate(finished, folder):
    """Its average of weights starts anew, where the longer training says."""
    config, workdir, _ = finished
    longer = changed(config, n_epochs=5, lr=1e-3, checkpoint_minutes=1.0)
    shutil.copytree(workdir, folder / "longer")
    summary = train(longer, folder / "longer", Options(resume_with_changes=["lr", "n_epochs"]))
    metrics = read_metrics(folder / "longer")
    assert metrics[:3] == read_metrics(workdir) and [line["step"] for line in metrics] == [3, 6, 9, 12, 15]
    np.testing.assert_allclose(metrics[3]["lr"], 1e-3 * (20 / (20 + 11)) ** 0.5, rtol=1e-6)
    assert (summary["epochs"], summary["steps"]) == (5, 15)
    state, _ = stored_state(longer, folder / "longer")
    assert int(state.swa_steps) == 3
    (change,) = map(json.loads, (folder / "longer" / "config_changes.jsonl").read_text().splitlines())
    assert change["changes"] == {"checkpoint_minutes": [2.0, 1.0], "lr": [0.002, 0.001], "n_epochs": [3, 5]}
    assert json.loads((folder / "longer" / "config.json").read_text())["n_epochs"] == 5


def test_a_run_cannot_become_shorter_than_it_is(finished):
    config, workdir, _ = finished
    with pytest.raises(ConfigError, match=r"n_epochs=2: .* longer already, 9 steps; give at least n_epochs=3"):
        train(changed(config, n_epochs=2), workdir, Options(["n_epochs"]))
    assert json.loads((workdir / "config.json").read_text())["n_epochs"] == 3


@pytest.mark.slow
def test_an_average_that_has_begun_keeps_its_beginning(finished, folder):
    """The run is at step 9 and its average began with step 6: it may begin anew later, but not earlier."""
    config, workdir, _ = finished
    allowed = Options(["n_epochs", "swa_epochs"])
    for name in ("later", "earlier"):
        shutil.copytree(workdir, folder / name)
    later = changed(config, n_epochs=4, swa_epochs=1)
    assert train(later, folder / "later", allowed)["steps"] == 12
    assert int(stored_state(later, folder / "later")[0].swa_steps) == 3
    with pytest.raises(ConfigError, match="begun with step 3, but the run is at step 9 with an average of 3"):
        train(changed(config, n_epochs=4, swa_epochs=3), folder / "earlier", allowed)
    assert json.loads((folder / "earlier" / "config.json").read_text()) == as_json(validate(config))


def test_an_old_summary_does_not_outlive_the_training_that_goes_on(finished, folder, monkeypatch):
    config, workdir, _ = finished
    shutil.copytree(workdir, folder / "extended")

    def interrupted(*_):
        raise TrainingInterrupted("stopped")

    monkeypatch.setattr(Run, "_epochs", interrupted)
    with pytest.raises(TrainingInterrupted, match="stopped, saved at step 9; the same command continues"):
        train(changed(config, n_epochs=6), folder / "extended", Options(["n_epochs"]))
    assert not (folder / "extended" / "summary.json").exists()


def test_a_layer_that_is_misspelt_is_not_stored(finished, folder):
    config, workdir, _ = finished
    wrong = changed(config, n_epochs=4, frozen_layers="typo")
    with pytest.raises(ConfigError, match="there is no layer 'typo'"):
        train(wrong, workdir, Options(["frozen_layers", "n_epochs"]))
    train(config, workdir)
    with pytest.raises(ConfigError, match="there is no hyperparameter typo"):
        train(config, folder / "unused", Options(["typo"]))


def test_a_signal_while_a_checkpoint_is_read_is_no_damage(finished, monkeypatch):
    _, workdir, _ = finished

    def interrupted(*_):
        raise TrainingInterrupted("stopped by SIGTERM")

    monkeypatch.setattr(checksums, "problem", interrupted)
    with pytest.raises(TrainingInterrupted, match="stopped by SIGTERM"):
        Predictor.load(workdir)
    assert not (workdir / "damaged_checkpoints").exists()


def test_a_directory_where_another_process_trains_is_refused(finished):
    config, workdir, _ = finished
    with locked(workdir / "lock"), pytest.raises(UserError, match="another process is training"):
        train(config, workdir)


def test_a_run_that_cannot_start_claims_no_directory(folder):
    for changes in ({"lr": -1.0}, {"targets": "typo"}, {"target_set": "typo"}):
        with pytest.raises(ConfigError):
            train(tiny_config(folder / "data", **changes), folder / "never")
        assert not (folder / "never" / "config.json").exists(), changes


def test_a_finished_run_is_only_reported(finished, monkeypatch, capsys):
    config, workdir, summary = finished
    metrics = (workdir / "metrics.jsonl").read_text()
    before, _ = stored_state(config, workdir)

    def no_training(*_):
        raise AssertionError("a finished run was trained")

    monkeypatch.setattr(Run, "_epochs", no_training)
    assert train(config, workdir) == summary
    assert (workdir / "metrics.jsonl").read_text() == metrics
    assert_equal_trees(stored_state(config, workdir)[0], before)
    assert f"{summary['test']['e_form']['mae']:.4f}" in capsys.readouterr().out


@pytest.fixture(scope="module")
def two_targets(folder):
    """A run with two targets, one batch per epoch and no averaging."""
    changes = {"targets": "e_above_hull,e_form", "batch_size": 1000, "swa_epochs": 0, "n_epochs": 2}
    config = tiny_config(folder / "data", **changes)
    return config, folder / "two", train(config, folder / "two")


def test_several_targets_a_large_batch_size_and_no_averaging(two_targets):
    config, workdir, summary = two_targets
    assert [line["step"] for line in read_metrics(workdir)] == [1, 2]
    assert list(summary["test"]) == ["e_above_hull", "e_form"] and "swa" not in summary["mae"]
    dataset = open_tiny(config)
    labels = dataset.labels[dataset.splits["train"]]
    predictor = Predictor.load(workdir)
    assert [target.name for target in predictor.targets] == ["e_above_hull", "e_form"]
    np.testing.assert_allclose([target.mean for target in predictor.targets], labels.mean(axis=0))
    np.testing.assert_allclose([target.std for target in predictor.targets], labels.std(axis=0))
    with pytest.raises(CheckpointError, match="swa_epochs=0"):
        Predictor.load(workdir, "swa")


def test_checkpoints_compete_in_the_sum_of_standardised_errors(two_targets):
    _, workdir, _ = two_targets
    std = [target.std for target in Predictor.load(workdir).targets]
    errors = [line["val_mae"] for line in read_metrics(workdir)]
    totals = [error["e_above_hull"] / std[0] + error["e_form"] / std[1] for error in errors]
    assert step_counts(Checkpoints(workdir))[1] == 1 + int(np.argmin(totals))
    np.testing.assert_allclose([line["val_loss"] for line in read_metrics(workdir)], totals, rtol=1e-5)


def test_the_metrics_of_a_resumed_run_continue_after_the_epochs_it_keeps(tmp_path):
    """In the file and in TensorBoard, where a torn line and an epoch that is trained anew are gone."""
    for first, last in ((0, 3), (2, 4)):
        log = MetricsLog(tmp_path, first_epoch=first, first_step=3 * first)
        for epoch in range(first, last):
            log.write({"epoch": epoch, "step": 3 * epoch + 3, "loss": epoch + first / 10, "val_mae": {"e_form": 0.25}})
        log.close()
        with (tmp_path / "metrics.jsonl").open("a") as stream:
            stream.write('{"epoch": 3, "lo')
        time.sleep(1.1)  # event files are named after the second
    kept = [(line["step"], line["loss"]) for line in read_metrics(tmp_path)]
    assert kept == [(3, 0.0), (6, 1.0), (9, 2.2), (12, 3.2)]
    assert losses_in_tensorboard(tmp_path / "tensorboard") == pytest.approx(dict(kept))


def losses_in_tensorboard(folder: Path) -> dict[int, float]:
    """{step: loss} as TensorBoard reads the event files: a start of a session removes what is at its step and after."""
    found: dict[int, float] = {}
    for file in sorted(folder.glob("events*"), key=lambda file: file.stat().st_mtime):
        for record in tf_records(file.read_bytes()):
            event = Event.FromString(record)
            if event.session_log.status == SessionLog.START:
                found = {step: loss for step, loss in found.items() if step < event.step}
            for value in event.summary.value:
                if value.tag == "loss":
                    found[event.step] = value.simple_value
    return found


def tf_records(content: bytes) -> Iterator[bytes]:
    """The records of a file: length (8 bytes), checksum (4), data, checksum (4)."""
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        yield content[12 : 12 + length]
        content = content[16 + length :]


def test_weights_and_biases_gets_every_epoch_and_continues_its_run(tmp_path, monkeypatch):
    """With a stand-in for the package wandb, which writes down what it is told."""
    calls = []
    run = types.SimpleNamespace(
        log=lambda *args, **kwargs: calls.append(("log", args, kwargs)), finish=lambda exit_code: None
    )
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **kwargs: calls.append(("init", kwargs)) or run
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for epoch in range(2):
        log = MetricsLog(tmp_path, epoch, 3 * epoch, "crystals", {"lr": 0.1})
        log.write({"epoch": epoch, "step": 3 * epoch + 3, "loss": 0.5, "val_mae": {"e_form": 0.25}})
        log.close()
    inits = [call[1] for call in calls if call[0] == "init"]
    assert len(inits) == 2 and inits[0] == inits[1] and len(inits[0]["id"]) == 12  # the same run, continued
    assert (inits[0]["project"], inits[0]["resume"]) == ("crystals", "allow")
    assert inits[0]["name"] == str(tmp_path) and inits[0]["config"] == {"lr": 0.1}
    expected = {"epoch": 1, "step": 6, "loss": 0.5, "val_mae/e_form": 0.25}
    assert calls[-1] == ("log", (expected,), {"step": 6})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'crystalframer-jax\[wandb\]'"):
        MetricsLog(tmp_path, 2, 6, "crystals", {})


# What goes wrong beside the training


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """A copy of a finished run, to be changed."""
    warn.cache_clear()
    return Path(shutil.copytree(finished[1], tmp_path / "run"))


def broken(*_: object, **__: object) -> None:
    raise UnicodeEncodeError("utf-8", "id\udc80", 2, 3, "surrogates\nnot allowed")


def test_a_report_that_fails_costs_no_training(finished, copy, monkeypatch, capfd):
    config, _, summary = finished
    for file in ("summary.json", "predictions_test.csv", "parity_test.png", "learning_curve.png"):
        (copy / file).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(predictions, "write_csv", broken)
        for draw in ("parity", "learning_curve"):
            patch.setattr(plots, draw, broken)
        found = train(config, copy)
    names = ["learning_curve.png", "predictions_test.csv", "parity_test.png"]
    assert found["not_written"] == names and found["mae"] == summary["mae"]
    assert json.loads((copy / "summary.json").read_text()) == found
    lines = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    assert len(lines) == 3 and all("the same command tries again" in line for line in lines)
    assert train(config, copy) == summary
    assert all((copy / name).is_file() for name in names)


def test_a_full_disk_is_no_failing_report(finished, copy, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (copy / "summary.json").unlink()
    monkeypatch.setattr(predictions, "write_csv", full)
    with pytest.raises(TrainingError, match=r"the disk of .* is full"):
        train(finished[0], copy)


@pytest.mark.parametrize("content", ["null", "[" * 10**5, '{"selected_weights": 3}', '{"mae": {}}', "flipped"])
def test_a_damaged_summary_of_a_finished_run_is_made_again(finished, copy, content):
    config, _, summary = finished
    file = copy / "summary.json"
    file.write_text(file.read_text().replace('"r2"', '"s2"') if content == "flipped" else content)
    assert train(config, copy) == json.loads(file.read_text()) == summary


def test_without_its_configuration_a_run_goes_on_as_it_was(finished, copy):
    config, workdir, summary = finished
    (copy / "config.json").unlink()
    with pytest.raises(ConfigError, match="head_num 2 -> 1"):
        train(changed(config, head_num=1), copy)
    with pytest.raises(ConfigError, match="n_epochs 3 -> 4"):
        train(changed(config, n_epochs=4), copy)
    assert train(config, copy) == summary
    assert (copy / "config.json").read_bytes() == (workdir / "config.json").read_bytes()


@pytest.mark.parametrize(
    "changes",
    [{"epoch": 0}, {"epoch": 10**9}, {"epoch": -1}, {"results": [[1.0, 1.0]]}, {"seconds": "1"}, {"targets": []}],
    ids=str,
)
def test_meta_data_that_do_not_fit_the_step_are_refused(finished, copy, changes):
    folder = copy / "checkpoints" / "9"
    file = folder / "meta" / "metadata"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    (folder / checksums.NAME).unlink()
    checksums.write(folder)
    with pytest.raises(UserError) as error:
        train(finished[0], copy)
    assert "step 9" in str(error.value) and "is damaged" in str(error.value) and "\n" not in str(error.value)


DAMAGED = [b'{"epoch": 1, "loss": 0.\xb5}', b"null", b"[]", b'{"epoch": "1"}', b"[" * 10**5, b"", b'{"loss": 1}']


def test_damaged_lines_of_metrics_are_left_out_and_kept(tmp_path, capfd):
    lines = [json.dumps({"epoch": epoch, "step": epoch + 1, "loss": 0.5}).encode() for epoch in range(3)]
    content = b"\n".join([lines[0], *DAMAGED, *lines[1:], b""])
    (tmp_path / "metrics.jsonl").write_bytes(content)
    assert [line["epoch"] for line in read_metrics(tmp_path)] == [0, 1, 2]
    warnings = capfd.readouterr().err.splitlines()
    assert len(warnings) == len(DAMAGED) and all("is damaged" in line and "left out" in line for line in warnings)
    MetricsLog(tmp_path, first_epoch=2, first_step=2).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == content.replace(lines[2] + b"\n", b"")


@pytest.mark.parametrize("kind", ["no folder", "no disk", "no thread"])
def test_tensorboard_that_fails_costs_no_training(tmp_path, capfd, monkeypatch, kind):
    warn.cache_clear()
    if kind == "no folder":
        (tmp_path / "tensorboard").write_text("a file")
    log = MetricsLog(tmp_path, 0, 0)
    for epoch in range(2):
        if kind == "no disk" and log.writer:
            monkeypatch.setattr(log.writer, "flush", broken)
        if kind == "no thread" and log.writer:
            log.writer.file_writer.event_writer._worker.stop()
        log.write({"epoch": epoch, "step": epoch + 1, "loss": 0.5, "val_mae": {"e_form": 0.25}})
    log.close()
    assert [line["epoch"] for line in read_metrics(tmp_path)] == [0, 1]
    assert capfd.readouterr().err.count("is no longer shown by TensorBoard") == 1


def test_results_that_could_not_be_written_make_the_status(monkeypatch, capsys):
    arguments = train_parser().parse_args(["--config=quickstart", "--workdir=run"])
    for missing, status in ((["parity_test.png"], 1), ([], 0)):
        monkeypatch.setattr(start, "train", lambda *_, missing=missing: {"not_written": missing} if missing else {})
        assert cli.run(arguments) == status
    assert "weights and summary are complete in run; not written: parity_test.png" in capsys.readouterr().out
