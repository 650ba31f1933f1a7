"""Leaks between splits: crystals of validation or test that are in another split too, by id or by structure.

Structures are the same if pymatgen's StructureMatcher says so without scaling the volume, at tolerances that forgive
what two relaxations of the same crystal differ by. Comparing all pairs is out of the question: candidates have the same
reduced formula and nearly the same fingerprint, a few sums over neighbors that depend neither on the choice of the
cell nor on orientation, origin or order of atoms.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Element, Structure
from pymatgen.optimization.neighbors import find_points_in_spheres
from scipy.spatial import KDTree

from crystalframer_jax.data.build import Columns, in_parallel
from crystalframer_jax.data.splits import SPLITS
from crystalframer_jax.data.store import crystal_at
from crystalframer_jax.structures.crystal import Crystal

RADII = (4.0, 6.0)  # Å; of the neighbors that enter a fingerprint
FINGERPRINT_TOLERANCE = 0.01  # of logarithms; about a change of all lengths by 0.3 %
MOST_CANDIDATES = 2  # that a crystal is compared with; frames of a trajectory would have thousands
LATTICE_TOLERANCE = 0.003  # relative, of lattice vectors
SITE_TOLERANCE = 0.01  # root mean square over the sites, in units of (volume per atom)^(1/3): about 0.025 Å
ANGLE_TOLERANCE = 0.5  # degrees
MOST_ATOMS = 60  # matching the sites of larger cells takes too long; they are the same if their fingerprints are
SAME_FINGERPRINT = 1e-4
CHUNK = 50  # crystals or pairs that a worker process looks at together


@dataclasses.dataclass(frozen=True)
class Leak:
    """A crystal of validation or test (`held`) that is also in another split (`other`); rows of the table."""

    kind: str  # "id" or "structure"
    split: str
    held: int
    other_split: str
    other: int


def find_leaks(columns: Columns, splits: dict[str, np.ndarray], workers: int = 0) -> list[Leak]:
    """Finds all leaks, of test crystals first; a crystal is listed once for each other split that it is in.

    `columns` are those of the crystals; `splits` are rows of them. `workers` are processes (0: one for each core).
    """
    split_of = {int(row): name for name in SPLITS for row in splits[name]}
    by_id = _grouped(split_of, lambda row: str(columns["ids"][row]))
    by_formula = _grouped(split_of, lambda row: _formula(columns, row))
    rows = sorted(row for group in by_formula for members in group.values() for row in members)
    crystals = (crystal_at(columns, row) for row in rows)
    found_prints = in_parallel(fingerprint, crystals, "fingerprints", len(rows), workers, CHUNK)
    prints = dict(zip(rows, found_prints, strict=True))
    leaks = []
    for held_split, other_split in (("test", "train"), ("test", "val"), ("val", "train")):
        found: dict[int, Leak] = {}
        pairs = [pair for group in by_formula for pair in _alike(group[held_split], group[other_split], prints)]
        for held, other in _same_structure(columns, pairs, prints, workers):
            found.setdefault(held, Leak("structure", held_split, held, other_split, other))
        for group in by_id:
            for held in group[held_split] if group[other_split] else ():
                found[held] = Leak("id", held_split, held, other_split, group[other_split][0])
        leaks += [found[held] for held in sorted(found)]
    return leaks


def _grouped(split_of: dict[int, str], key: Callable[[int], Hashable]) -> list[dict[str, list[int]]]:
    """Groups rows with the same key by their splits; groups that lie in one split are left out."""
    groups: dict[Hashable, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for row, split in split_of.items():
        groups[key(row)][split].append(row)
    return [group for group in groups.values() if len(group) > 1]


def _formula(columns: Columns, row: int) -> bytes:
    """Encodes the reduced formula of a crystal."""
    species = columns["species"][slice(*columns["atom_offset"][row : row + 2])]
    elements, counts = np.unique(species, return_counts=True)
    return elements.tobytes() + (counts // math.gcd(*counts.tolist())).tobytes()


def fingerprint(crystal: Crystal) -> np.ndarray:
    """Computes logarithms of sums over neighbors j of (1 - d^2/R^2)^3, plain and times Z_i Z_j; means over the atoms i.

    The atom itself is among its neighbors, so that no sum is 0.
    """
    i, j, _, distance = find_points_in_spheres(
        crystal.positions, crystal.positions, max(RADII), np.ones(3, np.int64), crystal.lattice, 1e-8
    )
    charge = crystal.species.astype(float)
    weights = np.stack([np.ones(len(i)), charge[i] * charge[j]])
    sums = [weights @ np.maximum(1 - (distance / radius) ** 2, 0) ** 3 for radius in RADII]
    return np.log(np.concatenate(sums) / crystal.num_atoms)


def _alike(held: list[int], others: list[int], prints: dict[int, np.ndarray]) -> list[tuple[int, int]]:
    """Finds the pairs of held and other rows whose fingerprints agree; at most MOST_CANDIDATES for each held one."""
    if not held or not others:
        return []
    tree = KDTree(np.stack([prints[row] for row in others]))
    queries = np.stack([prints[row] for row in held])
    nearest = range(1, min(MOST_CANDIDATES, len(others)) + 1)
    _, found = tree.query(queries, nearest, p=np.inf, distance_upper_bound=FINGERPRINT_TOLERANCE)
    return [(held[i], others[found[i, k]]) for i, k in np.argwhere(found < len(others))]


def _same_structure(
    columns: Columns, pairs: list[tuple[int, int]], prints: dict[int, np.ndarray], workers: int
) -> list[tuple[int, int]]:
    """Finds those of the pairs of rows whose structures match."""
    num_atoms = np.diff(columns["atom_offset"])
    small = [pair for pair in pairs if num_atoms[list(pair)].min() <= MOST_ATOMS]
    candidates = ((_structure(columns, held), _structure(columns, other)) for held, other in small)
    matches = in_parallel(_match, candidates, "comparing structures", len(small), workers, CHUNK)
    same = {pair for pair, matched in zip(small, matches, strict=True) if matched}
    for held, other in set(pairs) - set(small):
        if np.abs(prints[held] - prints[other]).max() <= SAME_FINGERPRINT:
            same.add((held, other))
    return [pair for pair in pairs if pair in same]


def _match(pair: tuple[Structure, Structure]) -> bool:
    """Tells whether two structures are the same."""
    matcher = StructureMatcher(LATTICE_TOLERANCE, SITE_TOLERANCE, ANGLE_TOLERANCE, scale=False)
    return bool(matcher.fit(*pair))


def _structure(columns: Columns, row: int) -> Structure:
    """Makes a pymatgen Structure of a crystal of the table, with its occupancies."""
    first, end = columns["atom_offset"][row : row + 2]
    species: list[Any] = [Element.from_Z(int(z)) for z in columns["species"][first:end]]
    for place in range(*np.searchsorted(columns["shared_site"], [first, end])):
        shares = columns["shared_occupancy"][place]
        site = int(columns["shared_site"][place] - first)
        species[site] = {Element.from_Z(int(z) + 1): float(shares[z]) for z in np.flatnonzero(shares)}
    position = np.asarray(columns["position"][first:end])
    return Structure(columns["lattice"][row], species, position, coords_are_cartesian=True)
