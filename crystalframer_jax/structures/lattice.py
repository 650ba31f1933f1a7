"""Lattices: boxes of images, the reduced basis, and short vectors for lattice frames."""

import functools
import itertools
import math

import numpy as np

PARALLEL = 0.9999  # cosine from which a vector is along the first of a frame
PERPENDICULAR = 1e-4  # |cosine| up to which neither sign of a vector is acute
COPLANAR = 1e-3  # |cosine| to the normal up to which a vector lies in the plane of two others
MOST_FRAMES = 144  # of a lattice: of fcc


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


# All but (0, 0, 0): the three shortest vectors are among these combinations of a reduced basis.
COMBINATIONS = np.delete(integer_box(2), 62, axis=0)


def lattice_frames(lattice: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """Lists the frames of three shortest lattice vectors (unit vectors, not orthogonal), [C, 3, 3], and shares [C].

    The shortest; the next shortest that is not collinear, at an acute (or right) angle to the first; the next that is
    not coplanar, likewise; all negated if they are left-handed. Vectors whose lengths are within `tolerance` Å are
    equally good, so there may be several frames, at most MOST_FRAMES; a share is the probability of a frame if each
    vector is drawn among the equally good ones.
    """
    lattice = np.asarray(lattice, np.float64)
    coefficients, shares = _frames_of_metric(np.round(lattice @ lattice.T, 9).tobytes(), tolerance)
    vectors = coefficients @ lattice * np.sign(np.linalg.det(lattice))
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True), shares


@functools.lru_cache(maxsize=20_000)
def _frames_of_metric(metric: bytes, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """Finds the frames of a right-handed lattice with this metric: integer coefficients [C, 3, 3], and shares [C]."""
    lattice = np.linalg.cholesky(np.frombuffer(metric).reshape(3, 3))
    coefficients = COMBINATIONS @ reduction(lattice)
    length = np.linalg.norm(coefficients @ lattice, axis=1)
    unit = coefficients @ lattice / length[:, None]

    def equally_good(allowed: np.ndarray) -> np.ndarray:
        return np.flatnonzero(allowed & (length <= length[allowed].min() + tolerance))

    found: dict[bytes, float] = {}
    firsts = equally_good(np.full(len(length), True))
    for first in firsts:
        cosine = unit @ unit[first]
        acute = cosine > -PERPENDICULAR
        seconds = equally_good(acute & (cosine < PARALLEL))
        for second in seconds:
            normal = np.cross(unit[first], unit[second])
            thirds = equally_good(acute & (np.abs(unit @ normal) > COPLANAR * np.linalg.norm(normal)))
            for third in thirds:
                frame = coefficients[[first, second, third]]
                frame = frame * (1 if unit[third] @ normal > 0 else -1)
                share = 1 / len(firsts) / len(seconds) / len(thirds)
                found[frame.tobytes()] = found.get(frame.tobytes(), 0.0) + share
    frames = np.frombuffer(b"".join(found), COMBINATIONS.dtype).reshape(-1, 3, 3)
    return frames, np.array(list(found.values()))


def reduction(lattice: np.ndarray) -> np.ndarray:
    """Finds an integer matrix U [3, 3] of determinant 1 or -1 such that U @ lattice is a reduced (LLL) basis."""
    from pymatgen.core import Lattice

    return np.rint(Lattice(lattice).lll_mapping).astype(np.int64)
