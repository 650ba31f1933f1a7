"""Prediction: what a run learned comes back from its directory, for every kind and size of structure."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from pymatgen.core import Structure
from small_sets import literal_split, raw_records
from support import EXAMPLES, GOLDEN, ROOT, random_crystal, real_crystals
from tiny import tiny_config, tiny_runs

from crystalframer_jax import Predictor, load_official
from crystalframer_jax.config import ConfigError
from crystalframer_jax.inference.evaluation import MAX_BATCH_ATOMS
from crystalframer_jax.runs.checkpoints import CheckpointError, Checkpoints
from crystalframer_jax.structures.crystal import Crystal, CrystalError
from crystalframer_jax.structures.files import read_crystals
from crystalframer_jax.training import loop
from crystalframer_jax.training.loop import TrainingError
from crystalframer_jax.training.start import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    with tiny_runs():
        yield tmp_path_factory.mktemp("predict")


def disturbed(monkeypatch, at_step: int, factor: float) -> None:
    """Let all parameters be multiplied by a factor after one step of every run that is made from now on."""
    make = loop.make_train_step

    def make_disturbed(*args):
        step = make(*args)

        def train_step(state, batch, **options):
            is_disturbed = int(state.step) == at_step
            state, result = step(state, batch, **options)
            if is_disturbed:
                state = dataclasses.replace(state, params=jax.tree.map(lambda x: x * factor, state.params))
            return state, result

        return train_step

    monkeypatch.setattr(loop, "make_train_step", make_disturbed)


@pytest.fixture(scope="module")
def run(folder) -> tuple[Path, dict]:
    """Directory and summary of a run with averaged weights whose last checkpoint is not its best."""
    workdir = folder / "run"
    with pytest.MonkeyPatch.context() as patch:
        disturbed(patch, at_step=7, factor=1.5)
        summary = train(tiny_config(folder / "data"), workdir)
    assert summary["mae"].keys() == {"last", "best", "swa"}
    return workdir, summary


@pytest.fixture(scope="module")
def predictor(run) -> Predictor:
    return Predictor.load(run[0])


@pytest.fixture(scope="module")
def crystals() -> list[Crystal]:
    """Five crystals without symmetry, of different sizes."""
    rng = np.random.default_rng(0)
    return [random_crystal(rng, n) for n in (3, 8, 1, 12, 5)]


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert message and "\n" not in message and len(message) < 300
    return message


# Loading


@pytest.mark.parametrize("weights", ["last", "best", "swa", None])
def test_loaded_weights_make_the_errors_of_the_summary(run, weights):
    """The summary was computed in training from prepared neighbors; here the test crystals are given as structures."""
    workdir, summary = run
    name = weights or summary["selected_weights"]
    test_rows = literal_split(np.ones(60, bool))[2]
    records = [raw_records(60)[row] for row in test_rows]
    predictions = Predictor.load(workdir, weights).predict(real_crystals([record["id"] for record in records]))
    labels = np.array([record["formation_energy_per_atom"] for record in records])
    assert predictions.shape == (6, 1)
    error = np.abs(predictions[:, 0] - labels).mean()
    assert error == pytest.approx(summary["mae"][name]["test"]["e_form"], abs=1e-6)


def test_a_predictor_tells_its_data(run, predictor):
    told = json.loads((run[0] / "data.json").read_text())["digest"]
    assert predictor.data_digest == told and len(told) == 12


def test_last_best_and_averaged_weights_differ(run, crystals):
    last, best, swa = (Predictor.load(run[0], weights).predict(crystals) for weights in ("last", "best", "swa"))
    assert min(np.abs(a - b).max() for a, b in ((last, best), (best, swa), (swa, last))) > 1e-4


def test_a_checkpoint_directory_gives_the_weights_of_its_step(run, crystals):
    workdir, _ = run
    checkpoints = Checkpoints(workdir)
    best, last = checkpoints.best(), checkpoints.last()
    checkpoints.close()
    assert best < last
    for step, weights in ((best, "best"), (last, "last")):
        expected = Predictor.load(workdir, weights).predict(crystals)
        for path in (workdir / "checkpoints" / str(step), f"{workdir}/checkpoints/{step}/"):
            np.testing.assert_array_equal(Predictor.load(path).predict(crystals), expected)
    averaged = Predictor.load(workdir / "checkpoints" / str(last), "swa").predict(crystals)
    np.testing.assert_array_equal(averaged, Predictor.load(workdir, "swa").predict(crystals))


def test_targets_and_radius_come_from_the_run(predictor):
    (target,) = predictor.targets
    assert (target.name, target.unit, predictor.cutoff) == ("e_form", "eV/atom", 4.0)
    rows = literal_split(np.ones(60, bool))[0]
    labels = np.array([record["formation_energy_per_atom"] for record in raw_records(60)])[rows]
    assert (target.mean, target.std) == (pytest.approx(labels.mean()), pytest.approx(labels.std()))


def test_a_run_directory_can_be_moved(run, folder, crystals, predictor):
    moved = shutil.copytree(run[0], folder / "moved")
    np.testing.assert_array_equal(Predictor.load(moved).predict(crystals), predictor.predict(crystals))


def test_directories_without_a_model_are_errors_of_one_line(run, folder):
    workdir, _ = run
    empty = folder / "empty"
    empty.mkdir()
    no_checkpoints = folder / "no-checkpoints"
    no_checkpoints.mkdir()
    shutil.copy(workdir / "config.json", no_checkpoints)
    not_yet = shutil.copytree(no_checkpoints, folder / "not-yet")
    (not_yet / "checkpoints").mkdir()
    damaged = shutil.copytree(no_checkpoints, folder / "damaged")
    (damaged / "config.json").write_text('{"lr": ')
    for path in (folder / "nowhere", empty, no_checkpoints, not_yet, damaged, workdir / "checkpoints"):
        with pytest.raises(CheckpointError) as error:
            Predictor.load(path)
        assert str(path) in one_line(error)
    assert not (folder / "nowhere").exists()


def test_a_step_that_is_not_there_is_an_error_of_one_line(run):
    with pytest.raises(CheckpointError) as error:
        Predictor.load(run[0] / "checkpoints" / "999")
    assert "999" in one_line(error)


def test_a_damaged_checkpoint_is_an_error_of_one_line(run, folder):
    damaged = shutil.copytree(run[0], folder / "torn")
    for step in (damaged / "checkpoints").iterdir():
        shutil.rmtree(step / "model")
    with pytest.raises(CheckpointError) as error:
        Predictor.load(damaged)
    assert str(damaged) in one_line(error)


def test_weights_that_do_not_exist(run, folder, monkeypatch):
    with pytest.raises(CheckpointError) as error:
        Predictor.load(run[0], "first")
    assert "'first'" in one_line(error) and "best, last, swa" in one_line(error)
    workdir = folder / "stopped"  # before averaging began
    with monkeypatch.context() as patch:
        disturbed(patch, at_step=3, factor=np.nan)
        with pytest.raises(TrainingError):
            train(tiny_config(folder / "data"), workdir)
    Predictor.load(workdir, "best")
    with pytest.raises(CheckpointError) as error:
        Predictor.load(workdir, "swa")
    assert "no swa weights" in one_line(error) and str(workdir) in one_line(error)


# Predicting


def test_order_and_shape(predictor, crystals):
    together = predictor.predict(crystals)
    assert together.shape == (5, 1) and len(set(together[:, 0])) == 5
    np.testing.assert_allclose(predictor.predict(crystals[::-1]), together[::-1], rtol=0, atol=1e-6)
    np.testing.assert_allclose(predictor.predict(tuple(crystals)), together, rtol=0, atol=1e-6)
    for crystal, expected in zip(crystals, together, strict=True):
        alone = predictor.predict(crystal)
        assert alone.shape == (1, 1)
        np.testing.assert_allclose(alone[0], expected, rtol=0, atol=1e-6)
    assert predictor.predict([]).shape == (0, 1)


def test_predictions_are_repeatable(predictor):
    """Symmetry leaves a choice of frames in rock salt."""
    path = EXAMPLES / "NaCl.cif"
    np.testing.assert_array_equal(predictor.predict(path), predictor.predict(path))


def test_all_kinds_of_structures_give_the_same_numbers(predictor):
    ase_io = pytest.importorskip("ase.io")
    path = ROOT / "tests" / "structures" / "files" / "CONTCAR"
    (crystal,) = read_crystals(path)
    structure = Structure.from_file(path)
    kinds = [str(path), path, crystal, structure, ase_io.read(path, format="vasp")]
    together = predictor.predict(kinds)
    np.testing.assert_allclose(together, np.repeat(together[:1], 5, axis=0), rtol=0, atol=1e-6)
    for kind in kinds:
        np.testing.assert_allclose(predictor.predict(kind), together[:1], rtol=0, atol=1e-6)
    other = structure.copy()
    other.replace(0, "Ca")
    assert abs(predictor.predict(other)[0, 0] - together[0, 0]) > 1e-4


def test_a_file_with_several_structures_gives_as_many_rows(predictor):
    pytest.importorskip("ase")
    path = ROOT / "tests" / "structures" / "files" / "frames.extxyz"
    frames = read_crystals(path)
    predictions = predictor.predict([EXAMPLES / "POSCAR_Si", path])
    assert predictions.shape == (1 + len(frames), 1) and len(frames) == 2
    np.testing.assert_allclose(predictions[1:], predictor.predict(frames), rtol=0, atol=1e-6)


def supercell(crystal: Crystal, n: int) -> Crystal:
    """The crystal with its cell repeated n times along every lattice vector."""
    shifts = np.stack(np.meshgrid(*[np.arange(n)] * 3, indexing="ij"), -1).reshape(-1, 3) @ crystal.lattice
    positions = (crystal.positions + shifts[:, None]).reshape(-1, 3)
    return Crystal(np.tile(crystal.species, n**3), positions, n * crystal.lattice)


def test_a_supercell_of_a_thousand_atoms_has_the_prediction_of_its_cell(predictor, crystals):
    cell = crystals[1]
    large = supercell(cell, 5)
    assert large.num_atoms == 1000
    np.testing.assert_allclose(predictor.predict(large), predictor.predict(cell), rtol=0, atol=1e-5)


def test_crystals_beyond_the_usual_batch_among_others(predictor, crystals):
    small, cell = crystals[0], crystals[3]
    large = supercell(cell, 5)
    assert large.num_atoms > MAX_BATCH_ATOMS
    expected = np.concatenate([predictor.predict(c) for c in (small, cell, small)])
    np.testing.assert_allclose(predictor.predict([small, large, small]), expected, rtol=0, atol=1e-5)


def test_the_first_structure_that_cannot_be_used_is_named(predictor, crystals, tmp_path):
    (tmp_path / "empty.cif").write_text("")
    (tmp_path / "other.cif").write_text("")
    with pytest.raises(CrystalError) as error:
        predictor.predict([crystals[0], tmp_path / "empty.cif", tmp_path / "other.cif"])
    assert "empty.cif" in one_line(error)


# Official models


@pytest.fixture(scope="module")
def official() -> tuple[dict, dict, dict]:
    """Hyperparameters, state dict and all arrays of a golden file."""
    golden = dict(np.load(GOLDEN / "max.npz"))
    state = {name.removeprefix("param/"): value for name, value in golden.items() if name.startswith("param/")}
    return json.loads(golden["config_json"].tobytes()), state, golden


def official_crystals(golden: dict) -> list[Crystal]:
    ends = np.cumsum(golden["sizes"])
    atoms = [slice(end - size, end) for end, size in zip(ends, golden["sizes"], strict=True)]
    return [
        Crystal(golden["numbers"][a], golden["positions"][a], lattice)
        for a, lattice in zip(atoms, golden["lattice"], strict=True)
    ]


def test_an_official_model_reproduces_its_output(official, folder):
    config, state, golden = official
    config = config | {"cutoff_radius": 9.0}  # exact to 1e-8, and fewer neighbors than the 15.8 Å of this file
    plain = load_official(config, state)
    crystals = official_crystals(golden)
    np.testing.assert_allclose(plain.predict(crystals), golden["output"], rtol=0, atol=1e-6)
    scaled = load_official(config, state | {"target_mean": np.float32(-2.0), "target_std": np.array([3.0])})
    expected = 3 * golden["output"].astype(np.float64) - 2
    np.testing.assert_allclose(scaled.predict(crystals), expected, rtol=0, atol=3e-6)
    assert [(t.name, t.mean, t.std) for t in scaled.targets] == [("e_form", -2.0, 3.0)]


def test_the_radius_of_an_official_model_follows_from_its_window(official):
    config, state, _ = official
    assert load_official(config, state).cutoff == pytest.approx(8 * 1.4 / 0.5**0.5)


def test_official_parameters_that_do_not_fit_are_all_listed(official):
    config, state, _ = official
    state = dict(state)
    missing, wrong = "encoder.layers.1.linear1.bias", "mlp.0.weight"
    del state[missing]
    state[wrong] = np.zeros((32, 31), np.float32)
    state["mlp.6.bias"] = np.zeros(1)
    with pytest.raises(ValueError) as error:
        load_official(config, state)
    message = str(error.value)
    assert f"missing {missing} [64]" in message and "unexpected mlp.6.bias" in message
    assert f"{wrong} has shape [32, 31], expected [32, 32]" in message
    assert message.count(";") == 2  # nothing else


def test_official_settings_that_are_not_available_are_refused(official):
    config, state, _ = official
    with pytest.raises(ConfigError, match="domain='reci'"):
        load_official(config | {"domain": "reci"}, state)
    with pytest.raises(ConfigError, match=r"num_layer\b"):
        load_official(config | {"num_layer": 3}, state)


def test_an_official_model_with_a_list_of_targets(official):
    config, state, _ = official
    state = dict(state)
    state["mlp.3.weight"] = np.repeat(state["mlp.3.weight"], 2, axis=0)
    state["mlp.3.bias"] = np.repeat(state["mlp.3.bias"], 2)
    scaling = {"target_mean": np.array([1.0, 2.0]), "target_std": np.array([3.0, 4.0])}
    predictor = load_official(config | {"targets": ["a", "b"]}, state | scaling)
    assert [(t.name, t.mean, t.std) for t in predictor.targets] == [("a", 1.0, 3.0), ("b", 2.0, 4.0)]
    assert jax.tree.leaves(predictor.variables["params"]["output"])[0].shape == (2,)
