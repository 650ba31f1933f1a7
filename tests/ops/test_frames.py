"""Frames by every method against the brute-force search; the choice among equally good ones is in test_ties.py."""

import dataclasses
import functools

import brute_force_frames
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import atom_places, batch_of, primitive, random_crystal, random_rotation, rotated, rows_from

from crystalframer_jax.batching.shapes import BatchShape
from crystalframer_jax.config import BatchParts
from crystalframer_jax.model.frames import block_frames
from crystalframer_jax.ops.frames import METHODS
from crystalframer_jax.ops.random_bits import draw, row_seeds, seed_of
from crystalframer_jax.structures.crystal import Crystal
from crystalframer_jax.structures.lattice import lattice_frames

HEADS, K_DIM = 3, 6
TIE_TOLERANCE = 1e-4
# Å. The reference sums to the end of the lattice images; beyond 8 Å, with the exponents of `make_inputs`, the weight is
# below exp(-0.5 * (64 - 12)) = 5e-12 of that of a neighbor at 3.5 Å.
RADIUS = 8.0
VOLUME = 60.0  # Å^3 per atom: short rows, which compile faster
SHAPE = BatchShape(64, 64, 8)  # one crystal and several atoms of padding
OTHER_SHAPE = BatchShape(96, 80, 7)
PARTS = BatchParts(lattice_frames=True, scatter=True)
PRINCIPAL = ("weighted_pca", "pca")  # eigenvectors, whose signs are free
PROPER = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])  # signs that keep the right hand

# float32 as users run it; float64 is there for the mathematics and compiles in half the time without optimisation.
compiled = {
    np.float32: jax.jit(block_frames, static_argnums=0),
    np.float64: jax.jit(block_frames, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0}),
}


def frames_of(method, batch, seeds=None, dtype=np.float32):
    return np.asarray(compiled[dtype](method, *make_inputs(batch, dtype), batch, TIE_TOLERANCE, seeds))


def seeds_of(seed, batch, heads=HEADS):
    seeds = draw(seed_of(seed), np.arange(len(batch.crystal_sizes)))
    return row_seeds(seeds, batch.crystal_of_atom, batch.atom_in_crystal, heads)


def make_inputs(batch, dtype=np.float32):
    """q, k and a (-0.7 to -0.5 / Å^2), random for each real atom and independent of its place in the batch."""
    places = atom_places(batch)
    rng = np.random.default_rng(12)
    q, k, a = (np.zeros((len(batch.species), *shape), dtype) for shape in ((HEADS, K_DIM), (HEADS, K_DIM), (HEADS,)))
    q[places], k[places] = rng.normal(size=(2, len(places), HEADS, K_DIM))
    a[places] = -rng.uniform(0.5, 0.7, (len(places), HEADS))
    return q, k, a


# Crystals without symmetry. An atom has its own images in pairs, +v and -v, which may be the best neighbors.


def recelled(crystal, change):
    """The same crystal in the cell of the lattice vectors `change` @ lattice; |det(change)| is 1."""
    return dataclasses.replace(crystal, lattice=np.array(change) @ crystal.lattice)


def stretched(crystal, factors):
    return dataclasses.replace(
        crystal, positions=crystal.positions * factors, lattice=crystal.lattice * np.array(factors)
    )


@functools.cache
def crystals():
    rng = np.random.default_rng(11)
    ordinary = [random_crystal(rng, size, VOLUME) for size in (1, 2, 6, 12)]
    left_handed = random_crystal(rng, 5, VOLUME)
    left_handed = recelled(left_handed, np.diag([1, 1, -np.sign(np.linalg.det(left_handed.lattice))]))
    flat = stretched(random_crystal(rng, 4, VOLUME), [2.0, 2.0, 0.4])
    skewed = recelled(random_crystal(rng, 3, VOLUME), [[1, 3, 0], [0, 1, -2], [0, 0, 1]])
    return [*ordinary, left_handed, flat, skewed]


@functools.cache
def batch_without_symmetry(dtype):
    return batch_of(crystals(), RADIUS, dtype, SHAPE, parts=PARTS)


