"""Search for the periodic neighbors of atoms, within bounds: what would take far too long or too much is refused."""

import math
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
    change, inverse = None, np.linalg.inv(lattice)
    if _visited(len(positions), inverse, radius) > MANY_VISITED:  # an oblique cell has a better basis
        change = reduction(lattice)
        lattice = np.ascontiguousarray(change @ lattice)
        inverse = np.linalg.inv(lattice)
    cell = np.floor(positions @ inverse)
    wrapped = positions
    if cell.any():
        is_outside = cell.any(axis=1)  # atoms inside keep their bits
        wrapped = positions.copy()
        wrapped[is_outside] -= cell[is_outside] @ lattice
    parts, found = [], 0
    for some in _chunks(wrapped, centers, lattice, inverse, radius, where):
        i, j, n, distance = _search(wrapped, wrapped if some is None else wrapped[some], lattice, radius)
        parts.append((i if some is None else some[i], j, n, distance))
        found += len(i)
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
    wrapped: np.ndarray,
    centers: np.ndarray | None,
    lattice: np.ndarray,
    inverse: np.ndarray,
    radius: float,
    where: str,
) -> Iterator[np.ndarray | None]:
    """Divides the centers so that no search can find too much; CrystalError if all of them would. None: all atoms."""
    number, faces = len(wrapped), _faces(inverse)
    searched = number if centers is None else len(centers)
    expected = searched * number * 4 / 3 * math.pi * radius**3 * abs(_determinant(inverse))
    if not expected <= MOST_NEIGHBORS:
        raise _too_many(where, number, expected, radius)
    images = math.prod(2 * radius * face + 1 for face in faces)  # of one atom within the radius of a point, at most
    chunks: list[np.ndarray | None] = [centers]
    if searched * number * images > MOST_AT_ONCE:
        all_of_them = np.arange(number) if centers is None else centers
        most = np.cumsum(_most_around(wrapped, inverse, radius)[all_of_them])
        chunks = [*np.split(all_of_them, np.flatnonzero(np.diff(most // MOST_AT_ONCE)) + 1)]
    visited, space = _visited(number, inverse, radius), np.abs(lattice).sum(axis=0)
    if _cubes(space, radius) > MOST_CUBES:  # the atoms may take less
        space = np.ptp(wrapped if centers is None else wrapped[centers], axis=0)
    if _cubes(space, radius) > MOST_CUBES or visited > MOST_VISITED or len(chunks) * visited > 20 * MOST_VISITED:
        lengths = " x ".join(f"{length:.4g}" for length in np.linalg.norm(lattice, axis=1))
        raise CrystalError(
            f"{where}: the cell ({lengths} Å, {1 / max(faces):.3g} Å between its faces) is too large or too flat to "
            f"look for neighbors within {radius:.3g} Å of {number:,} atoms; {CAUSE}"
        )
    yield from chunks


def _faces(inverse: np.ndarray) -> list[float]:
    """Returns how many pairs of opposite faces of the cell there are in 1 Å, for each axis (rows of the lattice)."""
    return [math.hypot(*column) for column in inverse.T.tolist()]


def _determinant(matrix: np.ndarray) -> float:
    (a, b, c), (d, e, f), (g, h, i) = matrix.tolist()
    return a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)


def _visited(number: int, inverse: np.ndarray, radius: float) -> float:
    """Estimates how many images of so many atoms a search looks at."""
    reach = max(radius, GRID) + 0.15
    return number * math.prod(2 * (reach * face + 1) + 2 for face in _faces(inverse))


def _cubes(extent: np.ndarray, radius: float) -> float:
    """Estimates into how many cubes a search divides a space of that `extent` [3] Å."""
    return math.prod(length / max(radius, GRID) + 3 for length in extent.tolist())


def cheap_radius(lattice: np.ndarray, radius: float) -> float:
    """Returns the radius, or a larger one for which the cell is not divided into too many cubes."""
    while _cubes(np.abs(lattice).sum(axis=0), radius) > MOST_CUBES:
        radius *= 1.5
    return radius


def _most_around(wrapped: np.ndarray, inverse: np.ndarray, radius: float) -> np.ndarray:
    """Counts the atoms in the boxes around each atom, and their images: never less than those within the radius, [n].

    The boxes are as wide as the radius at least; an axis of less than three is not divided.
    """
    per_radius = radius * np.array(_faces(inverse))
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
