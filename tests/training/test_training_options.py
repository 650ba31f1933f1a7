"""Whole runs with other hyperparameters: BatchNorm, dropout, domains, precision, frames, fine-tuning."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import NO_FRAMES, STEPS_PER_EPOCH, assert_equal_trees, open_tiny, tiny_config, tiny_runs

from crystalframer_jax import Predictor
from crystalframer_jax.batching.targets import TargetStatistics
from crystalframer_jax.config import ConfigError, validate
from crystalframer_jax.inference.evaluation import groups_of
from crystalframer_jax.ops.random_bits import draw
from crystalframer_jax.parallel.interruption import Interruption, TrainingInterrupted
from crystalframer_jax.reporting.metrics import main_metrics
from crystalframer_jax.runs.checkpoints import CheckpointError
from crystalframer_jax.training.logging import read_metrics
from crystalframer_jax.training.loop import Run
from crystalframer_jax.training.pretrained import start_from
from crystalframer_jax.training.start import train

OPTIONS = {
    "BatchNorm, dropout, another pooling": {
        "norm_type": "bn",
        "pre_pooling_op": "w+bn+relu",
        "embedding_dim": (16, 8),
        "dropout": 0.2,
        "scale_grad": 2.0,
        "ema_decay": 0.5,
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

NAMES = [pytest.param(name, marks=pytest.mark.slow) if "BatchNorm" not in name else name for name in OPTIONS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """Where the runs of this file are, with the setting that they need."""
    with tiny_runs():
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


def new_run(config, workdir) -> Run:
    """A run that has not started."""
    run = Run(validate(config), workdir, open_tiny(config))
    run.checkpoints.close()
    return run


def train_into_the_second_epoch(config, workdir: Path, monkeypatch) -> None:
    """Train, and be stopped after the second step of the second epoch."""
    requests = iter([""] * (STEPS_PER_EPOCH + 2) + ["a test"])
    with monkeypatch.context() as patch:
        patch.setattr(Interruption, "reason", lambda _: next(requests))
        with pytest.raises(TrainingInterrupted, match="stopped by a test in epoch 2, saved at step 5"):
            train(config, workdir)


def errors_on_test(predictor: Predictor, dataset) -> dict[str, float]:
    indices = dataset.splits["test"]
    predictions = predictor.predict_table(dataset.table, groups_of(indices, 16), predictor.parts)
    return main_metrics(predictions.value, dataset.labels[indices], predictor.targets)


@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_run_makes_the_errors_of_its_summary(runs, name):
    config, workdir, summary = runs(name)
    for weights in ("last", "swa"):
        predictor = Predictor.load(workdir, weights)
        errors = errors_on_test(predictor, open_tiny(config))
        assert errors["e_form"] == pytest.approx(summary["mae"][weights]["test"]["e_form"], rel=1e-4)
    expected = np.float64 if config.precision == "float64" else np.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(predictor.variables)} == {np.dtype(expected)}


@pytest.mark.parametrize(
    "name", [NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in list(OPTIONS)[1:])]
)
def test_an_interrupted_run_ends_as_one_that_was_not(runs, name, folder, monkeypatch):
    config, expected, _ = runs(name)
    workdir = folder / f"interrupted-{name[:4]}"
    train_into_the_second_epoch(config, workdir, monkeypatch)
    train(config, workdir)
    for weights in ("last", "swa"):
        assert_equal_trees(Predictor.load(workdir, weights).variables, Predictor.load(expected, weights).variables)


@pytest.mark.parametrize("average", ["swa", "ema"])
def test_averaged_weights_have_batch_statistics_of_their_own(runs, average):
    """The means over the last epoch of the mean and variance of what BatchNorm sees, computed here in numpy."""
    config, workdir, _ = runs("BatchNorm, dropout, another pooling")
    predictor = Predictor.load(workdir, average)
    found = predictor.variables["batch_stats"]
    assert set(found) == {"pre_pooling_norm", "dense_0_norm"}
    run = new_run(config, workdir)
    forward = jax.jit(
        lambda v, batch: run.model.apply(
            v,
            batch,
            train=True,
            dropout_seeds=draw(np.uint32(0), batch.crystal_place),
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


@pytest.mark.slow
def test_batch_statistics_stand_still_in_the_last_epochs(runs, folder):
    """Another number of epochs without them would move them; those of the first epoch are kept to the bit."""
    config, _, _ = runs("BatchNorm, dropout, another pooling")
    config = config.copy_and_resolve_references()
    config.update(freeze_bn_epochs=2, model_checkpoint_save_top_k=3)
    train(config, folder / "frozen")
    first, last = (Predictor.load(folder / "frozen" / "checkpoints" / str(step)).variables for step in (3, 9))
    assert_equal_trees(first["batch_stats"], last["batch_stats"])
    assert np.any(first["params"]["dense_0"]["kernel"] != last["params"]["dense_0"]["kernel"])
    assert np.any(first["batch_stats"]["dense_0_norm"]["mean"])


# Averages and recipes


def weights_after_each_step(config, workdir: Path) -> list:
    """The parameters after each step of a training, step by step, without its loop."""
    run = new_run(config, workdir)
    state, after = run.initial_state(), []
    for step in range(len(run.batches)):
        state, _ = run.step(state, run.batches[step])
        after.append(jax.tree.map(np.array, state.params))
    return after


@pytest.mark.slow
def test_averages_of_the_weights_of_a_run(folder):
    """Both by their definition from the weights after each step, in float64."""
    config = tiny_config(folder / "data", ema_decay=0.7, optimizer="sgd", lr=0.05, loss_func="Smooth_L1")
    train(config, folder / "averages")
    after = weights_after_each_step(config, folder / "unused")
    assert_equal_trees(Predictor.load(folder / "averages", "last").variables["params"], after[-1])
    swa = jax.tree.map(lambda *steps: np.mean(np.float64(steps), axis=0), *after[6:])
    ema = jax.tree.map(np.float64, after[0])
    for number, params in enumerate(after[1:], 2):
        share = max(0.3, 1 / number)
        ema = jax.tree.map(lambda mean, x: (1 - share) * mean + share * x, ema, params)  # noqa: B023
    for name, expected in (("swa", swa), ("ema", ema)):
        found = Predictor.load(folder / "averages", name).variables["params"]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found, expected)


@pytest.mark.slow
def test_training_on_a_part_of_the_data(folder):
    """Filters count atoms of training crystals; shares are of batches; validation and test keep all crystals."""
    config = tiny_config(
        folder / "data",
        train_filter_min=3,
        train_filter_max=12,
        train_percent_check=0.5,
        val_percent_check=0.5,
        batch_size=4,
        normalize_targets="scale",
        loss_func="MSE",
    )
    dataset = open_tiny(config)
    run = new_run(config, folder / "unused")
    sizes = dataset.table.num_atoms
    chosen = [row for row in dataset.splits["train"] if 3 <= sizes[row] <= 12]
    assert 8 < len(chosen) < len(dataset.splits["train"])
    assert run.batches.steps_per_epoch == len(chosen) // 4 // 2
    rows = [row for step in range(run.batches.steps_per_epoch) for row in run.batches.rows(step)]
    assert len(set(rows)) == len(rows) and set(rows) <= set(chosen)
    assert run.statistics[0].std == pytest.approx(np.sqrt(np.mean(dataset.labels[chosen, 0] ** 2)))
    summary = train(config, folder / "part")
    assert summary["steps"] == 3 * run.batches.steps_per_epoch
    (first, *_) = read_metrics(folder / "part")
    predictor = Predictor.load(folder / "part" / "checkpoints" / str(3 * run.batches.steps_per_epoch))
    last = read_metrics(folder / "part")[-1]
    val = dataset.splits["val"][:4]  # one of two batches
    errors = predictor.predict_table(dataset.table, [val], predictor.parts).value - dataset.labels[val]
    assert last["val_mae"]["e_form"] == pytest.approx(np.abs(errors).mean(), rel=1e-5)
    assert last["val_loss"] == pytest.approx(np.mean(errors**2) / predictor.targets[0].std ** 2, rel=1e-5)
    assert first["loss"] > 0
    with pytest.raises(ConfigError, match=r"train_filter_min=500.*none of the 48 training crystals"):
        new_run(tiny_config(folder / "data", train_filter_min=500), folder / "unused")


# Fine-tuning


def tuned(config, workdir: Path, **changes):
    """The configuration of a training that starts from the weights of a run."""
    config = config.copy_and_resolve_references()
    config.update(pretrained_model=str(workdir), **changes)
    return config


def test_fine_tuning_starts_from_the_predictions_of_the_old_run(runs, folder):
    config, workdir, _ = runs("BatchNorm, dropout, another pooling")
    run = new_run(config, folder / "tuned")
    other_units = tuple(dataclasses.replace(s, mean=s.mean + 3, std=2 * s.std) for s in run.statistics)
    state = start_from(run.initial_state(), validate(tuned(config, workdir)), other_units)
    old = Predictor.load(workdir)
    weights = {"params": state.params, "calibration": state.calibration, "batch_stats": state.batch_stats}
    new = Predictor(validate(config), weights, other_units)
    indices = open_tiny(config).splits["test"]
    table = open_tiny(config).table
    expected = old.predict_table(table, [indices], old.parts).value
    np.testing.assert_allclose(new.predict_table(table, [indices], old.parts).value, expected, rtol=1e-5, atol=1e-5)
    assert np.std(expected) > 1e-3
    assert int(state.step) == 0


@pytest.mark.slow
def test_fine_tuning_to_other_targets_keeps_all_but_the_output_layer(runs, folder):
    config, workdir, _ = runs("bfloat16, layer norms, lattice frames, draws")
    run = new_run(config, folder / "other")
    fresh = run.initial_state()
    state = start_from(fresh, validate(tuned(config, workdir)), (TargetStatistics("band_gap", "eV", 1.0, 1.0),))
    old = Predictor.load(workdir).variables["params"]
    assert_equal_trees(state.params["output"], fresh.params["output"])
    assert_equal_trees(state.params | {"output": 0}, old | {"output": 0})


@pytest.mark.slow
def test_a_fine_tuned_run_says_where_it_came_from_and_differs_from_one_that_was_not(runs, folder):
    config, workdir, _ = runs("bfloat16, layer norms, lattice frames, draws")
    config = tuned(config, workdir, n_epochs=2, lr=1e-6)
    train(config, folder / "fine")
    assert json.loads((folder / "fine" / "config.json").read_text())["pretrained_model"] == str(workdir)
    dataset = open_tiny(config)
    new, old = (errors_on_test(Predictor.load(run), dataset)["e_form"] for run in (folder / "fine", workdir))
    assert new == pytest.approx(old, rel=0.02) and new != old


@pytest.mark.slow
def test_layers_are_frozen_or_start_anew_by_name(runs, folder):
    """After training: frozen ones have the old bits, others do not; the output layer started at random."""
    config, workdir, _ = runs("BatchNorm, dropout, another pooling")
    layers = {"frozen_layers": "embedding,block_0/attention", "reinit_layers": "output, dense_0"}
    config = tuned(config, workdir, n_epochs=2, **layers)
    old = Predictor.load(workdir).variables["params"]
    fresh = new_run(config, folder / "unused").initial_state().params
    targets = Predictor.load(workdir).targets
    start = start_from(new_run(config, folder / "unused").initial_state(), validate(config), targets)
    for layer in ("output", "dense_0"):
        assert_equal_trees(start.params[layer], fresh[layer])
    train(config, folder / "layers")
    new = Predictor.load(folder / "layers", "last").variables["params"]
    for layer in ("embedding", "block_0"):
        frozen = {"embedding": old["embedding"], "block_0": {"attention": old["block_0"]["attention"]}}[layer]
        kept = new[layer] if layer == "embedding" else {"attention": new[layer]["attention"]}
        assert_equal_trees(kept, frozen)
    trained = {"block_0": {k: v for k, v in new["block_0"].items() if k != "attention"}, "output": new["output"]}
    for layer, before in {"block_0": old["block_0"], "output": fresh["output"]}.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(trained[layer]):
            other = before
            for entry in path:
                other = other[entry.key]
            assert np.any(leaf != other), (layer, path)


@pytest.mark.parametrize("key", ["frozen_layers", "reinit_layers"])
def test_a_layer_that_does_not_exist_is_refused(runs, folder, key):
    config, workdir, _ = runs("BatchNorm, dropout, another pooling")
    with pytest.raises(ConfigError, match=rf"{key}: there is no layer 'block_1'; there are .*block_0.*output"):
        train(tuned(config, workdir, **{key: "block_1"}), folder / "no-layer")


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
    output = start_from(fresh, validate(tuned(config, workdir)), targets).params["output"]
    before = Predictor.load(workdir).variables["params"]["output"]
    np.testing.assert_array_equal(output["kernel"][:, 0], twice["kernel"][:, 0])
    np.testing.assert_allclose(output["kernel"][:, 1], 2 * before["kernel"][:, 0], rtol=1e-6)
    np.testing.assert_allclose(output["bias"][1], 2 * before["bias"][0] + 2 / old.std, rtol=1e-5)
    logarithm = (targets[0], dataclasses.replace(targets[1], transform="log10"))  # another quantity
    output = start_from(fresh, validate(tuned(config, workdir)), logarithm).params["output"]
    np.testing.assert_array_equal(output["kernel"], twice["kernel"])


@pytest.mark.slow
def test_averaged_weights_without_batch_statistics_are_refused(runs, folder, monkeypatch):
    """In the middle of the averaging, before the end of the training."""
    config, _, _ = runs("BatchNorm, dropout, another pooling")
    config = config.copy_and_resolve_references()
    config.swa_epochs = 2
    train_into_the_second_epoch(config, folder / "averaging", monkeypatch)
    Predictor.load(folder / "averaging", "last")
    with pytest.raises(CheckpointError, match=r"no BatchNorm statistics.*ask for last or best"):
        Predictor.load(folder / "averaging", "swa")
