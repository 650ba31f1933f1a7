"""Neighbor rows: for every atom the sorted list of periodic neighbors that the lattice sums run over.

The row of atom i holds every (j, n) with |p_j + nL - p_i| <= r_c, the atom itself (distance 0) included: it is the
first. The relation is symmetric: (i, j, n) is present if and only if (j, i, -n) is. All in float64.
"""

import dataclasses

import numpy as np

from crystalframer_jax.structures.crystal import Crystal
from crystalframer_jax.structures.errors import CrystalError
from crystalframer_jax.structures.lattice import integer_box, volume_of
from crystalframer_jax.structures.search import CAUSE, MOST_NEIGHBORS, Pairs, pairs_within

SHELL_TOLERANCE = 1e-4  # Å; distances closer than this are one shell of neighbors
COLLINEAR = 0.999  # |cos| from which two directions cannot span a frame
NEAREST = 4  # neighbors that usually span a frame
BOND = 3.5  # Å, within which hardly any atom has no other
STEP = np.pi * 1e-5  # Å; distances in one step count as equal, and hardly any crystal has a distance between two
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
    """Lists the neighbor rows of a crystal within `cutoff` (a radius in Å, or a box of images).

    Rows are ordered by distance; among neighbors at one distance, the order does not change when the crystal turns. If
    all neighbors of an atom lie on one line, its row is enlarged (and the rows of its new neighbors with it) up to the
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
        return _rows(crystal.num_atoms, _in_box(crystal, cutoff.images))
    if not (np.isfinite(cutoff) and cutoff > 0):
        raise ValueError(f"the cutoff radius {cutoff} Å must be a positive number")
    pairs = _within(crystal, cutoff)
    rows = _rows(crystal.num_atoms, pairs)
    lonely = _without_frame(crystal, rows)
    if len(lonely) * crystal.num_atoms > MOST_NEIGHBORS:  # each of them has a search of its own
        raise CrystalError(
            f"{crystal.id}: {len(lonely):,} of {crystal.num_atoms:,} atoms have no neighbors within {cutoff:.3g} Å, or "
            f"all on a line; {CAUSE}"
        )
    if lonely:
        enlarged = [_up_to_a_frame(crystal, atom, cutoff) for atom in lonely]
        rows = _rows(crystal.num_atoms, _joined([pairs, *enlarged]))
    return rows


def check_neighbors(crystal: Crystal, cutoff: float | LatticeBox) -> None:
    """Raises the CrystalError that `neighbor_rows` would; in most crystals it need not look."""
    if not isinstance(cutoff, LatticeBox) and crystal.num_atoms <= FEW_ATOMS:
        expected = crystal.num_atoms * 4 / 3 * np.pi * cutoff**3 / volume_of(crystal.lattice)
        if FEW_NEIGHBORS < expected < MANY_NEIGHBORS:
            return
    elif isinstance(cutoff, LatticeBox) and crystal.num_atoms**2 * len(cutoff) <= MOST_IN_BOX:
        return
    neighbor_rows(crystal, cutoff)


def atoms_without_neighbors(crystal: Crystal, cutoff: float) -> int:
    """Counts the atoms that have no atom within `cutoff` (Å), nor an image of themselves.

    `neighbor_rows` gives them some farther away, to span a frame, of which the lattice sums see next to nothing.
    """
    is_alone = np.ones(crystal.num_atoms, bool)
    for radius in (min(BOND, cutoff), cutoff):  # most crystals need the first search only, which finds few
        i, j, *_ = _within(crystal, radius)
        is_alone[i] = is_alone[j] = False
        if not is_alone.any():
            break
    return int(is_alone.sum())


def displacements(crystal: Crystal, rows: NeighborRows) -> np.ndarray:
    """Computes the vectors p_j + nL - p_i of all neighbors, [E, 3] Å; exactly zero for the atom itself."""
    return _vectors(crystal, rows.center, rows.index, rows.image)


def _vectors(crystal: Crystal, i: int | np.ndarray, j: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Computes p_j + nL - p_i of arrays i [...], j [...] and n [..., 3]."""
    return crystal.positions[j] - crystal.positions[i] + n @ crystal.lattice


def _within(crystal: Crystal, radius: float, centers: np.ndarray | None = None) -> Pairs:
    """Finds pairs within the radius as `pairs_within` does; of a shell at the very radius all or none."""
    where = crystal.id or "crystal"
    return pairs_within(crystal.positions, crystal.lattice, radius + RADIUS_TOLERANCE, where, centers)


