"""Whole runs with other hyperparameters: BatchNorm, dropout, domains, precision, frames, fine-tuning."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import STEPS_PER_EPOCH, assert_equal_trees, open_tiny, tiny_config, tiny_runs

from crystalframer_jax import Predictor
from crystalframer_jax.config import ConfigError
from crystalframer_jax.inference.evaluation import groups_of, mean_absolute_errors
from crystalframer_jax.training.checkpoint import CheckpointError, Checkpoints
from crystalframer_jax.training.loop import Run, train
from crystalframer_jax.training.pretrained import start_from
from crystalframer_jax.training.state import TargetStatistics

NO_FRAMES = {"value_pe_angle_real": 0, "frame_method": "no"}
OPTIONS = {
    "BatchNorm, dropout, another pooling": {
        "norm_type": "bn",
        "pre_pooling_op": "w+bn+relu",
        "embedding_dim": (16, 8),
        "dropout": 0.2,
        "scale_grad": 2.0,
    },
    "two domains in float64, no calibration": {
        **NO_FRAMES,
        "num_layers": 2,
        "domain": "real-reci",
        "precision": "float64",
        "normalize_gauss": False,
        "lattice_range": 1,
    },
    "bfloat16, layer norms, lattice frames, draws": {
        "precision": "bfloat16",
        "t_fixup_init": False,
        "frame_method": "lattice",
        "num_frame_samples": 3,
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """Where the runs of this file are, with the setting that they need."""
    with tiny_runs(tmp_path_factory.getbasetemp() / "compiled"):
        yield tmp_path_factory.mktemp("options")


@pytest.fixture(scope="module")
def runs(folder):
    """(configuration, directory, summary) of a finished run for each of OPTIONS, made when asked for."""
    made = {}

    def run(name: str):
        if name not in made:
            config = tiny_config(folder / "data", **OPTIONS[name])
            workdir = folder / str(len(made))
            made[name] = config, workdir, train(config, workdir)
        return made[name]

    return run


def train_two_epochs(config, workdir: Path, monkeypatch) -> None:
    """Train until the checkpoint of the second epoch is on disk, and be interrupted there."""
    save = Checkpoints.save

    def save_and_stop(self, state, *args):
        save(self, state, *args)
        if int(state.step) == 2 * STEPS_PER_EPOCH:
            self.wait()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train(config, workdir)


def errors_on_test(predictor: Predictor, dataset) -> dict[str, float]:
    indices = dataset.splits["test"]
    predictions = predictor.predict_table(dataset.table, groups_of(indices, 16), predictor.parts)
    return mean_absolute_errors(predictions.mean, dataset.labels[indices], predictor.targets)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_loaded_run_makes_the_errors_of_its_summary(runs, name):
    config, workdir, summary = runs(name)
    for weights in ("last", "swa"):
        predictor = Predictor.load(workdir, weights)
        errors = errors_on_test(predictor, open_tiny(config))
        assert errors["e_form"] == pytest.approx(summary["mae"][weights]["test"]["e_form"], rel=1e-4)
    expected = np.float64 if config.precision == "float64" else np.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(predictor.variables)} == {np.dtype(expected)}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_interrupted_run_ends_as_one_that_was_not(runs, name, folder, monkeypatch):
    config, expected, _ = runs(name)
    workdir = folder / f"interrupted-{name[:4]}"
    train_two_epochs(config, workdir, monkeypatch)
    train(config, workdir)
    for weights in ("last", "swa"):
        assert_equal_trees(Predictor.load(workdir, weights).variables, Predictor.load(expected, weights).variables)


def test_averaged_weights_have_batch_statistics_of_their_own(runs):
    """The means over the last epoch of the mean and variance of what BatchNorm sees, computed here in numpy."""
    config, workdir, _ = runs("BatchNorm, dropout, another pooling")
    config = config.copy_and_resolve_references()
    predictor = Predictor.load(workdir, "swa")
    found = predictor.variables["batch_stats"]
    assert set(found) == {"pre_pooling_norm", "dense_0_norm"}
    run = Run(config, workdir, open_tiny(config))
    run.checkpoints.close()
    forward = jax.jit(
        lambda v, batch: run.model.apply(
            v,
            batch,
            train=True,
            rngs={"dropout": jax.random.key(0)},
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=lambda module, _: module.name in ("pre_pooling", "dense_0"),
        )[1]["intermediates"]
    )
    seen = {"pre_pooling": [], "dense_0": []}
    for step in range(2 * STEPS_PER_EPOCH, 3 * STEPS_PER_EPOCH):
        batch = run.batches[step]
        layers = forward(predictor.variables, batch)
        for name, real in (("pre_pooling", batch.species > 0), ("dense_0", batch.crystal_sizes > 0)):
            values = np.asarray(layers[name]["__call__"][0], np.float64)[real]
            seen[name].append((values.mean(axis=0), values.var(axis=0)))
    for name, statistics in seen.items():
        mean, variance = np.mean(statistics, axis=0)
        np.testing.assert_allclose(found[f"{name}_norm"]["mean"], mean, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found[f"{name}_norm"]["var"], variance, rtol=1e-4, atol=1e-6)
    assert not np.allclose(
        found["dense_0_norm"]["mean"], Predictor.load(workdir, "last").variables["batch_stats"]["dense_0_norm"]["mean"]
    )


# Fine-tuning


def new_run(config, workdir) -> Run:
    """A run that has not started."""
    run = Run(config, workdir, open_tiny(config))
    run.checkpoints.close()
    return run


def test_fine_tuning_starts_from_the_predictions_of_the_old_run(runs, folder):
    config, workdir, _ = runs("BatchNorm, dropout, another pooling")
    run = new_run(config, folder / "tuned")
    other_units = tuple(dataclasses.replace(s, mean=s.mean + 3, std=2 * s.std) for s in run.statistics)
    state = start_from(run.initial_state(), workdir, config, other_units)
    old = Predictor.load(workdir)
    weights = {"params": state.params, "calibration": state.calibration, "batch_stats": state.batch_stats}
    new = Predictor(config, weights, other_units)
    indices = open_tiny(config).splits["test"]
    table = open_tiny(config).table
    expected = old.predict_table(table, [indices], old.parts).mean
    np.testing.assert_allclose(new.predict_table(table, [indices], old.parts).mean, expected, rtol=1e-5, atol=1e-5)
    assert np.std(expected) > 1e-3
    assert int(state.step) == 0


def test_fine_tuning_to_other_targets_keeps_all_but_the_output_layer(runs, folder):
    config, workdir, _ = runs("bfloat16, layer norms, lattice frames, draws")
    run = new_run(config, folder / "other")
    fresh = run.initial_state()
    state = start_from(fresh, workdir, config, (TargetStatistics("band_gap", "eV", 1.0, 1.0),))
    old = Predictor.load(workdir).variables["params"]
    assert_equal_trees(state.params["output"], fresh.params["output"])
    assert_equal_trees(state.params | {"output": 0}, old | {"output": 0})


def test_a_fine_tuned_run_says_where_it_came_from_and_differs_from_one_that_was_not(runs, folder):
    config, workdir, _ = runs("bfloat16, layer norms, lattice frames, draws")
    config = config.copy_and_resolve_references()
    config.update(pretrained_model=str(workdir), n_epochs=2, lr=1e-6)
    train(config, folder / "fine")
    assert json.loads((folder / "fine" / "config.json").read_text())["pretrained_model"] == str(workdir)
    dataset = open_tiny(config)
    tuned, old = (errors_on_test(Predictor.load(run), dataset)["e_form"] for run in (folder / "fine", workdir))
    assert tuned == pytest.approx(old, rel=0.02) and tuned != old


def test_another_model_cannot_be_fine_tuned(runs, folder):
    """Also where all shapes are the same: these weights would compute something else."""
    _, workdir, _ = runs("BatchNorm, dropout, another pooling")
    changes = {**OPTIONS["BatchNorm, dropout, another pooling"], "frame_method": "pca", "cutoff_radius": 5.0}
    config = tiny_config(folder / "data", pretrained_model=str(workdir), **changes)
    with pytest.raises(ConfigError) as error:
        train(config, folder / "refused")
    for part in ("another model", "frame_method 'max', here 'pca'", "cutoff 4.0, here 5.0", "config.json"):
        assert part in str(error.value)


def test_targets_are_matched_by_name_and_new_ones_start_at_random(runs, folder):
    config, workdir, _ = runs("bfloat16, layer norms, lattice frames, draws")
    run = new_run(config, folder / "more")
    (old,) = run.statistics
    targets = (TargetStatistics("gap", "eV", 1.0, 1.0), dataclasses.replace(old, mean=old.mean - 1, std=old.std / 2))
    fresh = run.initial_state()
    twice = jax.tree.map(lambda x: jax.numpy.concatenate([x, x], axis=-1), fresh.params["output"])
    fresh = dataclasses.replace(fresh, params=fresh.params | {"output": twice})
    output = start_from(fresh, workdir, config, targets).params["output"]
    before = Predictor.load(workdir).variables["params"]["output"]
    np.testing.assert_array_equal(output["kernel"][:, 0], twice["kernel"][:, 0])
    np.testing.assert_allclose(output["kernel"][:, 1], 2 * before["kernel"][:, 0], rtol=1e-6)
    np.testing.assert_allclose(output["bias"][1], 2 * before["bias"][0] + 2 / old.std, rtol=1e-5)


def test_averaged_weights_without_batch_statistics_are_refused(runs, folder, monkeypatch):
    """In the middle of the averaging, before the end of the training."""
    config, _, _ = runs("BatchNorm, dropout, another pooling")
    config = config.copy_and_resolve_references()
    config.swa_epochs = 2
    train_two_epochs(config, folder / "averaging", monkeypatch)
    Predictor.load(folder / "averaging", "last")
    with pytest.raises(CheckpointError, match=r"no BatchNorm statistics.*ask for last or best"):
        Predictor.load(folder / "averaging", "swa")
