"""Neighbor rows: for every atom the sorted list of periodic neighbors that the lattice sums run over.

The row of atom i holds every (j, n) with |p_j + nL - p_i| <= r_c, the atom itself (distance 0) included. Rows are in
canonical order and the relation is symmetric: (i, j, n) is present if and only if (j, i, -n) is. All in float64.
"""

import dataclasses

import numpy as np

from crystalframer_jax.structures.crystal import Crystal
from crystalframer_jax.structures.errors import CrystalError
from crystalframer_jax.structures.lattice import integer_box, volume_of
from crystalframer_jax.structures.search import CAUSE, MOST_NEIGHBORS, pairs_within

SHELL_TOLERANCE = 1e-4  # Å; distances closer than this are one shell of neighbors
COLLINEAR = 0.999  # |cos| from which two directions cannot span a frame
SMALLEST_DISTANCE = 1e-3  # Å
MOST_IN_BOX = 20_000_000  # neighbors; about 2 GB while they are sorted
FEW_ATOMS, FEW_NEIGHBORS, MANY_NEIGHBORS = 500, 20, 5000  # an atom; usual cells need no check of their neighbors
RADIUS_TOLERANCE = 1e-6  # Å; a shell at the cutoff is taken whole, whatever the rounding of its distances


@dataclasses.dataclass(frozen=True)
class LatticeBox:
    """In place of a radius: the images n in [-lattice_range, lattice_range]^3 of every pair of atoms.

    What is in the box depends on the choice of the cell and of the atoms in it, and grows with the square of their
    number. It is here for models that the official code trained so.
    """

    lattice_range: int

    def __len__(self) -> int:
        return (2 * self.lattice_range + 1) ** 3

    @property
    def images(self) -> np.ndarray:
        """The images, [(2 R + 1)^3, 3] int64."""
        return integer_box(self.lattice_range)


@dataclasses.dataclass(frozen=True)
class NeighborRows:
    """The rows of one crystal, one after the other (n atoms, E neighbors in all)."""

    count: np.ndarray  # [n] int32 length of each row
    index: np.ndarray  # [E] int32 neighbor atom j
    image: np.ndarray  # [E, 3] int32 lattice image n of the neighbor
    reverse: np.ndarray  # [E] int32 place of (j, i, -n) among the E

    @property
    def center(self) -> np.ndarray:
        """Atom i that each neighbor belongs to, [E]."""
        return np.repeat(np.arange(len(self.count), dtype=np.int32), self.count)


def neighbor_rows(crystal: Crystal, cutoff: float | LatticeBox) -> NeighborRows:
    """Lists the neighbor rows of a crystal within `cutoff` (a radius in Å, or a box of images), in canonical order.

    Canonical order is by distance and, within a shell (distances closer than 1e-4 Å), by (j, n1, n2, n3). If all
    neighbors of an atom lie on one line, its row is enlarged (and the rows of its new neighbors with it) up to the
    nearest shell that spans a frame.

    Raises ValueError if the cutoff is not a positive number, CrystalError if there are too many neighbors or too many
    cells to look for them in.
    """
    if isinstance(cutoff, LatticeBox):
        number = crystal.num_atoms**2 * len(cutoff)
        if number > MOST_IN_BOX:
            raise CrystalError(
                f"{crystal.id}: {number:,} neighbors of {crystal.num_atoms} atoms in {len(cutoff):,} cells "
                f"(adaptive_cutoff_sigma=0) are more than {MOST_IN_BOX:,}; choose a radius"
            )
        atoms = np.arange(crystal.num_atoms)
        i, j, n = (x.ravel() for x in np.meshgrid(atoms, atoms, np.arange(len(cutoff.images)), indexing="ij"))
        return _canonical(crystal, i, j, cutoff.images[n])
    if not (np.isfinite(cutoff) and cutoff > 0):
        raise ValueError(f"the cutoff radius {cutoff} Å must be a positive number")
    i, j, n = _within(crystal, np.arange(crystal.num_atoms), cutoff)
    lonely = np.flatnonzero(~_spans_a_frame(crystal, i, j, n))
    if len(lonely) * crystal.num_atoms > MOST_NEIGHBORS:  # each of them has a search of its own
        raise CrystalError(
            f"{crystal.id}: {len(lonely):,} of {crystal.num_atoms:,} atoms have no neighbors within {cutoff:.3g} Å, or "
            f"all on a line; {CAUSE}"
        )
    if len(lonely):
        parts = [np.column_stack([i, j, n])]
        for atom in lonely.tolist():
            i, j, n = _up_to_a_frame(crystal, atom, cutoff)
            parts += [np.column_stack([i, j, n]), np.column_stack([j, i, -n])]
        edges = np.unique(np.concatenate(parts), axis=0)
        i, j, n = edges[:, 0], edges[:, 1], edges[:, 2:]
    return _canonical(crystal, i, j, n)


