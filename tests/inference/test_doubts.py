"""Warnings about crystals unlike the training set, and trainings on logarithms."""

import csv
import dataclasses
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support import EXAMPLES, primitive, random_variables
from tiny import open_tiny, tiny_config, tiny_runs

from crystalframer_jax import Predictor
from crystalframer_jax.batching.coverage import Coverage
from crystalframer_jax.batching.table import table_of
from crystalframer_jax.batching.targets import TargetStatistics
from crystalframer_jax.cli.predict import predict_main
from crystalframer_jax.config import ConfigError, validate
from crystalframer_jax.files import FileError
from crystalframer_jax.inference.doubts import PredictionWarning, doubts, summary
from crystalframer_jax.inference.ensemble import Ensemble
from crystalframer_jax.runs.metadata import checked
from crystalframer_jax.runs.run_directory import check_config
from crystalframer_jax.structures.crystal import Crystal
from crystalframer_jax.structures.neighbors import LatticeBox, atoms_without_neighbors
from crystalframer_jax.training.loop import Run

CUTOFF = 4.0
NACL = str(EXAMPLES / "NaCl.cif")
COVERAGE = Coverage((11, 14, 17), (10.0, 30.0), (2, 8))


def cube(edge: float, *species: int, spacing: float = 0.5) -> Crystal:
    """Atoms along the diagonal of a cube."""
    fract = spacing * np.arange(len(species))[:, None] * np.ones(3)
    return Crystal(np.array(species), fract * edge, edge * np.eye(3), id="cube")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    with tiny_runs():
        yield tmp_path_factory.mktemp("doubts")


@pytest.fixture(scope="module")
def predictor(folder) -> Predictor:
    """A model with random weights."""
    config = validate(tiny_config(folder / "data"))
    variables = random_variables(config.model)
    return Predictor(config, variables, (TargetStatistics("e_form", "", -1.5, 1.2),), coverage=COVERAGE)


@pytest.fixture(scope="module")
def logarithms(folder) -> tuple[Run, dict]:
    """A run on logarithms, of labels that span powers of ten, and its summary."""
    config = validate(tiny_config(folder / "data", target_transform="log10", n_epochs=1, swa_epochs=0))
    dataset = open_tiny(config)
    run = Run(config, folder / "run", dataclasses.replace(dataset, labels=10**dataset.labels))
    return run, run.finish()


# Coverage


def test_what_rows_of_a_table_hold():
    shared = np.zeros((1, 98))
    shared[0, [24, 25]] = 0.9, 0.1
    alloy = Crystal(np.array([25]), np.zeros((1, 3)), 3 * np.eye(3), shared, "alloy")
    crystals = [primitive("rock salt"), primitive("diamond"), alloy, primitive("perovskite")]
    found = Coverage.of(table_of(crystals, CUTOFF), np.array([0, 2, 3]))
    assert found.elements == (8, 11, 17, 22, 25, 26, 38)
    assert found.volume_per_atom == pytest.approx((3.905**3 / 5, 27.0))
    assert found.num_atoms == (1, 5)
    content = json.loads(json.dumps(dataclasses.asdict(found)))
    assert Coverage.from_json(checked({"training_set": content}, "meta")["training_set"]) == found
    for change in ({"elements": [0]}, {"num_atoms": [3, 2]}, {"volume_per_atom": [1.0]}, {"elements": "NaCl"}):
        with pytest.raises(FileError, match="training_set"):
            checked({"training_set": content | change}, "meta")


@pytest.mark.parametrize(
    ("crystal", "words"),
    [
        (primitive("rock salt"), []),
        (cube(4.0, 84, 11), ["training set: Po"]),
        (cube(2.34, 11), []),  # half the fewest atoms
        (cube(4.5, 11, 11), ["45.6 Å^3 an atom, far from the 10 to 30"]),
        (cube(2.3, 11, 11), ["6.08 Å^3 an atom"]),
        (cube(4.4, 11, 11), []),  # 42.6: within half as much again
        (cube(6.6, *[11] * 17, spacing=1 / 17), ["17 atoms, far from the 2 to 8"]),
    ],
)
def test_crystals_unlike_the_training_set(crystal, words):
    found = COVERAGE.doubts(crystal)
    assert len(found) == len(words)
    for text, word in zip(found, words, strict=True):
        assert word in text


