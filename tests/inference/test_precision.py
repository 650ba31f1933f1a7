"""What predictions are computed with: float64 on a CPU, so that the description of a crystal makes no difference."""

import dataclasses

import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from support import random_variables, real_crystals

from crystalframer_jax.batching.targets import TargetStatistics
from crystalframer_jax.config import ConfigError, validate
from crystalframer_jax.configs import default
from crystalframer_jax.inference.predictor import Predictor


@pytest.fixture(scope="module")
def crystals():
    """Some whose predictions move by 0.02 to 0.1 meV/atom in float32 when they are turned."""
    return real_crystals(["mp-21422", "mp-24935", "mp-554962", "mp-8218"])


def small_model(precision: str, asked: str | None = None) -> Predictor:
    config = default.get_config()
    config.update(num_layers=1, model_dim=16, head_num=2, ff_dim=32, embedding_dim=(16,))
    variables = random_variables(validate(config).model)  # the same numbers, of float32, for all
    config.precision = precision
    return Predictor(validate(config), variables, (TargetStatistics("e_form", "eV/atom", 0.0, 1.0),), precision=asked)


def test_the_way_a_crystal_lies_in_space_makes_no_difference(crystals):
    turn = Rotation.from_euler("xyz", [0.3, 1.1, -2.0]).as_matrix()
    turned = [dataclasses.replace(c, positions=c.positions @ turn.T, lattice=c.lattice @ turn.T) for c in crystals]
    model = Predictor.load("mp-2018")
    np.testing.assert_allclose(model.predict(turned), model.predict(crystals), rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "trained, asked, expected",
    [
        ("float32", None, "float64"),
        ("float32", "float32", "float32"),
        ("float64", None, "float64"),
        ("bfloat16", None, "bfloat16"),
        ("bfloat16", "float32", "float32"),
    ],
)
def test_precision(crystals, trained, asked, expected):
    model = small_model(trained, asked)
    assert model.precision == model.model.precision == expected and model.config.precision == trained
    found = model.predict(crystals)
    exact = small_model("float64").predict(crystals)
    error = np.abs(found - exact).max() / np.std(exact)
    least, most = {"float64": (0, 1e-6), "float32": (0, 1e-5), "bfloat16": (1e-5, 0.1)}[expected]
    assert least <= error < most
    if expected == "float32":
        assert (found != exact).any()


def test_vectors_have_the_precision_of_predictions(crystals):
    exact, rounded = (small_model("float32", asked).embed(crystals) for asked in (None, "float32"))
    assert (exact.dtype, rounded.dtype) == (np.float64, np.float32)
    np.testing.assert_allclose(rounded, exact, rtol=0, atol=1e-5)


def test_an_unknown_precision_is_an_error_of_one_line():
    with pytest.raises(ConfigError) as error:
        Predictor.load("mp-2018", precision="float16")
    assert str(error.value) == "precision='float16' does not exist; allowed: float32, float64"
