"""The model as a whole: calibration of the widths, rare elements, and precision.

Its values are checked in parity/, its symmetries in properties/.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from support import atom_places, batch_of, primitive, random_crystal, random_variables, rows_with, small_config
from tiny_models import (
    CRYSTALFORMER,
    FRAME_METHODS,
    LARGER,
    RADIUS,
    SHAPE,
    batch,
    crystals,
    evaluate,
    named_leaves,
    tiny_config,
)

from crystalframer_jax.model.regressor import CrystalFramer, rarity
from crystalframer_jax.structures.crystal import MAX_ATOMIC_NUMBER

# Calibration of the widths


def calibrated(config, variables, packed):
    _, state = jax.jit(lambda v, b: CrystalFramer(config).apply(v, b, calibrate=True, mutable=["calibration"]))(
        variables, packed
    )
    return jax.tree.map(float, state["calibration"]["block_0"]["attention"])


def test_widths_are_calibrated_by_mean_and_standard_deviation_of_real_atoms():
    """Of w_pos . q, over atoms and heads; padding does not count."""
    config = tiny_config(num_layers=1, **CRYSTALFORMER)
    variables = random_variables(config)
    params = variables["params"]
    x = params["embedding"][np.concatenate([crystal.species for crystal in crystals()]) - 1]
    attention = params["block_0"]["attention"]
    q = (x @ attention["q"]["kernel"] + attention["q"]["bias"]).reshape(12, 2, 4)
    logits = np.einsum("nhd,hd->nh", q, attention["w_pos"])
    for shape in (SHAPE, LARGER):
        values = calibrated(config, variables, batch(shape=shape))
        np.testing.assert_allclose(values["scale"], 1 / logits.std(ddof=1), rtol=1e-5)
        np.testing.assert_allclose(values["shift"], -logits.mean(), rtol=1e-5)


def test_a_single_width_is_shifted_only():
    """It has no standard deviation: heads or atoms that are all alike must not make predictions NaN."""
    config = tiny_config(num_layers=1, head_num=1, **CRYSTALFORMER)
    variables = random_variables(config)
    fcc = primitive("fcc")
    for packed in (batch_of([fcc], RADIUS), batch_of([fcc] * 3, RADIUS)):
        values = calibrated(config, variables, packed)
        assert values["scale"] == 1
        assert np.isfinite(values["shift"]) and values["shift"] != 0


# Rare elements: scale_grad


def raised(occupancies, crystal, largest):
    """Factors of the gradients [n]: inverse shares of the elements, with mean 1 over the atoms, clipped from above."""
    share = np.mean([occupancies[crystal == c].mean(axis=0) for c in np.unique(crystal)], axis=0)
    inverse = 1 / (occupancies @ share)
    return np.minimum(inverse / inverse.mean(), largest)


def composed(*all_species):
    """Crystals of given elements."""
    rng = np.random.default_rng(46)
    cells = [random_crystal(rng, len(species), 20.0) for species in all_species]
    return [
        dataclasses.replace(cell, species=np.array(species)) for cell, species in zip(cells, all_species, strict=True)
    ]


SPECIES = ([8, 8, 8, 8, 1], [8, 26], [8, 8, 1, 14])
LARGEST = 1.5


@pytest.mark.parametrize("shape", [SHAPE, LARGER])
def test_rarity_of_elements(shape):
    """The elements of a small crystal count as much as those of a large one, and padding does not count."""
    packed = batch_of(composed(*SPECIES), RADIUS, shapes=shape)
    species, crystal = np.concatenate(SPECIES), np.repeat(np.arange(3), [5, 2, 4])
    occupancies = np.eye(MAX_ATOMIC_NUMBER)[species - 1]
    in_batch = jax.nn.one_hot(packed.species - 1, MAX_ATOMIC_NUMBER)
    for largest in (LARGEST, 100.0):
        actual = np.asarray(rarity(in_batch, packed, largest))
        expected = raised(occupancies, crystal, largest)
        np.testing.assert_allclose(actual[atom_places(packed)], expected, rtol=1e-5)
    shares = {8: (4 / 5 + 1 / 2 + 2 / 4) / 3, 26: 1 / 6, 1: (1 / 5 + 1 / 4) / 3, 14: 1 / 12}  # by hand
    np.testing.assert_allclose(expected[species == 26] / expected[0], shares[8] / shares[26])
    np.testing.assert_allclose(expected.mean(), 1)


def test_rarity_of_shared_sites():
    """By the mean share of the elements at the site."""
    cells = composed(*SPECIES)
    occupancies = [np.eye(MAX_ATOMIC_NUMBER)[np.array(species) - 1] for species in SPECIES]
    occupancies[1][0, [7, 25]] = 0.3, 0.6  # vacancies are shares too
    cells = [dataclasses.replace(cell, occupancies=shares) for cell, shares in zip(cells, occupancies, strict=True)]
    packed = batch_of(cells, RADIUS, shapes=SHAPE)
    expected = raised(np.concatenate(occupancies), np.repeat(np.arange(3), [5, 2, 4]), LARGEST)
    actual = np.asarray(rarity(packed.occupancies, packed, LARGEST))
    np.testing.assert_allclose(actual[atom_places(packed)], expected, rtol=1e-5)


def test_gradients_of_rare_elements_are_raised_and_predictions_unchanged():
    """The gradient of each row of the embedding is multiplied, all others and all predictions stay what they are."""
    packed = batch_of(composed(*SPECIES), RADIUS, shapes=SHAPE)
    plain, scaled = (tiny_config(num_layers=1, model_dim=64, scale_grad=x, **CRYSTALFORMER) for x in (0.0, LARGEST))
    variables = random_variables(plain)
    expected_predictions, gradients, _ = evaluate(plain, variables, packed, True)
    predictions, raised_gradients, _ = evaluate(scaled, variables, packed, True)
    factors = np.ones(MAX_ATOMIC_NUMBER)
    species, crystal = np.concatenate(SPECIES), np.repeat(np.arange(3), [5, 2, 4])
    factors[species - 1] = raised(np.eye(MAX_ATOMIC_NUMBER)[species - 1], crystal, LARGEST)
    assert factors.max() == LARGEST and factors.min() < 0.7
    expected = factors[:, None] * gradients.pop("embedding")
    actual = raised_gradients.pop("embedding")
    assert np.abs(actual[species - 1]).max(axis=1).min() > 1e-3
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)
    for name, value in named_leaves(gradients).items():
        np.testing.assert_allclose(named_leaves(raised_gradients)[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    np.testing.assert_array_equal(predictions, expected_predictions)


# Precision


def equations(jaxpr):
    """All equations of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def products(jaxpr):
    """(types of the factors, type, precision) of all matrix products: of dense layers, and of lattice sums.

    Those of dense layers have no axis in common that is not summed over.
    """
    dense, batched = [], []
    for equation in equations(jaxpr.jaxpr):
        if equation.primitive.name == "dot_general":
            kind = batched if equation.params["dimension_numbers"][1][0] else dense
            factors = tuple(sorted({v.aval.dtype.name for v in equation.invars}))
            kind.append((factors, equation.outvars[0].aval.dtype.name, equation.params["precision"]))
    return dense, batched


