"""Target sets: named collections of crystals with labels, and where they come from. Adding one is adding an entry."""

import dataclasses
import gzip
import hashlib
import importlib.resources
import json
from collections.abc import Iterator
from typing import Any

from crystalframer_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Target:
    """A property to predict: its name here, the field of the source that holds it, and its unit."""

    name: str
    field: str
    unit: str


@dataclasses.dataclass(frozen=True)
class TargetSet:
    """Crystals with labels. `bundled` is the file inside the package: gzipped JSON lines with id, lattice (rows, Å),
    species, frac_coords and the labels.
    """

    name: str
    bundled: str
    targets: tuple[Target, ...]
    source: str

    def target(self, name: str) -> Target:
        """The target of that name; ConfigError if there is none."""
        for target in self.targets:
            if target.name == name:
                return target
        known = ", ".join(target.name for target in self.targets)
        raise ConfigError(f"targets={name!r} is not in target set {self.name}; it has {known}")

    def _content(self) -> bytes:
        return importlib.resources.files("crystalframer_jax.data").joinpath("bundled", self.bundled).read_bytes()

    def sha256(self) -> str:
        """Checksum of the source file."""
        return hashlib.sha256(self._content()).hexdigest()

    def records(self) -> Iterator[dict[str, Any]]:
        """The records of the source, in its order."""
        for line in gzip.decompress(self._content()).decode().splitlines():
            yield json.loads(line)


TARGET_SETS: dict[str, TargetSet] = {
    target_set.name: target_set
    for target_set in (
        TargetSet(
            name="mp_flla_2015",
            bundled="mp_flla_2015.jsonl.gz",
            targets=(
                Target("e_form", "formation_energy_per_atom", "eV/atom"),
                Target("e_above_hull", "e_above_hull", "eV/atom"),
            ),
            source="Materials Project (CC BY 4.0); F. Faber et al., Int. J. Quantum Chem. 115, 1094 (2015)",
        ),
    )
}


def target_set(name: str) -> TargetSet:
    """The target set of that name; ConfigError if there is none."""
    if name not in TARGET_SETS:
        raise ConfigError(f"target_set={name!r} is not known; allowed: {', '.join(TARGET_SETS)}")
    return TARGET_SETS[name]
