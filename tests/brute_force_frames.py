"""Periodic images, attention weights and frames of one crystal in plain numpy: the geometry under brute_force.py.

A frame holds three axes as rows e1, e2, e3. Shapes: n atoms, H heads, dk channels per head, K lattice images.
"""

import math

import numpy as np

_COLLINEAR = 0.9999  # a neighbor with |e1 . u| at or above this cannot define the second frame axis
_MIN_PERPENDICULARITY = 1e-5  # floor of 1 - |e1 . u| inside the logarithm of the second axis' score
_TIES = 1e-4  # scores closer than this to the best are equally good
_MARKER = np.array([1.0, 1.7, 2.9])


def frames(method, q, k, a, positions, lattice, radius=16.0, box=None):
    """Frames of every atom and head of one crystal by the official name of the method.

    Args:
      method: max | max_static | weighted_pca | pca | lattice.
      q, k: [n, H, dk]. a: [n, H], exponent of the attention, Å^-2. (`pca` and `lattice` read only H.)
      positions: [n, 3], Å. lattice: [3, 3] rows, Å. radius, box: see `image_shifts`.

    Returns:
      [n, H, 3 axes, 3], right-handed, rows of unit length (orthogonal unless the method is `lattice`).

    Raises ValueError if the method is unknown.
    """
    q, k, a, positions, lattice = (np.asarray(x, np.float64) for x in (q, k, a, positions, lattice))
    if method == "max":
        return max_frames(q, k, a, positions, lattice, radius, box)
    if method == "weighted_pca":
        return weighted_pca_frames(q, k, a, positions, lattice, radius, box)
    if method == "max_static":
        return max_frames(q, k, a, positions, lattice, radius, box, is_static=True)
    if method == "pca":
        of_atoms = pca_frame(positions)
    elif method == "lattice":
        of_atoms = lattice_frame(lattice)
    else:
        raise ValueError(f"brute_force: no frame_method={method!r}")
    # The same for every head; of `pca` and `lattice`, for every atom too.
    return np.broadcast_to(of_atoms.reshape(-1, 1, 3, 3), (*a.shape, 3, 3)).copy()


def max_frames(q, k, a, positions, lattice, radius=16.0, box=None, is_static=False):
    """Frames of the method `max`: the neighbor with the largest logit, then the best one not along it.

    A logit is q_i . k_j / sqrt(dk) + a_i d^2, or -d^2 (d in Å) if `is_static`; the second axis maximises
    logit + log(1 - |cosine to the first|). Arguments and result as in `frames`. Orthonormal. Among ties that frame is
    taken whose direction e1 + 1.7 e2 + 2.9 e3 sees most of the attention of q, k and a.
    """
    q, k, a, positions, lattice = (np.asarray(x, np.float64) for x in (q, k, a, positions, lattice))
    n, heads, dk = q.shape
    shifts = image_shifts(positions, lattice, radius, box)
    result = np.zeros((n, heads, 3, 3))
    for i in range(n):
        distance, direction = neighbors(i, positions, shifts)
        for h in range(heads):
            logit = (k[:, h] @ q[i, h] / math.sqrt(dk))[:, None] + a[i, h] * distance**2  # [n, K]
            result[i, h] = _best_frame(-(distance**2) if is_static else logit, logit, distance, direction)
    return result


def weighted_pca_frames(q, k, a, positions, lattice, radius=16.0, box=None):
    """Frames of the method `weighted_pca`: eigenvectors of sum p u u^T over the neighbors at d > 0.

    p is the attention weight, a softmax over all neighbors with the atom itself; u the unit vector to the neighbor.
    Eigenvalues ascend from e1 to e3. The signs are arbitrary but for the right hand: compare up to (+, +, +),
    (+, -, -), (-, +, -) and (-, -, +). Arguments and result as in `frames`.
    """
    q, k, a, positions, lattice = (np.asarray(x, np.float64) for x in (q, k, a, positions, lattice))
    n, heads, _ = q.shape
    shifts = image_shifts(positions, lattice, radius, box)
    result = np.zeros((n, heads, 3, 3))
    for i in range(n):
        distance, direction = neighbors(i, positions, shifts)  # the direction of the atom itself is zero
        for h in range(heads):
            attention, within_pair = pair_weights(q[i, h], k[:, h], a[i, h], distance)
            moment = np.einsum("j,jn,jnx,jny->xy", attention, within_pair, direction, direction)
            result[i, h] = _right_handed_eigenvectors(moment)
    return result


