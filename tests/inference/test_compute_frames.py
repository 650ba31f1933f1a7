"""compute_frames: frames of one structure from Python."""

import brute_force_frames
import numpy as np
import pytest
from support import EXAMPLES, primitive, random_crystal, random_rotation, rotated

from crystalframer_jax import compute_frames
from crystalframer_jax.config import ConfigError
from crystalframer_jax.structures.crystal import CrystalError

METHODS = ["max", "max_static", "weighted_pca", "pca", "lattice"]


@pytest.mark.parametrize("method", METHODS)
def test_frames_equal_the_reference_in_the_order_of_the_atoms(method):
    rng = np.random.default_rng(0)
    crystal = random_crystal(rng, 6)
    q, k = rng.normal(size=(2, 6, 3, 4))
    a = -rng.uniform(0.2, 0.4, (6, 3))
    frames = compute_frames(crystal, method, q=q, k=k, a=a, cutoff_radius=12.0)
    expected = brute_force_frames.frames(method, q, k, a, crystal.positions, crystal.lattice, radius=12.0)
    assert frames.shape == (6, 3, 3, 3) and frames.dtype == np.float64
    if method.endswith("pca"):  # the signs of eigenvectors are arbitrary
        np.testing.assert_allclose(np.abs(np.sum(frames * expected, axis=-1)), 1, atol=1e-10)
        np.testing.assert_allclose(np.linalg.det(frames), 1, atol=1e-10)
    else:
        np.testing.assert_allclose(frames, expected, atol=1e-10)


def seen_along_axes(crystal, frames):
    """What the axes of every atom see of its neighbors, weighted by distance and element: [n, 3]."""
    shifts, seen = brute_force_frames.image_shifts(crystal.positions, crystal.lattice, 6.93), []
    for i, axes in enumerate(frames[:, 0]):
        distance, unit = brute_force_frames.neighbors(i, crystal.positions, shifts)
        weight = np.where((distance > 0) & (distance < 6.93), crystal.species[:, None] * np.exp(-0.25 * distance**2), 0)
        seen.append([np.sum(weight * np.exp(unit @ axis)) for axis in axes])
    return np.array(seen)


@pytest.mark.parametrize("method", METHODS)
def test_frames_without_weights_turn_with_the_crystal(method):
    """Where symmetry leaves several that are equivalent another one may be taken, which sees the same."""
    rng = np.random.default_rng(1)
    rotation = random_rotation(rng)
    for crystal in (primitive("perovskite"), primitive("fcc"), random_crystal(rng, 4)):
        frames, turned = compute_frames(crystal, method), compute_frames(rotated(crystal, rotation), method)
        assert frames.shape == (crystal.num_atoms, 1, 3, 3)
        seen = seen_along_axes(crystal, frames), seen_along_axes(rotated(crystal, rotation), turned)
        np.testing.assert_allclose(*seen, rtol=1e-9)
        if crystal.id.startswith("random"):
            np.testing.assert_allclose(turned, frames @ rotation.T, atol=1e-9)


def test_a_seed_draws_among_ties_and_nothing_else():
    fcc, unique = primitive("fcc"), random_crystal(np.random.default_rng(2), 4)
    drawn = [compute_frames(fcc, seed=i) for i in range(6)]
    assert np.ptp(drawn, axis=0).max() > 0.5
    np.testing.assert_array_equal(compute_frames(unique, seed=0), compute_frames(unique))


def test_files_and_structures_give_the_same():
    from pymatgen.core import Structure

    file = EXAMPLES / "NaCl.cif"
    np.testing.assert_allclose(compute_frames(file), compute_frames(Structure.from_file(file)), atol=1e-12)


def test_what_is_wrong_is_said():
    crystal = primitive("rock salt")
    with pytest.raises(ConfigError, match=r"method='mox'.*allowed: max, max_static, weighted_pca, pca, lattice"):
        compute_frames(crystal, "mox")
    with pytest.raises(ConfigError, match=r"cutoff_radius=-1"):
        compute_frames(crystal, cutoff_radius=-1)
    with pytest.raises(ValueError, match=r"q and k together"):
        compute_frames(crystal, q=np.zeros((2, 1, 4)))
    with pytest.raises(ValueError, match=r"must be \[2, H, d_k\].*2 atoms"):
        compute_frames(crystal, q=np.zeros((3, 1, 4)), k=np.zeros((3, 1, 4)))
    with pytest.raises(ValueError, match=r"negative"):
        compute_frames(crystal, a=np.ones((2, 1)))
    with pytest.raises(CrystalError, match=r"nowhere\.cif"):
        compute_frames("nowhere.cif")
