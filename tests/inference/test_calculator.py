"""Total energies for ASE."""

import numpy as np
import pytest
from support import EXAMPLES

from crystalframer_jax.batching.targets import TargetStatistics
from crystalframer_jax.config import ConfigError
from crystalframer_jax.inference import energy_calculator

ase_io = pytest.importorskip("ase.io")


class Model:
    """Predicts 1 eV/atom of the first target and 2 of the second, whatever the crystal."""

    def __init__(self, *names, unit="eV/atom"):
        self.targets = tuple(TargetStatistics(name, unit, 0.0, 1.0) for name in names)

    def predict(self, structures):
        return np.arange(1.0, len(self.targets) + 1)[None]


def test_energies_and_nothing_else():
    from ase.calculators.calculator import PropertyNotImplementedError

    atoms = ase_io.read(EXAMPLES / "NaCl.cif")
    atoms.calc = energy_calculator(Model("opt_bandgap", "total_energy"))
    assert atoms.get_potential_energy() == 2.0 * 8
    for ask in (atoms.get_forces, atoms.get_stress):
        with pytest.raises(PropertyNotImplementedError, match="energies only: the model has no"):
            ask()


@pytest.mark.parametrize(
    ("model", "target"),
    [(Model("e_form"), ""), (Model("e_form"), "e_form"), (Model("total_energy", unit="eV"), ""), (Model("x"), "y")],
)
def test_models_without_total_energies(model, target):
    with pytest.raises(ConfigError, match="no total energy in eV/atom"):
        energy_calculator(model, target)
