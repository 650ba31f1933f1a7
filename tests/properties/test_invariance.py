"""Predictions do not depend on how a crystal is described or turned, whatever the frames.

Every method is tested on the same random and real crystals, in float64, where 1e-10 leaves no room for a frame that
rounding decides. What holds for which crystals:

- Turning and moving, another order of the atoms, another cell, atoms taken from other cells, supercells: for all, also
  where symmetry leaves several frames equally good: the crystal itself chooses among them.
- But frames by `lattice` follow the given lattice, so that supercells change them, and those by `pca` the choice of the
  atoms, so that moving atoms to other cells changes them too.
- Mirror images: frames are right-handed, so the two hands of a chiral crystal differ, but not if only the moduli of
  the cosines to the axes count (cos_abs=1) and frames are unique, nor if the mirror image is the same crystal.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from support import SYMMETRIC as TEXTBOOK
from support import (
    batch_of,
    primitive,
    random_crystal,
    random_rotation,
    random_variables,
    real_crystals,
    rotated,
    small_config,
)

from crystalframer_jax.batching.shapes import BatchShape
from crystalframer_jax.config import BatchParts
from crystalframer_jax.model.regressor import CrystalFramer
from crystalframer_jax.ops.frames import METHODS
from crystalframer_jax.ops.random_bits import draw, seed_of
from crystalframer_jax.structures.crystal import Crystal
from crystalframer_jax.structures.lattice import lattice_frames

# Of the bundled set, crystals with all atoms on general positions: those of the space groups P1 and P-1, and some of
# others. Then one or two crystals of each of many groups of higher symmetry, first some whose predictions depend on the
# choice among ties.
# fmt: off
GENERAL = [
    "mp-1900", "mp-6695", "mp-6999", "mp-7622", "mp-8190", "mp-8294", "mp-8450", "mp-8627", "mp-9145", "mp-9481",
    "mp-10621", "mp-11737", "mp-14241", "mp-14345", "mp-14983", "mp-18772", "mp-18776", "mp-19029", "mp-19110",
    "mp-19134", "mp-19187", "mp-19194", "mp-19985", "mp-22747", "mp-23079", "mp-23396", "mp-23487", "mp-27178",
    "mp-28159", "mp-28330", "mp-28691", "mp-28813", "mp-30120", "mp-30146", "mp-30248", "mp-31268", "mp-32046",
    "mp-32500", "mp-504777", "mp-505000", "mp-505061", "mp-505062", "mp-505166", "mp-505190", "mp-505200",
    "mp-505435", "mp-510632", "mp-541588", "mp-541656", "mp-554002", "mp-554678", "mp-555513", "mp-556319",
    "mp-556517", "mp-556588", "mp-556788", "mp-556878", "mp-557484", "mp-558747", "mp-559033", "mp-559119",
    "mp-559417", "mp-559432", "mp-560898", "mp-560904", "mp-561493", "mp-561597", "mp-561622", "mp-562100",
    "mp-566232", "mp-566406", "mp-566781", "mp-569380", "mp-569578", "mp-570829", "mp-573321", "mp-574485",
    "mp-606470", "mp-607848", "mp-611630", "mp-613162", "mp-613820", "mp-625094", "mp-625551", "mp-625788",
    "mp-625993", "mp-626708", "mp-626799", "mp-632686", "mp-632723", "mp-632758", "mp-636821", "mp-638765",
    "mp-640189", "mp-642890", "mp-643365", "mp-643666", "mp-644693", "mp-651951", "mp-653154", "mp-655461",
    "mp-655613", "mp-667192", "mp-695829", "mp-696588", "mp-697033", "mp-697540", "mp-699173", "mp-722516",
    "mp-743869", "mp-850083", "mp-352", "mp-755", "mp-2287", "mp-7595", "mp-7596", "mp-8200", "mp-8761", "mp-13567",
    "mp-23045", "mp-27904", "mp-29246", "mp-549720", "mp-550070", "mp-553881", "mp-555096", "mp-555874",
    "mp-556553", "mp-568862", "mp-569051", "mp-570589", "mp-570668", "mp-625385",
]
DIFFERENT_TIES = [
    "mp-10000", "mp-10256", "mp-1038", "mp-104", "mp-856", "mp-10105", "mp-12779", "mp-1337",
]
OF_HIGH_SYMMETRY = [
    "mp-569790", "mp-2273", "mp-558134", "mp-553946", "mp-11723", "mp-20526", "mp-569626", "mp-10443", "mp-27418",
    "mp-8361", "mp-21264", "mp-1224", "mp-10021", "mp-11078", "mp-157", "mp-1692", "mp-600604", "mp-10118",
    "mp-1602", "mp-568100", "mp-10955", "mp-11262", "mp-471", "mp-11879", "mp-10956", "mp-570256", "mp-628616",
    "mp-10967", "mp-10074", "mp-10422", "mp-10322", "mp-10101", "mp-1058", "mp-2574", "mp-10254", "mp-10166",
    "mp-10128", "mp-574250", "mp-22995", "mp-1492", "mp-10232", "mp-15226", "mp-10010", "mp-10214", "mp-10659",
    "mp-2437", "mp-23208", "mp-1070", "mp-10161", "mp-11073", "mp-10059", "mp-571143",
]
# fmt: on

MODELS = (*METHODS, "none")  # the last is Crystalformer
RADIUS = 4.2  # Å
SHAPE = BatchShape(1024, 48, 128)  # one compiled program for each model
PARTS = BatchParts(lattice_frames=True, scatter=True)
TOLERANCE = 1e-10  # predictions are of the order of one
FLOAT32_TOLERANCE = 1e-5
UNIQUE = 2e-4  # lead over the second best from which there is no tie: twice the tolerance of the model


# Crystals


def in_cell(crystal, change):
    """The crystal in the cell of lattice vectors `change` @ lattice; a supercell if |det(change)| is above 1."""
    copies = round(abs(np.linalg.det(change)))
    reach = np.arange(-np.abs(change).sum(), np.abs(change).sum() + 1)
    shifts = np.stack(np.meshgrid(reach, reach, reach), -1).reshape(-1, 3)
    inside = np.round(shifts @ np.linalg.inv(change), 9) % 1.0
    _, distinct = np.unique(np.round(inside, 6) % 1.0, axis=0, return_index=True)
    assert len(distinct) == copies
    positions = [crystal.positions + shift @ crystal.lattice for shift in shifts[distinct]]
    species = np.tile(crystal.species, copies)
    return Crystal(species, np.concatenate(positions), change @ crystal.lattice, id=crystal.id)


def stretched(crystal, factors):
    return dataclasses.replace(
        crystal, positions=crystal.positions * factors, lattice=crystal.lattice * np.array(factors)
    )


def random_crystals(count):
    """Crystals of 1 to 6 atoms without symmetry, every third in a left-handed cell, every fourth flat or long."""
    rng, crystals = np.random.default_rng(0), []
    for number in range(count):
        crystal = random_crystal(rng, (1, 2, 3, 4, 4, 5, 5, 6, 6, 6)[number % 10])
        if (np.linalg.det(crystal.lattice) < 0) != (number % 3 == 0):
            crystal = in_cell(crystal, SWAP)
        if number % 4 == 0:
            crystal = stretched(crystal, [(1.3, 1.3, 0.6), (0.75, 0.75, 1.8)][number % 8 // 4])
        crystals.append(crystal)
    return crystals


def centrosymmetric_crystals():
    """Pairs of equal atoms at +p and -p in random cells: each crystal is its own mirror image, turned."""
    rng, crystals = np.random.default_rng(1), []
    while len(crystals) < 40:
        crystal = random_crystal(rng, 3, 40.0)
        center = rng.uniform(0, 1, 3) @ crystal.lattice
        positions = np.concatenate([crystal.positions - center, center - crystal.positions])
        both = Crystal(np.tile(crystal.species, 2), positions, crystal.lattice)
        nearest = np.sort(np.linalg.norm(batch_of([both], RADIUS, np.float64).rows.vector, axis=-1), axis=1)
        if nearest[nearest > 0].min() > 1.5:
            crystals.append(both)
    return crystals


KINDS = ["random", "real", *(pytest.param(f"many {kind}", marks=pytest.mark.slow) for kind in ("random", "real"))]


@functools.cache
def crystals_of(kind):
    """Of "random" and "real" crystals there are "many", of which a part is enough to notice most mistakes."""
    if kind in ("random", "many random"):
        return random_crystals(128 if kind == "random" else 340)
    if kind == "centrosymmetric":
        return centrosymmetric_crystals()
    if kind == "ties":
        return real_crystals(DIFFERENT_TIES)
    part = slice(None, None, 2 if kind == "real" else 1)
    ids = GENERAL[part] + DIFFERENT_TIES + OF_HIGH_SYMMETRY[part]
    return [primitive(name) for name in TEXTBOOK] + real_crystals(ids)


# Other descriptions of the same crystal

SWAP = np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1]])


def turn(crystal, rng):
    return rotated(crystal, random_rotation(rng))


def move(crystal, rng):
    return dataclasses.replace(crystal, positions=crystal.positions + rng.uniform(-5, 5, 3))


def permute(crystal, rng):
    order = rng.permutation(crystal.num_atoms)
    return dataclasses.replace(crystal, species=crystal.species[order], positions=crystal.positions[order])


def move_atoms_to_other_cells(crystal, rng):
    shifts = rng.integers(-2, 3, crystal.positions.shape)
    return dataclasses.replace(crystal, positions=crystal.positions + shifts @ crystal.lattice)


def choose_other_cell(crystal, rng):
    return in_cell(crystal, np.array([[1, 2, 0], [0, 1, -1], [1, 2, 1]]))


def choose_cell_of_other_hand(crystal, rng):
    changed = in_cell(crystal, SWAP)
    assert np.linalg.det(changed.lattice) * np.linalg.det(crystal.lattice) < 0
    return changed


def double(crystal, rng):
    return in_cell(crystal, np.diag([2, 1, 1]))


def double_and_shear(crystal, rng):
    return in_cell(crystal, np.array([[1, 1, 0], [-1, 1, 0], [0, 1, 1]]))


def mirror(crystal, rng):
    normal = random_rotation(rng)[0]
    return rotated(crystal, np.eye(3) - 2 * np.outer(normal, normal))


SAME_ATOMS = (turn, move, permute, choose_other_cell, choose_cell_of_other_hand)
SAME_LATTICE = (*SAME_ATOMS, move_atoms_to_other_cells)
DESCRIPTIONS = (*SAME_LATTICE, double, double_and_shear)
INVARIANCES = {"pca": SAME_ATOMS, "lattice": SAME_LATTICE}  # of the others: all DESCRIPTIONS


# Models


def config_of(model, **changes):
    """A model of two blocks and two heads with a small basis."""
    frames = {"frame_method": model, "value_pe_angle_real": 8}
    if model == "none":
        frames = {"frame_method": "no", "value_pe_angle_real": 0}
    return small_config(**{"value_pe_dist_real": 8, "scale_real": (1.0,), "precision": "float64", **frames, **changes})


def evaluate(config, variables, batch, frame_seeds=None, given_frames=None):
    """Predictions [B, 1] and the intermediates of the attention, queries and keys among them."""
    return CrystalFramer(config).apply(
        variables,
        batch,
        frame_seeds,
        given_frames=given_frames,
        mutable=["intermediates"],
        capture_intermediates=lambda module, _: module.name in ("q", "k"),
    )


# float64 without optimisation, in half the time, but so that programs with and without draws have the same bits.
COMPILED = {
    "float32": jax.jit(evaluate, static_argnums=0),
    "float64": jax.jit(
        evaluate,
        static_argnums=0,
        compiler_options={"xla_backend_optimization_level": 0, "xla_backend_extra_options": ""},
    ),
}


@functools.cache
def variables_of(config):
    """Random weights with halved queries: with full ones, many atoms choose images of their own, which are ties."""
    variables = random_variables(config, dtype=config.dtype)
    for block in range(config.num_layers):
        query = variables["params"][f"block_{block}"]["attention"]["q"]
        query["kernel"] /= 2
        query["bias"] /= 2
    return variables


@functools.cache
def batches_of(kind, describe=None, dtype="float64"):
    """The crystals in batches of one shape."""
    rng, crystals = np.random.default_rng(0), crystals_of(kind)
    if describe is not None:
        crystals = [describe(crystal, rng) for crystal in crystals]
    groups = [[]]
    for crystal in crystals:
        atoms = sum(other.num_atoms for other in groups[-1]) + crystal.num_atoms
        if atoms > SHAPE.num_atoms or len(groups[-1]) == SHAPE.num_crystals:
            groups.append([])
        groups[-1].append(crystal)
    return [batch_of(group, RADIUS, np.dtype(dtype).type, SHAPE, parts=PARTS) for group in groups]


def predict(config, kind, describe=None, seed=None, given_frames=None):
    """Predictions [number of crystals] of a model with random weights."""
    seeds = None if seed is None else draw(seed_of(seed), np.arange(SHAPE.num_crystals))
    predictions = []
    with jax.enable_x64(config.precision == "float64"):
        for batch in batches_of(kind, describe, config.precision):
            result, _ = COMPILED[config.precision](config, variables_of(config), batch, seeds, given_frames)
            predictions.append(result[batch.crystal_sizes > 0, 0])
    return np.concatenate(predictions)


@functools.cache
def expected(config, kind):
    """Predictions of the crystals as they come."""
    return predict(config, kind)


# Ties


def leads(logits, batch):
    """How far the best choice for e1, and then for e2, is ahead of the second best: the smaller of the two, [N, H]."""
    distance = np.linalg.norm(batch.rows.vector, axis=-1)
    unit = batch.rows.vector / np.where(distance > 0, distance, 1)[..., None]
    logits = np.where(distance[:, None] > 0, logits, -np.inf)
    e1 = np.take_along_axis(unit, logits.argmax(axis=-1)[..., None], axis=1)  # [N, H, 3]
    cosine = np.abs(np.einsum("nhx,nmx->nhm", e1, unit))
    scores = np.where(cosine < 0.9999, logits + np.log(np.maximum(1 - cosine, 1e-5)), -np.inf)
    with np.errstate(invalid="ignore"):  # of padding
        best = [np.diff(np.sort(x, axis=-1)[..., -2:])[..., 0] for x in (logits, scores)]
    return np.minimum(*best)


def all_atoms(batch, condition):
    """For which crystals the condition [N] holds for every atom."""
    result = batch.crystal_sizes > 0
    np.logical_and.at(result, batch.crystal_of_atom[batch.species > 0], condition[batch.species > 0])
    return result[batch.crystal_sizes > 0]


@functools.cache
def has_unique_frames(model, kind):
    """Whether the frames of each crystal are unique, [number of crystals].

    `weighted_pca` and `pca` take their signs from `max_static` frames.
    """
    if model == "none":
        return np.full(len(crystals_of(kind)), True)
    if model == "lattice":
        return np.array([len(lattice_frames(crystal.lattice, UNIQUE)[0]) == 1 for crystal in crystals_of(kind)])
    config, found = config_of(model), []
    for batch in batches_of(kind):
        unique = leads(-np.sum(batch.rows.vector**2, axis=-1)[:, None], batch)[:, 0] > UNIQUE
        if model == "max":
            with jax.enable_x64(True):
                _, state = COMPILED["float64"](config, variables_of(config), batch)
            for block in state["intermediates"].values():
                found_in = block["attention"]
                q, k = (
                    np.asarray(found_in[name]["__call__"][0]).reshape(-1, config.head_num, config.k_dim)
                    for name in ("q", "k")
                )
                dots = np.einsum("nhd,nmhd->nhm", q, k[batch.rows.index]) / np.sqrt(config.k_dim)
                square = np.sum(batch.rows.vector**2, axis=-1)[:, None]
                logits = dots + np.asarray(found_in["a"][0])[..., None] * square
                unique &= leads(logits, batch).min(axis=1) > UNIQUE
        found.append(all_atoms(batch, unique))
    return np.concatenate(found)


# Invariances

CASES = [
    pytest.param(model, describe, id=f"{model}-{describe.__name__}")
    for model in MODELS
    for describe in INVARIANCES.get(model, DESCRIPTIONS)
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("model", "describe"), CASES)
def test_prediction_does_not_depend_on_the_description(model, describe, kind):
    config = config_of(model)
    np.testing.assert_allclose(predict(config, kind, describe), expected(config, kind), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", [KINDS[1], KINDS[3]])
@pytest.mark.parametrize("describe", DESCRIPTIONS)
def test_prediction_in_float32_does_not_depend_on_the_description(describe, kind):
    """As users run it."""
    config = config_of("max", precision="float32")
    predictions = predict(config, kind, describe)
    assert predictions.dtype == np.float32
    np.testing.assert_allclose(predictions, expected(config, kind), rtol=0, atol=FLOAT32_TOLERANCE)


def test_draws_turn_with_the_crystal():
    """The same seed draws the same neighbors of a turned crystal."""
    config = config_of("max")
    drawn = predict(config, "real", seed=5)
    np.testing.assert_allclose(predict(config, "real", turn, 5), drawn, rtol=0, atol=TOLERANCE)


# Mirror images


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", METHODS)
def test_prediction_from_moduli_of_cosines_is_that_of_the_mirror_image(model, kind):
    """Mirrored are the directions of the axes, but not all their signs: frames stay right-handed. Ties may differ."""
    config = config_of(model, cos_abs=1, num_layers=1)
    holds, mirrored = has_unique_frames(model, kind), predict(config, kind, mirror)
    assert np.sum(holds) >= {"random": 75, "real": 50, "many random": 200, "many real": 100}[kind]
    np.testing.assert_allclose(mirrored[holds], expected(config, kind)[holds], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[2]])
@pytest.mark.parametrize("model", MODELS)
def test_prediction_with_frames_tells_the_hands_of_a_chiral_crystal_apart(model, kind):
    """And Crystalformer does not. Cells of one or two atoms are not chiral by themselves."""
    config = config_of(model)
    chiral = np.array([crystal.num_atoms > 2 for crystal in crystals_of(kind)])
    difference = np.abs(predict(config, kind, mirror) - expected(config, kind))
    if model == "none":
        assert difference.max() < TOLERANCE
    else:
        assert difference[chiral].min() > 1e-6


@pytest.mark.parametrize("model", METHODS)
def test_prediction_of_a_crystal_with_an_inversion_center_is_that_of_its_mirror_image(model):
    """It is the same crystal, turned; its atoms change places, and the images of an atom in their pairs."""
    config = config_of(model)
    mirrored = predict(config, "centrosymmetric", mirror)
    np.testing.assert_allclose(mirrored, expected(config, "centrosymmetric"), rtol=0, atol=TOLERANCE)


# These keep the tests above from passing without meaning.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", MODELS)
def test_predictions_differ_between_crystals(model, kind):
    predictions = expected(config_of(model), kind)
    assert np.std(predictions) > 0.5
    assert np.diff(np.sort(predictions)).min() > 100 * TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_differ_between_models(kind):
    """A crystal may have the same max frames by both definitions, but few do."""
    predictions = [expected(config_of(model), kind) for model in MODELS]
    for i, first in enumerate(predictions):
        for second in predictions[:i]:
            assert np.mean(np.abs(first - second) > 1e-3) > 0.5


def test_frames_matter_and_fixed_frames_are_not_invariant():
    config = config_of("max")
    axes = np.broadcast_to(np.eye(3), (SHAPE.num_atoms, config.head_num, 3, 3))
    fixed = [axes] * config.num_layers
    before = predict(config, "random", given_frames=fixed)
    assert np.min(np.abs(before - expected(config, "random"))) > 1e-6
    assert np.min(np.abs(predict(config, "random", turn, given_frames=fixed) - before)) > 1e-6


@pytest.mark.parametrize(
    ("model", "describe"),
    [("pca", move_atoms_to_other_cells), ("pca", double), ("lattice", double), ("lattice", double_and_shear)],
)
def test_frames_of_a_given_cell_depend_on_it(model, describe):
    """So these are no invariances of `pca` and `lattice`. A doubled lattice may keep its three shortest vectors."""
    config = config_of(model)
    changed = np.abs(predict(config, "random", describe) - expected(config, "random")) > 1e-3
    assert np.mean(changed) > 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_unique_frames_do_not_depend_on_a_draw(kind):
    config, holds = config_of("max"), has_unique_frames("max", kind)
    for seed in range(4):
        drawn = predict(config, kind, seed=seed)
        np.testing.assert_array_equal(drawn[holds], expected(config, kind)[holds])


def test_ties_matter():
    """Drawn, predictions of these crystals are not repeatable.

    Those of rock salt and its like are: all the frames that are tied there are related by rotations of the crystal.
    """
    assert not has_unique_frames("max", "ties").any()
    drawn = [predict(config_of("max"), "ties", seed=seed) for seed in range(6)]
    assert np.all(np.ptp(drawn, axis=0) > 1e-5)
