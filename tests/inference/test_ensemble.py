"""Ensembles: mean and standard deviation over models, their run directories, their errors, their command lines."""

import csv
import dataclasses
import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from small_sets import literal_split, raw_records
from support import EXAMPLES, random_crystal, random_variables
from tiny import assert_same_run, open_tiny, tiny_config, tiny_runs

from crystalframer_jax import Ensemble, Predictor
from crystalframer_jax.batching import table as table_module
from crystalframer_jax.batching.targets import TargetStatistics
from crystalframer_jax.cli import evaluate
from crystalframer_jax.cli.evaluate import evaluate_main
from crystalframer_jax.cli.predict import predict_main
from crystalframer_jax.config import ConfigError, validate
from crystalframer_jax.files import write_json
from crystalframer_jax.inference.ensemble import ensemble_summary, load_model
from crystalframer_jax.inference.evaluation import Predictions, groups_of
from crystalframer_jax.inference.forward import working_precision
from crystalframer_jax.inference.predictor import stored_fields
from crystalframer_jax.reporting.summary import ensemble_text
from crystalframer_jax.reporting.suspects import HEADER
from crystalframer_jax.runs.checkpoints import CheckpointError, Checkpoints
from crystalframer_jax.runs.run_directory import as_json
from crystalframer_jax.training import loop
from crystalframer_jax.training.start import train