def pca_frame(positions):
    """Frame of the method `pca`, [3 axes, 3]: eigenvectors of the centred scatter of the atoms as given, no images.

    positions: [n, 3], Å. Eigenvalues ascend from e1 to e3; signs as in `weighted_pca_frames`. Axes of equal
    eigenvalues are arbitrary: all three if n = 1, two if n = 2 or the atoms lie on a line.
    """
    centered = positions - positions.mean(0)
    return _right_handed_eigenvectors(centered.T @ centered)


def lattice_frame(lattice):
    """Frame of the method `lattice`, [3 axes, 3]: directions of the three shortest lattice vectors, not orthogonal.

    The second is the shortest not along the first, the third the shortest not in their plane; both point to the
    side of the first, and all three are negated if that makes a right hand. So the choice of the first among +v and
    -v does not matter. Arbitrary are vectors of equal length, and the sign of one at a right angle to the first.
    lattice: [3, 3] rows, Å.
    """
    longest = np.linalg.norm(lattice, axis=1).max()  # the rows span the cell: none of the three is longer
    limits = np.ceil(longest * np.linalg.norm(np.linalg.inv(lattice), axis=0)).astype(int)
    coefficients = _integer_box(limits)  # [K, 3]
    order = np.argsort(np.linalg.norm(coefficients @ lattice, axis=1), kind="stable")
    first, *others = coefficients[order[1:]]  # the zero vector comes first
    second = next(c for c in others if np.cross(first, c).any())  # exact: coefficients are integers
    third = next(c for c in others if np.cross(first, second) @ c)
    vectors = np.stack([first, second, third]) @ lattice
    vectors[vectors @ vectors[0] < 0] *= -1
    if np.linalg.det(vectors) < 0:
        vectors = -vectors
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def image_shifts(positions, lattice, radius, box=None):
    """Translations n L [K, 3]: all n in [-box, box]^3, or enough for every image within radius (Å) of every atom."""
    if box is not None:
        return _integer_box([box] * 3) @ lattice
    inverse = np.linalg.inv(lattice)
    heights = 1 / np.linalg.norm(inverse, axis=0)  # [3] distances between opposite faces of the cell, Å
    fractional = positions @ inverse
    reach = radius / heights + np.ptp(fractional, axis=0)
    return _integer_box(np.ceil(reach).astype(int)) @ lattice


def neighbors(i, positions, shifts):
    """Distances [n, K], Å, and unit vectors [n, K, 3] from atom i to every image; the atom itself has zeros."""
    vector = (positions - positions[i])[:, None] + shifts
    distance = np.linalg.norm(vector, axis=-1)
    return distance, vector / np.where(distance > 0, distance, 1)[..., None]


def pair_weights(query, keys, a, distance):
    """Attention of one atom and head: over the atoms j of the cell [n], and over the images inside each pair [n, K].

    query: [dk]. keys: [n, dk]. a: exponent, Å^-2. distance: [n, K], Å. Each row of either sums to 1.
    """
    exponent = a * distance**2
    z = log_sum_exp(exponent)  # [n]
    score = keys @ query / math.sqrt(len(query)) + z
    return np.exp(score - log_sum_exp(score)), np.exp(exponent - z[:, None])


def log_sum_exp(x):
    """log sum exp over the last axis."""
    return x.max(-1) + np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1))


def _best_frame(score, logit, distance, direction):
    """[3, 3] orthonormal axes: of the frames of equally good scores that whose marker sees most; arrays [n, K]."""
    score, logit, direction = (x[distance > 0] for x in (score, logit, direction))  # never the atom itself
    weight = np.exp(logit - logit.max())
    seen, best = -np.inf, None
    for e1 in direction[score >= score.max() - _TIES]:
        cosine = np.abs(direction @ e1)
        second = score + np.log(np.maximum(1 - cosine, _MIN_PERPENDICULARITY))
        second = np.where(cosine < _COLLINEAR, second, -np.inf)
        for u2 in direction[second >= second.max() - _TIES]:
            e2 = u2 - (u2 @ e1) * e1
            e2 /= np.linalg.norm(e2)
            frame = np.stack([e1, e2, np.cross(e1, e2)])
            value = weight @ np.exp(direction @ (_MARKER @ frame))
            if value > seen:
                seen, best = value, frame
    return best


def _right_handed_eigenvectors(symmetric):
    """Eigenvectors of a [3, 3] matrix as rows, eigenvalues ascending; the last is negated for a right hand."""
    rows = np.linalg.eigh(symmetric)[1].T.copy()
    rows[2] *= np.sign(np.linalg.det(rows))
    return rows


def _integer_box(limits):
    """[K, 3] every n with |n_i| <= limits[i]."""
    axes = [np.arange(-limit, limit + 1) for limit in limits]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
