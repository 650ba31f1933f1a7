"""Target sets: named collections of crystals with labels, and where they come from. Adding one is adding an entry."""

import dataclasses
import importlib.resources

from crystalframer_jax.config import ConfigError
from crystalframer_jax.data.io.download import LARGEST_FILE
from crystalframer_jax.data.records import Target
from crystalframer_jax.data.sources import Bundled, FigsharePickles, JarvisArchive
from crystalframer_jax.data.splits import SplitFacts
from crystalframer_jax.files import parse_json


@dataclasses.dataclass(frozen=True)
class TargetSet:
    """Crystals with labels."""

    name: str
    source: Bundled | JarvisArchive | FigsharePickles
    targets: tuple[Target, ...]
    credit: str  # whose data they are
    num_records: int = 0  # that the source is known to have; 0: unknown
    split_counts: tuple[int, ...] = ()  # for training, validation and test; (): 80, 10 and 10 %

    def target(self, name: str) -> Target:
        """Finds the target of that name; ConfigError if there is none."""
        return find_target(self.name, self.targets, name)

    @property
    def official_splits(self) -> dict[str, SplitFacts]:
        """Returns what is known of the splits that published numbers refer to; empty if there are none."""
        file = importlib.resources.files("crystalframer_jax.data").joinpath("bundled", "official_splits.json")
        official = parse_json(file.read_bytes(), file).get(self.name, {})
        return {split: SplitFacts(**facts) for split, facts in official.items()}


def find_target(target_set: str, targets: tuple[Target, ...], name: str) -> Target:
    """Finds the target of that name; ConfigError if there is none."""
    for target in targets:
        if target.name == name:
            return target
    known = ", ".join(target.name for target in targets)
    raise ConfigError(f"targets={name!r} is not in target set {target_set}; it has {known}")


JARVIS_CREDIT = "JARVIS-DFT (NIST); K. Choudhary et al., npj Comput. Mater. 6, 173 (2020)"
MEGNET_CREDIT = "Materials Project 2018.6.1 (CC BY 4.0); C. Chen et al., Chem. Mater. 31, 3564 (2019)"
OQMD_CREDIT = "OQMD (CC BY 4.0); S. Kirklin et al., npj Comput. Mater. 1, 15010 (2015)"
ELASTIC_CREDIT = MEGNET_CREDIT + "; splits of K. Yan et al., NeurIPS 2022 (Matformer)"


def _dft_3d_2021(name: str, *targets: Target) -> TargetSet:
    return TargetSet(name, JarvisArchive("dft_3d_2021", id_field="jid"), targets, JARVIS_CREDIT, num_records=55_723)


def _oqmd(name: str, *targets: Target) -> TargetSet:
    source = JarvisArchive("oqmd_3d_no_cfid", id_field="_oqmd_entry_id", largest=4 * LARGEST_FILE)
    return TargetSet(name, source, targets, OQMD_CREDIT, num_records=817_636)


def _elastic(name: str, word: str, train: int, val: int, test: int) -> TargetSet:
    target = Target(f"{word}_modulus", f"{word} modulus", "log10 GPa")
    return TargetSet(name, FigsharePickles(word, {"train": train, "val": val, "test": test}), (target,), ELASTIC_CREDIT)


def _phonons(fold: int) -> TargetSet:
    """One of the five tasks of matbench_phonons: its official test crystals, and a tenth of the others to validate."""
    return TargetSet(
        name=f"matbench_phonons-fold_{fold}",
        source=Bundled("matbench_phonons.jsonl.gz", fold),
        targets=(Target("last_phdos_peak", "last_phdos_peak", "1/cm"),),
        credit="Materials Project (CC BY 4.0); G. Petretto et al., Sci. Data 5, 180065 (2018); Matbench v0.1",
        num_records=1_265,
    )


TARGET_SETS: dict[str, TargetSet] = {
    target_set.name: target_set
    for target_set in (
        TargetSet(
            name="mp_flla_2015",
            source=Bundled("mp_flla_2015.jsonl.gz"),
            targets=(
                Target("e_form", "formation_energy_per_atom", "eV/atom"),
                Target("e_above_hull", "e_above_hull", "eV/atom"),
            ),
            credit="Materials Project (CC BY 4.0); F. Faber et al., Int. J. Quantum Chem. 115, 1094 (2015)",
        ),
        TargetSet(
            name="mp_elastic_2015",
            source=Bundled("mp_elastic_2015.jsonl.gz"),
            targets=(
                Target("bulk_modulus", "K_VRH", "log10 GPa", log10=True),
                Target("shear_modulus", "G_VRH", "log10 GPa", log10=True),
            ),
            credit="Materials Project (CC BY 4.0); M. de Jong et al., Sci. Data 2, 150009 (2015)",
        ),
        *map(_phonons, range(5)),
        _dft_3d_2021(
            "jarvis__dft_3d_2021",
            Target("formation_energy", "formation_energy_peratom", "eV/atom"),
            Target("total_energy", "optb88vdw_total_energy", "eV/atom"),
            Target("opt_bandgap", "optb88vdw_bandgap", "eV"),
        ),
        _dft_3d_2021("jarvis__dft_3d_2021-mbj_bandgap", Target("mbj_bandgap", "mbj_bandgap", "eV")),
        _dft_3d_2021("jarvis__dft_3d_2021-ehull", Target("ehull", "ehull", "eV")),
        TargetSet(
            name="jarvis__megnet",
            source=JarvisArchive("megnet", id_field="id"),
            targets=(Target("e_form", "e_form", "eV/atom"), Target("bandgap", "gap pbe", "eV")),
            credit=MEGNET_CREDIT,
            num_records=69_239,
            split_counts=(60_000, 5_000, 4_239),
        ),
        _elastic("jarvis__megnet-bulk_modulus", "bulk", train=40258705, val=40258675, test=40258666),
        _elastic("jarvis__megnet-shear_modulus", "shear", train=40258681, val=40258684, test=40258678),
        _oqmd(
            "jarvis__oqmd_3d",
            Target("delta_e", "_oqmd_delta_e", "eV/atom"),
            Target("stability", "_oqmd_stability", "eV/atom"),
        ),
        _oqmd("jarvis__oqmd_3d-bandgap", Target("bandgap", "_oqmd_band_gap", "eV")),
    )
}


def target_set(name: str) -> TargetSet:
    """Finds the target set of that name; ConfigError if it is not one of those known from the start."""
    if name not in TARGET_SETS:
        raise ConfigError(f"target_set={name!r} is not known; allowed: {', '.join(TARGET_SETS)}")
    return TARGET_SETS[name]