def _in_box(crystal: Crystal, images: np.ndarray) -> Pairs:
    """Lists the pairs of all atoms in a box of images [b, 3], one direction of each and no atom with itself."""
    i, j = np.tril_indices(crystal.num_atoms, -1)
    atoms, half = np.arange(crystal.num_atoms), images[: len(images) // 2]  # the others are their negatives, and 0
    n = np.concatenate([np.tile(images, (len(i), 1)), np.tile(half, (len(atoms), 1))])
    i = np.concatenate([np.repeat(i, len(images)), np.repeat(atoms, len(half))])
    j = np.concatenate([np.repeat(j, len(images)), np.repeat(atoms, len(half))])
    return i, j, n, np.linalg.norm(_vectors(crystal, i, j, n), axis=1)


def _without_frame(crystal: Crystal, rows: NeighborRows) -> list[int]:
    """Lists the atoms whose neighbors all lie on one line; the nearest few tell of most that they do not."""
    end = np.cumsum(rows.count)
    start = end - rows.count
    near = np.minimum(start[:, None] + np.arange(1, NEAREST + 1), end[:, None] - 1)
    vector = _vectors(crystal, np.arange(len(start))[:, None], rows.index[near], rows.image[near])
    on_line = np.flatnonzero(~_off_line(vector).any(axis=1)).tolist()

    def has_frame(atom: int) -> bool:
        row = slice(start[atom] + 1, end[atom])
        return bool(_off_line(_vectors(crystal, atom, rows.index[row], rows.image[row])).any())

    return [atom for atom in on_line if not has_frame(atom)]


def _off_line(vector: np.ndarray) -> np.ndarray:
    """Tells which vectors [..., m, 3] do not lie on a line with the first of them, [..., m]."""
    length = np.linalg.norm(vector, axis=-1)
    product = np.sum(vector * vector[..., :1, :], axis=-1)
    return np.abs(product) < COLLINEAR * length * length[..., :1]


def _up_to_a_frame(crystal: Crystal, atom: int, cutoff: float) -> Pairs:
    """Finds all (i, j, n) of one atom i up to the shell with which its neighbors stop lying on one line."""
    center, off_line = np.array([atom]), np.empty(0)
    while not len(off_line):
        cutoff *= 1.5
        i, j, n, distance = _within(crystal, cutoff, center)
        order = np.argsort(distance, kind="stable")
        i, j, n, distance = i[order], j[order], n[order], distance[order]
        off_line = distance[1:][_off_line(_vectors(crystal, atom, j[1:], n[1:]))]
    radius = off_line[0] + SHELL_TOLERANCE
    i, j, n, distance = _within(crystal, radius, center)
    keep = distance <= radius
    return i[keep], j[keep], n[keep], distance[keep]


def _joined(parts: list[Pairs]) -> Pairs:
    """Joins pairs of which each may be there several times, in both directions; those of an atom and itself go."""
    i, j, n, distance = map(np.concatenate, zip(*parts, strict=True))
    step = np.column_stack([j - i, n])
    sign = -np.sign(step[np.arange(len(step)), (step != 0).argmax(axis=1)])  # of the first that is not 0
    edges = np.column_stack([np.maximum(i, j), np.minimum(i, j), sign[:, None] * n])
    edges, place = np.unique(edges[sign != 0], axis=0, return_index=True)
    return edges[:, 0], edges[:, 1], edges[:, 2:], distance[sign != 0][place]


def _rows(number: int, pairs: Pairs) -> NeighborRows:
    """Makes the rows of `number` atoms from pairs in one direction; neighbors at one distance stay in their order."""
    i, j, n, distance = pairs
    atoms, n = np.arange(number), n.astype(np.int32)
    center = np.concatenate([atoms, i, j])  # of the atoms themselves, of the pairs, and of the other direction
    index = np.concatenate([atoms, j, i]).astype(np.int32)
    image = np.concatenate([np.zeros((number, 3), np.int32), n, -n])
    places = np.arange(len(center))
    # Atom, distance and place in one integer each: these are sorted many times faster than columns are.
    place_bits = len(center).bit_length()
    step_bits = 63 - place_bits - number.bit_length()
    step = max(STEP, distance.max(initial=0) / (2**step_bits - 2))
    steps = (distance / step).astype(np.int64) + 1
    key = ((center << step_bits) + np.concatenate([np.zeros_like(atoms), steps, steps]) << place_bits) + places
    key.sort()
    order = key & (1 << place_bits) - 1
    place = np.empty(len(order), np.int32)  # where each went
    place[order] = places
    myself, there, back = np.split(place, [number, number + len(i)])
    reverse = np.concatenate([myself, back, there])[order]
    count = np.bincount(center, minlength=number).astype(np.int32)
    return NeighborRows(count, index[order], np.take(image, order, axis=0), reverse)
