"""Search for the periodic neighbors of atoms, within bounds: what would take far too long or too much is refused."""

import math
from typing import Any

import numpy as np

from crystalframer_jax.structures.errors import CrystalError
from crystalframer_jax.structures.lattice import geometry, reduction

MOST_NEIGHBORS = 5_000_000  # of all atoms of a crystal; over 0.5 GB while they are sorted
MOST_AT_ONCE = 8_000_000  # neighbors that a search of several centers may find at most
MANY_VISITED = 500_000  # images of atoms; to make them fewer is worth a change of basis
MOST_VISITED = 50_000_000  # images of atoms that one search looks at
MOST_CUBES = 1_000_000  # into which one search divides the space; 216 bytes each
TOLERANCE = 1e-6  # Å; a search looks so much farther, so that its own tolerance does not matter
GRID = 1.0  # Å; the least edge of those cubes
CAUSE = "are lengths in Å, is the cell right, are atoms doubled?"

Pairs = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def pairs_within(
    positions: np.ndarray, lattice: np.ndarray, radius: float, where: str, centers: np.ndarray | None = None
) -> Pairs:
    """Finds all pairs of an atom i and an image n of an atom j with |p_j + nL - p_i| <= radius.

    Atoms may be anywhere: they are wrapped into the cell for the search, and n is that of the `positions` given.
    Of (i, j, n) and (j, i, -n) one is listed, and no atom with itself. They are ordered by i, j and the image, in the
    basis of the search: that does not change when the crystal turns.

    Args:
      positions: [n, 3] Å. lattice: [3, 3] rows, Å. radius: Å.
      where: what the crystal is called in messages.
      centers: [c] numbers of atoms, all of whose neighbors are listed instead, themselves included, in any order.

    Returns:
      i [E], j [E], n [E, 3] int64, and the distance [E] in Å.

    Raises:
      CrystalError: there are too many neighbors, or the search would visit too many cells.
    """
    number, searched, change = len(positions), len(positions if centers is None else centers), None
    inverse, faces, volume = geometry(lattice)
    wider = radius + TOLERANCE
    if _visited(number, faces, wider) > MANY_VISITED:  # an oblique cell has a better basis
        change = reduction(lattice)
        lattice = np.ascontiguousarray(change @ lattice)
        inverse, faces, volume = geometry(lattice)
    expected = searched * number * 4 / 3 * math.pi * wider**3 / volume
    if not expected <= MOST_NEIGHBORS:
        raise _too_many(where, number, expected, wider)
    cell = np.floor(positions @ inverse)
    wrapped = positions
    if cell.any():
        is_outside = cell.any(axis=1)  # atoms inside keep their bits
        wrapped = positions.copy()
        wrapped[is_outside] -= cell[is_outside] @ lattice
    chunks: list[Any]
    chunks, most = [centers], searched * number * math.prod(2 * wider * face + 1 for face in faces)
    if most > MOST_AT_ONCE:
        chunks = _chunks(wrapped, np.arange(number) if centers is None else centers, inverse, faces, wider)
    _check_size(wrapped if centers is None else wrapped[centers], lattice, faces, wider, len(chunks), number, where)
    images = [2 * math.ceil(wider * face) + 5 for face in faces]
    parts, found = [], 0
    for some in chunks:
        i, j, n, distance = _search(wrapped, wrapped if some is None else wrapped[some], lattice, wider)
        found += len(i)
        if found > MOST_NEIGHBORS:
            raise _too_many(where, number, found, wider)
        i, n = i if some is None else some[i], np.rint(n)
        kept = _once(i, j, n, number, images) if centers is None else np.arange(len(i))
        kept = kept[distance[kept] <= radius]
        parts.append((i[kept], j[kept], n[kept], distance[kept]))
    i, j, n, distance = parts[0] if len(parts) == 1 else map(np.concatenate, zip(*parts, strict=True))
    n = n.astype(np.int64)
    if wrapped is not positions:
        n += (cell[i] - cell[j]).astype(np.int64)
    return i, j, n if change is None else n @ change, distance


def _search(points: np.ndarray, centers: np.ndarray, lattice: np.ndarray, radius: float) -> Pairs:
    from pymatgen.optimization.neighbors import find_points_in_spheres

    return find_points_in_spheres(points, centers, float(radius), np.ones(3, dtype=np.int64), lattice, 1e-8)


