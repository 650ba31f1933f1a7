"""Target sets: named collections of crystals with labels, and where they come from. Adding one is adding an entry."""

import dataclasses
import functools
import importlib.resources
import json

from crystalframer_jax.config import ConfigError
from crystalframer_jax.data.records import Target
from crystalframer_jax.data.sources import Bundled, FigsharePickles, JarvisArchive
from crystalframer_jax.data.splits import SplitFacts

MEGNET_COUNTS = (60_000, 5_000, 4_239)


@dataclasses.dataclass(frozen=True)
class TargetSet:
    """Crystals with labels.

    Attributes:
      origin: where they come from, and how they are read.
      credit: whose data they are.
      num_records: records that the source is known to have; 0: unknown.
      split_counts: crystals for training, validation and test; (): 80, 10 and 10 %.
    """

    name: str
    origin: Bundled | JarvisArchive | FigsharePickles
    targets: tuple[Target, ...]
    credit: str
    num_records: int = 0
    split_counts: tuple[int, ...] = ()

    def target(self, name: str) -> Target:
        """The target of that name; ConfigError if there is none."""
        return find_target(self.name, self.targets, name)

    @property
    def official_splits(self) -> dict[str, SplitFacts]:
        """What is known of the splits that published numbers refer to; empty if there are none."""
        return {split: SplitFacts(**facts) for split, facts in _official_splits().get(self.name, {}).items()}


def find_target(target_set: str, targets: tuple[Target, ...], name: str) -> Target:
    """The target of that name; ConfigError if there is none."""
    for target in targets:
        if target.name == name:
            return target
    known = ", ".join(target.name for target in targets)
    raise ConfigError(f"targets={name!r} is not in target set {target_set}; it has {known}")


@functools.cache
def _official_splits() -> dict[str, dict[str, dict]]:
    file = importlib.resources.files("crystalframer_jax.data").joinpath("bundled", "official_splits.json")
    return json.loads(file.read_text())


JARVIS_CREDIT = "JARVIS-DFT (NIST); K. Choudhary et al., npj Comput. Mater. 6, 173 (2020)"
MEGNET_CREDIT = "Materials Project 2018.6.1 (CC BY 4.0); C. Chen et al., Chem. Mater. 31, 3564 (2019)"
OQMD_CREDIT = "OQMD (CC BY 4.0); S. Kirklin et al., npj Comput. Mater. 1, 15010 (2015)"
ELASTIC_CREDIT = MEGNET_CREDIT + "; splits of K. Yan et al., NeurIPS 2022 (Matformer)"

DFT_3D_2021 = JarvisArchive("dft_3d_2021", id_field="jid")
MEGNET = JarvisArchive("megnet", id_field="id")
OQMD = JarvisArchive("oqmd_3d_no_cfid", id_field="_oqmd_entry_id")

TARGET_SETS: dict[str, TargetSet] = {
    target_set.name: target_set
    for target_set in (
        TargetSet(
            name="mp_flla_2015",
            origin=Bundled("mp_flla_2015.jsonl.gz"),
            targets=(
                Target("e_form", "formation_energy_per_atom", "eV/atom"),
                Target("e_above_hull", "e_above_hull", "eV/atom"),
            ),
            credit="Materials Project (CC BY 4.0); F. Faber et al., Int. J. Quantum Chem. 115, 1094 (2015)",
        ),
        TargetSet(
            name="mp_elastic_2015",
            origin=Bundled("mp_elastic_2015.jsonl.gz"),
            targets=(
                Target("bulk_modulus", "K_VRH", "log10 GPa", log10=True),
                Target("shear_modulus", "G_VRH", "log10 GPa", log10=True),
            ),
            credit="Materials Project (CC BY 4.0); M. de Jong et al., Sci. Data 2, 150009 (2015)",
        ),
        TargetSet(
            name="jarvis__dft_3d_2021",
            origin=DFT_3D_2021,
            targets=(
                Target("formation_energy", "formation_energy_peratom", "eV/atom"),
                Target("total_energy", "optb88vdw_total_energy", "eV/atom"),
                Target("opt_bandgap", "optb88vdw_bandgap", "eV"),
            ),
            credit=JARVIS_CREDIT,
            num_records=55_723,
        ),
        TargetSet(
            name="jarvis__dft_3d_2021-mbj_bandgap",
            origin=DFT_3D_2021,
            targets=(Target("mbj_bandgap", "mbj_bandgap", "eV"),),
            credit=JARVIS_CREDIT,
            num_records=55_723,
        ),
        TargetSet(
            name="jarvis__dft_3d_2021-ehull",
            origin=DFT_3D_2021,
            targets=(Target("ehull", "ehull", "eV"),),
            credit=JARVIS_CREDIT,
            num_records=55_723,
        ),
        TargetSet(
            name="jarvis__megnet",
            origin=MEGNET,
            targets=(Target("e_form", "e_form", "eV/atom"), Target("bandgap", "gap pbe", "eV")),
            credit=MEGNET_CREDIT,
            num_records=69_239,
            split_counts=MEGNET_COUNTS,
        ),
        TargetSet(
            name="jarvis__megnet-bulk_modulus",
            origin=FigsharePickles("bulk", {"train": 40258705, "val": 40258675, "test": 40258666}),
            targets=(Target("bulk_modulus", "bulk modulus", "log10 GPa"),),
            credit=ELASTIC_CREDIT,
        ),
        TargetSet(
            name="jarvis__megnet-shear_modulus",
            origin=FigsharePickles("shear", {"train": 40258681, "val": 40258684, "test": 40258678}),
            targets=(Target("shear_modulus", "shear modulus", "log10 GPa"),),
            credit=ELASTIC_CREDIT,
        ),
        TargetSet(
            name="jarvis__oqmd_3d",
            origin=OQMD,
            targets=(Target("delta_e", "_oqmd_delta_e", "eV/atom"), Target("stability", "_oqmd_stability", "eV/atom")),
            credit=OQMD_CREDIT,
            num_records=817_636,
        ),
        TargetSet(
            name="jarvis__oqmd_3d-bandgap",
            origin=OQMD,
            targets=(Target("bandgap", "_oqmd_band_gap", "eV"),),
            credit=OQMD_CREDIT,
            num_records=817_636,
        ),
    )
}


def target_set(name: str) -> TargetSet:
    """The target set of that name; ConfigError if it is not one of those known from the start."""
    if name not in TARGET_SETS:
        raise ConfigError(f"target_set={name!r} is not known; allowed: {', '.join(TARGET_SETS)}")
    return TARGET_SETS[name]
