"""Crystals that were seen before are known again."""

import dataclasses

import numpy as np
from small_sets import raw_records
from support import random_crystal, random_rotation, real_crystals, rotated

from crystalframer_jax.data.seen import RESOLUTION, SeenCrystals, trace_of
from crystalframer_jax.structures.crystal import Crystal

IDS = [record["id"] for record in raw_records(30)]


def supercell(crystal: Crystal) -> Crystal:
    """Two cells along the first vector."""
    positions = np.concatenate([crystal.positions, crystal.positions + crystal.lattice[0]])
    lattice = crystal.lattice * np.array([[2.0], [1.0], [1.0]])
    return Crystal(np.tile(crystal.species, 2), positions, lattice)


def scaled(crystal: Crystal, factor: float) -> Crystal:
    return dataclasses.replace(crystal, positions=factor * crystal.positions, lattice=factor * crystal.lattice)


def test_by_id_or_by_structure():
    crystals = real_crystals(IDS)
    seen = SeenCrystals.of(np.array(IDS[:20]), crystals[:20])
    np.testing.assert_array_equal(seen.hold(np.array(IDS), crystals), np.arange(30) < 20)
    np.testing.assert_array_equal(seen.hold(np.array([f"mine-{id}" for id in IDS]), crystals), np.arange(30) < 20)
    others = [scaled(crystal, 1.1) for crystal in crystals]
    np.testing.assert_array_equal(seen.hold(np.array(IDS), others), np.arange(30) < 20)
    assert not seen.hold(np.array([f"mine-{id}" for id in IDS]), others).any()
    assert seen.hold(np.array([], str), []).tolist() == []


def test_another_description_of_the_structure():
    rng = np.random.default_rng(3)
    crystals = [random_crystal(rng, size) for size in (1, 2, 5)]
    seen = SeenCrystals.of(np.array(["a", "b", "c"]), crystals)
    for change in (supercell, lambda c: rotated(c, random_rotation(rng)), lambda c: scaled(c, 1.0001)):
        assert seen.hold(np.array(["x", "y", "z"]), [change(crystal) for crystal in crystals]).all()
    other = [dataclasses.replace(crystal, species=crystal.species % 98 + 1) for crystal in crystals]
    assert not seen.hold(np.array(["x", "y", "z"]), other).any()


def test_the_sums_of_a_trace():
    """One atom alone: itself is its only neighbor, so that the sums are 1 and Z^2."""
    alone = Crystal(np.array([14]), np.zeros((1, 3)), 20 * np.eye(3))
    trace = trace_of(alone)
    assert trace >> 16 & 0xFFFF == 0 and trace & 0xFFFF == round(RESOLUTION * np.log(14**2))
