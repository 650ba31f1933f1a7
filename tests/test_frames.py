"""Max frames against the brute-force search, and the choice among equally good neighbors."""

import functools

import brute_force
import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import chi2
from support import atom_places, batch_of, primitive, random_crystal, random_variables, small_config

from crystalframer_jax.batch import BatchShape, Rows
from crystalframer_jax.model.frames import max_frames, row_seeds
from crystalframer_jax.model.regressor import CrystalFramer

HEADS, K_DIM = 4, 6
TIE_TOLERANCE = 1e-4
SIZES = (1, 6, 12)
SHAPE = BatchShape(32, 64, 4)
RADIUS = 6.0  # Å

compiled_frames = jax.jit(max_frames)
compiled_seeds = jax.jit(row_seeds, static_argnums=3)


@functools.cache
def crystals():
    """Crystals without symmetry but for the first: an atom alone in its cell has neighbors in pairs, +u and -u.

    Of these the first image is taken, in canonical order and in the brute-force search.
    """
    rng = np.random.default_rng(11)
    return [random_crystal(rng, size) for size in SIZES]


def make_inputs(batch, dtype=np.float32):
    """q, k and a, random for each real atom and independent of its place in the batch."""
    places = atom_places(batch)
    rng = np.random.default_rng(12)
    values = []
    for shape in (HEADS, K_DIM), (HEADS, K_DIM), (HEADS,):
        value = np.zeros((len(batch.species), *shape), dtype)
        value[places] = rng.normal(size=(len(places), *shape))
        values.append(value)
    q, k, a = values
    return q, k, -0.25 * np.exp(0.2 * a)


# Frames of crystals without symmetry


def test_frames_equal_brute_force(dtype):
    batch = batch_of(crystals(), RADIUS, dtype, SHAPE)
    q, k, a = make_inputs(batch, dtype)
    frames = compiled_frames(q, k, a, batch.rows, TIE_TOLERANCE)
    assert frames.dtype == dtype
    places = np.split(atom_places(batch), np.cumsum(SIZES)[:-1])
    for crystal, place in zip(crystals(), places, strict=True):
        expected = brute_force.max_frames(q[place], k[place], a[place], crystal.positions, crystal.lattice, RADIUS)
        np.testing.assert_allclose(frames[place], expected, rtol=0, atol=1e-12 if dtype == np.float64 else 2e-6)


def test_frames_are_orthonormal_and_right_handed(dtype):
    batch = batch_of(crystals(), RADIUS, dtype, SHAPE)
    frames = compiled_frames(*make_inputs(batch, dtype), batch.rows, TIE_TOLERANCE)[atom_places(batch)]
    tolerance = 1e-12 if dtype == np.float64 else 1e-6
    np.testing.assert_allclose(
        frames @ frames.swapaxes(-1, -2), np.broadcast_to(np.eye(3), frames.shape), atol=tolerance
    )
    np.testing.assert_allclose(np.linalg.det(frames), 1, atol=tolerance)


def test_without_ties_nothing_is_drawn():
    batch = batch_of(crystals()[1:], RADIUS, shapes=SHAPE)
    inputs = make_inputs(batch)
    frames = compiled_frames(*inputs, batch.rows, TIE_TOLERANCE)
    for seed in range(3):
        drawn = compiled_frames(*inputs, batch.rows, TIE_TOLERANCE, seeds_of(jax.random.key(seed), batch))
        np.testing.assert_array_equal(drawn, frames)


def test_frames_get_no_gradient():
    batch = batch_of(crystals(), RADIUS, shapes=SHAPE)

    @jax.jit
    def gradients(q, k, a):
        return jax.grad(lambda x: jnp.sum(max_frames(*x, batch.rows, TIE_TOLERANCE) ** 3))((q, k, a))

    batch = jax.tree.map(jnp.asarray, batch)
    for gradient in gradients(*make_inputs(batch)):
        np.testing.assert_array_equal(gradient, 0)


