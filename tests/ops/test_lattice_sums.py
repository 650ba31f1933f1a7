"""Lattice sums and framed attention against the float64 brute-force sum, and their gradient against two others.

The gradient is written by hand. It is compared with the one that JAX derives of a dense re-implementation, which
evaluates every Gaussian directly and knows neither blocks, factorised Gaussians nor reverse neighbors, and with finite
differences of the lattice sums themselves. Dropout is checked last.
"""

import dataclasses
import functools
from types import SimpleNamespace

import brute_force
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_sums import dense_sums
from support import atom_places, batch_of, random_crystal, random_rotation, rows_with

from crystalframer_jax.batching.shapes import BatchShape
from crystalframer_jax.model.attention import ValueEncoding, framed_attention
from crystalframer_jax.ops.basis import AngleBasis, Bases, DistanceBasis
from crystalframer_jax.ops.lattice_sums import SumOptions, lattice_sums
from crystalframer_jax.ops.random_bits import draw, row_seeds, seed_of, thinned

HEADS, K_DIM, V_DIM = 2, 6, 5
SIZES = (1, 12, 24)  # atoms: more than one block of 32 atoms, and padding atoms
VOLUMES_PER_ATOM = (24.0, 30.0, 50.0)  # Å^3: rows of different lengths, that of the one-atom cell the longest
SHAPE = BatchShape(64, 96, 4)

# Å. Exponents are below -0.5 / Å^2 here, so that what lies beyond has weights of exp(-32) and less.
RADIUS = 8.0
CONFIG = {
    "cos_abs": 0, "scale_real": [1.4],
    "value_pe_dist_real": 16, "value_pe_dist_max": -10.0, "value_pe_dist_wscale": 1.5,
    "value_pe_angle_real": 16, "value_pe_angle_wscale": 1.0,
}  # fmt: skip
DISTANCE = DistanceBasis(16, 14.0, 1.5)
ANGLE = AngleBasis(16, 1.0)
BASES = {
    "both": Bases(DISTANCE, ANGLE),
    "distances": Bases(DISTANCE, None),
    "angles": Bases(None, ANGLE),
    "neither": Bases(None, None),
    "moduli": Bases(None, dataclasses.replace(ANGLE, cos_abs=True)),
}
BRUTE_FORCE_TOLERANCE = {np.float32: 5e-6, np.float64: 1e-9}


@functools.cache
def crystals():
    """Three crystals without symmetry."""
    rng = np.random.default_rng(5)
    return [random_crystal(rng, size, volume) for size, volume in zip(SIZES, VOLUMES_PER_ATOM, strict=True)]


@functools.cache
def make_inputs(dtype):
    """Random q, k, v, a, frames for the batch of crystals; padding atoms have random numbers like all others."""
    batch = batch_of(crystals(), RADIUS, dtype, SHAPE)
    rng = np.random.default_rng(6)
    atoms = SHAPE.num_atoms
    arrays = SimpleNamespace(
        q=rng.normal(size=(atoms, HEADS, K_DIM)),
        k=rng.normal(size=(atoms, HEADS, K_DIM)),
        v=rng.normal(size=(atoms, HEADS, V_DIM)),
        a=-rng.uniform(0.5, 1.2, (atoms, HEADS)),
        frames=np.array([[random_rotation(rng) for _ in range(HEADS)] for _ in range(atoms)]),
    )
    arrays = SimpleNamespace(**{name: value.astype(dtype) for name, value in vars(arrays).items()})
    return SimpleNamespace(batch=batch, rows=batch.rows, **vars(arrays))


def frames_for(bases, inputs):
    return inputs.frames if bases.angle else None


@functools.partial(jax.jit, static_argnums=0)
def sums_and_gradients(options, q, k, v, a, rows, frames, seeds, cotangents):
    """lattice_sums, and the gradients of <sums, cotangents> with respect to q, k, v, a."""
    sums, pullback = jax.vjp(lambda *qkva: lattice_sums(options, *qkva, rows, frames, seeds), q, k, v, a)
    return sums, pullback(cotangents)


def evaluate(bases, inputs, dropout=0.0, seeds=None, **changes):
    """sums_and_gradients of the inputs, some of them changed, for the random cotangents that belong to the bases."""
    inputs = SimpleNamespace(**(vars(inputs) | changes))
    arrays = inputs.q, inputs.k, inputs.v, inputs.a, inputs.rows
    options, cotangents = SumOptions(bases, dropout=dropout), cotangents_of(bases, inputs)
    return sums_and_gradients(options, *arrays, frames_for(bases, inputs), seeds, cotangents)


