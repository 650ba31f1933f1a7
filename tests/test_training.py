"""Training: the official trajectory, optimizer and loss by their formulas, and runs that are interrupted or fail."""

import contextlib
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
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict
from test_data import raw_records, small_set

from crystalframer_jax.batch import pack, shape_for
from crystalframer_jax.config import ConfigError, cutoff_radius, model_config, target_names
from crystalframer_jax.configs import default
from crystalframer_jax.crystal import Crystal
from crystalframer_jax.data.registry import TARGET_SETS, Target, target_set
from crystalframer_jax.data.store import open_dataset
from crystalframer_jax.data.table import make_table
from crystalframer_jax.errors import UserError
from crystalframer_jax.files import locked
from crystalframer_jax.inference.official import load_official, variables_from_official
from crystalframer_jax.inference.predictor import Predictor
from crystalframer_jax.model.regressor import CrystalFramer
from crystalframer_jax.neighbors import neighbor_rows
from crystalframer_jax.training import loop
from crystalframer_jax.training.checkpoint import CheckpointError, Checkpoints
from crystalframer_jax.training.logging import MetricsLog, read_metrics
from crystalframer_jax.training.loop import Run, TrainingError, train
from crystalframer_jax.training.optimizer import clip_by_global_norm, learning_rate, make_optimizer
from crystalframer_jax.training.state import TargetStatistics, TrainState, standardise, to_label_units
from crystalframer_jax.training.step import l1_loss, make_train_step

TESTS = Path(__file__).parent

# Tiny runs, also for the tests of prediction


@contextlib.contextmanager
def tiny_runs(compiled: Path) -> Iterator[None]:
    """Register the target set "small" (60 crystals), and keep compiled programs in a folder: runs share them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TARGET_SETS, "small", small_set())
        changes = {
            "jax_compilation_cache_dir": str(compiled),
            "jax_persistent_cache_min_compile_time_secs": 0.0,
            "jax_persistent_cache_min_entry_size_bytes": 0,
        }
        before = {name: getattr(jax.config, name) for name in changes}
        for name, value in changes.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def tiny_config(data_dir: Path, **changes) -> ConfigDict:
    """One small block on 60 crystals; three epochs of three steps, the last one averaged."""
    config = default.get_config()
    config.update(num_layers=1, model_dim=16, head_num=2, ff_dim=32, embedding_dim=(16,))
    config.update(value_pe_dist_real=8, value_pe_angle_real=8, cutoff_radius=4.0)
    config.update(batch_size=16, n_epochs=3, swa_epochs=1, lr=2e-3, sch_params=(20.0,))
    config.update(target_set="small", data_dir=str(data_dir))
    config.update(changes)
    return config


STEPS_PER_EPOCH = 3


def open_tiny(config: ConfigDict):
    """The dataset of a configuration."""
    return open_dataset(target_set(config.target_set), target_names(config), cutoff_radius(config), config.data_dir)


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


def assert_equal_trees(a, b) -> None:
    """Every leaf has the same bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=jax.tree_util.keystr(path))


# The official trajectory: 30 steps on 16 crystals without symmetry, so that no frame is a tie


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """What the package makes of the official initial parameters and batches."""

    golden: dict[str, np.ndarray]
    schedule: list[float]
    calibration: dict
    loss: np.ndarray
    grad_norm: np.ndarray
    params: list  # after each step
    state: TrainState
    predictions: dict[str, np.ndarray]

    def official(self, prefix: str) -> dict[str, np.ndarray]:
        """The official parameters of one moment."""
        return {name.removeprefix(prefix): value for name, value in self.golden.items() if name.startswith(prefix)}