def test_padding_and_atoms_without_neighbors_give_finite_frames():
    """Rows with nothing but the atom itself, and with neighbors on one line, which `neighbor_rows` never makes."""
    vector = np.zeros((4, 48, 3), np.float32)
    vector[1, 1:3] = [[2, 0, 0], [-2, 0, 0]]
    count = np.array([1, 3, 0, 0], np.int32)
    index = np.zeros((4, 48), np.int32)
    rows = Rows(index, vector, index, count)
    q = k = np.ones((4, HEADS, K_DIM), np.float32)
    a = np.full((4, HEADS), -0.25, np.float32)
    seeds = np.arange(4 * HEADS, dtype=np.uint32).reshape(4, HEADS)
    for choice in (None, seeds):
        frames = compiled_frames(q, k, a, rows, TIE_TOLERANCE, choice)
        assert np.isfinite(frames).all()
        np.testing.assert_array_equal(np.abs(frames[1, :, 0]), np.tile([1, 0, 0], (HEADS, 1)))
        np.testing.assert_array_equal(frames[2:], 0)


# Ties


def seeds_of(key, batch, heads=HEADS):
    return compiled_seeds(key, batch.crystal_of_atom, batch.atom_in_crystal, heads)


def rock_salt():
    """Rock salt packed alone, with queries and keys that make its 6 nearest neighbors the best ones."""
    batch = batch_of([primitive("rock salt")], 5.0, shapes=BatchShape(32, 48, 1))
    return batch, place_of(batch, 0)


def place_of(batch, atom):
    return atom_places(batch)[atom]


def ties(batch, draws=1):
    """q, k, a for which all atoms are alike, so that the nearest neighbors are tied."""
    atoms = len(batch.species)
    q, k = (np.ones((atoms, draws, 1), np.float32) for _ in range(2))
    return q, k, np.full((atoms, draws), -0.25, np.float32)


def first_two_axes(frames):
    """Number of the Cartesian direction +x, -x, +y, -y, +z, -z of e1 and e2; [..., 2]."""
    directions = np.kron(np.eye(3), [[1], [-1]])
    cosine = np.einsum("...ed,cd->...ec", frames[..., :2, :], directions)
    np.testing.assert_allclose(cosine.max(axis=-1), 1, atol=1e-6)
    return cosine.argmax(axis=-1)


def assert_uniform(counts):
    """Chi-square test; a uniform distribution fails it once in a million times."""
    expected = counts.sum() / len(counts)
    statistic = np.sum((counts - expected) ** 2) / expected
    assert statistic < chi2.isf(1e-6, len(counts) - 1), counts


def test_evaluation_takes_the_first_in_canonical_order():
    batch, atom = rock_salt()
    frames = compiled_frames(*ties(batch), batch.rows, TIE_TOLERANCE)
    unit = batch.rows.vector[atom, 1:7] / 2.82  # the shell of nearest neighbors follows the atom itself
    e1 = unit[0]
    e2 = next(u for u in unit if abs(u @ e1) < 0.5)
    np.testing.assert_allclose(frames[atom, 0], [e1, e2, np.cross(e1, e2)], atol=1e-6)
    np.testing.assert_array_equal(compiled_frames(*ties(batch), batch.rows, TIE_TOLERANCE), frames)


def test_evaluation_takes_the_first_also_where_rounding_makes_another_the_best():
    batch, atom = rock_salt()
    expected = compiled_frames(*ties(batch), batch.rows, TIE_TOLERANCE)
    batch.rows.vector[atom, 2:7] *= 1 - 1e-5  # nearer: their logits are larger by 4e-5
    frames = compiled_frames(*ties(batch), batch.rows, TIE_TOLERANCE)
    np.testing.assert_allclose(frames[atom], expected[atom], atol=1e-6)


