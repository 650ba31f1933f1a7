"""Fine-tune mp-2018 and train the same model from scratch for as long, on small sets, and compare the errors.

    python scripts/compare_finetuning.py [--sets NAME,...]

Sets are matbench_phonons (its five folds) and mp_elastic_2015 (both moduli), with all training crystals and with 200 of
them, those whose ids have the smallest SHA-256. About an hour on two cores; it continues where it was stopped.
"""

import argparse
import gzip
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from compare_recipes import train
from pymatgen.core import Element, Structure

from crystalframer_jax.cli.common import reporting_errors
from crystalframer_jax.config import TrainConfig
from crystalframer_jax.configs import finetune, recommended
from crystalframer_jax.data.datasets import open_dataset
from crystalframer_jax.text import table

CONFIG = "configs/finetune.py"
FROM_SCRATCH = {"pretrained_model": "", "reinit_layers": "", "weight_decay": recommended.get_config().weight_decay}


class Case(NamedTuple):
    """Sets whose errors are averaged, and for how long to train on each."""

    target_sets: tuple[str, ...]
    targets: tuple[str, ...]
    epochs: int
    crystals: int = 0  # to train on; 0: all


PHONONS = tuple(f"matbench_phonons-fold_{fold}" for fold in range(5)), ("last_phdos_peak",)
ELASTIC = ("mp_elastic_2015",), ("bulk_modulus", "shear_modulus")
CASES = {
    "phonons": Case(*PHONONS, 40),
    "phonons_200": Case(*PHONONS, 80, 200),
    "elastic": Case(*ELASTIC, 40),
    "elastic_200": Case(*ELASTIC, 80, 200),
}


def subset(name: str, case: Case, folder: Path, data_dir: str) -> str:
    """Prepares a bundled set with few of its training crystals and returns the name of what it makes."""
    smaller, source = f"{name}-{case.crystals}", folder / f"{name}-{case.crystals}.jsonl.gz"
    if not source.exists():
        dataset = open_dataset(name, case.targets, TrainConfig().cutoff, data_dir)
        crystals = dataset.table
        by_hash = sorted(
            dataset.splits["train"], key=lambda row: hashlib.sha256(str(crystals.ids[row]).encode()).hexdigest()
        )
        chosen = dataset.splits | {"train": by_hash[: case.crystals]}
        source.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(source, "wt") as stream:
            for split, row in ((split, row) for split, rows in chosen.items() for row in rows):
                atoms = slice(*crystals.atom_offset[row : row + 2])
                elements = [Element.from_Z(int(number)) for number in crystals.species[atoms]]
                place = crystals.lattice[row], elements, crystals.position[atoms]
                structure = Structure(*place, coords_are_cartesian=True)
                record = {"id": str(crystals.ids[row]), "split": split, "structure": structure.as_dict()}
                record |= dict(zip(case.targets, dataset.labels[row].tolist(), strict=True))
                stream.write(json.dumps(record) + "\n")
    units = ",".join(target.unit for target in open_dataset(name, case.targets, TrainConfig().cutoff, data_dir).targets)
    command = [sys.executable, "scripts/prepare_data.py", f"--target_set={smaller}", f"--source={source}"]
    command += [f"--targets={','.join(case.targets)}", f"--units={units}", f"--data_dir={data_dir}"]
    subprocess.run(command, check=True)
    return smaller


def lines_of(name: str, folder: Path, data_dir: str, flags: list[str]) -> list[list[str]]:
    """Trains on the sets of a case in both ways; a line for each target."""
    case, summaries = CASES[name], {}
    sets = [subset(s, case, folder, data_dir) if case.crystals else s for s in case.target_sets]
    for way, changes in (("from scratch", FROM_SCRATCH), ("fine-tuned", {})):
        settings = {"targets": ",".join(case.targets), "n_epochs": case.epochs, "data_dir": data_dir} | changes
        runs = {s: folder / name / way.replace(" ", "_") / s for s in sets}
        summaries[way] = [train(runs[s], CONFIG, {"target_set": s, **settings}, flags) for s in sets]
    minutes = [np.sum([summary["seconds"] for summary in found]) / 60 for found in summaries.values()]
    lines = []
    for target in case.targets:
        line = [name, target, summaries["fine-tuned"][0]["units"][target], *(f"{time:.1f}" for time in minutes)]
        for split in ("val", "test"):
            scratch, tuned = (
                np.mean([s["mae"][s["selected_weights"]][split][target] for s in found]) for found in summaries.values()
            )
            line += [f"{scratch:.4g}", f"{tuned:.4g}", f"{tuned / scratch - 1:+.1%}"]
        lines.append(line)
    return lines


@reporting_errors()
def main() -> None:
    """Trains what is not trained yet and prints the table."""
    parser = argparse.ArgumentParser("compare_finetuning.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--sets", default=",".join(CASES), metavar="NAME,...", help=f"of {', '.join(CASES)}")
    parser.add_argument("--folder", type=Path, default=Path("runs/finetuning"), metavar="DIR", help="of the runs")
    parser.add_argument("--data_dir", default=finetune.get_config().data_dir, metavar="DIR", help="of prepared data")
    arguments, flags = parser.parse_known_args()  # the others are for train.py
    names = arguments.sets.split(",")
    if unknown := set(names) - set(CASES):
        parser.error(f"--sets: there is no {', '.join(unknown)}")
    lines = [line for name in names for line in lines_of(name, arguments.folder, arguments.data_dir, flags)]
    header = ["set", "target", "unit", "minutes, scratch", "tuned", "val, scratch", "tuned", "gain"]
    print(table([*header, "test, scratch", "tuned", "gain"], lines, 3))


if __name__ == "__main__":
    main()
