"""Search for the periodic neighbors of atoms, within bounds: what would take far too long or too much is refused."""

from collections.abc import Iterator

import numpy as np

from crystalframer_jax.structures.errors import CrystalError
from crystalframer_jax.structures.lattice import reduction

MOST_NEIGHBORS = 5_000_000  # of all atoms of a crystal; over 1 GB while they are sorted
MOST_AT_ONCE = 8_000_000  # neighbors that a search of several centers may find at most
MANY_VISITED = 500_000  # images of atoms; to make them fewer is worth a change of basis
MOST_VISITED = 50_000_000  # images of atoms that one search looks at
MOST_CUBES = 1_000_000  # into which one search divides the space; 216 bytes each
GRID = 1.0  # Å; the least edge of those cubes
CAUSE = "are lengths in Å, is the cell right, are atoms doubled?"

Pairs = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def pairs_within(
    positions: np.ndarray, lattice: np.ndarray, radius: float, where: str, centers: np.ndarray | None = None
) -> Pairs:
    """Finds all pairs of a center i and an image n of an atom j with |p_j + nL - p_i| <= radius.

    Atoms may be anywhere: they are wrapped into the cell for the search, and n is that of the `positions` given.

    Args:
      positions: [n, 3] Å. lattice: [3, 3] rows, Å. radius: Å.
      where: what the crystal is called in messages.
      centers: [c] numbers of the atoms that are centers; None: all.

    Returns:
      i [E], j [E], n [E, 3] int64, and the distance [E] in Å.

    Raises:
      CrystalError: there are too many neighbors, or the search would visit too many cells.
    """
    centers = np.arange(len(positions)) if centers is None else centers
    change = None
    if _visited(len(positions), lattice, radius) > MANY_VISITED:  # an oblique cell has a better basis
        change = reduction(lattice)
        lattice = np.ascontiguousarray(change @ lattice)
    inverse = np.linalg.inv(lattice)
    cell = np.floor(positions @ inverse)
    is_outside = cell.any(axis=1)
    wrapped = positions
    if is_outside.any():  # atoms inside keep their bits
        wrapped = positions.copy()
        wrapped[is_outside] -= cell[is_outside] @ lattice
    parts = []
    for some in _chunks(wrapped, centers, lattice, inverse, radius, where):
        i, j, n, distance = _search(wrapped, wrapped[some], lattice, radius)
        parts.append((some[i], j, n, distance))
        found = sum(len(part[0]) for part in parts)
        if found > MOST_NEIGHBORS:
            raise _too_many(where, len(positions), found, radius)
    i, j, n, distance = parts[0] if len(parts) == 1 else map(np.concatenate, zip(*parts, strict=True))
    n = np.rint(n).astype(np.int64)
    if wrapped is not positions:
        n += (cell[i] - cell[j]).astype(np.int64)
    return i, j, n if change is None else n @ change, distance


def _search(points: np.ndarray, centers: np.ndarray, lattice: np.ndarray, radius: float) -> Pairs:
    from pymatgen.optimization.neighbors import find_points_in_spheres

    return find_points_in_spheres(points, centers, float(radius), np.ones(3, dtype=np.int64), lattice, 1e-8)


def _chunks(
    wrapped: np.ndarray, centers: np.ndarray, lattice: np.ndarray, inverse: np.ndarray, radius: float, where: str
) -> Iterator[np.ndarray]:
    """Divides the centers so that no search can find too much; CrystalError if all of them would."""
    number, heights = len(wrapped), 1 / np.linalg.norm(inverse, axis=0)  # Å between opposite faces
    expected = len(centers) * number * 4 / 3 * np.pi * radius**3 / abs(np.linalg.det(lattice))
    if not expected <= MOST_NEIGHBORS:
        raise _too_many(where, number, expected, radius)
    visited = _visited(number, lattice, radius)
    cubes = _cubes(np.ptp(wrapped[centers], axis=0), radius)
    images = np.prod(np.floor(2 * radius / heights) + 1)  # of one atom within the radius of a point, at most
    chunks = [centers]
    if len(centers) * number * images > MOST_AT_ONCE:
        most = np.cumsum(_most_around(wrapped, inverse, heights, radius)[centers])
        chunks = np.split(centers, np.flatnonzero(np.diff(most // MOST_AT_ONCE)) + 1)
    if not (cubes <= MOST_CUBES and visited <= MOST_VISITED and len(chunks) * visited <= 20 * MOST_VISITED):
        lengths = " x ".join(f"{length:.4g}" for length in np.linalg.norm(lattice, axis=1))
        raise CrystalError(
            f"{where}: the cell ({lengths} Å, {heights.min():.3g} Å between its faces) is too large or too flat to "
            f"look for neighbors within {radius:.3g} Å of {number:,} atoms; {CAUSE}"
        )
    yield from chunks


def _visited(number: int, lattice: np.ndarray, radius: float) -> float:
    """Estimates how many images of so many atoms a search looks at."""
    reach = (max(radius, GRID) + 0.15) * np.linalg.norm(np.linalg.inv(lattice), axis=0)
    return number * float(np.prod(2 * np.ceil(reach) + 2))


def _cubes(extent: np.ndarray, radius: float) -> float:
    """Estimates into how many cubes a search divides a space of that `extent` [3] Å."""
    return float(np.prod(extent / max(radius, GRID) + 3))


def cheap_radius(lattice: np.ndarray, radius: float) -> float:
    """Returns the radius, or a larger one for which the cell is not divided into too many cubes."""
    while _cubes(np.abs(lattice).sum(axis=0), radius) > MOST_CUBES:
        radius *= 1.5
    return radius


def _most_around(wrapped: np.ndarray, inverse: np.ndarray, heights: np.ndarray, radius: float) -> np.ndarray:
    """Counts the atoms in the boxes around each atom, and their images: never less than those within the radius, [n].

    The boxes are as wide as the radius at least; an axis of less than three is not divided.
    """
    number = np.clip(heights // radius, 1, 100).astype(int)
    number[number < 3] = 1
    place = tuple(np.minimum((wrapped @ inverse % 1.0 * number).astype(int), number - 1).T)
    count = np.zeros(number)
    np.add.at(count, place, 1)
    for axis in np.flatnonzero(number > 1).tolist():
        count = count + np.roll(count, 1, axis) + np.roll(count, -1, axis)
    return count[place] * np.prod(np.where(number > 1, 1, np.floor(2 * radius / heights) + 1))


def _too_many(where: str, atoms: int, found: float, radius: float) -> CrystalError:
    return CrystalError(
        f"{where}: its {atoms:,} atoms have about {found:,.0f} neighbors within {radius:.3g} Å, over "
        f"{MOST_NEIGHBORS:,}; {CAUSE} A smaller radius has fewer"
    )