def by_crystal(batch):
    """Places in the batch of the atoms of each crystal."""
    return np.split(atom_places(batch), np.cumsum([crystal.num_atoms for crystal in crystals()])[:-1])


@functools.cache
def expected_frames(method):
    """[N, H, 3, 3] of the brute-force search in float64; zeros for padding."""
    batch = batch_without_symmetry(np.float64)
    q, k, a = make_inputs(batch, np.float64)
    frames = np.zeros((len(batch.species), HEADS, 3, 3))
    for crystal, place in zip(crystals(), by_crystal(batch), strict=True):
        inputs = q[place], k[place], a[place], crystal.positions, crystal.lattice
        frames[place] = brute_force_frames.frames(method, *inputs, RADIUS)
    return frames


@functools.cache
def gaps(method):
    """Smallest difference of the eigenvalues behind the expected frames over their sum, [N, H]; 0 for padding."""
    batch = batch_without_symmetry(np.float64)
    q, k, a = make_inputs(batch, np.float64)
    values = np.zeros((len(batch.species), HEADS, 3))
    for crystal, place in zip(crystals(), by_crystal(batch), strict=True):
        positions = crystal.positions
        if method == "pca":
            values[place] = np.linalg.eigvalsh(np.cov(positions.T)) if crystal.num_atoms > 1 else 0
            continue
        shifts = brute_force_frames.image_shifts(positions, crystal.lattice, RADIUS)
        for i, at in enumerate(place):
            distance, direction = brute_force_frames.neighbors(i, positions, shifts)
            for h in range(HEADS):
                weights = brute_force_frames.pair_weights(q[at, h], k[place, h], a[at, h], distance)
                moment = np.einsum("j,jn,jnx,jny->xy", *weights, direction, direction)
                values[at, h] = np.linalg.eigvalsh(moment)
    total = values.sum(axis=-1)
    return np.diff(values, axis=-1).min(axis=-1) / np.where(total > 0, total, 1)


def distance_up_to_signs(frames, expected):
    """Largest difference of the entries of two frames [..., 3, 3], for the best of the four choices of signs."""
    return np.min([np.abs(frames * signs[:, None] - expected).max(axis=(-2, -1)) for signs in PROPER], axis=0)


@pytest.mark.parametrize("method", ["max", "max_static", "lattice"])
def test_frames_equal_brute_force(method, dtype):
    batch = batch_without_symmetry(dtype)
    frames = frames_of(method, batch, dtype=dtype)
    assert frames.dtype == dtype
    places = atom_places(batch)
    tolerance = 1e-12 if dtype == np.float64 else 1e-5
    np.testing.assert_allclose(frames[places], expected_frames(method)[places], rtol=0, atol=tolerance)


@pytest.mark.parametrize("method", PRINCIPAL)
def test_principal_axes_equal_brute_force_up_to_signs(method, dtype):
    """Rounding turns an eigenvector by about its size over the gap to the next eigenvalue."""
    batch = batch_without_symmetry(dtype)
    frames = frames_of(method, batch, dtype=dtype)
    assert frames.dtype == dtype
    gap = gaps(method)
    separate = gap > 1e-3
    several = batch_sizes(batch) > 2  # by `pca` the cells of one and two atoms leave axes free
    assert np.mean(separate[several]) > 0.9
    error = distance_up_to_signs(frames, expected_frames(method)) * gap
    # In float64 what is left is the neighbors beyond the radius.
    assert error[separate].max() < (1e-11 if dtype == np.float64 else 1e-6)


def batch_sizes(batch):
    """Number of atoms of the crystal of each atom, [N]; 0 for padding."""
    return np.append(batch.crystal_sizes, 0)[batch.crystal_of_atom]