def cotangents_of(bases, inputs):
    rng = np.random.default_rng(7)
    distances, angles = bases.sizes
    shapes = (inputs.v.shape[-1],), (distances,), (3, angles)
    return tuple(rng.normal(size=(*inputs.a.shape, *shape)).astype(inputs.a.dtype) for shape in shapes)


@functools.cache
def brute_force_sums(name):
    """Value, distance and angle sums of all real atoms, crystal after crystal, in float64."""
    inputs, places = make_inputs(np.float64), atom_places(make_inputs(np.float64).batch)
    bases = BASES[name]
    config = CONFIG | {"cos_abs": int(name == "moduli")}
    config |= {"value_pe_dist_real": bases.sizes[0]}
    parts = []
    for crystal, place in zip(crystals(), np.split(places, np.cumsum(SIZES)[:-1]), strict=True):
        arrays = [x[place] for x in (inputs.q, inputs.k, inputs.v, inputs.a)]
        frames = inputs.frames[place] if bases.angle else None
        sums = brute_force.lattice_sums(*arrays, crystal.positions, crystal.lattice, frames, config, RADIUS)
        parts.append(sums)
    return [np.concatenate(kind) for kind in zip(*parts, strict=True)]


def relative_error(actual, expected):
    return np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()


def test_setting_is_what_it_claims():
    """Several lengths of rows and two blocks of atoms, the second of them shorter, and padding."""
    count = make_inputs(np.float64).rows.count
    assert count[0] > 80 > count[1] > 64 > 48 > count[32]
    assert np.count_nonzero(count) == sum(SIZES) < SHAPE.num_atoms


def assert_sums_equal_brute_force(name, dtype):
    inputs = make_inputs(dtype)
    sums, _ = evaluate(BASES[name], inputs)
    places = atom_places(inputs.batch)
    for actual, expected in zip(sums, brute_force_sums(name), strict=True):
        assert actual.dtype == dtype
        assert actual[places].shape == expected.shape
        np.testing.assert_allclose(actual[places], expected, rtol=0, atol=BRUTE_FORCE_TOLERANCE[dtype])


@pytest.mark.parametrize("name", BASES)
def test_sums_equal_brute_force(name, x64):
    assert_sums_equal_brute_force(name, np.float64)


def test_sums_in_float32():
    assert_sums_equal_brute_force("both", np.float32)


@pytest.mark.parametrize("name", BASES)
def test_gradients_equal_those_of_dense_sums(name, x64):
    inputs, bases = make_inputs(np.float64), BASES[name]
    real = inputs.rows.count > 0

    @jax.jit
    def dense(*arrays):
        sums, pullback = jax.vjp(lambda *x: dense_sums(bases, *x, inputs.rows, frames_for(bases, inputs)), *arrays)
        return sums, pullback(cotangents_of(bases, inputs))

    sums, gradients = evaluate(bases, inputs)
    dense_values, dense_gradients = dense(inputs.q, inputs.k, inputs.v, inputs.a)
    for actual, expected in zip((*sums, *gradients), (*dense_values, *dense_gradients), strict=True):
        assert np.isfinite(actual).all()
        if expected.size:
            assert np.abs(expected[real]).max() > 1e-2
            assert relative_error(actual[real], expected[real]) < 1e-10


def assert_gradients_equal_finite_differences(inputs, **dropout):
    """Along random directions of q, k, v and a, one after the other."""
    bases = BASES["both"]
    cotangents = cotangents_of(bases, inputs)
    _, gradients = evaluate(bases, inputs, **dropout)
    rng = np.random.default_rng(8)
    step = 1e-5
    for name, gradient in zip("qkva", gradients, strict=True):
        value = getattr(inputs, name)
        for _ in range(3):
            direction = rng.normal(size=value.shape)
            ends = []
            for sign in (1, -1):
                sums, _ = evaluate(bases, inputs, **dropout, **{name: value + sign * step * direction})
                ends.append(sum(np.sum(s * c) for s, c in zip(sums, cotangents, strict=True)))
            difference = (ends[0] - ends[1]) / (2 * step)
            assert abs(difference - np.sum(gradient * direction)) < 1e-7 * np.linalg.norm(gradient)


def test_gradients_equal_finite_differences(x64):
    assert_gradients_equal_finite_differences(make_inputs(np.float64))


def test_gradients_in_float32():
    _, gradients = evaluate(BASES["both"], make_inputs(np.float32))
    with jax.enable_x64(True):
        _, expected = evaluate(BASES["both"], make_inputs(np.float64))
    for actual, exact in zip(gradients, expected, strict=True):
        assert actual.dtype == np.float32
        assert relative_error(actual, np.asarray(exact)) < 5e-6


