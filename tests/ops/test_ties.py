"""The choice among equally good frames: uniform draws in training, by the crystal itself in evaluation.

What is equally good is enumerated here from the definitions, with the images of brute_force_frames.py.
"""

import dataclasses
import functools
import itertools

import brute_force_frames
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2, chi2_contingency
from support import (
    SYMMETRIC,
    atom_places,
    batch_of,
    primitive,
    random_crystal,
    random_rotation,
    random_variables,
    real_crystals,
    rotated,
    rows_from,
    small_config,
)

from crystalframer_jax.batching.shapes import BatchShape
from crystalframer_jax.config import BatchParts
from crystalframer_jax.model.frames import block_frames
from crystalframer_jax.model.regressor import CrystalFramer
from crystalframer_jax.ops.frames import METHODS
from crystalframer_jax.ops.random_bits import draw, row_seeds, seed_of
from crystalframer_jax.structures.crystal import Crystal

TIE_TOLERANCE = 1e-4
RADIUS = 5.0  # Å
SHAPE = BatchShape(96, 64, 16)  # holds all crystals; also for one alone, so that there is one compiled program
PARTS = BatchParts(lattice_frames=True, scatter=True)
DRAWS = 1600  # as heads: each draws for itself
EXPONENT = -0.25  # 1/Å^2
LEAST_P = 1e-3  # of the chi-square tests; keys are fixed
SAME = 1e-4  # largest difference of the entries of equal frames
MARKER = np.array([1.0, 1.7, 2.9])
PROPER = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])  # signs that keep the right hand

REAL = {  # Fd-3m, P63/mmc twice, R-3m, P63mc, P42/mnm, P4/nmm
    "MgCu2": "mp-1038",
    "Hf2S": "mp-10000",
    "VTe": "mp-10256",
    "Sb": "mp-104",
    "CdTe": "mp-12779",
    "SnO2": "mp-856",
    "UTeAs": "mp-10105",
}