NACL, SILICON = str(EXAMPLES / "NaCl.cif"), str(EXAMPLES / "POSCAR_Si")
E_FORM = TargetStatistics("e_form", "eV/atom", -1.5, 1.2)
E_HULL = TargetStatistics("e_above_hull", "eV/atom", 0.1, 0.2)
BOTH = {"targets": "e_form,e_above_hull"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    with tiny_runs():
        yield tmp_path_factory.mktemp("ensemble")


def model(folder: Path, seed: int, targets=(E_FORM,), **changes) -> Predictor:
    """A model with random weights."""
    config = validate(tiny_config(folder / "data", targets=",".join(t.name for t in targets), **changes))
    with working_precision(config):
        variables = random_variables(config.model, seed, config.model.dtype.type)
    return Predictor(config, variables, tuple(targets))


@pytest.fixture(scope="module")
def members(folder) -> list[Predictor]:
    return [model(folder, seed) for seed in range(3)]


@pytest.fixture(scope="module")
def crystals():
    """Five crystals without symmetry, of different sizes."""
    rng = np.random.default_rng(0)
    return [random_crystal(rng, n) for n in (3, 8, 1, 12, 5)]


def median_and_deviation(samples: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Median and deviation over models, by definition, with the divisor M - 1."""
    mean, ordered, half = sum(samples) / len(samples), np.sort(samples, axis=0), len(samples) // 2
    median = ordered[half] if len(samples) % 2 else (ordered[half - 1] + ordered[half]) / 2
    return median, np.sqrt(sum((sample - mean) ** 2 for sample in samples) / (len(samples) - 1))


def test_models_are_combined_by_the_median_or_the_mean():
    samples = np.array([[[1.0]], [[2.0]], [[9.0]], [[4.0]]])
    assert Predictions.over(samples, "median").value == 3 and Predictions.over(samples[:3], "median").value == 2
    assert Predictions.over(samples, "mean").value == Predictions.over(samples).value == 4
    assert (
        Predictions.over(samples, "median").spread == Predictions.over(samples).spread == np.std([1, 2, 9, 4], ddof=1)
    )


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert message and "\n" not in message and len(message) < 400
    return message


def write_run(folder: Path, member: Predictor) -> Path:
    """The run directory of a model."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", as_json(member.config))
    checkpoints = Checkpoints(folder, writable=True)
    targets = [vars(target) for target in member.targets]
    fields = stored_fields(member.config, member.variables)
    checkpoints.save_weights(7, fields, {"epoch": 0, "seconds": 0.0, "targets": targets, "val_mae": {}})
    checkpoints.close()
    write_json(folder / "summary.json", {"selected_weights": "last"})
    return folder


def write_ensemble(folder: Path, members: list[Predictor]) -> Path:
    """The run directory of an ensemble."""
    for number, member in enumerate(members):
        write_run(folder / f"member_{number}", member)
    return folder


@pytest.fixture(scope="module")
def run(folder, members) -> Path:
    return write_ensemble(folder / "run", members)


@pytest.fixture(scope="module")
def run_of_two_targets(folder) -> Path:
    return write_ensemble(folder / "two", [model(folder, seed, (E_FORM, E_HULL)) for seed in range(2)])


# Predicting


def test_mean_and_standard_deviation_over_the_members(members, crystals):
    ensemble = Ensemble(members)
    mean, deviation = median_and_deviation([member.predict(crystals) for member in members])
    assert mean.shape == (5, 1) and deviation.min() > 1e-2
    found = ensemble.predict_with_spread(crystals)
    np.testing.assert_allclose(found.value, mean, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found.spread, deviation, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(ensemble.predict(crystals), found.value)
    assert ensemble.predict([]).shape == (0, 1)
    assert (ensemble.targets, ensemble.cutoff) == ((E_FORM,), 4.0)


def test_the_order_of_the_members_does_not_matter(members, crystals):
    found, turned = (Ensemble(m).predict_with_spread(crystals) for m in (members, members[1:] + members[:1]))
    np.testing.assert_allclose(turned.value, found.value, rtol=1e-12)
    np.testing.assert_allclose(turned.spread, found.spread, rtol=1e-12)


def test_an_ensemble_of_one_is_its_model(members, crystals):
    found = Ensemble(members[:1]).predict_with_spread(crystals)
    np.testing.assert_array_equal(found.value, members[0].predict(crystals))
    np.testing.assert_array_equal(found.spread, np.zeros((5, 1)))


def test_drawn_frames_are_averaged_inside_each_member(folder, crystals):
    """Rock salt has ties; the spread is over the means of the members."""
    members = [model(folder, seed, num_frame_samples=2) for seed in range(2)]
    means = [member.predict_with_spread([NACL, *crystals], 4) for member in members]
    mean, deviation = median_and_deviation([found.value for found in means])
    found = Ensemble(members).predict_with_spread([NACL, *crystals], 4)
    np.testing.assert_allclose(found.value, mean, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found.spread, deviation, rtol=0, atol=1e-6)
    with pytest.raises(ConfigError, match="num_frame_samples=0"):
        Ensemble(members).predict(NACL, 0)


def test_members_with_different_radii_and_targets_of_batches(folder, crystals, monkeypatch):
    """Neighbors are searched once for each radius; a table of one radius is refused."""
    frameless = {"value_pe_angle_real": 0, "frame_method": "no"}
    members = [
        model(folder, 0),
        model(folder, 1, cutoff_radius=5.0),
        model(folder, 2, frame_method="lattice"),
        model(folder, 3, domain="multihead", **frameless),
    ]
    mean, deviation = median_and_deviation([member.predict(crystals) for member in members])
    radii = []
    search = table_module.neighbor_rows

    def counted(crystal, cutoff):
        radii.append(cutoff)
        return search(crystal, cutoff)

    monkeypatch.setattr(table_module, "neighbor_rows", counted)
    ensemble = Ensemble(members)
    found = ensemble.predict_with_spread(crystals)
    assert sorted(radii) == [4.0] * 5 + [5.0] * 5
    np.testing.assert_allclose(found.value, mean, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found.spread, deviation, rtol=0, atol=1e-6)
    with pytest.raises(ConfigError) as error:
        ensemble.predict_dataset(open_tiny(members[0].config), np.arange(5))
    assert "4.0" in one_line(error) and "5.0" in one_line(error)


@pytest.mark.slow
def test_one_table_serves_members_that_need_different_parts(folder):
    """float64 beside float32, lattice frames and attention in reciprocal space beside neighbors alone."""
    members = [
        model(folder, 0),
        model(folder, 1, frame_method="lattice"),
        model(folder, 2, domain="multihead", value_pe_angle_real=0, frame_method="no"),
        model(folder, 3, precision="float64"),
    ]
    dataset = open_tiny(members[0].config)
    indices = dataset.splits["test"]
    ensemble = Ensemble(members)
    samples = ensemble.predict_members(dataset, indices)
    assert samples.shape == (4, 6, 1)
    for member, sample in zip(members, samples, strict=True):
        expected = member.predict_table(dataset.table, groups_of(indices, 4), member.parts).value
        np.testing.assert_allclose(sample, expected, rtol=0, atol=1e-6)
    found = ensemble.predict_dataset(dataset, indices)
    mean, deviation = median_and_deviation(list(samples))
    np.testing.assert_allclose(found.value, mean, rtol=1e-12)
    np.testing.assert_allclose(found.spread, deviation, rtol=1e-12)


@pytest.mark.parametrize("other", [E_HULL, TargetStatistics("e_form", "meV/atom", -1500.0, 1200.0)])
def test_models_that_predict_other_things_are_refused(folder, members, tmp_path, other):
    first, second = write_run(tmp_path / "a", members[0]), write_run(tmp_path / "b", model(folder, 5, (other,)))
    with pytest.raises(ConfigError) as error:
        Ensemble([Predictor.load(first), Predictor.load(second)])
    message = one_line(error)
    assert str(first) in message and str(second) in message
    assert "e_form (eV/atom)" in message and f"{other.name} ({other.unit})" in message


def test_an_ensemble_of_nothing():
    with pytest.raises(ConfigError, match="at least one model"):
        Ensemble([])


# Loading


def test_a_run_directory_gives_its_members_in_order(folder, members, crystals, run):
    twelve = folder / "twelve"
    for number in range(12):  # member_10 comes after member_9
        shutil.copytree(run / f"member_{number % 3}", twelve / f"member_{number}")
    ensemble = load_model(twelve)
    assert isinstance(ensemble, Ensemble) and ensemble.names == tuple(f"member_{n}" for n in range(12))
    assert "12 models" in ensemble.origin and str(twelve) in ensemble.origin and "last" in ensemble.origin
    for member, expected in zip(ensemble.members, members * 4, strict=True):
        jax.tree.map(np.testing.assert_array_equal, member.variables["params"], expected.variables["params"])
    expected = Ensemble(members).predict(crystals)
    np.testing.assert_allclose(Ensemble.load(str(run)).predict(crystals), expected, rtol=0, atol=1e-6)


def test_single_models_are_loaded_as_such(run):
    for path in (run / "member_1", run / "member_1" / "checkpoints" / "7"):
        assert isinstance(load_model(path), Predictor)
    with pytest.raises(CheckpointError, match="member_0"):
        Ensemble.load(run / "member_1")


def test_members_that_are_missing_or_not_trained_to_the_end_are_named(folder, run):
    gap, planned, unfinished, begun = (shutil.copytree(run, folder / name) for name in ("gap", "plan", "half", "begun"))
    shutil.rmtree(gap / "member_1")
    write_json(planned / "config.json", {"ensemble_size": 4})
    (unfinished / "member_2" / "summary.json").unlink()
    shutil.rmtree(begun / "member_1" / "checkpoints")
    for path, name in ((gap, "member_1"), (planned, "member_3"), (unfinished, "member_2"), (begun, "member_1")):
        with pytest.raises(CheckpointError) as error:
            load_model(path)
        assert str(path / name) in one_line(error)


# Errors of an ensemble


def read_csv(file: Path) -> list[list[str]]:
    with file.open(newline="") as stream:
        return list(csv.reader(stream))


def figure(file: Path) -> bool:
    return file.read_bytes().startswith(b"\x89PNG")


def test_the_summary_of_an_ensemble(folder, run):
    ensemble, workdir = Ensemble.load(run), folder / "summary"
    workdir.mkdir()
    dataset = open_tiny(ensemble.config)
    summary = ensemble_summary(ensemble, dataset, workdir)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary

    train, _, test = literal_split(np.ones(60, bool))
    energies = np.array([record["formation_energy_per_atom"] for record in raw_records(60)])
    header, *rows = read_csv(workdir / "predictions_test.csv")
    assert header == ["id", "target", "prediction", "spread"]
    assert [row[0] for row in rows] == [raw_records(60)[row]["id"] for row in test]
    labels, value, spread = np.array([row[1:] for row in rows], float).T
    assert labels.tolist() == energies[test].tolist()
    batches = groups_of(dataset.splits["test"], 16)
    alone = [member.predict_table(dataset.table, batches, member.parts).value[:, 0] for member in ensemble.members]
    np.testing.assert_allclose(value, np.median(alone, axis=0), rtol=0, atol=1e-6)
    np.testing.assert_allclose(spread, median_and_deviation(alone)[1], rtol=0, atol=1e-6)

    found = summary["test"]["e_form"]
    assert found["mae"] == pytest.approx(np.abs(value - labels).mean(), rel=1e-12)
    assert found["rmse"] == pytest.approx(math.sqrt(((value - labels) ** 2).mean()), rel=1e-12)
    assert found["r2"] == pytest.approx(1 - ((value - labels) ** 2).mean() / labels.var(), rel=1e-12)
    assert found["mean_std"] == pytest.approx(spread.mean(), rel=1e-12) and found["unit"] == "eV/atom"
    baseline = np.abs(energies[train].mean() - labels).mean()
    assert found["mean_predictor_mae"] == pytest.approx(baseline, rel=1e-12)
    assert summary["mean_predictor_mae"]["test"]["e_form"] == found["mean_predictor_mae"]
    assert 0 <= found["miscalibration_area"] <= 0.5
    errors = [np.abs(sample - labels).mean() for sample in alone]
    for number, (member, error) in enumerate(zip(summary["members"], errors, strict=True)):
        assert (member["run"], member["weights"]) == (f"member_{number}", "last")
        assert member["test"]["e_form"] == pytest.approx(error, abs=1e-6)
        assert member["val"].keys() == {"e_form"}
    assert found["mae"] <= np.abs(alone - labels).max(axis=0).mean()
    assert figure(workdir / "parity_test.png") and figure(workdir / "calibration_test.png")

    text = ensemble_text(summary).splitlines()
    (line,) = [line for line in text if "e_form (eV/atom), ensemble" in line]
    numbers = [f"{found[key]:.4f}" for key in ("mae", "rmse", "r2", "mean_std")]
    assert re.split(r"\s{2,}", line)[1:] == numbers
    (line,) = [line for line in text if "mean of these errors" in line]
    assert f"{np.mean(errors):.4f}" in line and sum("member_" in line for line in text) == 3
    header, *rows = read_csv(workdir / "suspect_labels.csv")
    assert header == [*HEADER] and len(rows) == sum(summary["suspect_labels"].values())
    assert text[-1].startswith("labels that all models agree against: ") and summary["suspect_labels"].keys() == {
        *("train", "val", "test")
    }


def test_a_wrong_label_is_found(folder, run, capsys, tmp_path, monkeypatch):
    """Labels are what the models predict, but for one of each split; the command writes the same file."""
    ensemble, dataset = Ensemble.load(run), open_tiny(tiny_config(folder / "data"))
    wrong = [int(dataset.splits[split][2]) for split in ("train", "val", "test")]
    labels = np.median(ensemble.predict_members(dataset, np.arange(60)), axis=0)
    labels += np.random.default_rng(0).normal(0, 0.1, labels.shape)
    labels[wrong] += np.array([[80.0], [-90.0], [70.0]])
    dataset = dataclasses.replace(dataset, labels=labels)
    summary = ensemble_summary(ensemble, dataset, tmp_path)
    rows = read_csv(tmp_path / "suspect_labels.csv")[1:]
    found = {row[0]: row for row in reversed(rows)}  # the first of each split
    assert [found[split][1] for split in ("train", "val", "test")] == [dataset.table.ids[row] for row in wrong]
    for split, deviation in zip(("train", "val", "test"), (80, -90, 70), strict=True):
        assert float(found[split][7]) == pytest.approx(deviation, abs=1) and summary["suspect_labels"][split] >= 1
    monkeypatch.setattr(evaluate, "dataset_of", lambda *_: dataset)
    assert evaluate_main([str(run), f"--suspects={tmp_path / 'again.csv'}"]) == 0
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "suspect_labels.csv").read_bytes()
    assert f"again.csv, {len(rows)} labels" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--suspects needs the models of an ensemble"):
        evaluate_main([str(run / "member_0"), f"--suspects={tmp_path / 'none.csv'}"])


def test_the_summary_of_several_targets(folder, run_of_two_targets):
    ensemble, workdir = Ensemble.load(run_of_two_targets), folder / "summary-two"
    workdir.mkdir()
    summary = ensemble_summary(ensemble, open_tiny(ensemble.config), workdir)
    names = ["e_form", "e_above_hull"]
    assert [*summary["test"]] == [*summary["val"]] == [*summary["units"]] == names
    header, *rows = read_csv(workdir / "predictions_test.csv")
    pairs = [f"{kind}_{name}" for name in names for kind in ("target", "prediction")]
    assert header == ["id", *pairs, *(f"spread_{name}" for name in names)]
    values = np.array([row[1:] for row in rows], float)
    for t, name in enumerate(names):
        assert summary["test"][name]["mae"] == pytest.approx(np.abs(values[:, 2 * t] - values[:, 2 * t + 1]).mean())
        assert summary["test"][name]["mean_std"] == pytest.approx(values[:, 4 + t].mean())
        assert figure(workdir / f"calibration_test_{name}.png")
    assert not (workdir / "calibration_test.png").exists()
    assert "e_above_hull (eV/atom), member_1" in ensemble_text(summary)


# Command lines


def cells(text: str, label: str) -> list[list[str]]:
    """The cells of the lines of a table that begin with a label."""
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if line.startswith(label)]