def test_padding_has_no_influence_and_no_results(dtype):
    """What stands in padding atoms and columns changes no bit of the results of real atoms; its own are zero."""
    inputs, bases = make_inputs(dtype), BASES["both"]
    rng = np.random.default_rng(9)
    padding_atom = inputs.rows.count == 0
    padding_column = np.arange(SHAPE.row_length) >= inputs.rows.count[:, None]
    assert padding_atom.any()
    assert padding_column[~padding_atom].any()

    def scramble(array, where, values):
        array = np.array(array)
        array[where] = values(array[where].shape)
        return array

    def large(shape):
        return 100 * rng.normal(size=shape)

    rows = dataclasses.replace(
        inputs.rows,
        index=scramble(inputs.rows.index, padding_column, lambda shape: rng.integers(0, padding_atom.size, shape)),
        reverse=scramble(
            inputs.rows.reverse, padding_column, lambda shape: rng.integers(0, padding_column.size, shape)
        ),
    )
    scrambled = rows_with(rows, scramble(inputs.rows.vector, padding_column, large))
    square = np.where(padding_column, scrambled.square, inputs.rows.square)
    rows = dataclasses.replace(scrambled, square=square)
    changes = {name: scramble(getattr(inputs, name), padding_atom, large) for name in ("q", "k", "v")}
    changes["a"] = scramble(inputs.a, padding_atom, lambda shape: -rng.uniform(0, 10, shape))
    expected = jax.tree.leaves(evaluate(bases, inputs))
    scrambled = jax.tree.leaves(evaluate(bases, inputs, rows=rows, **changes))
    for before, after in zip(expected, scrambled, strict=True):
        np.testing.assert_array_equal(after, before)
        np.testing.assert_array_equal(after[padding_atom], 0)


def test_positions_and_frames_get_no_gradient():
    inputs, bases = jax.tree.map(jnp.asarray, vars(make_inputs(np.float32))), BASES["both"]
    inputs = SimpleNamespace(**inputs)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(vector, frames):
        rows = rows_with(inputs.rows, vector)
        sums = lattice_sums(SumOptions(bases), inputs.q, inputs.k, inputs.v, inputs.a, rows, frames)
        return sum(jnp.sum(s) for s in sums)

    of_positions, of_frames = gradients(inputs.rows.vector, inputs.frames)
    np.testing.assert_array_equal(of_positions, 0)
    np.testing.assert_array_equal(of_frames, 0)


# Framed attention: the projections of the sums


def encoding(name, dtype):
    """Random projections for bases, with coefficients other than 1."""
    rng = np.random.default_rng(10)
    bases = BASES[name]
    w_dist = rng.normal(size=(HEADS, V_DIM, 16)).astype(dtype)
    w_angle = rng.normal(size=(3, HEADS, V_DIM, 16)).astype(dtype)
    return ValueEncoding(w_dist if bases.distance else None, w_angle if bases.angle else None, bases, 1.5, 0.7)


@pytest.mark.parametrize("name", ["both", "distances"])
def test_attention_projects_the_brute_force_sums(name, x64):
    inputs, params = make_inputs(np.float64), encoding(name, np.float64)
    frames = frames_for(params.bases, inputs)
    actual = jax.jit(framed_attention)(inputs.q, inputs.k, inputs.v, inputs.a, inputs.rows, frames, params)
    values, distance_sum, angle_sum = brute_force_sums(name)
    expected = values
    if params.w_dist is not None:
        expected = expected + 1.5 * np.einsum("hvd,nhd->nhv", params.w_dist, distance_sum)
    for axis in range(3 if params.w_angle is not None else 0):
        expected = expected + 0.7 * np.einsum("hvd,nhd->nhv", params.w_angle[axis], angle_sum[:, :, axis])
    np.testing.assert_allclose(actual[atom_places(inputs.batch)], expected, rtol=0, atol=1e-8)


def test_unknown_implementation_is_an_error():
    inputs = make_inputs(np.float32)
    arrays = inputs.q, inputs.k, inputs.v, inputs.a, inputs.rows, inputs.frames
    with pytest.raises(ValueError, match=r"implementation='cuda'.*allowed"):
        framed_attention(*arrays, encoding("both", np.float32), implementation="cuda")


@pytest.mark.parametrize(("name", "with_frames"), [("both", False), ("distances", True)])
def test_frames_and_angle_basis_go_together(name, with_frames):
    inputs = make_inputs(np.float32)
    frames = inputs.frames if with_frames else None
    with pytest.raises(ValueError, match="frames"):
        framed_attention(inputs.q, inputs.k, inputs.v, inputs.a, inputs.rows, frames, encoding(name, np.float32))