def check_neighbors(crystal: Crystal, cutoff: float | LatticeBox) -> None:
    """Raises the CrystalError that `neighbor_rows` would; in most crystals it need not look."""
    if not isinstance(cutoff, LatticeBox) and crystal.num_atoms <= FEW_ATOMS:
        expected = crystal.num_atoms * 4 / 3 * np.pi * cutoff**3 / volume_of(crystal.lattice)
        if FEW_NEIGHBORS < expected < MANY_NEIGHBORS:
            return
    elif isinstance(cutoff, LatticeBox) and crystal.num_atoms**2 * len(cutoff) <= MOST_IN_BOX:
        return
    neighbor_rows(crystal, cutoff)


def displacements(crystal: Crystal, rows: NeighborRows) -> np.ndarray:
    """Computes the vectors p_j + nL - p_i of all neighbors, [E, 3] Å; exactly zero for the atom itself."""
    p = crystal.positions
    return p[rows.index] - p[rows.center] + rows.image @ crystal.lattice


def _within(crystal: Crystal, centers: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Finds all (i, j, n) with i among `centers` [c] and distance <= radius: i [E], j [E], n [E, 3]."""
    wider = radius + 2 * RADIUS_TOLERANCE  # the distances that decide are computed below
    i, j, n, _ = pairs_within(crystal.positions, crystal.lattice, wider, crystal.id or "crystal", centers)
    keep = _distance(crystal, i, j, n) <= radius + RADIUS_TOLERANCE  # alike for both directions of a pair
    return i[keep], j[keep], n[keep]


def _distance(crystal: Crystal, i: np.ndarray, j: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Computes distances [E] in Å from the metric of the lattice: the same bits for (i, j, n) and (j, i, -n)."""
    metric = crystal.lattice @ crystal.lattice.T
    fractional = crystal.positions @ np.linalg.inv(crystal.lattice)
    x, y, z = ((fractional[j] - fractional[i]) + n).T
    square = metric[0, 0] * x * x + metric[1, 1] * y * y + metric[2, 2] * z * z
    square += 2 * (metric[0, 1] * x * y + metric[0, 2] * x * z + metric[1, 2] * y * z)
    return np.sqrt(np.maximum(square, 0))


def _spans_a_frame(crystal: Crystal, i: np.ndarray, j: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Tells whether the neighbors of each atom point along more than one line, [number of atoms] bool."""
    vector = crystal.positions[j] - crystal.positions[i] + n @ crystal.lattice
    distance = np.linalg.norm(vector, axis=1)
    other = distance > SMALLEST_DISTANCE
    i, unit = i[other], vector[other] / distance[other, None]
    first = np.full((crystal.num_atoms, 3), np.nan)
    first[i[::-1]] = unit[::-1]
    spans = np.zeros(crystal.num_atoms, bool)
    spans[i[np.abs(np.sum(first[i] * unit, axis=1)) < COLLINEAR]] = True
    return spans


def _up_to_a_frame(crystal: Crystal, atom: int, cutoff: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Finds all (i, j, n) of one atom i up to the shell with which its neighbors stop lying on one line."""
    center, off_line = np.array([atom]), np.empty(0)
    while not len(off_line):
        cutoff *= 1.5
        i, j, n = _within(crystal, center, cutoff)
        distance = _distance(crystal, i, j, n)
        order = np.argsort(distance, kind="stable")
        order = order[distance[order] > SMALLEST_DISTANCE]
        i, j, n, distance = i[order], j[order], n[order], distance[order]
        unit = (crystal.positions[j] - crystal.positions[i] + n @ crystal.lattice) / distance[:, None]
        off_line = distance[(np.abs(unit @ unit[:1].T) < COLLINEAR).any(axis=1)]
    radius = off_line[0] + SHELL_TOLERANCE
    i, j, n = _within(crystal, center, radius)
    keep = _distance(crystal, i, j, n) <= radius
    return i[keep], j[keep], n[keep]


def _canonical(crystal: Crystal, i: np.ndarray, j: np.ndarray, n: np.ndarray) -> NeighborRows:
    """Sorts into canonical order and finds the reverse of every neighbor."""
    distance = _distance(crystal, i, j, n)
    itself = (i == j) & ~n.any(axis=1)
    distance[itself] = 0.0
    by_distance = np.lexsort((distance, i))
    new_row = np.diff(i[by_distance], prepend=-1) != 0
    new_shell = np.diff(distance[by_distance], prepend=0) > SHELL_TOLERANCE
    shell = np.empty(len(i), dtype=np.int64)
    shell[by_distance] = np.cumsum(new_row | new_shell)
    order = np.lexsort((n[:, 2], n[:, 1], n[:, 0], j, shell))
    i, j, n = i[order], j[order], n[order]

    forward = np.lexsort((n[:, 2], n[:, 1], n[:, 0], j, i))
    backward = np.lexsort((-n[:, 2], -n[:, 1], -n[:, 0], i, j))
    if not (np.array_equal(i[forward], j[backward]) and np.array_equal(n[forward], -n[backward])):
        raise RuntimeError(f"{crystal.id}: the neighbor relation is not symmetric; please report this crystal")
    reverse = np.empty(len(i), dtype=np.int32)
    reverse[forward] = backward
    count = np.bincount(i, minlength=crystal.num_atoms)
    return NeighborRows(count.astype(np.int32), j.astype(np.int32), n.astype(np.int32), reverse)