def test_minor_elements_of_a_site_count():
    occupancies = np.zeros((1, 98))
    occupancies[0, [10, 83]] = 0.9, 0.1
    crystal = Crystal(np.array([11]), np.zeros((1, 3)), 2.7 * np.eye(3), occupancies)
    assert [text[-2:] for text in COVERAGE.doubts(crystal)] == ["Po"]


def test_atoms_without_neighbors():
    assert atoms_without_neighbors(cube(3.9, 11), 4.0) == 0  # its own images
    assert atoms_without_neighbors(cube(4.1, 11), 4.0) == 1
    assert atoms_without_neighbors(cube(20.0, 11, 17), 4.0) == 2
    assert atoms_without_neighbors(cube(20.0, 11, 17, 17, spacing=0.1), 4.0) == 0
    bonded = Crystal(np.array([1, 1, 2]), np.array([[0, 0, 0], [0.7, 0, 0], [9, 9, 9.0]]), 20 * np.eye(3))
    assert atoms_without_neighbors(bonded, 4.0) == 1


# Predictions


def test_doubts_of_models(predictor):
    (far,) = doubts(Predictor(predictor.config, predictor.variables, predictor.targets), cube(30.0, 84, 11))
    assert far == "no atom has a neighbor within the cutoff of 4 Å"  # and no training set is known
    other = Predictor(predictor.config, predictor.variables, predictor.targets)
    other.coverage = dataclasses.replace(COVERAGE, elements=(11, 17, 84))
    found = doubts(Ensemble([predictor, other]), cube(4.0, 84, 14))
    assert [text[-2:] for text in found] == ["Po", "Si"]
    other.cutoff, other.coverage = LatticeBox(1), None
    assert doubts(other, cube(30.0, 84, 11)) == []
    config = dataclasses.replace(predictor.config, domain="reci", value_pe_angle_real=0)
    assert doubts(Predictor(config, {}, predictor.targets), cube(30.0, 84, 11)) == []  # sees the atoms of the cell


def test_warnings_of_a_file_are_summed_up_by_kind():
    assert summary([("x", []), ("y", [])]) == summary([]) == ""
    assert summary([("x", ["a 1", "b"])]) == "a 1; b"
    assert summary([("x", []), ("y", ["a 1.5"]), ("z", ["b", "a 2"])]) == (
        "a 1.5 (2 of 3 structures, the first is y); b (1 of 3 structures, the first is z)"
    )
    many = summary([(name, [name]) for name in "abcdefg"])
    assert many.count(";") == 5 and many.endswith("; 2 warnings of other kinds")


def test_predictions_warn_in_python(predictor):
    with warnings.catch_warnings(action="error"):
        assert predictor.predict(primitive("rock salt")).shape == (1, 1)
    with pytest.warns(PredictionWarning, match="^cube: .*training set: Po$"):
        predictor.predict(cube(4.0, 84, 11))
    with pytest.warns(PredictionWarning, match=r"Po \(1 of 2 structures, the first is cube\)$"):
        Ensemble([predictor, predictor]).predict([primitive("rock salt"), cube(4.0, 84, 11)])


@pytest.fixture
def frames(tmp_path) -> Path:
    """Four frames: NaCl, an unusable one, one of Po, and one with far atoms."""
    frame = '2\nLattice="{0} 0 0 0 {0} 0 0 0 {0}" Properties=species:S:1:pos:R:3\n{1} 0 0 0\n{1} {2} {2} {2}\n'
    given = [(3.5, "Na", 1.7), (3.5, "X", 1.7), (3.5, "Po", 1.7), (20.0, "Na", 10.0)]
    file = tmp_path / "frames.extxyz"
    file.write_text("".join(frame.format(*values) for values in given))
    return file