def test_predicting_with_an_ensemble(run, members, capsys, tmp_path):
    output = tmp_path / "out" / "predictions.csv"
    assert predict_main([str(run), NACL, SILICON, f"--output={output}"]) == 0
    mean, deviation = median_and_deviation([member.predict([NACL, SILICON]) for member in members])
    text = capsys.readouterr().out
    header = ["structure", "formula", "atoms", "e_form (eV/atom)", "e_form std over 3 models (eV/atom)"]
    assert cells(text, "structure") == [header]
    lines = cells(text, str(EXAMPLES))
    expected = np.concatenate([mean, deviation], axis=1)
    np.testing.assert_allclose([[float(x) for x in line[3:]] for line in lines], expected, rtol=0, atol=6e-5)
    written, *rows = read_csv(output)
    assert written == [*header, "warnings"]
    np.testing.assert_allclose([[float(x) for x in row[3:-1]] for row in rows], expected, rtol=0, atol=1e-6)


def test_predicting_with_draws_of_one_model(run, capsys):
    assert predict_main([str(run / "member_0"), NACL, "--num_frame_samples=2"]) == 0
    header = ["structure", "formula", "atoms", "e_form (eV/atom)", "e_form std over 2 draws (eV/atom)"]
    assert cells(capsys.readouterr().out, "structure") == [header]