HIGHEST = (jax.lax.Precision.HIGHEST,) * 2


def precise(precision, frame_method="max_static"):
    """A model of one block whose frames do not depend on rounding."""
    return tiny_config(frame_method=frame_method, num_layers=1, precision=precision)


@functools.cache
def evaluated(precision):
    """Predictions and gradients of the crystals by one model in some precision."""
    config = precise(precision)
    with jax.enable_x64(precision == "float64"):
        variables = random_variables(config, dtype=config.dtype)
        predictions, gradients, _ = evaluate(config, variables, batch(config.dtype))
        return np.asarray(predictions), jax.tree.map(np.asarray, gradients)


def initial_types(config):
    variables = jax.eval_shape(CrystalFramer(config).init, jax.random.key(0), batch(config.dtype))
    return {leaf.dtype.name for leaf in jax.tree.leaves(variables)}


def test_float64_is_float64_from_the_first_to_the_last_operation(x64):
    config = precise("float64", "max")
    assert initial_types(config) == {"float64"}
    variables = random_variables(config, dtype=np.float64)
    jaxpr = jax.make_jaxpr(evaluate, static_argnums=0)(config, variables, batch(np.float64)).jaxpr
    types = {v.aval.dtype.name for equation in equations(jaxpr) for v in equation.outvars if hasattr(v.aval, "dtype")}
    assert {name for name in types if "float" in name} == {"float64"}


def test_float64_is_close_to_float32():
    single, double = evaluated("float32")[0], evaluated("float64")[0]
    assert single.dtype == np.float32 and double.dtype == np.float64
    assert 0 < np.abs(single - double)[:3].max() < 1e-5


def test_bfloat16_is_that_of_the_dense_layers_of_blocks_alone():
    """The factors are rounded, the sums are not; the lattice sums have nothing of it, also on the way back."""
    config = precise("bfloat16", "max")
    variables = random_variables(config)
    dense, batched = products(jax.make_jaxpr(CrystalFramer(config).apply)(variables, batch()))
    assert dense.count((("bfloat16",), "float32", HIGHEST)) == 6  # q, k, v, out, linear1, linear2
    assert dense.count((("float32",), "float32", HIGHEST)) == 4  # embedding, pooling, dense_0, output
    assert len(dense) == 10
    assert len(batched) > 5
    _, and_back = products(jax.make_jaxpr(evaluate, static_argnums=0)(config, variables, batch()))
    assert len(and_back) > len(batched)
    assert set(batched + and_back) == {(("float32",), "float32", HIGHEST)}


@pytest.mark.parametrize("method", FRAME_METHODS)
def test_float32_products_never_run_in_tf32(method):
    config = precise("float32", method)
    jaxpr = jax.make_jaxpr(evaluate, static_argnums=0)(config, random_variables(config), batch())
    dense, batched = products(jaxpr)
    assert set(dense + batched) == {(("float32",), "float32", HIGHEST)}


def test_bfloat16_has_float32_parameters_and_predictions_close_to_those_of_float32():
    assert initial_types(precise("bfloat16")) == {"float32"}
    (expected, expected_gradients), (actual, gradients) = evaluated("float32"), evaluated("bfloat16")
    assert actual.dtype == np.float32
    assert 1e-4 < np.abs(actual - expected)[:3].max() < 0.03 * np.abs(expected[:3]).max()
    for name, gradient in named_leaves(gradients).items():
        exact = named_leaves(expected_gradients)[name]
        assert gradient.dtype == np.float32
        assert name.endswith("k/bias") or np.linalg.norm(gradient - exact) < 0.1 * np.linalg.norm(exact), name


# What is not finite


def test_an_atom_that_is_not_finite_spoils_its_own_crystal_alone():
    config = small_config()
    variables = random_variables(config)
    batch = batch_of([primitive(name) for name in ("rock salt", "fcc", "diamond")], 5.0)
    is_broken = (batch.crystal_of_atom == 1)[:, None, None]
    rows = rows_with(batch.rows, np.where(is_broken, np.nan, batch.rows.vector))
    batch = dataclasses.replace(batch, rows=rows)
    predictions = np.asarray(jax.jit(CrystalFramer(config).apply)(variables, batch))[:3, 0]
    np.testing.assert_array_equal(np.isnan(predictions), [False, True, False])
