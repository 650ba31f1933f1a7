"""Training: optimizer and loss by their formulas, and runs that are interrupted or fail."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from test_data import raw_records
from tiny import STEPS_PER_EPOCH, assert_equal_trees, open_tiny, tiny_config, tiny_runs

from crystalframer_jax.config import ConfigError
from crystalframer_jax.configs import default
from crystalframer_jax.data.registry import Target
from crystalframer_jax.errors import UserError
from crystalframer_jax.files import locked
from crystalframer_jax.inference.official import load_official
from crystalframer_jax.inference.predictor import Predictor
from crystalframer_jax.training import loop
from crystalframer_jax.training.checkpoint import CheckpointError, Checkpoints
from crystalframer_jax.training.logging import MetricsLog, read_metrics
from crystalframer_jax.training.loop import Run, TrainingError, train
from crystalframer_jax.training.optimizer import clip_by_global_norm, make_optimizer
from crystalframer_jax.training.state import TargetStatistics, TrainState, standardise, to_label_units
from crystalframer_jax.training.step import l1_loss

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """Where the runs of this file are, with the setting that they need."""
    with tiny_runs(tmp_path_factory.getbasetemp() / "compiled"):
        yield tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def finished(folder):
    """(configuration, directory, summary) of a run that nothing disturbed."""
    config = tiny_config(folder / "data")
    return config, folder / "finished", train(config, folder / "finished")


# Optimizer


def official_names_as_parameters() -> dict:
    """Parameters that are 1 where the official code decays by its own rate, and 0 elsewhere.

    These are the parameters with "bias" in their official name, and those of normalisations (here BatchNorm, mlp.1).
    """
    golden = np.load(TESTS / "golden" / "max_bn.npz")
    state = {name.removeprefix("param/"): golden[name] for name in golden if name.startswith("param/")}
    marked = {
        name: np.full(value.shape, float("bias" in name or "mlp.1." in name), np.float32)
        for name, value in state.items()
    }
    marked |= {name: np.array([1.0, 0.0], np.float32) for name in marked if name.endswith("gauss_scale")}
    return load_official(json.loads(golden["config_json"].tobytes()), marked).variables["params"]


def test_biases_and_normalisations_decay_by_their_own_rate():
    config = default.get_config()
    config.update(lr=0.1, sch_params=(4.0,), weight_decay=0.03, bias_weight_decay=0.2)
    is_bias = official_names_as_parameters()
    params = jax.tree.map(jnp.ones_like, is_bias)
    optimizer = make_optimizer(config, swa_first_step=2)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    rates = 0.1 * np.sqrt(4 / (4 + np.array([0, 1, 2, 2])))  # the schedule stands still from step 2 on
    for rate in rates:
        updates, state = update(jax.tree.map(jnp.zeros_like, params), state, params)
        for (path, found), marks in zip(
            jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(is_bias), strict=True
        ):
            expected = np.where(marks == 1, -0.2 * rate, -0.03 * rate)
            np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(("norm", "factor"), [(0.5, 1.0), (1.0, 1 / (1 + 1e-6)), (5.0, 1 / (5 + 1e-6))])
def test_gradients_are_clipped_by_their_global_norm(x64, norm, factor):
    gradients = {"a": jnp.array([0.6 * norm]), "b": {"c": jnp.array([[0.0, 0.8 * norm]])}}
    clip = clip_by_global_norm(1.0)
    clipped, _ = clip.update(gradients, clip.init(gradients))
    jax.tree.map(lambda c, g: np.testing.assert_allclose(c, factor * g, rtol=1e-12), clipped, gradients)


@pytest.mark.parametrize(("clip_norm", "scale"), [(1.0, 1 / (5 + 1e-6)), (0.0, 1.0)])
def test_adam_sees_clipped_gradients_unless_clip_norm_is_zero(x64, clip_norm, scale):
    """Two steps of AdamW by its formula, with gradients g and g / 100."""
    config = default.get_config()
    config.update(clip_norm=clip_norm, lr=0.1, weight_decay=0.0, sch_params=(1e12,), adam_betas=(0.9, 0.98))
    optimizer = make_optimizer(config, None)
    params = {"kernel": jnp.zeros(2)}
    state = optimizer.init(params)
    gradient = np.array([3.0, -4.0])
    _, state = optimizer.update({"kernel": jnp.array(gradient)}, state, params)
    update, _ = optimizer.update({"kernel": jnp.array(gradient / 100)}, state, params)
    first, second = scale * gradient, gradient / 100
    mean = (0.9 * 0.1 * first + 0.1 * second) / (1 - 0.9**2)
    square = (0.98 * 0.02 * first**2 + 0.02 * second**2) / (1 - 0.98**2)
    np.testing.assert_allclose(update["kernel"], -0.1 * mean / (np.sqrt(square) + 1e-8), rtol=1e-9)


# Loss and statistics


def test_l1_loss_sums_known_targets_and_averages_crystals():
    predictions = jnp.array([[1.0, 2.0], [3.0, 4.0], [99.0, 99.0]])
    targets = jnp.array([[0.0, 4.0], [3.5, jnp.nan], [0.0, 0.0]])
    known = jnp.array([[True, True], [True, False], [False, False]])
    assert float(l1_loss(predictions, targets, known, jnp.array(2))) == (1 + 2 + 0.5) / 2
    gradient = jax.grad(l1_loss)(predictions, targets, known, jnp.array(2))
    np.testing.assert_array_equal(gradient, [[0.5, -0.5], [-0.5, 0], [0, 0]])


@pytest.mark.parametrize(("targets", "known"), [((3,), (3, 1)), ((3, 1), (3,)), ((1, 3), (3, 1)), ((3, 2), (3, 2))])
def test_l1_loss_refuses_to_broadcast(targets, known):
    with pytest.raises(ValueError, match="shapes differ"):
        l1_loss(jnp.zeros((3, 1)), jnp.zeros(targets), jnp.ones(known, bool), jnp.array(3))


def test_statistics_are_mean_and_population_deviation_of_known_labels():
    target = Target("gap", "band_gap", "eV")
    statistics = TargetStatistics.of(target, np.array([1.0, np.nan, 4.0, 1.0]))
    assert (statistics.name, statistics.unit) == ("gap", "eV")
    assert (statistics.mean, statistics.std) == (2.0, pytest.approx(2**0.5))
    for labels in ([1.0, 1.0], [np.nan], []):
        with pytest.raises(ValueError, match="gap"):
            TargetStatistics.of(target, np.array(labels))


def test_standardising_and_back():
    statistics = (TargetStatistics("a", "eV", 2.0, 0.5), TargetStatistics("b", "GPa", -100.0, 20.0))
    labels = np.array([[2.0, -100.0], [3.0, -60.0]])
    standard = standardise(jnp.array(labels, jnp.float32), statistics)
    np.testing.assert_array_equal(standard, [[0, 0], [2, 2]])
    np.testing.assert_array_equal(to_label_units(np.asarray(standard), statistics), labels)


# Runs


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
    assert summary["selected_weights"] == min(by_val, key=by_val.get) and {"last", "swa"} <= by_val.keys()
    assert by_val["last"] == metrics[-1]["val_mae"]["e_form"]


def test_the_mean_predictor_of_the_summary(finished):
    config, _, summary = finished
    splits = open_tiny(config).splits
    labels = np.array([record["formation_energy_per_atom"] for record in raw_records(60)])
    for split, rows in splits.items():
        expected = np.abs(labels[rows] - labels[splits["train"]].mean()).mean()
        assert summary["mean_predictor_mae"][split]["e_form"] == pytest.approx(expected, rel=1e-12)
    assert summary["test"]["e_form"]["mean_predictor_mae"] == summary["mean_predictor_mae"]["test"]["e_form"]


def stored_state(config: ConfigDict, workdir: Path) -> tuple[TrainState, dict]:
    """The training state of the last checkpoint of a run, and its meta data."""
    run = Run(config, workdir, open_tiny(config))
    try:
        return run.checkpoints.restore_state(run.checkpoints.last(), run.initial_state())
    finally:
        run.checkpoints.close()


def assert_same_run(config: ConfigDict, workdir: Path, expected: Path) -> None:
    """All that two runs leave is equal, except for times."""
    for line, other in zip(read_metrics(workdir), read_metrics(expected), strict=True):
        assert line | {"crystals_per_s": 0} == other | {"crystals_per_s": 0}
    times = {"seconds": 0, "crystals_per_s": 0}
    summaries = [json.loads((run / "summary.json").read_text()) for run in (workdir, expected)]
    assert summaries[0] | times == summaries[1] | times
    (state, meta), (other, other_meta) = stored_state(config, workdir), stored_state(config, expected)
    assert_equal_trees(state, other)
    assert meta | {"seconds": 0} == other_meta | {"seconds": 0}
    assert int(state.step) == 9 and int(state.swa_steps) == 3
    assert any(np.any(leaf) for leaf in jax.tree.leaves(state.swa_params))


def train_and_die(folder: str, workdir: str, fatal_step: int) -> None:
    """For a process of its own: train until the optimizer step `fatal_step`, then die as by kill -9.

    In the middle of an epoch it waits first for the checkpoint of the epoch before; at the start of an epoch that
    checkpoint is still being written.
    """
    make = loop.make_train_step

    def make_fatal(*args):
        step = make(*args)

        def train_step(state, batch):
            if int(state.step) == fatal_step:
                before = fatal_step - fatal_step % STEPS_PER_EPOCH
                while fatal_step != before and not (Path(workdir) / "checkpoints" / str(before)).is_dir():
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)
            return step(state, batch)

        return train_step

    loop.make_train_step = make_fatal
    compiled = Path(folder).parent / "compiled"
    with tiny_runs(compiled):
        train(tiny_config(Path(folder) / "data"), workdir)


def die_in_training(folder: Path, workdir: Path, fatal_step: int) -> None:
    call = f"import test_training; test_training.train_and_die({str(folder)!r}, {str(workdir)!r}, {fatal_step})"
    killed = subprocess.run([sys.executable, "-c", call], cwd=TESTS, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr


def test_a_killed_run_ends_as_one_that_was_not(finished, folder):
    config, expected, _ = finished
    workdir = folder / "killed"
    die_in_training(folder, workdir, fatal_step=4)
    assert [line["epoch"] for line in read_metrics(workdir)] == [0] and (workdir / "checkpoints" / "3").is_dir()
    die_in_training(folder, workdir, fatal_step=6)
    assert not (workdir / "summary.json").exists()
    with (workdir / "metrics.jsonl").open("a") as stream:
        stream.write('{"epoch": 2, "st')  # a torn line
    train(config, workdir)
    assert_same_run(config, workdir, expected)


def disturbed(monkeypatch, at_step: int, factor: float) -> None:
    """Let all parameters be multiplied by a factor after one step of every run that is made from now on."""
    make = loop.make_train_step

    def make_disturbed(*args):
        step = make(*args)

        def train_step(state, batch):
            is_disturbed = int(state.step) == at_step
            state, result = step(state, batch)
            if is_disturbed:
                state = dataclasses.replace(state, params=jax.tree.map(lambda x: x * factor, state.params))
            return state, result

        return train_step

    monkeypatch.setattr(loop, "make_train_step", make_disturbed)


# NaN parameters give a NaN loss in the next step: in the middle of the second epoch, or not before the third
@pytest.mark.parametrize("fatal_step", [3, 5], ids=["mid-epoch", "last step of an epoch"])
@pytest.mark.filterwarnings("ignore:Mean of empty slice")
def test_a_diverged_run_stops_and_keeps_the_last_good_checkpoint(finished, folder, monkeypatch, fatal_step):
    config, expected, _ = finished
    workdir = folder / f"diverged-{fatal_step}"
    with monkeypatch.context() as patch:
        disturbed(patch, fatal_step, factor=np.nan)
        with pytest.raises(TrainingError, match="not finite"):
            train(config, workdir)
    checkpoints = Checkpoints(workdir)
    assert (checkpoints.last(), checkpoints.best()) == (3, 3)
    checkpoints.close()
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
    other = config.copy_and_resolve_references()
    other.update(lr=1e-3, head_num=1)
    with pytest.raises(ConfigError) as error:
        train(other, workdir)
    for part in (str(workdir), "lr 0.002 -> 0.001", "head_num 2 -> 1", "--workdir"):
        assert part in str(error.value)
    assert {path: path.read_bytes() for path in workdir.iterdir() if path.is_file()} == files


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
    checkpoints = Checkpoints(workdir)
    assert checkpoints.best() == 1 + int(np.argmin(totals))
    checkpoints.close()


def test_the_metrics_of_a_resumed_run_continue_after_the_epochs_it_keeps(tmp_path):
    lines = [{"epoch": epoch, "step": 3 * epoch + 3, "loss": float(epoch)} for epoch in range(3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"epoch": 3, "lo')
    log = MetricsLog(tmp_path, first_epoch=2, first_step=6)
    log.write({"epoch": 2, "step": 9, "loss": 0.5, "val_mae": {"e_form": 0.25}})
    log.close()
    assert read_metrics(tmp_path) == [*lines[:2], {"epoch": 2, "step": 9, "loss": 0.5, "val_mae": {"e_form": 0.25}}]
