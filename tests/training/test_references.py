"""Element references in trainings, and in what is made of them."""

import dataclasses

import numpy as np
import pytest
from tiny import open_tiny, tiny_config, tiny_runs

from crystalframer_jax.batching.table import compositions_of
from crystalframer_jax.config import ConfigError, validate
from crystalframer_jax.data.loader import TrainingBatches
from crystalframer_jax.inference.predictor import Predictor
from crystalframer_jax.official.config import official_from_config
from crystalframer_jax.official.conversion import export_checkpoint
from crystalframer_jax.runs.run_directory import check_config
from crystalframer_jax.structures.crystal import Crystal
from crystalframer_jax.training.averages import weights_of
from crystalframer_jax.training.loop import Options, Run
from crystalframer_jax.training.pretrained import start_from
from crystalframer_jax.training.start import train
from crystalframer_jax.training.targets import kept_references, labels_to_learn, statistics_of

CHANGES = {"element_references": True, "targets": "e_form,e_above_hull", "n_epochs": 2, "swa_epochs": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with tiny_runs():
        yield tmp_path_factory.mktemp("references")


@pytest.fixture(scope="module")
def finished(folder):
    config = tiny_config(folder / "data", **CHANGES)
    return validate(config), folder / "run", train(config, folder / "run")


def test_batches_hold_what_the_composition_leaves(folder):
    config = validate(tiny_config(folder / "data", **CHANGES))
    dataset = open_tiny(config)
    labels = dataset.labels.copy()
    labels[dataset.splits["train"][::5], 1] = np.nan  # not all are known
    dataset = dataclasses.replace(dataset, labels=labels)
    rows = dataset.splits["train"]
    statistics = statistics_of(config, dataset, rows)
    learned = labels_to_learn(statistics, dataset)
    expected = (
        labels - compositions_of(dataset.table, np.arange(len(labels))) @ np.array([s.references for s in statistics]).T
    )
    np.testing.assert_allclose(learned, expected, rtol=1e-12)
    np.testing.assert_allclose([s.std for s in statistics], np.nanstd(learned[rows], axis=0), rtol=1e-9)
    assert (np.nanstd(learned[rows], axis=0) < np.nanstd(labels[rows], axis=0)).all()
    for on_device in (False, True):
        batches = TrainingBatches(dataset, 16, 1, 7, learned=learned, on_device=on_device)
        batch, chosen = next(iter(batches.iterate(0))), batches.rows(0)
        known = np.isfinite(learned[chosen])
        np.testing.assert_array_equal(np.asarray(batch.target_mask)[: len(chosen)], known)
        np.testing.assert_allclose(np.asarray(batch.targets)[: len(chosen)][known], learned[chosen][known], rtol=1e-6)


def test_predictions_have_them_added(finished):
    config, workdir, summary = finished
    dataset, predictor = open_tiny(config), Predictor.load(workdir)
    rows = dataset.splits["test"]
    predictions = predictor.predict_dataset(dataset, rows).value
    without = tuple(dataclasses.replace(s, references=()) for s in predictor.targets)
    other = Predictor(config, predictor.variables, without)
    added = compositions_of(dataset.table, rows) @ np.array([s.references for s in predictor.targets]).T
    assert np.abs(added).max() > 0.1
    np.testing.assert_allclose(predictions, other.predict_dataset(dataset, rows).value + added, atol=1e-6)
    errors = np.abs(predictions - dataset.labels[rows]).mean(axis=0)
    found = summary["mae"][summary["selected_weights"]]["test"]
    np.testing.assert_allclose(errors, [found["e_form"], found["e_above_hull"]], rtol=1e-5)


def test_an_element_that_was_not_trained_on_adds_nothing(finished):
    _config, workdir, _ = finished
    predictor = Predictor.load(workdir)
    unseen = next(z for z in range(1, 99) if z not in predictor.coverage.elements)
    assert all(s.references[unseen - 1] == 0 for s in predictor.targets)
    with pytest.warns(UserWarning, match="not among the elements"):
        assert np.isfinite(predictor.predict(Crystal(np.array([unseen]), np.zeros((1, 3)), 3 * np.eye(3)))).all()


def test_a_run_goes_on_with_them_and_only_with_them(finished, folder):
    config, workdir, summary = finished
    again = train(tiny_config(folder / "data", **CHANGES), workdir, Options())
    assert again == summary
    with pytest.raises(ConfigError, match="element_references True -> False"):
        check_config(dataclasses.replace(config, element_references=False), workdir)


def test_official_checkpoints_have_no_place_for_them(finished):
    with pytest.raises(ConfigError, match="element_references=True has no official counterpart"):
        official_from_config(finished[0])


@pytest.mark.parametrize("element_references", [True, False])
def test_fine_tuning_keeps_the_references_of_the_old_run(finished, folder, element_references):
    """Predictions are the old ones at the start, also of elements that the few crystals to train on do not have."""
    _, workdir, _ = finished
    changes = CHANGES | {"element_references": element_references, "train_filter_max": 4}
    config = validate(tiny_config(folder / "data", **changes, pretrained_model=str(workdir)))
    dataset, tuned = open_tiny(config), folder / f"tuned_{element_references}"
    run = Run(config, tuned, dataset)
    old, rows = Predictor.load(workdir), dataset.splits["test"]
    assert [s.references for s in run.statistics] == [s.references for s in old.targets]
    assert run.statistics[0].std != old.targets[0].std
    state = start_from(run.initial_state(), config, run.statistics)
    run.checkpoints.close()
    new = Predictor(config, weights_of(state), run.statistics)
    expected = old.predict_dataset(dataset, rows).value
    np.testing.assert_allclose(new.predict_dataset(dataset, rows).value, expected, rtol=0, atol=1e-5)
    train(config, tuned)
    with pytest.raises(ConfigError, match="element_references=True has no official counterpart"):
        export_checkpoint(tuned, folder / "tuned.ckpt")
    moved = workdir.rename(workdir.with_name("moved"))  # a training that goes on has them itself
    try:
        assert kept_references(config, tuned) == {(s.name, s.transform): s.references for s in old.targets}
        assert Predictor.load(tuned).targets[0].references == old.targets[0].references
    finally:
        moved.rename(workdir)


def test_fine_tuning_of_a_model_without_references_has_none(folder):
    plain, changes = folder / "plain", CHANGES | {"element_references": False, "targets": "e_form", "n_epochs": 1}
    train(tiny_config(folder / "data", **changes), plain)
    changes |= {"element_references": True, "targets": "e_form,e_above_hull", "pretrained_model": str(plain)}
    run = Run(config := validate(tiny_config(folder / "data", **changes)), folder / "both", open_tiny(config))
    run.checkpoints.close()
    assert not run.statistics[0].references and any(run.statistics[1].references)  # the new target has its own