compiled = jax.jit(block_frames, static_argnums=0)
compiled_x64 = jax.jit(block_frames, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
compiled_seeds = jax.jit(row_seeds, static_argnums=3)


def crystal_named(name):
    """A textbook crystal, a simple or body-centred cubic one, or a real one."""
    if name in REAL:
        return real_crystals([REAL[name]])[0]
    if name in SYMMETRIC:
        return primitive(name)
    lattice = {"simple cubic": np.eye(3), "bcc": 0.5 * (np.ones((3, 3)) - 2 * np.eye(3))}[name]
    return Crystal([84], np.zeros((1, 3)), 3.35 * lattice, id=name)


CRYSTALS = [*SYMMETRIC, "simple cubic", "bcc", *REAL]


@functools.cache
def batch_named(name):
    return batch_of([crystal_named(name)], RADIUS, shapes=SHAPE, parts=PARTS)


def alike(batch, draws=1, exponent=EXPONENT):
    """q, k, a for which all atoms are alike and only distances count."""
    atoms, dtype = len(batch.species), batch.rows.vector.dtype
    q, k = (np.ones((atoms, draws, 1), dtype) for _ in range(2))
    return q, k, np.full((atoms, draws), exponent, dtype)


def seeds_of(seed, batch, draws=DRAWS):
    seeds = draw(seed_of(seed), np.arange(len(batch.crystal_sizes)))
    return compiled_seeds(seeds, batch.crystal_of_atom, batch.atom_in_crystal, draws)


@functools.cache
def all_drawn_frames(method):
    """Frames of the atoms of each of the CRYSTALS by name, [n, DRAWS, 3, 3]."""
    crystals = [crystal_named(name) for name in CRYSTALS]
    batch = batch_of(crystals, RADIUS, shapes=SHAPE, parts=PARTS)
    seeds = seeds_of(0, batch)
    frames = np.asarray(compiled(method, *alike(batch, DRAWS), batch, TIE_TOLERANCE, seeds))[atom_places(batch)]
    ends = np.cumsum([crystal.num_atoms for crystal in crystals])
    return dict(zip(CRYSTALS, np.split(frames, ends[:-1]), strict=True))


def drawn_frames(method, name):
    return all_drawn_frames(method)[name]


def evaluated_frames(method, batch):
    """[n, 3, 3], without keys."""
    return np.asarray(compiled(method, *alike(batch), batch, TIE_TOLERANCE))[atom_places(batch), 0]


# What is equally good


def best(scores):
    """Places of the scores that tie with the best; none may be near the limit, where rounding would decide."""
    behind = scores.max() - scores
    assert not np.any((behind > TIE_TOLERANCE / 4) & (behind < 4 * TIE_TOLERANCE))
    return np.flatnonzero(behind < TIE_TOLERANCE)


def merged(frames, shares):
    """Distinct frames [F, 3, 3] and the sum of the shares of each, [F]."""
    number = labels(frames.reshape(-1, 9))
    _, first = np.unique(number, return_index=True)
    return frames[first], np.bincount(number, shares)


def labels(vectors):
    """Numbers [...] that tell distinct vectors [..., d] apart."""
    flat = vectors.reshape(-1, vectors.shape[-1])
    number, distinct = np.full(len(flat), -1), 0
    while (number < 0).any():
        number[np.abs(flat - flat[np.argmax(number < 0)]).max(axis=1) < SAME] = distinct
        distinct += 1
    return number.reshape(vectors.shape[:-1])


def tied_max_frames(crystal, atom, exponent):
    """Max frames of an atom among alike atoms, and the share of each in fair draws of e1, then of e2."""
    shifts = brute_force_frames.image_shifts(crystal.positions, crystal.lattice, RADIUS)
    distance, direction = (
        x.reshape(-1, *x.shape[2:]) for x in brute_force_frames.neighbors(atom, crystal.positions, shifts)
    )
    distance, direction = distance[distance > 0], direction[distance > 0]
    score = exponent * distance**2
    frames, shares = [], []
    first = best(score)
    for e1 in direction[first]:
        cosine = np.abs(direction @ e1)
        second = best(np.where(cosine < 0.9999, score + np.log(np.maximum(1 - cosine, 1e-5)), -np.inf))
        for u in direction[second]:
            e2 = u - (u @ e1) * e1
            e2 /= np.linalg.norm(e2)
            frames.append([e1, e2, np.cross(e1, e2)])
            shares.append(1 / len(first) / len(second))
    return merged(np.array(frames), shares)


def tied_lattice_frames(crystal):
    """Lattice frames and the share of each in fair draws of e1, then of e2, then of e3."""
    vectors = brute_force_frames._integer_box([3, 3, 3]) @ crystal.lattice  # of a cell that is hardly skewed
    vectors = vectors[np.linalg.norm(vectors, axis=1) > 0]
    length = np.linalg.norm(vectors, axis=1)
    unit = vectors / length[:, None]
    frames, shares = [], []
    first = best(-length)
    for e1 in unit[first]:
        cosine = unit @ e1
        acute = cosine > -1e-4
        second = best(np.where(acute & (cosine < 0.9999), -length, -np.inf))
        for e2 in unit[second]:
            off_plane = np.abs(unit @ np.cross(e1, e2)) > 1e-3
            third = best(np.where(acute & off_plane, -length, -np.inf))
            for e3 in unit[third]:
                frame = np.array([e1, e2, e3])
                frames.append(frame * np.sign(np.linalg.det(frame)))
                shares.append(1 / len(first) / len(second) / len(third))
    return merged(np.array(frames), shares)


def counts_of(frames, expected):
    """How often each of the expected frames [F, 3, 3] occurs among `frames` [D, 3, 3]; it is an error if others do."""
    difference = np.abs(frames[:, None] - expected).max(axis=(-2, -1))  # [D, F]
    assert np.all(difference.min(axis=1) < SAME)
    return np.bincount(difference.argmin(axis=1), minlength=len(expected))


def assert_shares(samples):
    """One chi-square test of several independent samples: pairs of counts and expected shares."""
    statistic = degrees = 0
    for counts, shares in samples:
        expected = shares * counts.sum()
        assert expected.min() > 5
        statistic += np.sum((counts - expected) ** 2 / expected)
        degrees += len(counts) - 1
    assert degrees > 0, "nothing is tied"
    assert chi2.sf(statistic, degrees) > LEAST_P, samples


def uniform(counts):
    return counts, np.full(len(counts), 1 / len(counts))


def assert_independent(first, second):
    """Chi-square test of two series of labels [D]."""
    table = np.zeros((first.max() + 1, second.max() + 1))
    np.add.at(table, (first, second), 1)
    assert min(table.shape) > 1, "nothing is drawn"
    assert chi2_contingency(table).pvalue > LEAST_P, table


def rotations_of_site(crystal, atom):
    """Proper rotations [G, 3, 3] that map the neighbors of an atom onto each other, all atoms alike.

    Each of them maps max frames to others that are equally good, so they are found by comparing those.
    """
    shifts = brute_force_frames.image_shifts(crystal.positions, crystal.lattice, RADIUS)
    vectors = (crystal.positions[:, None] - crystal.positions[atom] + shifts).reshape(-1, 3)
    length = np.linalg.norm(vectors, axis=1)
    near = vectors[(length > 0) & (length < RADIUS - 0.01)]
    frames, _ = tied_max_frames(crystal, atom, -1.0)
    found = []
    for frame in frames:
        rotation = frame.T @ frames[0]
        distance = np.linalg.norm((near @ rotation.T)[:, None] - vectors, axis=-1)
        if distance.min(axis=1).max() < 1e-2:
            found.append(rotation)
    return np.array(found)


# Draws


@pytest.mark.parametrize("name", CRYSTALS)
@pytest.mark.parametrize(("method", "exponent"), [("max", EXPONENT), ("max_static", -1.0)])
def test_max_frames_are_drawn_with_their_shares_in_the_ties(method, exponent, name):
    """Uniformly over the best neighbors, and then over the best second ones, for every atom of the cell."""
    crystal, samples = crystal_named(name), []
    for atom, frames in enumerate(drawn_frames(method, name)):
        expected, shares = tied_max_frames(crystal, atom, exponent)
        samples.append((counts_of(frames, expected), shares))
    assert_shares(samples)


@pytest.mark.parametrize("name", CRYSTALS)
def test_lattice_frames_are_drawn_with_their_shares_in_the_ties(name):
    expected, shares = tied_lattice_frames(crystal_named(name))
    assert_shares([(counts_of(frames, expected), shares) for frames in drawn_frames("lattice", name)])


def test_cubic_sites_and_cells_have_as_many_frames_as_the_cube_has_rotations():
    """What the tests above compare with, in cases that can be counted by hand."""
    for name in ("rock salt", "fcc", "simple cubic"):
        frames, shares = tied_max_frames(crystal_named(name), 0, -1.0)
        assert len(frames) == 24
        np.testing.assert_allclose(shares, 1 / 24)
    frames, shares = tied_lattice_frames(crystal_named("perovskite"))
    assert len(frames) == 24
    np.testing.assert_allclose(shares, 1 / 24)
    assert len(rotations_of_site(crystal_named("rock salt"), 0)) == 24
    assert len(rotations_of_site(crystal_named("diamond"), 1)) == 12


@pytest.mark.parametrize("method", ["weighted_pca", "pca"])
def test_signs_of_principal_axes_are_drawn_uniformly(method):
    """Without symmetry nothing else is drawn: four right-handed frames."""
    exponent = -1.5  # for the reference, which sums to the end of the lattice images: nothing is left at 5 Å
    crystal = random_crystal(np.random.default_rng(20), 4)
    batch = batch_of([crystal], RADIUS, shapes=SHAPE, parts=PARTS)
    seeds = seeds_of(1, batch)
    frames = compiled(method, *alike(batch, DRAWS, exponent), batch, TIE_TOLERANCE, seeds)
    frames = np.asarray(frames)[atom_places(batch)]
    inputs = [x[:4] for x in alike(batch, exponent=exponent)]
    axes = brute_force_frames.frames(method, *inputs, crystal.positions, crystal.lattice)[:, 0]
    samples = [uniform(counts_of(f, axis * PROPER[:, :, None])) for f, axis in zip(frames, axes, strict=True)]
    assert_shares(samples)


@pytest.mark.parametrize("name", CRYSTALS)
def test_principal_axes_are_drawn_without_preference_for_a_sign_or_an_equivalent_direction(name):
    """Frames that differ by signs, or by a rotation that maps the surroundings of the atom onto themselves.

    For `pca`, which looks at a choice of atoms without that symmetry, by signs.
    """
    crystal, samples = crystal_named(name), []
    for method in ("weighted_pca", "pca"):
        for atom, frames in enumerate(drawn_frames(method, name)):
            distinct, _ = merged(frames, np.ones(len(frames)))
            counts = counts_of(frames, distinct)
            rotations = rotations_of_site(crystal, atom) if method == "weighted_pca" else np.eye(3)[None]
            left = set(range(len(distinct)))
            while left:
                frame = distinct[min(left)]
                equivalent = [signs[:, None] * frame @ turn.T for signs in PROPER for turn in rotations]
                difference = np.abs(np.array(equivalent)[:, None] - distinct).max(axis=(-2, -1))
                assert np.all(difference.min(axis=1) < 10 * SAME)  # each of them occurs
                orbit = np.unique(difference.argmin(axis=1))
                samples.append(uniform(counts[orbit]))
                left -= set(orbit)
    assert_shares(samples)


@pytest.mark.parametrize("method", METHODS)
def test_draws_differ_between_steps_blocks_atoms_and_heads(method):
    """The first axes are independent of each other. (A perovskite has a simple cubic lattice.)"""
    name = "perovskite" if method == "lattice" else "rock salt"
    batch = batch_named(name)
    first, second = labels(drawn_frames(method, name)[:2, :, 0])
    assert_independent(first, second)  # atoms
    assert_independent(first[:-1], first[1:])  # heads
    step, place = seed_of(2), atom_places(batch)[0]

    def of_step(number, block):
        seeds = draw(draw(draw(step, number), np.arange(SHAPE.num_crystals)), block)
        return row_seeds(seeds, batch.crystal_of_atom, batch.atom_in_crystal, 1)[:, 0]

    e1 = []
    for block in range(2):
        seeds = jax.jit(jax.vmap(functools.partial(of_step, block=block)))(jnp.arange(DRAWS)).T  # steps as heads
        e1.append(np.asarray(compiled(method, *alike(batch, DRAWS), batch, TIE_TOLERANCE, seeds))[place, :, 0])
    first, second = labels(np.array(e1))
    assert_independent(first, second)  # blocks
    assert_independent(first[:-1], first[1:])  # steps
    if method != "pca":  # its axes in rock salt are not all equivalent
        assert_shares([uniform(np.bincount(first)), uniform(np.bincount(second))])


@pytest.mark.parametrize("method", ["max", "max_static"])
def test_only_neighbors_within_the_tolerance_are_ties(method):
    """Three of the six nearest neighbors of rock salt, set apart by more than the tolerance, leave three."""
    batch = batch_of([primitive("rock salt")], RADIUS, shapes=SHAPE, parts=PARTS)
    place = atom_places(batch)[0]
    batch.rows.vector[place, 1:4] *= 1.0005  # 0.25 * 2.82^2 * 0.001 = 2e-3 less
    batch.rows.square[place, 1:4] *= 1.0005**2
    seeds = seeds_of(3, batch)
    frames = np.asarray(compiled(method, *alike(batch, DRAWS), batch, TIE_TOLERANCE, seeds))
    unit = batch.rows.vector[place, 4:7] / 2.82
    cosine = frames[place, :, 0] @ unit.T
    np.testing.assert_allclose(cosine.max(axis=1), 1, atol=1e-6)
    assert_shares([uniform(np.bincount(cosine.argmax(axis=1), minlength=3))])


@pytest.mark.parametrize("method", ["max", "max_static"])
def test_a_turned_crystal_has_the_same_ties_even_at_the_tolerance(method):
    """Gaps between the two kinds of nearest neighbors that differ from the tolerance by no more than some rounding."""
    rng, edge, exponent = np.random.default_rng(12), 3.35, 1.0 if method == "max_static" else 0.25
    gaps = TIE_TOLERANCE * (1 + np.linspace(-0.01, 0.01, 41))
    crystals = [
        Crystal([84], np.zeros((1, 3)), np.diag([edge, edge, np.sqrt(edge**2 + gap / exponent)])) for gap in gaps
    ]

    def are_tied(turns):
        turned = [rotated(crystal, turn) for crystal, turn in zip(crystals, turns, strict=True)]
        batch = batch_of(turned, 4.0, parts=PARTS)
        seeds = seeds_of(6, batch, 32)
        q, k, a = alike(batch, 32, exponent=-exponent)
        frames = np.asarray(compiled(method, 3 * q, k, a, batch, TIE_TOLERANCE, seeds))[atom_places(batch)]
        along = np.einsum("nhx,nx->nh", frames[:, :, 0], np.array(turns)[:, :, 2])
        return np.any(np.abs(along) > 0.9, axis=1)

    expected = are_tied([np.eye(3)] * len(crystals))
    assert 10 < expected.sum() < 31
    for _ in range(3):
        np.testing.assert_array_equal(are_tied([random_rotation(rng) for _ in crystals]), expected)


@pytest.mark.parametrize(("gap", "equal"), [(0.5, True), (2.0, False)])
def test_eigenvalues_closer_than_the_tolerance_times_their_sum_count_as_equal(gap, equal):
    """A cubic cell with its last edge longer, so that the two neighbors there come last but have the largest weight."""
    exponent, edge, weight = 0.25, 3.35, 1 + 3 * gap * TIE_TOLERANCE  # of three equal eigenvalues one is larger
    longer = np.sqrt(edge**2 + np.log(weight) / exponent)
    crystal = Crystal([84], np.zeros((1, 3)), np.diag([edge, edge, longer]))
    batch = batch_of([crystal], 4.0, shapes=SHAPE, parts=PARTS)
    frames = compiled("weighted_pca", *alike(batch, exponent=exponent), batch, TIE_TOLERANCE)
    axes = np.abs(np.asarray(frames)[atom_places(batch)[0], 0])
    # Equal: the axes of the anchor, whose first is the nearest neighbor, in reverse; else the largest weight is last.
    np.testing.assert_allclose(axes, np.eye(3)[[2, 1, 0] if equal else [1, 0, 2]], atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_draws_depend_on_nothing_but_the_seed_of_the_crystal_and_the_atom(method):
    """Not on the place of the crystal in the batch, nor on the other crystals there."""
    names = ("rock salt", "hcp")
    of_crystals = draw(seed_of(4), np.arange(SHAPE.num_crystals))
    alone = []
    for i, name in enumerate(names):
        batch = batch_named(name)
        seeds = compiled_seeds(jnp.roll(of_crystals, -i), batch.crystal_of_atom, batch.atom_in_crystal, DRAWS)
        frames = compiled(method, *alike(batch, DRAWS), batch, TIE_TOLERANCE, seeds)
        alone.append(np.asarray(frames)[atom_places(batch)])
    crystals = [primitive("perovskite"), primitive("hcp"), crystal_named("SnO2"), primitive("rock salt")]
    batch = batch_of(crystals, RADIUS, shapes=SHAPE, parts=PARTS)
    seeds = compiled_seeds(
        of_crystals[np.array([2, 1, 3, 0, *range(4, SHAPE.num_crystals)])],
        batch.crystal_of_atom,
        batch.atom_in_crystal,
        DRAWS,
    )
    frames = np.asarray(compiled(method, *alike(batch, DRAWS), batch, TIE_TOLERANCE, seeds))[atom_places(batch)]
    # Sums over longer rows are rounded differently.
    tolerance = 1e-5 if method == "weighted_pca" else 0
    np.testing.assert_allclose(frames[13:15], alone[0], rtol=0, atol=tolerance)
    np.testing.assert_allclose(frames[5:7], alone[1], rtol=0, atol=tolerance)


def test_seeds_do_not_depend_on_padding():
    crystals = [primitive("rock salt"), primitive("hcp")]
    of_crystals = draw(seed_of(4), np.arange(5))
    seeds = []
    for shape, added in (BatchShape(32, 64, 2), []), (BatchShape(64, 80, 5), [primitive("perovskite")]):
        batch = batch_of(crystals + added, RADIUS, shapes=shape)
        atoms = batch.crystal_of_atom, batch.atom_in_crystal
        seeds.append(compiled_seeds(of_crystals[: shape.num_crystals], *atoms, 8)[atom_places(batch)[:4]])
    np.testing.assert_array_equal(*seeds)


def test_one_seed_for_all_draws_alike_for_equal_crystals_and_seeds_by_place_do_not():
    batch = batch_of([primitive("hcp")] * 2, RADIUS, shapes=BatchShape(32, 64, 3))
    seed = seed_of(5)
    atoms = batch.crystal_of_atom, batch.atom_in_crystal
    first, second = np.split(np.asarray(compiled_seeds(jnp.repeat(seed, 3), *atoms, 8))[atom_places(batch)], 2)
    np.testing.assert_array_equal(first, second)
    by_place = np.asarray(compiled_seeds(draw(seed, np.arange(3)), *atoms, 8))[atom_places(batch)]
    assert len(np.unique(by_place)) == by_place.size == 4 * 8


def test_seeds_differ_between_seeds_crystals_blocks_atoms_and_heads():
    batch = batch_of([primitive("rock salt"), primitive("hcp")], RADIUS, shapes=BatchShape(32, 64, 3))
    atoms = batch.crystal_of_atom, batch.atom_in_crystal
    seeds = [
        compiled_seeds(draw(draw(seed_of(seed), np.arange(3)), block), *atoms, 8)[atom_places(batch)]
        for seed, block in itertools.product(range(3), range(4))
    ]
    assert len(np.unique(seeds)) == 3 * 4 * 4 * 8


def test_blocks_of_the_model_draw_independently():
    """The seed of a step serves all blocks: they must not all choose the same neighbor."""
    config = small_config(head_num=8)
    batch = batch_named("rock salt")
    variables = random_variables(config)
    for block in range(config.num_layers):  # without queries the nearest neighbors are the best for every block
        query = variables["params"][f"block_{block}"]["attention"]["q"]
        query["kernel"], query["bias"] = 0 * query["kernel"], 0 * query["bias"]
    apply = jax.jit(functools.partial(CrystalFramer(config).apply, mutable=["intermediates"]))
    _, state = apply(variables, batch, draw(seed_of(6), np.arange(SHAPE.num_crystals)))
    blocks = [state["intermediates"][f"block_{block}"]["attention"]["frames"][0] for block in range(config.num_layers)]
    first, second = labels(np.array([frames[atom_places(batch), :, 0] for frames in blocks]))
    assert len(np.unique(first)) > 3
    assert np.mean(first == second) < 0.5  # of 2 atoms and 8 heads, each with 6 neighbors to choose from


# Evaluation


def inputs_of(batch, heads=3, seed=14, dtype=np.float64):
    """q, k and a that are alike for atoms of the same element: q and k random for each element and head."""
    rng = np.random.default_rng(seed)
    queries, keys = rng.normal(size=(2, 99, heads, 4))
    a = -rng.uniform(0.2, 0.4, (99, heads))
    return tuple(x[np.asarray(batch.species)].astype(dtype) for x in (queries, keys, a))


@pytest.mark.parametrize("name", CRYSTALS)
@pytest.mark.parametrize("method", ["max", "max_static"])
def test_evaluation_takes_the_frame_whose_marker_sees_most(method, name, x64):
    """As the float64 search does, or another that sees the same: then all that is seen along its axes is the same."""
    crystal = crystal_named(name)
    batch = batch_of([crystal], RADIUS, np.float64, SHAPE, parts=PARTS)
    places, inputs = atom_places(batch), inputs_of(batch)
    frames = np.asarray(compiled_x64(method, *inputs, batch, TIE_TOLERANCE))[places]
    q, k, a = (x[places] for x in inputs)
    expected = brute_force_frames.frames(method, q, k, a, crystal.positions, crystal.lattice, RADIUS)
    shifts = brute_force_frames.image_shifts(crystal.positions, crystal.lattice, RADIUS)
    for i, h in np.ndindex(*frames.shape[:2]):
        distance, unit = brute_force_frames.neighbors(i, crystal.positions, shifts)
        logit = (k[:, h] @ q[i, h] / np.sqrt(k.shape[-1]))[:, None] + a[i, h] * distance**2
        weight = np.where((distance > 0) & (distance < RADIUS), np.exp(logit), 0)
        axes = (
            [np.array([1.0, 1.7, 2.9]) @ frames[i, h], *frames[i, h]],
            [np.array([1.0, 1.7, 2.9]) @ expected[i, h], *expected[i, h]],
        )
        seen = [[np.sum(weight * np.exp(scale * (unit @ x))) for x in of for scale in (1, 3)] for of in axes]
        np.testing.assert_allclose(*seen, rtol=1e-9)


@pytest.mark.parametrize("name", CRYSTALS)
@pytest.mark.parametrize("method", METHODS)
def test_evaluation_takes_one_of_the_frames_that_are_drawn(method, name):
    for evaluated, drawn in zip(evaluated_frames(method, batch_named(name)), drawn_frames(method, name), strict=True):
        counts_of(evaluated[None], merged(drawn, np.ones(DRAWS))[0])


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_is_repeatable_to_the_bit(method):
    batch = batch_of([crystal_named(name) for name in CRYSTALS], RADIUS, shapes=SHAPE, parts=PARTS)
    np.testing.assert_array_equal(evaluated_frames(method, batch), evaluated_frames(method, batch))


@pytest.mark.parametrize("method", METHODS)
def test_draws_turn_with_the_crystal(method, x64):
    """With the same keys. (Evaluation may take an equivalent frame; what follows from it is in test_invariance.py.)"""
    crystals, draws = [crystal_named(name) for name in CRYSTALS], 16
    rng = np.random.default_rng(7)

    def frames_of(turn):
        """[n, draws, 3, 3]"""
        turned = [rotated(crystal, turn) for crystal in crystals]
        batch = batch_of(turned, RADIUS, np.float64, SHAPE, parts=PARTS)
        seeds = seeds_of(0, batch, draws)
        return np.asarray(compiled_x64(method, *alike(batch, draws), batch, TIE_TOLERANCE, seeds))[atom_places(batch)]

    expected = frames_of(np.eye(3))
    assert np.mean(np.ptp(expected, axis=1) > 0.5) > 0.5  # draws differ
    for _ in range(5):
        turn = random_rotation(rng)
        np.testing.assert_allclose(frames_of(turn), expected @ turn.T, rtol=0, atol=1e-10)


# Sites of their own: one atom with neighbors at given places, as rows


def rows_of(vectors, columns=64):
    """A batch of one atom with these neighbors [M, 3] and atoms of padding."""
    vector = np.zeros((4, columns, 3))
    vector[0, 1 : len(vectors) + 1] = vectors
    index, count = np.zeros((4, columns), np.int32), np.array([len(vectors) + 1, 0, 0, 0], np.int32)
    batch = batch_of([primitive("fcc")], 4.0, np.float64, shapes=BatchShape(4, columns, 1))
    return dataclasses.replace(batch, rows=rows_from(index, vector, index, count))


def seen_along(frame, vectors, exponent):
    """What the axes and the marker of a frame see of neighbors with the weights exp(exponent d^2)."""
    square = np.sum(vectors**2, axis=1)
    unit = vectors / np.sqrt(square)[:, None]
    return [np.sum(np.exp(exponent * square) * np.exp(unit @ x)) for x in (*frame, MARKER @ frame)]


def frame_of_site(vectors, exponent=-0.3, method="max", tolerance=TIE_TOLERANCE):
    batch = rows_of(vectors)
    return np.asarray(compiled_x64(method, *alike(batch, exponent=exponent), batch, tolerance))[0, 0]


def assert_same_site(vectors, others):
    np.testing.assert_allclose(
        seen_along(frame_of_site(vectors), vectors, -0.3), seen_along(frame_of_site(others), others, -0.3), rtol=1e-9
    )


MIRROR = np.diag([1, 1, -1])


def site_with_a_mirror_plane():
    """Nearest neighbors in a pair that the mirror exchanges, and three more pairs: no first axis is in the plane."""
    half = np.array([[1.1, 0.4, 1.7], [2.2, -0.7, 0.9], [-1.5, 1.9, 1.2], [0.3, -2.1, 2.4]])
    return np.concatenate([half, half @ MIRROR])


@pytest.mark.parametrize("seed", range(6))
def test_a_pair_of_mirror_images_is_told_apart_by_the_hand(seed, x64):
    """Both first axes look alike to anything that sees no hand; in any order and turned the same one is taken."""
    rng, vectors = np.random.default_rng(seed), site_with_a_mirror_plane()
    others = vectors[rng.permutation(len(vectors))] @ random_rotation(rng).T
    assert_same_site(vectors, others)
    mirrored = frame_of_site(vectors @ MIRROR)  # the same site: its mirror image is itself
    np.testing.assert_allclose(mirrored, frame_of_site(vectors), atol=1e-9)


@pytest.mark.parametrize("number", [30, 60])
def test_many_tied_neighbors(number, x64):
    """More first axes and pairs than are compared at once."""
    rng = np.random.default_rng(number)
    vectors = rng.normal(size=(number, 3))
    vectors *= 2.5 / np.linalg.norm(vectors, axis=1, keepdims=True)
    others = vectors[rng.permutation(number)] @ random_rotation(rng).T
    assert_same_site(vectors, others)


@pytest.mark.parametrize(("gap", "is_tied"), [(0.9, True), (1.1, False)])
def test_neighbors_just_inside_and_just_outside_the_tolerance(gap, is_tied, x64):
    """The neighbor that is a little further is taken, in one of some sites that differ by a mirror, if it is a tie."""
    exponent, near = -0.3, 2.0
    far = np.sqrt(near**2 + gap * TIE_TOLERANCE / -exponent)
    others = np.array([[0.2, 2.6, 0.7], [-0.3, 2.5, -0.9], [0.1, -0.2, 3.1]])
    firsts = []
    for site in (others, others @ MIRROR, others[:, [1, 0, 2]], others[:, [1, 0, 2]] @ MIRROR):
        vectors = np.concatenate([[[near, 0, 0], [0, far, 0]], site])
        firsts.append(frame_of_site(vectors, exponent)[0])
    np.testing.assert_allclose(np.abs(firsts).max(axis=1), 1, atol=1e-9)
    assert (np.abs(firsts)[:, 1] > 0.5).any() == is_tied


def test_ties_that_differ_in_species_only(x64):
    """For max_static nearest neighbors are ties whatever they are; the attention tells their elements apart."""
    crystal, rng = primitive("perovskite"), np.random.default_rng(3)
    other = Crystal(np.array([38, 22, 8, 16, 8]), crystal.positions, crystal.lattice)
    order, turn = rng.permutation(5), random_rotation(rng)
    again = Crystal(other.species[order], other.positions[order] @ turn.T, other.lattice @ turn.T)
    seen = []
    for one in (other, again):
        batch = batch_of([one], RADIUS, np.float64, SHAPE, parts=PARTS)
        places, (q, k, a) = atom_places(batch), inputs_of(batch)
        frames = np.asarray(compiled_x64("max_static", q, k, a, batch, TIE_TOLERANCE))
        rows = batch.rows
        logit = np.einsum("nhd,nmhd->nhm", q, k[rows.index]) / 2 + a[..., None] * np.sum(rows.vector**2, -1)[:, None]
        length = np.linalg.norm(rows.vector, axis=-1)
        unit = rows.vector / np.where(length > 0, length, 1)[..., None]
        weight = np.where((length > 0)[:, None], np.exp(logit), 0)
        along = np.exp(np.einsum("nhax,nmx->nham", frames, unit))
        values = np.einsum("nhm,nham->nha", weight, along)[places]
        seen.append(values if one is other else values[np.argsort(order)])
    np.testing.assert_allclose(*seen, rtol=1e-9)


def test_enantiomorphs_may_differ_and_each_is_the_same_however_listed(x64):
    rng = np.random.default_rng(5)
    vectors = np.concatenate([rng.normal(size=(1, 3)), rng.normal(size=(5, 3))])
    vectors = np.concatenate([vectors @ turn for turn in (np.eye(3), np.diag([1, -1, -1]))])  # a twofold axis alone
    vectors *= np.clip(np.linalg.norm(vectors, axis=1), 1.5, 4)[:, None] / np.linalg.norm(vectors, axis=1)[:, None]
    assert_same_site(vectors, vectors[rng.permutation(12)] @ random_rotation(rng).T)
    hands = [seen_along(frame_of_site(x), x, -0.3) for x in (vectors, vectors @ MIRROR)]
    assert np.abs(np.subtract(*hands)).max() > 1e-3