@pytest.mark.parametrize("method", METHODS)
def test_frames_are_right_handed_and_of_unit_length_and_orthogonal_but_for_lattice(method, dtype):
    batch = batch_without_symmetry(dtype)
    for seeds in (None, seeds_of(0, batch)):
        frames = frames_of(method, batch, seeds, dtype)[atom_places(batch)].astype(np.float64)
        products = frames @ frames.swapaxes(-1, -2)
        tolerance = 1e-12 if dtype == np.float64 else 1e-6
        np.testing.assert_allclose(np.einsum("...ii->...i", products), 1, atol=tolerance)
        if method == "lattice":
            # An LLL-reduced cell of unit vectors has at least this volume: no two angles below 30 degrees.
            assert np.linalg.det(frames).min() > 0.3
            assert np.all(products[..., 0, 1:] > -1e-4)  # e2 and e3 at acute angles to e1
        else:
            np.testing.assert_allclose(products - np.eye(3), 0, atol=tolerance)
            np.testing.assert_allclose(np.linalg.det(frames), 1, atol=tolerance)


def test_methods_differ():
    """Also `max` from `max_static`, though the nearest neighbor often has the largest logit too."""
    batch = batch_without_symmetry(np.float32)
    several = batch_sizes(batch) > 2
    frames = [frames_of(method, batch)[several] for method in METHODS]
    for i, first in enumerate(frames):
        for second in frames[:i]:
            assert np.mean(distance_up_to_signs(first, second) > 0.1) > 0.2


@pytest.mark.parametrize("method", METHODS)
def test_heads_share_static_frames_only(method):
    frames = frames_of(method, batch_without_symmetry(np.float32))
    shared = np.all(frames == frames[:, :1])
    assert shared == (method in ("max_static", "pca", "lattice"))


