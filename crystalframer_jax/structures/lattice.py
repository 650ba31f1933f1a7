"""Lattices: boxes of images, the reduced basis, and short vectors for lattice frames."""

import functools
import itertools
import math

import numpy as np

SAME_LENGTH = 1e-4  # Å; vectors whose lengths are closer than this count as equally long


def volume_of(lattice: np.ndarray) -> float:
    """Computes the volume of a cell in Å^3, in a fraction of the time of np.linalg.det."""
    (a, b, c), (d, e, f), (g, h, i) = lattice.tolist()
    return abs(a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g))


def geometry(lattice: np.ndarray) -> tuple[np.ndarray, list[float], float]:
    """Returns the inverse of a lattice [3, 3] (rows, Å), one over the distances of its faces (1/Å), volume (Å^3)."""
    inverse = np.linalg.inv(lattice)
    return inverse, [math.hypot(*column) for column in inverse.T.tolist()], volume_of(lattice)


def integer_box(reach: int) -> np.ndarray:
    """Lists integer vectors with components from -reach to reach, the last running fastest, [(2 reach + 1)^3, 3]."""
    return np.array(list(itertools.product(range(-reach, reach + 1), repeat=3)))


COMBINATIONS = np.delete(integer_box(2), 62, axis=0)  # all but (0, 0, 0)


def lattice_vectors(lattice: np.ndarray) -> np.ndarray:
    """Lists the 124 vectors n1 b1 + n2 b2 + n3 b3 with n in [-2, 2] of an LLL-reduced basis b, [124, 3] Å.

    The three shortest independent vectors of the lattice are among them. Canonical order is by length and, within
    1e-4 Å, by the integer coefficients with respect to the given `lattice` [3, 3] (rows), largest first. It does not
    change when the crystal is turned.
    """
    lattice = np.asarray(lattice, np.float64)
    coefficients = COMBINATIONS @ _reduction_of_metric(np.round(lattice @ lattice.T, 9).tobytes())
    vectors = coefficients @ lattice
    length = np.sqrt(np.einsum("ki,ij,kj->k", coefficients, lattice @ lattice.T, coefficients))
    order = np.argsort(length, kind="stable")
    shell = np.empty(len(order), int)
    shell[order] = np.cumsum(np.diff(length[order], prepend=0) > SAME_LENGTH)
    return vectors[np.lexsort((*-coefficients.T[::-1], shell))]


@functools.lru_cache(maxsize=200_000)
def _reduction_of_metric(metric: bytes) -> np.ndarray:
    return reduction(np.linalg.cholesky(np.frombuffer(metric).reshape(3, 3)))


def reduction(lattice: np.ndarray) -> np.ndarray:
    """Finds an integer matrix U [3, 3] of determinant 1 or -1 such that U @ lattice is a reduced (LLL) basis."""
    from pymatgen.core import Lattice

    return np.rint(Lattice(lattice).lll_mapping).astype(np.int64)
