"""Total energies are told from labels that do not grow with the cell, on real crystals."""

import numpy as np
import pytest
from pymatgen.core import Element
from small_sets import raw_records

from crystalframer_jax.data.extensive import size_exponent


def columns() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Labels of the bundled crystals, and their numbers of atoms."""
    raw = raw_records()
    atoms = np.array([len(record["species"]) for record in raw])
    found = {name: np.array([record[name] for record in raw]) for name in ("formation_energy_per_atom", "e_above_hull")}
    volumes = np.array([abs(np.linalg.det(record["lattice"])) for record in raw])
    masses = {element.symbol: float(element.atomic_mass) for element in Element}
    mass = np.array([sum(masses[symbol] for symbol in record["species"]) for record in raw])
    return found | {"volume_per_atom": volumes / atoms, "density": mass / volumes}, atoms


INTENSIVE, ATOMS = columns()


@pytest.mark.parametrize("name", INTENSIVE)
def test_few_false_alarms(name):
    """None for all crystals, and at most one in a hundred for small sets."""
    labels = INTENSIVE[name]
    assert size_exponent(labels, ATOMS) is None
    parts = [slice(start, start + size) for size in (24, 60, 300) for start in range(0, len(labels) - size, size)]
    alarms = [size_exponent(labels[part], ATOMS[part]) is not None for part in parts]
    assert len(alarms) > 200 and np.mean(alarms) < 0.01


@pytest.mark.parametrize("size", [60, 300])
def test_total_energies_are_told(size):
    """Per atom they are of one sign and size, whatever the crystal."""
    energies = (-6 + 2 * INTENSIVE["formation_energy_per_atom"] / 4) * ATOMS
    parts = [slice(start, start + size) for start in range(0, len(ATOMS) - size, size)]
    found = [size_exponent(energies[part], ATOMS[part]) for part in parts]
    assert np.mean([exponent is not None for exponent in found]) > 0.95
    assert abs(size_exponent(energies, ATOMS) - 1) < 0.1
    per_cell = INTENSIVE["formation_energy_per_atom"] * ATOMS
    assert size_exponent(per_cell, ATOMS) is not None


def test_what_tells_nothing():
    """Few labels, zeros, unknown ones, cells of one size."""
    energies = -5.0 * ATOMS
    assert size_exponent(energies[:11], ATOMS[:11]) is None
    assert (
        size_exponent(np.zeros(100), ATOMS[:100]) is None and size_exponent(np.full(100, np.nan), ATOMS[:100]) is None
    )
    assert size_exponent(energies[:100], np.full(100, 8)) is None
    some = np.where(np.arange(100) % 3 == 0, np.nan, energies[:100])
    assert size_exponent(some, ATOMS[:100]) == pytest.approx(1)
