"""Atoms that are closer than any bond: a cell in other units, a misread file."""

from __future__ import annotations

import functools

import numpy as np

from crystalframer_jax.structures.crystal import Crystal
from crystalframer_jax.structures.errors import CrystalError
from crystalframer_jax.structures.reading import warn
from crystalframer_jax.structures.search import cheap_radius, pairs_within

SHORTEST = 0.65  # Å; hydrogen molecules have 0.74, hydrogens seen by X-rays are often too close
SHARE = 0.6  # of the sum of two covalent radii; uranyl and bonds of four electron pairs have 0.66
USUAL_RADIUS = 1.7  # Å, of elements that the table lacks


@functools.lru_cache(maxsize=1)
def covalent_radii() -> np.ndarray:
    """Returns covalent radii [99] by atomic number, Å: Cordero et al., Dalton Trans. 2008, 2832."""
    from pymatgen.analysis.molecule_structure_comparator import CovalentRadius
    from pymatgen.core import Element

    return np.array([0.0] + [CovalentRadius.radius.get(Element.from_Z(z).symbol, USUAL_RADIUS) for z in range(1, 99)])


def warn_of_close_atoms(crystal: Crystal) -> Crystal:
    """Warns of the pair of atoms that is farthest below any bond, if there is one; returns the crystal.

    Atoms that exclude each other, with occupancies that sum to 1 at most, may be closer.
    """
    radii = covalent_radii()[crystal.species]
    radius = max(SHORTEST, 2 * SHARE * float(radii.max()))
    try:
        i, j, _, distance = pairs_within(
            crystal.positions, crystal.lattice, cheap_radius(crystal.lattice, radius), crystal.id
        )
    except CrystalError:  # too many neighbors, of which the search within the cutoff will tell
        return crystal
    share = distance / np.maximum(SHORTEST, SHARE * (radii[i] + radii[j]))
    if crystal.occupancies is not None:
        total = crystal.occupancies.sum(axis=1)
        share[total[i] + total[j] <= 1 + 1e-3] = np.inf
    if share.size and share.min() < 1:
        pair = int(share.argmin())
        a, b = sorted((int(i[pair]), int(j[pair])))
        other = f"site {b + 1} ({_symbol(crystal, b)})" if a != b else "its periodic image"
        apart = f"{distance[pair]:.2f} Å apart, closer than any bond"
        warn(f"{crystal.id}: site {a + 1} ({_symbol(crystal, a)}) and {other} are {apart}; are lengths in Å?")
    return crystal


def _symbol(crystal: Crystal, site: int) -> str:
    from pymatgen.core import Element

    return Element.from_Z(int(crystal.species[site])).symbol