@pytest.mark.parametrize("two_targets", [False, True])
def test_evaluating_an_ensemble(run, run_of_two_targets, folder, capsys, tmp_path, two_targets):
    workdir, names = (run_of_two_targets, ["e_form", "e_above_hull"]) if two_targets else (run, ["e_form"])
    ensemble = Ensemble.load(workdir)
    summary = ensemble_summary(ensemble, open_tiny(ensemble.config), tmp_path)
    output, plot = tmp_path / "evaluated.csv", tmp_path / "figures" / "calibration.png"
    assert evaluate_main([str(workdir), f"--output={output}", f"--plot={plot}"]) == 0
    text = capsys.readouterr().out
    models = f"{len(ensemble.members)} models"
    assert f"last weights of the {models} in {workdir}" in text
    header = ["small, test", "unit", "crystals", "MAE", "RMSE", "R2", "mean predictor", f"mean std over {models}"]
    assert cells(text, "small, test") == [header]
    for name in names:
        values = summary["test"][name]
        numbers = [f"{values[key]:.4f}" for key in ("mae", "rmse", "r2", "mean_predictor_mae", "mean_std")]
        assert cells(text, f"{name}  ") == [[name, "eV/atom", "6", *numbers]]
    assert read_csv(output) == read_csv(tmp_path / "predictions_test.csv")
    figures = [plot.with_name(f"calibration_{name}.png") for name in names] if two_targets else [plot]
    assert sorted(plot.parent.iterdir()) == sorted(figures) and all(map(figure, figures))
    for file in (output, *figures):
        assert f"wrote {file}" in text