# Dropout: pairs of atoms (i, j) are dropped from the sums of a head, after the softmax

DROPOUT = 0.3
NUMBER_OF_DRAWS = 100


def seeds_of(draw):
    """Random seeds [N, H] of lattice_sums."""
    return np.random.default_rng((11, draw)).integers(0, 2**32, (SHAPE.num_atoms, HEADS), dtype=np.uint32)


@functools.cache
def kept_factors(draws):
    """What the weights of all pairs (i, j) were multiplied with, [draws, N, H, N], and which pairs have a weight.

    v_j is the unit vector of atom j here, so that the sum over p v_j is the sum of the weights of all images of j.
    """
    inputs = make_inputs(np.float64)
    v = np.repeat(np.eye(SHAPE.num_atoms)[:, None], HEADS, axis=1)
    arrays = inputs.q, inputs.k, v, inputs.a, inputs.rows, None

    @jax.jit
    def weights(seeds):
        return lattice_sums(SumOptions(BASES["neither"], dropout=DROPOUT), *arrays, seeds)[0]

    every = np.asarray(weights(None))
    connected = every > 1e-25
    dropped = np.stack([weights(seeds_of(draw)) for draw in range(draws)])
    return np.where(connected, dropped, 0) / np.where(connected, every, 1), connected


def test_all_images_of_an_atom_are_dropped_together_or_kept_and_scaled(x64):
    factors, connected = kept_factors(NUMBER_OF_DRAWS)
    rows = make_inputs(np.float64).rows
    images = np.zeros(connected.shape[::2], int)
    for atom, count in enumerate(rows.count):
        np.add.at(images[atom], rows.index[atom, :count], 1)
    assert (connected == (images > 0)[:, None]).mean() > 0.999
    assert (images > 1).sum() > 500  # pairs of which a part could be dropped
    factors = factors[:, connected]
    kept = factors > 0
    np.testing.assert_allclose(factors[kept], 1 / (1 - DROPOUT), rtol=1e-9)
    np.testing.assert_array_equal(factors[~kept], 0)


def test_the_share_of_dropped_pairs_is_the_dropout(x64):
    factors, connected = kept_factors(NUMBER_OF_DRAWS)
    dropped = factors[:, connected] == 0
    error = (DROPOUT * (1 - DROPOUT) / dropped.size) ** 0.5
    assert abs(dropped.mean() - DROPOUT) < 4 * error < 0.01
    of_pair = (DROPOUT * (1 - DROPOUT) / NUMBER_OF_DRAWS) ** 0.5  # every pair has its turn
    assert np.abs(dropped.mean(axis=0) - DROPOUT).max() < 5 * of_pair


def test_pairs_heads_and_directions_are_dropped_independently(x64):
    """The shares at which two of them are dropped at once are products."""
    factors, connected = kept_factors(NUMBER_OF_DRAWS)
    dropped, connected = factors == 0, connected.all(axis=1)
    i, j = np.nonzero(connected & ~np.eye(SHAPE.num_atoms, dtype=bool))
    other = np.roll(j, 1)
    neighbors = i == np.roll(i, 1)  # j and other are of the same row
    partners = {
        "other head": (dropped[:, i, 0, j], dropped[:, i, 1, j]),
        "back": (dropped[:, i, 0, j], dropped[:, j, 0, i]),
        "other atom j": (dropped[:, i, 0, j][:, neighbors], dropped[:, i, 0, other][:, neighbors]),
        "other draw": (dropped[:-1, i, 0, j], dropped[1:, i, 0, j]),
    }
    for name, (first, second) in partners.items():
        error = (DROPOUT**2 * (1 - DROPOUT**2) / first.size) ** 0.5
        assert abs((first & second).mean() - DROPOUT**2) < 5 * error < 0.01, name


def test_sums_and_gradients_with_dropout_equal_those_of_dense_sums(x64):
    """All three sums lose the same pairs, and the softmax is that of all neighbors."""
    inputs, bases = make_inputs(np.float64), BASES["both"]
    kept = kept_factors(NUMBER_OF_DRAWS)[0][0]
    real = inputs.rows.count > 0

    @jax.jit
    def dense(*qkva):
        frames = frames_for(bases, inputs)
        sums, pullback = jax.vjp(lambda *x: dense_sums(bases, *x, inputs.rows, frames, kept), *qkva)
        return sums, pullback(cotangents_of(bases, inputs))

    actual = jax.tree.leaves(evaluate(bases, inputs, DROPOUT, seeds_of(0)))
    undropped = jax.tree.leaves(evaluate(bases, inputs))
    expected = jax.tree.leaves(dense(inputs.q, inputs.k, inputs.v, inputs.a))
    for with_dropout, dense_value, without in zip(actual, expected, undropped, strict=True):
        if dense_value.size:
            assert relative_error(with_dropout[real], dense_value[real]) < 1e-10
            assert relative_error(without[real], dense_value[real]) > 0.1
        np.testing.assert_array_equal(with_dropout[~real], 0)