def test_training_draws_uniformly_among_ties():
    """e1 among 6 neighbors, and e2 among the 4 perpendicular to it, for each of the two atoms."""
    batch, _ = rock_salt()
    draws = 2400
    frames = compiled_frames(*ties(batch, draws), batch.rows, TIE_TOLERANCE, seeds_of(jax.random.key(0), batch, draws))
    chosen = [first_two_axes(frames[place]) for place in atom_places(batch)]
    for e1, e2 in (axes.T for axes in chosen):
        assert_uniform(np.bincount(e1, minlength=6))
        pairs = np.bincount(6 * e1 + e2, minlength=36).reshape(6, 6)
        assert_uniform(pairs[np.arange(6)[:, None] // 2 != np.arange(6) // 2])  # 24 pairs of different axes
    # The two atoms draw independently of each other.
    assert_uniform(np.bincount(6 * chosen[0][:, 0] + chosen[1][:, 0], minlength=36))


def test_successive_keys_draw_uniformly():
    """The draws of one atom and head over the steps of a training."""
    batch, atom = rock_salt()
    key = jax.random.key(1)
    steps = jax.vmap(lambda step: row_seeds(jax.random.fold_in(key, step), *identity(batch), 1)[:, 0])
    seeds = jax.jit(steps)(jnp.arange(2400)).T  # one column for each step
    frames = compiled_frames(*ties(batch, 2400), batch.rows, TIE_TOLERANCE, seeds)
    e1 = first_two_axes(frames[atom])[:, 0]
    assert_uniform(np.bincount(e1, minlength=6))
    assert_uniform(np.bincount(6 * e1[:-1] + e1[1:], minlength=36))  # nor do successive steps depend on each other


def identity(batch):
    return batch.crystal_of_atom, batch.atom_in_crystal


def test_only_neighbors_within_the_tolerance_are_ties():
    """Keys that set three of the six neighbors apart by more than the tolerance leave three to draw from."""
    batch, atom = rock_salt()
    batch.rows.vector[atom, 1:4] *= 1.0005  # 0.25 * 2.82^2 * 0.001 = 2e-3 less
    draws = 2400
    frames = compiled_frames(*ties(batch, draws), batch.rows, TIE_TOLERANCE, seeds_of(jax.random.key(2), batch, draws))
    counts = np.bincount(first_two_axes(frames[atom])[:, 0], minlength=6)
    assert np.count_nonzero(counts) == 3
    assert_uniform(counts[counts > 0])


def test_draws_depend_on_nothing_but_key_crystal_and_atom():
    """Other padding, and other crystals behind the first ones, change no draw."""
    first = [primitive("rock salt"), primitive("hcp")]
    shapes = BatchShape(32, 48, 2), BatchShape(64, 64, 5)
    others = [[], [primitive("fcc"), crystals()[1]]]
    key = jax.random.key(3)
    drawn = []
    for shape, added in zip(shapes, others, strict=True):
        batch = batch_of(first + added, 5.0, shapes=shape)
        frames = compiled_frames(*ties(batch, HEADS), batch.rows, TIE_TOLERANCE, seeds_of(key, batch))
        drawn.append(frames[atom_places(batch)[:4]])
    np.testing.assert_array_equal(drawn[0], drawn[1])


def test_seeds_differ_between_keys_crystals_atoms_and_heads():
    batch = batch_of([primitive("rock salt"), primitive("hcp")], 5.0, shapes=BatchShape(32, 48, 2))
    seeds = [seeds_of(jax.random.key(seed), batch)[atom_places(batch)] for seed in range(2)]
    assert len(np.unique(seeds)) == 2 * 4 * HEADS


def test_blocks_of_the_model_draw_independently():
    """The key of a step serves all blocks: they must not all choose the same neighbor."""
    config = small_config(head_num=8)
    batch, _ = rock_salt()
    variables = random_variables(config)
    for block in range(config.num_layers):  # without queries the nearest neighbors are the best for every block
        query = variables["params"][f"block_{block}"]["attention"]["q"]
        query["kernel"], query["bias"] = 0 * query["kernel"], 0 * query["bias"]
    apply = jax.jit(functools.partial(CrystalFramer(config).apply, mutable=["intermediates"]))
    _, state = apply(variables, batch, jax.random.key(4))
    blocks = [state["intermediates"][f"block_{block}"]["attention"]["frames"][0] for block in range(config.num_layers)]
    first, second = (first_two_axes(frames[atom_places(batch)])[..., 0] for frames in blocks)
    assert np.mean(first == second) < 0.5  # of 2 atoms and 8 heads, each with 6 neighbors to choose from
