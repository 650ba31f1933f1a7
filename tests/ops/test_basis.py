"""Distance and angle Gaussians, and the factorised sums over them, against plain float64 numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crystalframer_jax.ops.basis import AngleBasis, Bases, DistanceBasis

# Number of Gaussians and their width in spacings. 64 of width 1 are as narrow as they get: the factors have the
# largest exponents, and few divide into groups. 7 and 11 are prime: one group, and no group at all.
SIZES = [(64, 4.0), (16, 1.0), (64, 1.0), (10, 1.0), (7, 1.0), (11, 0.5)]

# Relative to the largest result. In float32 a Gaussian is the product of factors with exponents up to 40, whose own
# rounding (40 * 2^-24 = 2.4e-6) is the error that remains.
TOLERANCE = {np.float32: 3e-6, np.float64: 1e-12}


SHAPE = (5, 2, 3, 30)  # atoms, heads, axes, neighbors: the same everywhere, so that each basis compiles once


@functools.partial(jax.jit, static_argnums=0)
def both(basis, cosine, weights, coefficients):
    """weighted_sum and combination."""
    argument = basis.argument(cosine)
    return basis.weighted_sum(argument, weights), basis.combination(argument, coefficients)


def weighted_sum(basis, cosine, weights):
    return both(basis, cosine, weights, np.zeros((*SHAPE[:-1], basis.size), cosine.dtype))[0]


def combination(basis, cosine, coefficients):
    return both(basis, cosine, np.zeros(SHAPE, cosine.dtype), coefficients)[1]


@pytest.fixture(params=SIZES, ids=[f"{size}-width{width:g}" for size, width in SIZES])
def size_and_width(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["cosine", "modulus"])
def basis(request, size_and_width):
    return AngleBasis(*size_and_width, cos_abs=request.param)


def gaussians(basis, cosine):
    """[..., D] Gaussians of the definition, float64."""
    centers = np.linspace(0 if basis.cos_abs else -1, 1, basis.size)
    sigma = basis.width_scale * (centers[1] - centers[0])
    argument = np.abs(cosine) if basis.cos_abs else cosine
    return np.exp(-0.5 * ((argument.astype(np.float64)[..., None] - centers) / sigma) ** 2)


def random_cosines(rng, dtype):
    """Cosines over the whole range, both ends included."""
    cosine = rng.uniform(-1, 1, SHAPE).astype(dtype)
    cosine[..., 0], cosine[..., 1], cosine[..., 2] = 1, -1, 0
    return cosine


def assert_close(actual, expected, dtype):
    assert actual.dtype == dtype
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE[dtype] * np.abs(expected).max())


def test_weighted_sum_is_the_sum_of_weighted_gaussians(basis, dtype):
    rng = np.random.default_rng(0)
    cosine = random_cosines(rng, dtype)
    weights = rng.dirichlet(np.ones(SHAPE[-1]), SHAPE[:-1]).astype(dtype)
    expected = np.einsum("...m,...mt->...t", weights.astype(np.float64), gaussians(basis, cosine))
    assert_close(weighted_sum(basis, cosine, weights), expected, dtype)


def test_every_single_gaussian_is_accurate(basis, dtype):
    """Each of 30 rows sees one neighbor alone, so that no error hides behind a larger Gaussian of another one."""
    cosine = np.broadcast_to(np.linspace(-1, 1, 30), SHAPE).astype(dtype)
    alone = np.eye(30, dtype=dtype).reshape(SHAPE)
    expected = gaussians(basis, cosine[0, 0, 0]).reshape(*SHAPE[:-1], basis.size)
    assert_close(weighted_sum(basis, cosine, alone), expected, dtype)


def test_combination_is_the_sum_of_gaussians_with_coefficients(basis, dtype):
    rng = np.random.default_rng(1)
    cosine = random_cosines(rng, dtype)
    coefficients = rng.normal(size=(*SHAPE[:-1], basis.size)).astype(dtype)
    expected = np.einsum("...et,...emt->...m", coefficients.astype(np.float64), gaussians(basis, cosine))
    assert_close(combination(basis, cosine, coefficients), expected, dtype)


def test_combination_is_the_transpose_of_weighted_sum(basis, x64):
    """<weighted_sum(w), g> = <w, combination(g)>, which is what the backward pass takes it for."""
    rng = np.random.default_rng(2)
    cosine = random_cosines(rng, np.float64)
    weights, coefficients = rng.normal(size=(5, 2, 1, 30)), rng.normal(size=(*SHAPE[:-1], basis.size))
    sums = weighted_sum(basis, cosine, np.broadcast_to(weights, cosine.shape).copy())
    back = combination(basis, cosine, coefficients)
    np.testing.assert_allclose(np.sum(sums * coefficients), np.sum(weights[:, :, 0] * back), rtol=1e-12)


def test_no_infinity_at_the_ends(basis):
    """Cosines of rounded unit vectors leave [-1, 1] by a few rounding errors."""
    cosine = np.broadcast_to(np.resize([-1, 1, -1 - 1e-6, 1 + 1e-6], SHAPE[-1]), SHAPE).astype(np.float32)
    sums, values = both(basis, cosine, np.ones_like(cosine), np.ones((*SHAPE[:-1], basis.size), np.float32))
    assert np.isfinite(sums).all()
    assert np.isfinite(values).all()
    assert np.max(values) < 3 * basis.size + 1  # each Gaussian is at most 1


@pytest.mark.parametrize(("size", "width"), [(64, 4.0), (16, 1.0)])
def test_published_bases_are_summed_in_groups_of_eight(size, width):
    """The cost depends on it: 16 exponentials for 64 Gaussians, 10 for 16."""
    assert AngleBasis(size, width).group_size == 8


def test_group_size_divides_and_keeps_the_exponents_small(basis):
    assert basis.size % basis.group_size == 0
    spacing = basis.centers[1] - basis.centers[0]
    sharpness = 0.5 / (basis.width_scale * spacing) ** 2
    half_range = 0.5 * np.ptp(basis.centers)
    assert 2 * sharpness * half_range * 0.5 * (basis.group_size - 1) * spacing < 60


@pytest.mark.parametrize(("size", "r_max", "width"), [(64, 14.0, 1.0), (10, 5.0, 2.0)])
def test_distance_basis(size, r_max, width, dtype):
    distance = np.linspace(0, 20, 301).astype(dtype).reshape(7, 43)
    centers = r_max / size * np.arange(1, size + 1)  # the last one at r_max, none at 0
    expected = np.exp(-((distance[..., None].astype(np.float64) - centers) ** 2) / (2 * (width * r_max / size) ** 2))
    assert_close(DistanceBasis(size, r_max, width)(jnp.asarray(distance)), expected, dtype)


def test_sizes_of_bases():
    distance, angle = DistanceBasis(64, 14.0, 1.0), AngleBasis(16, 1.0)
    assert Bases(distance, angle).sizes == (64, 16)
    assert Bases(distance, None).sizes == (64, 0)
    assert Bases(None, angle).sizes == (0, 16)


def test_bases_are_static_arguments():
    """Equal bases are one compiled program: they hash and compare by value, also after use."""
    basis, twin = AngleBasis(16, 1.0), AngleBasis(16, 1.0)
    jax.block_until_ready(basis.weighted_sum(jnp.zeros((1, 2)), jnp.ones((1, 2))))
    assert hash(basis) == hash(twin)
    assert basis == twin