def test_evaluating_one_model_draws_its_parity(run, capsys, tmp_path):
    plot = tmp_path / "parity.png"
    assert evaluate_main([str(run / "member_0"), "--split=val", f"--plot={plot}"]) == 0
    header = ["small, val", "unit", "crystals", "MAE", "RMSE", "R2", "mean predictor"]
    assert cells(capsys.readouterr().out, "small, val") == [header] and figure(plot)


@pytest.mark.parametrize("command", ["predict", "evaluate", "plot"])
def test_results_replace_nothing_but_results(run, capsys, tmp_path, command):
    run, file = str(run / "member_0"), tmp_path / "results.png"
    main, *arguments = {
        "predict": (predict_main, run, NACL, f"--output={file}"),
        "evaluate": (evaluate_main, run, f"--output={file}"),
        "plot": (evaluate_main, run, f"--plot={file}"),
    }[command]
    for theirs in ("data_NaCl", "id;target", "\n"):
        file.write_text(theirs)
        with pytest.raises(SystemExit, match=r"error: .*results\.png exists and is no such file"):
            main(arguments)
        assert file.read_text() == theirs
    file.write_text("")
    for _ in range(2):  # what is there the second time is ours
        assert main(arguments) == 0 and file.stat().st_size > 50


def test_figures_are_png(run, capsys):
    with pytest.raises(SystemExit) as error:
        evaluate_main([str(run), "--plot=figure.tiff"])
    assert error.value.code == 2 and "figure.tiff" in capsys.readouterr().err


