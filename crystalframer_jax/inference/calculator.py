"""A calculator of ASE for models that predict total energies per atom."""

from typing import Any

from crystalframer_jax.config import ConfigError
from crystalframer_jax.text import with_unit

TOTAL_ENERGIES = ("total_energy", "optb88vdw_total_energy", "energy_per_atom", "total_energy_per_atom")


def energy_calculator(model: Any, target: str = "") -> Any:
    """Makes a calculator of ASE, for `atoms.calc`, of a `Predictor` or an `Ensemble`.

    It has the total energy (eV): that of an atom, which the `target` (default: the first of TOTAL_ENERGIES among those
    of the model) is, times the number of atoms. There are no forces. Raises ConfigError for a model without a total
    energy: a formation energy is counted from the elements, and times the number of atoms it is no total energy.
    """
    from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes

    names = [s.name for s in model.targets]
    chosen = target or next((name for name in names if name in TOTAL_ENERGIES), "")
    if (
        chosen not in names
        or "form" in chosen
        or "hull" in chosen
        or model.targets[names.index(chosen)].unit != "eV/atom"
    ):
        told = ", ".join(with_unit(s.name, s.unit) for s in model.targets)
        raise ConfigError(f"the model predicts {told}, no total energy in eV/atom; name its target if that is one")
    column = names.index(chosen)

    class EnergyCalculator(Calculator):
        """Total energies by a model of crystals, without forces."""

        implemented_properties = ["energy"]  # noqa: RUF012  # as ASE wants it

        def calculate(
            self, atoms: Any = None, properties: Any = ("energy",), system_changes: Any = all_changes
        ) -> None:
            """Computes the total energy of the atoms, eV."""
            if missing := set(properties) - {"energy"}:
                raise PropertyNotImplementedError(f"energies only: the model has no {', '.join(sorted(missing))}")
            super().calculate(atoms, properties, system_changes)
            self.results["energy"] = float(model.predict(self.atoms)[0, column]) * len(self.atoms)

        def get_property(self, name: str, atoms: Any = None, allow_calculation: bool = True) -> Any:
            """Returns a property; says of others than the energy that there are none."""
            if name != "energy":
                raise PropertyNotImplementedError(f"energies only: the model has no {name}")
            return super().get_property(name, atoms, allow_calculation)

    return EnergyCalculator()
