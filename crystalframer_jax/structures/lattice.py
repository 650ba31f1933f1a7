"""The short vectors of a lattice in canonical order, which lattice frames choose from."""

import functools

import numpy as np

SAME_LENGTH = 1e-4  # Å; vectors whose lengths are closer than this count as equally long
_STEPS = np.arange(-2, 3)
COMBINATIONS = np.delete(np.stack(np.meshgrid(_STEPS, _STEPS, _STEPS, indexing="ij"), -1).reshape(-1, 3), 62, axis=0)


def lattice_vectors(lattice: np.ndarray) -> np.ndarray:
    """The 124 vectors n1 b1 + n2 b2 + n3 b3 with n in [-2, 2] of an LLL-reduced basis b, [124, 3] Å.

    The three shortest independent vectors of the lattice are among them. Canonical order is by length and, within
    1e-4 Å, by the integer coefficients with respect to the given `lattice` [3, 3] (rows), largest first. It does not
    change when the crystal is turned.
    """
    lattice = np.asarray(lattice, np.float64)
    coefficients = COMBINATIONS @ _reduction(np.round(lattice @ lattice.T, 9).tobytes())
    vectors = coefficients @ lattice
    length = np.sqrt(np.einsum("ki,ij,kj->k", coefficients, lattice @ lattice.T, coefficients))
    order = np.argsort(length, kind="stable")
    shell = np.empty(len(order), int)
    shell[order] = np.cumsum(np.diff(length[order], prepend=0) > SAME_LENGTH)
    return vectors[np.lexsort((*-coefficients.T[::-1], shell))]


@functools.lru_cache(maxsize=200_000)
def _reduction(metric: bytes) -> np.ndarray:
    """Integer coefficients [3, 3] of an LLL-reduced basis of the lattice with this metric (float64 bytes)."""
    from pymatgen.core import Lattice

    lattice = np.linalg.cholesky(np.frombuffer(metric).reshape(3, 3))
    reduced = Lattice(lattice).get_lll_reduced_lattice().matrix
    return np.rint(reduced @ np.linalg.inv(lattice)).astype(int)