def test_evaluating_members_of_different_radii_is_an_error_of_one_line(folder, members):
    workdir = write_ensemble(folder / "radii", [members[0], model(folder, 1, cutoff_radius=5.0)])
    with pytest.raises(SystemExit) as error:
        evaluate_main([str(workdir)])
    message = str(error.value.code)
    assert message.startswith("error: ") and str(workdir / "member_0") in message and str(workdir) in message


def test_no_figure_of_predictions_that_are_not_finite(run, folder, capsys, monkeypatch):
    predict = Ensemble.predict_dataset
    broken = lambda *args: (lambda found: found._replace(value=found.value * np.nan))(predict(*args))  # noqa: E731
    monkeypatch.setattr(Ensemble, "predict_dataset", broken)
    with pytest.raises(SystemExit, match=r"error: .*x\.png is not drawn: 6 of 6 predictions are not finite"):
        evaluate_main([str(run), f"--plot={folder / 'x.png'}"])


# Training


@pytest.mark.slow
def test_an_ensemble_is_trained_member_by_member_and_continues(folder, capsys, monkeypatch):
    """Its members are the runs of single trainings with seeds that count up; trained members are only reported."""
    config = tiny_config(folder / "data", ensemble_size=2)
    summary = train(config, folder / "trained")
    single = tiny_config(folder / "data", seed=config.seed + 1)
    train(single, folder / "single")
    assert_same_run(single, folder / "trained" / "member_1", folder / "single")
    assert json.loads((folder / "trained" / "summary.json").read_text()) == summary
    ensemble, dataset = Ensemble.load(folder / "trained"), open_tiny(config)
    indices = dataset.splits["test"]
    predictions = ensemble.predict_dataset(dataset, indices)
    errors = np.abs(predictions.value - dataset.labels[indices])[:, 0]
    assert summary["test"]["e_form"]["mae"] == pytest.approx(errors.mean(), rel=1e-5)
    assert summary["test"]["e_form"]["mean_std"] == pytest.approx(predictions.spread.mean(), rel=1e-4)
    assert predictions.spread.min() > 0
    for name in ("predictions_test.csv", "parity_test.png", "calibration_test.png"):
        assert (folder / "trained" / name).is_file()
    capsys.readouterr()
    monkeypatch.setattr(loop.Run, "_epochs", None)
    assert train(config, folder / "trained") == summary
    output = capsys.readouterr().out
    assert "member 2 of 2" in output and "e_form (eV/atom), ensemble" in output


def test_an_ensemble_cannot_shrink(folder):
    for number in range(3):
        (folder / "shrunk" / f"member_{number}").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"ensemble_size=2: .*shrunk has member_2 already; move them away"):
        train(tiny_config(folder / "data", ensemble_size=2), folder / "shrunk")


def test_a_directory_holds_an_ensemble_or_one_model(folder):
    (folder / "mixed" / "member_0").mkdir(parents=True)
    with pytest.raises(ConfigError, match="mixed holds an ensemble; choose another --workdir"):
        train(tiny_config(folder / "data"), folder / "mixed")
    (folder / "alone" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match="alone holds a run with one model; choose another --workdir"):
        train(tiny_config(folder / "data", ensemble_size=2), folder / "alone")
