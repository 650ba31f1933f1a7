"""Predictions do not depend on how a crystal is described or turned.

Crystals without ties: the frames of an atom are unique if no symmetry operation leaves the atom in place. These
crystals have space group P1 or P-1 with all atoms on general positions, and `test_crystals_have_no_ties` sees to it
that their frames never depend on a draw. In other crystals the choice between equally good neighbors follows the order
of the rows, which turns with the crystal but changes with its cell.

Mirror images are not in the list: frames are right-handed, so the two hands of a chiral crystal may differ.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from support import (
    SYMMETRIC,
    batch_of,
    primitive,
    random_rotation,
    random_variables,
    real_crystals,
    rotated,
    small_config,
)

from crystalframer_jax.batch import BatchShape
from crystalframer_jax.crystal import Crystal
from crystalframer_jax.model.regressor import CrystalFramer

# fmt: off
WITHOUT_TIES = [
    "mp-14983", "mp-556788", "mp-632686", "mp-636821", "mp-10621", "mp-554678", "mp-696588",  # P1
    "mp-27178", "mp-541588", "mp-613162", "mp-14241", "mp-541656", "mp-569380", "mp-569578", "mp-570829",  # P-1
    "mp-6999", "mp-7622", "mp-8190", "mp-9145", "mp-9481", "mp-23079", "mp-30120", "mp-31268", "mp-561622",
]
# Hf2S and VTe (P63/mmc), MgCu2 (Fd-3m), Sb (R-3m), SnO2 (P42/mnm), UTeAs (P4/nmm), CdTe (P63mc), MoAs2 (C2/m)
WITH_TIES = ["mp-10000", "mp-10256", "mp-1038", "mp-104", "mp-856", "mp-10105", "mp-12779", "mp-1337"]
# fmt: on

RADIUS = 6.93  # Å, the default of the model
SHAPE = BatchShape(640, 128, 32)  # holds the supercells, so that all batches share one compiled program
TOLERANCE = 1e-5  # predictions are of the order of one
CONFIG = small_config()


@functools.cache
def without_ties():
    return real_crystals(WITHOUT_TIES)


@functools.cache
def variables():
    return random_variables(CONFIG)


@jax.jit
def apply(variables, batch, frame_key=None, given_frames=None):
    return CrystalFramer(CONFIG).apply(variables, batch, frame_key, given_frames=given_frames)


def predict(crystals, frame_key=None, given_frames=None):
    """Predictions [number of crystals] of a model with random weights."""
    batch = batch_of(crystals, RADIUS, shapes=SHAPE)
    return np.asarray(apply(variables(), batch, frame_key, given_frames))[: len(crystals), 0]


@pytest.fixture(scope="module")
def predictions():
    """Of the crystals without ties, as they come."""
    return predict(without_ties())


# Other descriptions of the same crystal


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


def double(crystal, rng):
    return in_cell(crystal, np.diag([2, 1, 1]))


def double_and_shear(crystal, rng):
    return in_cell(crystal, np.array([[1, 1, 0], [-1, 1, 0], [0, 1, 1]]))


def choose_other_cell(crystal, rng):
    return in_cell(crystal, np.array([[1, 2, 0], [0, 1, -1], [1, 2, 1]]))


def choose_left_handed_cell(crystal, rng):
    changed = in_cell(crystal, np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1]]))
    assert np.linalg.det(changed.lattice) * np.linalg.det(crystal.lattice) < 0
    return changed


DESCRIPTIONS = [
    turn,
    move,
    permute,
    move_atoms_to_other_cells,
    double,
    double_and_shear,
    choose_other_cell,
    choose_left_handed_cell,
]


@pytest.mark.parametrize("describe", DESCRIPTIONS, ids=lambda function: function.__name__)
def test_prediction_does_not_depend_on_the_description(describe, predictions):
    rng = np.random.default_rng(0)
    described = [describe(crystal, rng) for crystal in without_ties()]
    np.testing.assert_allclose(predict(described), predictions, rtol=0, atol=TOLERANCE)


# These keep the tests above from passing without meaning


def test_crystals_have_no_ties(predictions):
    for seed in range(4):
        np.testing.assert_array_equal(predict(without_ties(), jax.random.key(seed)), predictions)


def test_predictions_differ_between_crystals(predictions):
    assert np.std(predictions) > 0.5
    assert np.diff(np.sort(predictions)).min() > 10 * TOLERANCE


def test_frames_matter_and_fixed_frames_are_not_invariant(predictions):
    axes = np.broadcast_to(np.eye(3, dtype=np.float32), (SHAPE.num_atoms, CONFIG.head_num, 3, 3))
    fixed = [axes] * CONFIG.num_layers
    before = predict(without_ties(), given_frames=fixed)
    assert np.all(np.abs(before - predictions) > 100 * TOLERANCE)
    rng = np.random.default_rng(0)
    after = predict([turn(crystal, rng) for crystal in without_ties()], given_frames=fixed)
    assert np.all(np.abs(after - before) > 100 * TOLERANCE)


# Crystals whose frames are ties. Evaluation takes the first neighbor in the order of the rows, which turns with them.


def test_prediction_of_symmetric_crystals_does_not_change_when_they_turn():
    crystals = [primitive(name) for name in SYMMETRIC] + real_crystals(WITH_TIES)
    expected = predict(crystals)
    assert np.std(expected) > 0.5
    rng = np.random.default_rng(1)
    for _ in range(5):
        turned = [turn(crystal, rng) for crystal in crystals]
        np.testing.assert_allclose(predict(turned), expected, rtol=0, atol=TOLERANCE)


def test_draws_turn_with_the_crystal():
    """The same key draws the same neighbors of a turned crystal."""
    crystals, key = real_crystals(WITH_TIES), jax.random.key(5)
    turned = [turn(crystal, np.random.default_rng(2)) for crystal in crystals]
    np.testing.assert_allclose(predict(turned, key), predict(crystals, key), rtol=0, atol=TOLERANCE)


def test_ties_matter():
    """Without a rule, predictions of these crystals would not be repeatable.

    Those of rock salt and its like would: all the frames that are tied there are related by rotations of the crystal.
    """
    crystals = real_crystals(WITH_TIES)
    drawn = [predict(crystals, jax.random.key(seed)) for seed in range(6)]
    assert np.all(np.ptp(drawn, axis=0) > 100 * TOLERANCE)