def test_what_is_dropped_does_not_depend_on_the_places_in_a_batch(dtype):
    """Seeds and pairs of the same crystals, which stand in another order and are cut into other blocks."""
    first, second = (random_crystal(np.random.default_rng(seed), 7) for seed in (31, 32))
    shares = []
    for crystals, places in (([first, second], [4, 9]), ([second, first], [9, 4])):
        batch = batch_of(crystals, 4.0, dtype)
        of_crystals = draw(seed_of(3), np.array([*places, 0, 0])[: len(batch.crystal_sizes)])
        seeds = row_seeds(of_crystals, batch.crystal_of_atom, batch.atom_in_crystal, 2)
        assert seeds.dtype == np.uint32
        q, k, v = np.ones((3, len(batch.species), 2, 4), dtype)
        a = np.full((len(batch.species), 2), -0.2, dtype)
        values = lattice_sums(SumOptions(BASES["neither"], dropout=0.4), q, k, v, a, batch.rows, None, seeds)[0]
        order = np.lexsort((batch.atom_in_crystal, np.array([*places, 99, 99])[batch.crystal_of_atom]))[:14]
        shares.append(np.asarray(values)[order])
        dropped = np.asarray(thinned(np.ones((len(batch.species), 64), dtype), seeds[:, :1], 0.4))[order]
        assert np.mean(dropped == 0) == pytest.approx(0.4, abs=0.05) and dropped.mean() == pytest.approx(1, abs=0.1)
    np.testing.assert_allclose(*shares, rtol=1e-5)
    assert shares[0].std() > 0.01


def test_gradients_with_dropout_equal_finite_differences(x64):
    assert_gradients_equal_finite_differences(make_inputs(np.float64), dropout=DROPOUT, seeds=seeds_of(0))


def test_mean_over_many_draws_approaches_the_sums_without_dropout(x64):
    inputs, bases, draws = make_inputs(np.float64), BASES["both"], 400
    arrays = inputs.q, inputs.k, inputs.v, inputs.a, inputs.rows, inputs.frames
    options = SumOptions(bases, dropout=DROPOUT)
    all_sums = jax.jit(lambda seeds: jax.lax.map(lambda one: lattice_sums(options, *arrays, one), seeds))(
        np.stack([seeds_of(draw) for draw in range(draws)])
    )
    real = inputs.rows.count > 0
    for drawn, expected in zip(all_sums, evaluate(bases, inputs)[0], strict=True):
        drawn, expected = np.asarray(drawn)[:, real], np.asarray(expected)[real]
        varies = drawn.std(axis=0) > 1e-3
        assert varies.mean() > 0.3  # far distances never count
        deviations = (drawn.mean(axis=0) - expected)[varies] / (drawn.std(axis=0)[varies] / draws**0.5)
        assert np.abs(deviations).max() < 5
        assert np.sqrt(np.mean(deviations**2)) < 1.1


def test_without_seeds_nothing_is_dropped():
    inputs = make_inputs(np.float32)
    arrays = inputs.q, inputs.k, inputs.v, inputs.a, inputs.rows, None
    expected = lattice_sums(SumOptions(BASES["neither"]), *arrays)
    for dropout, seeds in ((DROPOUT, None), (0.0, seeds_of(0))):
        actual = lattice_sums(SumOptions(BASES["neither"], dropout=dropout), *arrays, seeds)
        jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_attention_passes_dropout_on(x64):
    """framed_attention drops what lattice_sums drops with the same seeds."""
    inputs, params = make_inputs(np.float64), encoding("both", np.float64)
    arrays = inputs.q, inputs.k, inputs.v, inputs.a, inputs.rows, inputs.frames
    actual = framed_attention(*arrays, params, dropout=DROPOUT, seeds=seeds_of(0))
    values, distance_sum, angle_sum = evaluate(BASES["both"], inputs, DROPOUT, seeds_of(0))[0]
    expected = values + 1.5 * np.einsum("hvd,nhd->nhv", params.w_dist, distance_sum)
    expected += 0.7 * np.einsum("ahvd,nhad->nhv", params.w_angle, angle_sum)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)
