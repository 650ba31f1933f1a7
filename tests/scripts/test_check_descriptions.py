"""The command that measures how predictions depend on the description: the descriptions, and its table."""

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Structure
from support import ROOT, primitive, random_crystal

from crystalframer_jax.batching.targets import TargetStatistics


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("check_descriptions", ROOT / "scripts" / "check_descriptions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def structure(crystal):
    return Structure(crystal.lattice, crystal.species, crystal.positions, coords_are_cartesian=True)


@pytest.mark.parametrize("seed", range(4))
def test_every_description_is_of_the_same_crystal_and_another_description(script, seed):
    rng = np.random.default_rng(seed)
    for crystal in (random_crystal(rng, 4), primitive("perovskite")):
        for title, describe in script.DESCRIPTIONS.items():
            other = describe(crystal, rng)
            matcher = StructureMatcher(1e-4, 1e-4, 0.01, scale=False, primitive_cell=True)
            assert matcher.fit(structure(crystal), structure(other)), title
            same = [np.array_equal(getattr(crystal, x), getattr(other, x)) for x in ("positions", "lattice")]
            assert not all(same) or title == "Niggli cell"
            turn = np.linalg.solve(crystal.lattice, other.lattice)
            if title.startswith("turned"):  # a rotation: the hand of a chiral crystal stays
                np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-12)
                assert np.linalg.det(turn) == pytest.approx(1)


def test_the_table_tells_how_far_predictions_move(script, monkeypatch, capsys):
    """By a model that looks at the first atom of the list, which another order changes and turning does not."""
    model = SimpleNamespace(
        targets=(TargetStatistics("e", "eV/atom", 0.0, 1.0),),
        predict=lambda crystals: np.array([[float(crystal.species[0])] for crystal in crystals]),
    )
    monkeypatch.setattr(script, "load_model", lambda run, precision: model)
    script.main(["run", "--crystals=20", "--most_atoms=8"])
    lines = {line.split("  ")[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert "meV/atom" in lines["another cell"] and lines["turned, origin moved"][-1] == "0"
    assert float(lines["atoms in another order"][-1]) > 1000


def test_a_set_that_is_not_prepared_is_an_error_in_one_line(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "load_model", lambda run, precision: None)
    with pytest.raises(SystemExit, match=r"error: .*not prepared"):
        script.main(["run", "--target_set=mine", f"--data_dir={tmp_path}"])