def _once(i: np.ndarray, j: np.ndarray, n: np.ndarray, number: int, images: list[int]) -> np.ndarray:
    """Lists the places of one direction of each pair, in the order of i, j and n.

    `number` is that of the atoms, `images` more than there are along each axis. By `_check_size` their product is so
    small that the numbers below are exact.
    """
    per_atom = float(math.prod(images))
    step = n @ np.array([images[1] * images[2], images[2], 1.0]) + (j - i) * per_atom  # 0 for an atom and itself
    kept = np.flatnonzero(step < 0)
    return kept[np.argsort(i[kept] * (number * per_atom) + step[kept])]


def _check_size(
    centers: np.ndarray, lattice: np.ndarray, faces: list[float], radius: float, searches: int, number: int, where: str
) -> None:
    """Raises CrystalError if searches around `centers` [c, 3] would visit or divide too much space."""
    visited = searches * _visited(number, faces, radius)
    is_large = _cubes(_box(lattice), radius) > MOST_CUBES  # else the atoms are in less
    if is_large:
        is_large = _cubes(np.ptp(centers, axis=0).tolist(), radius) > MOST_CUBES
    if is_large or visited > (MOST_VISITED if searches == 1 else 20 * MOST_VISITED):
        lengths = " x ".join(f"{length:.4g}" for length in np.linalg.norm(lattice, axis=1))
        raise CrystalError(
            f"{where}: the cell ({lengths} Å, {1 / max(faces):.3g} Å between its faces) is too large or too flat to "
            f"look for neighbors within {radius:.3g} Å of {number:,} atoms; {CAUSE}"
        )


def _visited(number: int, faces: list[float], radius: float) -> float:
    """Estimates how many images of so many atoms a search looks at."""
    reach = max(radius, GRID) + 0.15
    return number * math.prod(2 * (reach * face + 1) + 2 for face in faces)


def _box(lattice: np.ndarray) -> list[float]:
    """Returns the lengths of a box, along the axes, that holds the cell."""
    return [sum(map(abs, column)) for column in lattice.T.tolist()]


def _cubes(extent: list[float], radius: float) -> float:
    """Estimates into how many cubes a search divides a space of that `extent` [3] Å."""
    return math.prod(length / max(radius, GRID) + 3 for length in extent)


def cheap_radius(lattice: np.ndarray, radius: float) -> float:
    """Returns the radius, or a larger one for which the cell is not divided into too many cubes."""
    while _cubes(_box(lattice), radius) > MOST_CUBES:
        radius *= 1.5
    return radius


def _chunks(
    wrapped: np.ndarray, centers: np.ndarray, inverse: np.ndarray, faces: list[float], radius: float
) -> list[np.ndarray]:
    """Divides the centers so that no search can find too much."""
    most = np.cumsum(_most_around(wrapped, inverse, faces, radius)[centers])
    return np.split(centers, np.flatnonzero(np.diff(most // MOST_AT_ONCE)) + 1)


def _most_around(wrapped: np.ndarray, inverse: np.ndarray, faces: list[float], radius: float) -> np.ndarray:
    """Counts the atoms in the boxes around each atom, and their images: never less than those within the radius, [n].

    The boxes are as wide as the radius at least; an axis of less than three is not divided.
    """
    per_radius = radius * np.array(faces)
    number = np.clip(1 / per_radius, 1, 100).astype(int)
    number[number < 3] = 1
    place = tuple(np.minimum((wrapped @ inverse % 1.0 * number).astype(int), number - 1).T)
    count = np.zeros(number)
    np.add.at(count, place, 1)
    for axis in np.flatnonzero(number > 1).tolist():
        count = count + np.roll(count, 1, axis) + np.roll(count, -1, axis)
    return count[place] * np.prod(np.where(number > 1, 1, 2 * per_radius + 1))


def _too_many(where: str, atoms: int, found: float, radius: float) -> CrystalError:
    return CrystalError(
        f"{where}: its {atoms:,} atoms have about {found:,.0f} neighbors within {radius:.3g} Å, over "
        f"{MOST_NEIGHBORS:,}; {CAUSE} A smaller radius has fewer"
    )