@pytest.mark.parametrize("method", ["max", "max_static", "lattice"])
def test_without_ties_nothing_is_drawn(method):
    """Drawn are the frames of crystals of several atoms, none of which has its own images for best neighbors."""
    batch = batch_without_symmetry(np.float32)
    unique = batch_sizes(batch) == 6 if method != "lattice" else batch.species > 0
    assert unique.sum() >= 6
    frames = frames_of(method, batch)[unique]
    for seed in range(4):
        drawn = frames_of(method, batch, seeds_of(seed, batch))
        np.testing.assert_allclose(drawn[unique], frames, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_frames_get_no_gradient(method):
    batch = jax.tree.map(jnp.asarray, batch_without_symmetry(np.float32))

    @jax.jit
    def gradients(inputs):
        return jax.grad(lambda x: jnp.sum(block_frames(method, *x, batch, TIE_TOLERANCE) ** 3))(inputs)

    for gradient in gradients(make_inputs(batch)):
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("method", METHODS)
def test_padding_is_finite_and_changes_nothing(method):
    """More padding atoms and longer rows, but no crystal of padding, to which the padding atoms would belong."""
    batch, other = batch_without_symmetry(np.float32), batch_of(crystals(), RADIUS, shapes=OTHER_SHAPE, parts=PARTS)
    expected, frames = frames_of(method, batch), frames_of(method, other)
    assert np.isfinite(expected).all()
    assert np.isfinite(frames).all()
    # Sums over longer rows are rounded differently, and eigenvectors turn by the error over the gap, above 1e-3.
    tolerance = 1e-4 if method == "weighted_pca" else 0
    np.testing.assert_allclose(frames[atom_places(other)], expected[atom_places(batch)], rtol=0, atol=tolerance)


def test_padding_has_no_max_frame():
    batch = batch_without_symmetry(np.float32)
    for method in ("max", "max_static"):
        np.testing.assert_array_equal(frames_of(method, batch)[batch.species == 0], 0)


def test_padding_and_atoms_without_neighbors_give_finite_frames():
    """Rows with nothing but the atom itself, and with neighbors on one line, which `neighbor_rows` never makes."""
    vector = np.zeros((4, 48, 3), np.float32)
    vector[1, 1:3] = [[2, 0, 0], [-2, 0, 0]]
    count = np.array([1, 3, 0, 0], np.int32)
    index = np.zeros((4, 48), np.int32)
    rows = rows_from(index, vector, index, count)
    q = k = np.ones((4, HEADS, K_DIM), np.float32)
    a = np.full((4, HEADS), -0.25, np.float32)
    batch = batch_of([primitive("fcc")], 4.0, shapes=BatchShape(4, 48, 1))
    batch = dataclasses.replace(batch, rows=rows)
    seeds = np.arange(4 * HEADS, dtype=np.uint32).reshape(4, HEADS)
    for choice in (None, seeds):
        frames = compiled[np.float32]("max", q, k, a, batch, TIE_TOLERANCE, choice)
        assert np.isfinite(frames).all()
        np.testing.assert_array_equal(np.abs(frames[1, :, 0]), np.tile([1, 0, 0], (HEADS, 1)))
        np.testing.assert_array_equal(frames[2:], 0)
        axes = compiled[np.float32]("weighted_pca", q, k, a, batch, TIE_TOLERANCE, choice)
        assert np.isfinite(axes).all()
        np.testing.assert_allclose(np.abs(axes[1, :, 2]), np.tile([1, 0, 0], (HEADS, 1)), atol=1e-6)


def test_unknown_method_is_an_error():
    batch = batch_without_symmetry(np.float32)
    with pytest.raises(ValueError, match=r"frame_method='maximal'.*max, max_static, weighted_pca, pca, lattice"):
        block_frames("maximal", *make_inputs(batch), batch, TIE_TOLERANCE)


@pytest.mark.parametrize(("method", "part"), [("lattice", "lattice_frames"), ("pca", "scatter")])
def test_frames_from_a_batch_without_what_they_need_are_an_error(method, part):
    batch = batch_of(crystals()[:1], 4.0)
    with pytest.raises(ValueError, match=part):
        block_frames(method, *make_inputs(batch), batch, TIE_TOLERANCE)


# Turned and mirrored crystals


def transformed(matrix):
    """The crystals with all positions and lattices multiplied by an orthogonal matrix [3, 3]."""
    return batch_of([rotated(crystal, matrix) for crystal in crystals()], RADIUS, np.float64, SHAPE, parts=PARTS)


@pytest.mark.parametrize("method", METHODS)
def test_frames_turn_with_the_crystal(method, x64):
    """Whether drawn or not."""
    turn = random_rotation(np.random.default_rng(1))
    batch, turned = batch_without_symmetry(np.float64), transformed(turn)
    places = atom_places(batch)
    for seeds in (None, seeds_of(1, batch)):
        expected = frames_of(method, batch, seeds, np.float64) @ turn.T
        np.testing.assert_allclose(
            frames_of(method, turned, seeds, np.float64)[places], expected[places], rtol=0, atol=1e-10
        )


@pytest.mark.parametrize("method", METHODS)
def test_frames_of_the_mirror_image_are_mirrored_up_to_signs_that_keep_the_right_hand(method, x64):
    mirror = np.eye(3) - 2 * np.outer(*[np.array([0.48, -0.6, 0.64])] * 2)
    batch, mirrored = batch_without_symmetry(np.float64), transformed(mirror)
    places = atom_places(batch)
    if method in ("max", "max_static"):  # where an atom's own images are the best neighbors, +v may become -v
        places = places[batch_sizes(batch)[places] == 6]
    expected = (frames_of(method, batch, dtype=np.float64) @ mirror.T)[places]  # left-handed
    frames = frames_of(method, mirrored, dtype=np.float64)[places]
    if method in PRINCIPAL:
        assert distance_up_to_signs(frames, -expected).max() < 1e-10
    else:
        signs = np.full(3, -1) if method == "lattice" else np.array([1, 1, -1])
        np.testing.assert_allclose(frames, expected * signs[:, None], rtol=0, atol=1e-10)


# Lattice frames


def lattice_frame(lattices, dtype=np.float64):
    """Frames [B, 3, 3] of lattices [B, 3, 3] with an atom in each."""
    atoms = [Crystal([14], np.zeros((1, 3)), lattice) for lattice in lattices]
    shape = BatchShape(128, 64, 128)
    batch = batch_of(atoms, 3.0, dtype, shape, parts=PARTS)
    return frames_of("lattice", batch, dtype=dtype)[atom_places(batch), 0]


def random_lattices(number, seed=5):
    rng = np.random.default_rng(seed)
    return np.stack([random_crystal(rng, 2).lattice for _ in range(number)])


def unimodular(rng, steps):
    """A random integer matrix of determinant 1, the product of that many shears of up to 3."""
    matrix = np.eye(3, dtype=int)
    for _ in range(steps):
        i, j = rng.choice(3, 2, replace=False)
        shear = np.eye(3, dtype=int)
        shear[i, j] = rng.integers(-3, 4)
        matrix = shear @ matrix
    return matrix


def test_lattice_frames_equal_brute_force_also_of_left_handed_and_skewed_cells(x64):
    rng = np.random.default_rng(6)
    lattices = random_lattices(60)
    lattices[::2] = lattices[::2, [1, 0, 2]]
    lattices[::3] = [unimodular(rng, 2) @ lattice for lattice in lattices[::3]]
    assert {-1, 1} == set(np.sign(np.linalg.det(lattices)))
    expected = [brute_force_frames.lattice_frame(lattice) for lattice in lattices]
    np.testing.assert_allclose(lattice_frame(lattices), expected, rtol=0, atol=1e-12)


def test_lattice_frames_do_not_depend_on_the_cell(x64):
    """Up to extremely skewed cells, whose short vectors have coefficients that no fixed box would hold."""
    rng = np.random.default_rng(7)
    lattices = random_lattices(100)
    expected = [brute_force_frames.lattice_frame(lattice) for lattice in lattices]
    largest = 0
    for steps in (1, 3, 8):
        changes = np.array([unimodular(rng, steps) for _ in lattices])
        largest = max(largest, np.abs(np.linalg.inv(changes)).max())
        # The vectors of a skewed cell are long: their difference is rounded.
        tolerance = 1e-12 * np.abs(changes).max() ** 2
        assert tolerance < 1e-6
        np.testing.assert_allclose(lattice_frame(changes @ lattices), expected, rtol=0, atol=tolerance)
    assert largest > 50


@pytest.mark.parametrize("shear", [20, 1000])
def test_equally_good_frames_are_those_of_the_lattice_however_sheared_the_cell(shear):
    cubic = 4.0 * random_rotation(np.random.default_rng(8))
    for lattice in (*random_lattices(10), cubic, cubic[[1, 0, 2]], primitive("fcc").lattice, primitive("hcp").lattice):
        frames, shares = lattice_frames(lattice, TIE_TOLERANCE)
        other, others = lattice_frames(np.array([[1, shear, 0], [0, 1, 0], [0, -shear, 1]]) @ lattice, TIE_TOLERANCE)
        assert len(frames) == len(other) and shares.sum() == pytest.approx(1)
        difference = np.abs(frames[:, None] - other).max(axis=(-2, -1))
        assert difference.min(axis=1).max() < 1e-8
        np.testing.assert_allclose(others[difference.argmin(axis=1)], shares, rtol=1e-9)


def test_lattice_frame_of_a_cubic_cell_is_the_cell_turned_by_its_symmetry(x64):
    turn = random_rotation(np.random.default_rng(8))
    for frame in lattice_frame(np.stack([4.0 * turn, 4.0 * turn[[1, 0, 2]]])):
        among = np.abs(frame @ turn.T)
        np.testing.assert_allclose(np.sort(among.ravel()), [0] * 6 + [1] * 3, rtol=0, atol=1e-12)
        assert np.linalg.det(frame) == pytest.approx(1)


def test_perpendicular_vectors_are_acute_whatever_rounding_makes_of_them(x64):
    """a > b > c at right angles, the angles off by less than the tolerance: the frame is c, b, a up to signs."""
    rng = np.random.default_rng(9)
    frames = lattice_frame(np.diag([5.0, 4.0, 3.0]) + 1e-5 * rng.normal(size=(50, 3, 3)))
    np.testing.assert_allclose(np.abs(frames), np.tile(np.eye(3)[::-1], (50, 1, 1)), rtol=0, atol=1e-4)
    assert np.linalg.det(frames).min() > 0.99