@pytest.fixture(scope="module")
def trajectory() -> Trajectory:
    golden = dict(np.load(TESTS / "golden" / "training_trajectory.npz"))
    official = json.loads(golden["config_json"].tobytes()) | {"cutoff_radius": 12.0}
    init = {name.removeprefix("init/"): value for name, value in golden.items() if name.startswith("init/")}
    predictor = load_official(official, init | {name: golden[name] for name in ("target_mean", "target_std")})
    config, swa_first_step = predictor.config, int(golden["swa_first_step"])
    config.update({key: official[key] for key in ("lr", "weight_decay", "clip_norm")})
    config.update({key: tuple(official[key]) for key in ("sch_params", "adam_betas")})

    ends = np.cumsum(golden["sizes"])
    atoms = [slice(end - size, end) for end, size in zip(ends, golden["sizes"], strict=True)]
    crystals = [
        Crystal(golden["numbers"][a], golden["positions"][a], lattice)
        for a, lattice in zip(atoms, golden["lattice"], strict=True)
    ]
    table = make_table(crystals, [neighbor_rows(crystal, cutoff_radius(config)) for crystal in crystals])
    order, labels = golden["batch_order"], golden["targets"][:, None]
    shape = max((shape_for(table, chosen) for chosen in order), key=lambda shape: shape.num_atoms)
    batches = [pack(table, chosen, [shape], labels[chosen]) for chosen in order]

    model, optimizer = CrystalFramer(model_config(config)), make_optimizer(config, swa_first_step)
    calibrate = jax.jit(lambda v, batch: model.apply(v, batch, calibrate=True, mutable=["calibration"])[1])
    calibration = jax.tree.map(np.asarray, calibrate(predictor.variables, batches[0])["calibration"])
    params = jax.tree.map(jnp.asarray, predictor.variables["params"])
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        calibration=jax.tree.map(jnp.asarray, calibration),
        opt_state=optimizer.init(params),
        swa_params=jax.tree.map(jnp.zeros_like, params),
        swa_steps=jnp.zeros((), jnp.int32),
    )
    step = make_train_step(model, optimizer, predictor.targets, jax.random.key(0), swa_first_step)
    results, after = [], []
    for batch in batches:
        state, result = step(state, batch)
        results.append(result)
        after.append(jax.tree.map(np.array, state.params))

    predictions = {}
    for name, weights in (("final", state.params), ("swa", state.swa_params)):
        parts = [
            predictor.forward({"params": weights, "calibration": state.calibration}, pack(table, half, [shape]))
            for half in np.split(np.arange(16), 2)
        ]
        predictions[name] = to_label_units(np.concatenate(parts), predictor.targets)
    return Trajectory(
        golden=golden,
        schedule=[float(learning_rate(config, swa_first_step)(t)) for t in range(30)],
        calibration=calibration,
        loss=np.array([float(result["loss"]) for result in results]),
        grad_norm=np.array([float(result["grad_norm"]) for result in results]),
        params=after,
        state=state,
        predictions=predictions,
    )


def test_official_calibration(trajectory):
    for block in range(2):
        expected = trajectory.golden[f"calibrated/encoder.layers.{block}.self_attn.gauss_scale"]
        found = trajectory.calibration[f"block_{block}"]["attention"]
        np.testing.assert_allclose([found["scale"], found["shift"]], expected, rtol=1e-5)
    assert_equal_trees(trajectory.state.calibration, trajectory.calibration)  # training leaves it alone


def test_official_learning_rates_decay_and_then_stand_still(trajectory):
    np.testing.assert_allclose(trajectory.schedule, trajectory.golden["lr"], rtol=1e-6)
    first = int(trajectory.golden["swa_first_step"])
    assert len(set(trajectory.schedule[: first + 1])) == first + 1 and len(set(trajectory.schedule[first:])) == 1


def test_official_losses_and_gradient_norms(trajectory):
    """The official run adds noise to its distances; measured differences are 8e-5, 5e-4 and 3e-4."""
    np.testing.assert_allclose(trajectory.loss[:10], trajectory.golden["loss"][:10], rtol=0, atol=1e-4)
    np.testing.assert_allclose(trajectory.loss, trajectory.golden["loss"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(trajectory.grad_norm[:10], trajectory.golden["grad_norm"][:10], rtol=1e-3)


def test_weights_are_averaged_equally_from_the_official_step_on(trajectory):
    first = int(trajectory.golden["swa_first_step"])
    assert int(trajectory.state.swa_steps) == 30 - first
    mean = jax.tree.map(lambda *steps: np.mean(np.float64(steps), axis=0), *trajectory.params[first:])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), trajectory.state.swa_params, mean)


@pytest.mark.parametrize("weights", ["final", "swa"])
def test_official_predictions_after_training(trajectory, weights):
    """Measured differences: 1.6e-3 and 1.3e-3 eV/atom. An average that starts a step early or late moves by 2.7e-2."""
    expected = trajectory.golden[f"{weights}_predictions"]
    np.testing.assert_allclose(trajectory.predictions[weights], expected, rtol=0, atol=5e-3)


@pytest.mark.parametrize("weights", ["final", "swa"])
def test_official_parameters_after_training(trajectory, weights):
    """Each parameter to 2 % of its norm (measured: 0.9 %); one step of training moves some by 10 %.

    Key biases have no effect on the output, so what they do is rounding noise.
    """
    config = load_official(json.loads(trajectory.golden["config_json"].tobytes()), trajectory.official("init/")).config
    expected = variables_from_official(trajectory.official(f"{weights}/"), model_config(config))["params"]
    found = trajectory.state.params if weights == "final" else trajectory.state.swa_params
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        name = jax.tree_util.keystr(path)
        if "['k']['bias']" not in name:
            assert np.linalg.norm(x - y) < 0.02 * np.linalg.norm(y), name


# Optimizer


def official_names_as_parameters() -> dict:
    """Parameters that are 1 where the official name holds "bias", and 0 elsewhere."""
    golden = np.load(TESTS / "golden" / "max.npz")
    state = {name.removeprefix("param/"): golden[name] for name in golden if name.startswith("param/")}
    marked = {name: np.full(value.shape, float("bias" in name), np.float32) for name, value in state.items()}
    return load_official(json.loads(golden["config_json"].tobytes()), marked).variables["params"]


def test_biases_decay_by_their_own_rate():
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