@pytest.mark.parametrize("is_ensemble", [False, True])
def test_an_unusable_frame_costs_no_other(predictor, frames, is_ensemble):
    model = Ensemble([predictor, predictor]) if is_ensemble else predictor
    with pytest.warns(UserWarning, match="#2: .*; its predictions are NaN"):
        found = model.predict([NACL, frames])
    assert np.isnan(found[:, 0]).tolist() == [False, False, True, False, False]
    np.testing.assert_allclose(found[:1], model.predict(NACL), rtol=0, atol=1e-5)


def test_one_line_of_warnings_for_a_file_and_a_column(predictor, frames, capsys, monkeypatch):
    monkeypatch.setattr("crystalframer_jax.cli.predict.load_model", lambda *_: predictor)
    output = frames.with_name("out.csv")
    with warnings.catch_warnings(action="error"):
        assert predict_main(["run", NACL, str(frames), f"--output={output}"]) == 1
    printed = capsys.readouterr()
    warning, error = printed.err.splitlines()
    assert warning == (
        f"warning: {frames}: not among the elements of the training set: Po (1 of 3 structures, the first is #3); "
        "4e+03 Å^3 an atom, far from the 10 to 30 of the training set (1 of 3 structures, the first is #4); "
        "no atom has a neighbor within the cutoff of 4 Å (1 of 3 structures, the first is #4)"
    )
    assert error.startswith(f"error: {frames}#2: ")
    assert "structure" in printed.out and "e_form\n" in printed.out and "()" not in printed.out  # no unit
    with output.open(newline="") as stream:
        header, *lines = csv.reader(stream)
    assert header[-2:] == ["e_form", "warnings"]
    assert [line[-1][:9] for line in lines] == ["", "", "not among", "4e+03 Å^3"]


def test_the_column_is_empty_without_warnings(predictor, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("crystalframer_jax.cli.predict.load_model", lambda *_: predictor)
    assert predict_main(["run", NACL, f"--output={tmp_path / 'out.csv'}"]) == 0
    assert capsys.readouterr().err == ""
    assert (tmp_path / "out.csv").read_text().startswith("structure,formula,atoms,e_form,warnings\n")


# Trainings


def test_a_run_stores_what_its_training_set_held(logarithms):
    run, _ = logarithms
    loaded = Predictor.load(run.workdir)
    assert loaded.coverage == Coverage.of(run.dataset.table, run.batches.indices)
    assert len(loaded.coverage.elements) > 20 and loaded.targets[0].transform == "log10"


def test_errors_of_logarithms_are_in_label_units(logarithms):
    run, summary = logarithms
    rows = run.dataset.splits["test"]
    labels = run.dataset.labels[rows, 0]
    logs = np.log10(run.dataset.labels[run.batches.indices, 0])
    assert (run.statistics[0].mean, run.statistics[0].std) == pytest.approx((logs.mean(), logs.std()))
    predictions = Predictor.load(run.workdir).predict_dataset(run.dataset, rows).value[:, 0]
    assert (predictions > 0).all()
    error = np.abs(predictions - labels).mean()
    assert summary["mae"][summary["selected_weights"]]["test"]["e_form"] == pytest.approx(error, rel=1e-5)


def test_labels_and_changes_that_are_refused(folder, logarithms):
    config = validate(tiny_config(folder / "data", target_transform="log10"))
    with pytest.raises(ConfigError, match=r"target_transform='log10': 53 of 60 labels of e_form .* is -"):
        Run(config, folder / "refused", open_tiny(config))
    assert not (folder / "refused").exists()
    run, _ = logarithms
    with pytest.raises(ConfigError, match="target_transform 'log10' -> 'none'"):
        check_config(dataclasses.replace(run.config, target_transform="none"), run.workdir)
