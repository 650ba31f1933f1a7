"""The product of bfloat16 factors and its gradients: their rounding, and no other types in the programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import random_variables
from test_regressor import HIGHEST, equations, precise, products
from tiny_models import batch, evaluate

from crystalframer_jax.model.layers import rounded_product

UNIT = 2.0**-9  # the largest relative error of rounding a number to bfloat16
N, D, WIDTH = 60, 48, 40


def rounded(x: np.ndarray) -> np.ndarray:
    """Float64 numbers as bfloat16 has them."""
    return x.astype(np.float32).astype(jnp.bfloat16).astype(np.float64)


@pytest.fixture(scope="module")
def computed():
    """{name: (result or gradient, its two factors in float64)} of x W for a random gradient of the result."""
    rng = np.random.default_rng(11)
    x, w, g = (rng.normal(size=shape).astype(np.float32) for shape in ((N, D), (D, WIDTH), (N, WIDTH)))
    product, pull_back = jax.vjp(rounded_product, x, w)
    of_x, of_w = pull_back(g)
    x, w, g = (factor.astype(np.float64) for factor in (x, w, g))
    return {"product": (product, x, w), "gradient of x": (of_x, g, w.T), "gradient of W": (of_w, x.T, g)}


@pytest.mark.parametrize("name", ["product", "gradient of x", "gradient of W"])
def test_both_factors_are_rounded_and_nothing_else(computed, name):
    actual, left, right = computed[name]
    assert actual.dtype == np.float32
    sizes = np.abs(left) @ np.abs(right)
    assert np.all(np.abs(actual - rounded(left) @ rounded(right)) <= left.shape[1] * 2.0**-24 * 1.01 * sizes)
    error = np.abs(actual - left @ right)
    assert np.all(error <= (2.01 * UNIT + left.shape[1] * 2.0**-24) * sizes)
    assert np.max(error / sizes) > UNIT / 10


def test_all_products_of_the_blocks_have_bfloat16_factors_on_the_way_back_too():
    """Three for each dense layer of the block: forward, gradient of x, gradient of W."""
    config = precise("bfloat16")
    dense, batched = products(jax.make_jaxpr(evaluate, static_argnums=0)(config, random_variables(config), batch()))
    assert dense.count((("bfloat16",), "float32", HIGHEST)) == 3 * 6  # q, k, v, out, linear1, linear2
    others = 2 + 2 + 3 + 3  # embedding and pooling, with one gradient each, and two layers of the head
    assert dense.count((("float32",), "float32", HIGHEST)) == others
    assert len(dense) == 3 * 6 + others
    assert {factors for factors, *_ in batched} == {("float32",)}


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_programs_of_other_precisions_have_no_bfloat16(precision):
    config = precise(precision)
    with jax.enable_x64(precision == "float64"):
        variables = random_variables(config, dtype=config.dtype)
        jaxpr = jax.make_jaxpr(evaluate, static_argnums=0)(config, variables, batch(config.dtype))
    types = {v.aval.dtype.name for e in equations(jaxpr.jaxpr) for v in e.outvars if hasattr(v.aval, "dtype")}
    assert precision in types and "bfloat16" not in types
