"""Element references in trainings, and in what is made of them."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from small_sets import small_set
from tiny import NO_FRAMES, StopAt, nan_at, open_tiny, tiny_config, tiny_runs

from crystalframer_jax.batching.table import compositions_of
from crystalframer_jax.cli.evaluate import evaluate_main
from crystalframer_jax.config import ConfigError, validate
from crystalframer_jax.data.loader import TrainingBatches
from crystalframer_jax.data.registry import TARGET_SETS
from crystalframer_jax.inference.ensemble import Ensemble, ensemble_summary
from crystalframer_jax.inference.predictor import Predictor
from crystalframer_jax.official.config import official_from_config
from crystalframer_jax.official.conversion import export_checkpoint
from crystalframer_jax.parallel.interruption import TrainingInterrupted
from crystalframer_jax.reporting.summary import ensemble_text
from crystalframer_jax.runs.run_directory import check_config
from crystalframer_jax.structures.crystal import Crystal
from crystalframer_jax.training.averages import weights_of
from crystalframer_jax.training.errors import TrainingError
from crystalframer_jax.training.loop import Options, Run
from crystalframer_jax.training.pretrained import start_from
from crystalframer_jax.training.start import train
from crystalframer_jax.training.targets import kept_references, labels_to_learn, statistics_of

CHANGES = NO_FRAMES | {"element_references": True, "targets": "e_form,e_above_hull", "n_epochs": 2, "swa_epochs": 0}


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


# With logarithms, unknown labels and several targets

ALL = CHANGES | {"target_transform": "none,log10"}


@pytest.fixture(scope="module")
def gaps(folder):
    """The small set with a second target that is positive, over powers of ten, and unknown for every fifth crystal."""
    values = 10 ** np.random.default_rng(0).uniform(-2, 2, 60)
    changes = {i: {"e_above_hull": None if i % 5 == 0 else float(value)} for i, value in enumerate(values)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TARGET_SETS, "small", small_set(changes=changes))
        config = tiny_config(folder / "gaps", **ALL | {"swa_epochs": 1})
        with pytest.raises(TrainingInterrupted):
            train(config, folder / "ensemble" / "member_0", interruption=StopAt(4))
        train(config, folder / "ensemble" / "member_0")
        train(tiny_config(folder / "gaps", **ALL | {"swa_epochs": 1}, seed=9), folder / "ensemble" / "member_1")
        yield config, folder / "ensemble", values


def test_a_run_that_was_stopped_has_the_same_statistics_and_predictions(gaps, folder):
    config, ensemble, _ = gaps
    train(config, folder / "at_once")
    expected, found = (folder / "at_once" / "predictions_test.csv", ensemble / "member_0" / "predictions_test.csv")
    assert found.read_bytes() == expected.read_bytes()
    assert Predictor.load(ensemble / "member_0").targets == Predictor.load(folder / "at_once").targets


def test_files_and_errors_are_in_label_units(gaps, tmp_path, capsys):
    config, ensemble, values = gaps
    dataset, run = open_tiny(config), ensemble / "member_0"
    rows = dataset.splits["test"]
    known = np.isfinite(dataset.labels[:, 1])
    np.testing.assert_allclose(dataset.labels[known, 1], values[known])
    assert not known[::5].any() and known.sum() == 48 and not known[rows].all()
    lines = list(csv.DictReader((run / "predictions_test.csv").read_text().splitlines()))
    for line, row in zip(lines, rows, strict=True):
        assert line["target_e_above_hull"] == (repr(float(dataset.labels[row, 1])) if known[row] else "")
    predictions = np.array([float(line["prediction_e_above_hull"]) for line in lines])
    assert predictions.min() > 0
    np.testing.assert_allclose(predictions, Predictor.load(run).predict_dataset(dataset, rows).value[:, 1], rtol=1e-4)
    error = np.abs(predictions - dataset.labels[rows, 1])[known[rows]].mean()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["test"]["e_above_hull"]["mae"] == pytest.approx(error)
    assert evaluate_main([str(run), f"--output={tmp_path / 'e.csv'}", f"--plot={tmp_path / 'e.png'}"]) == 0
    assert f"{error:.4f}" in capsys.readouterr().out
    evaluated = list(csv.DictReader((tmp_path / "e.csv").read_text().splitlines()))
    again = np.array([float(line["prediction_e_above_hull"]) for line in evaluated])
    np.testing.assert_allclose(again, predictions, rtol=1e-4)


def test_an_ensemble_tells_the_spread_of_known_labels(gaps, tmp_path, capsys):
    config, ensemble, _ = gaps
    dataset = open_tiny(config)
    summary = ensemble_summary(Ensemble.load(ensemble), dataset, tmp_path)
    rows = dataset.splits["test"]
    known, spread = np.isfinite(dataset.labels[rows, 1]), Ensemble.load(ensemble).predict_dataset(dataset, rows).spread
    assert summary["test"]["e_above_hull"]["mean_std"] == pytest.approx(spread[known, 1].mean())
    assert evaluate_main([str(ensemble)]) == 0
    assert f"{spread[known, 1].mean():.4f}" in capsys.readouterr().out
    assert "not_written" not in summary
    labels = dataset.labels.copy()
    labels[rows, 1] = np.nan  # of no test crystal
    summary = ensemble_summary(Ensemble.load(ensemble), dataclasses.replace(dataset, labels=labels), tmp_path)
    assert "not_written" not in summary and summary["test"]["e_above_hull"]["mean_std"] is None
    assert "e_above_hull (eV/atom), ensemble" in ensemble_text(summary)


def test_reports_of_bad_steps_have_labels_as_they_were_given(gaps, folder, monkeypatch):
    config, *_ = gaps
    nan_at(monkeypatch, 1)
    with pytest.raises(TrainingError, match="not finite at step 1"):
        train(config, folder / "bad")
    dataset, report = open_tiny(config), json.loads((folder / "bad" / "nonfinite_step_1.json").read_text())
    labels = {id: row for id, row in zip(dataset.table.ids.tolist(), dataset.labels.tolist(), strict=True)}
    assert len(report["crystals"]) == 16
    for crystal in report["crystals"]:
        found = [float(crystal[name]) for name in ("e_form", "e_above_hull")]
        np.testing.assert_array_equal(found, labels[crystal["id"]])
