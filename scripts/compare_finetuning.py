"""Fine-tune mp-2018 and train the same model from scratch for as long, on small sets, and compare the errors.

    python scripts/compare_finetuning.py [--sets NAME,...]

Sets are matbench_phonons (its five folds) and mp_elastic_2015 (both moduli, and the bulk modulus alone; five folds too,
as its own test set is small) with all training crystals, and with 200 of them, those whose ids have the smallest
SHA-256. Two hours on two cores; it continues where it was stopped.
"""

import argparse
import gzip
import hashlib
import itertools
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from compare_recipes import train
from pymatgen.core import Element, Structure

from crystalframer_jax.cli.common import reporting_errors
from crystalframer_jax.config import TrainConfig
from crystalframer_jax.configs import finetune, recommended
from crystalframer_jax.data.datasets import open_dataset
from crystalframer_jax.data.registry import target_set
from crystalframer_jax.data.store import Dataset
from crystalframer_jax.text import table

FROM_SCRATCH = {"pretrained_model": "", "reinit_layers": "", "weight_decay": recommended.get_config().weight_decay}


class Case(NamedTuple):
    """Sets whose errors are averaged, and for how long to train on each."""

    target_sets: tuple[str, ...]
    targets: tuple[str, ...]
    epochs: int
    variant: str  # of configs/finetune.py
    folds: int = 0  # to make of the whole set; 0: its own splits
    crystals: int = 0  # to train on; 0: all


PHONONS = tuple(f"matbench_phonons-fold_{fold}" for fold in range(5)), ("last_phdos_peak",)
ELASTIC = ("mp_elastic_2015",), ("bulk_modulus", "shear_modulus")
CASES = {
    "phonons": Case(*PHONONS, 40, "many"),
    "phonons_200": Case(*PHONONS, 80, "few", crystals=200),
    "elastic": Case(*ELASTIC, 40, "many", folds=5),
    "bulk": Case(ELASTIC[0], ("bulk_modulus",), 40, "many", folds=5),
    "elastic_200": Case(*ELASTIC, 80, "few", crystals=200),
    "bulk_200": Case(ELASTIC[0], ("bulk_modulus",), 80, "few", crystals=200),
}


def sets_of(name: str, case: Case, folder: Path, data_dir: str) -> list[str]:
    """Prepares what is made of a bundled set, if anything is, and returns the names of the sets to train on."""
    if not case.crystals and not case.folds:
        return [name]
    labels = tuple(target.name for target in target_set(name).targets)  # all: cases of other targets share the sets
    dataset = open_dataset(name, labels, TrainConfig().cutoff, data_dir)
    splits = {split: rows.tolist() for split, rows in dataset.splits.items()}
    if case.crystals:
        made = {f"{name}-{case.crystals}": splits | {"train": by_hash(dataset, splits["train"])[: case.crystals]}}
    else:
        rows = by_hash(dataset, itertools.chain(*splits.values()))
        made = {f"{name}-fold_{fold}": fold_of(rows, fold, case.folds) for fold in range(case.folds)}
    for smaller, splits in made.items():
        prepare(smaller, dataset, splits, folder, data_dir)
    return list(made)


def by_hash(dataset: Dataset, rows: Iterable[int]) -> list[int]:
    """Sorts rows of the table by the SHA-256 of their ids."""
    return sorted(rows, key=lambda row: hashlib.sha256(str(dataset.table.ids[row]).encode()).hexdigest())


def fold_of(rows: list[int], fold: int, folds: int) -> dict[str, list[int]]:
    """The splits of a fold: every crystal is tested once, an eighth of the others validates."""
    rest = [row for place, row in enumerate(rows) if place % folds != fold]
    train = [row for place, row in enumerate(rest) if place % 8]
    return {"train": train, "val": rest[::8], "test": rows[fold::folds]}


def prepare(name: str, dataset: Dataset, splits: dict[str, list[int]], folder: Path, data_dir: str) -> None:
    """Writes crystals of a dataset to a file of the folder, unless it is there, and prepares them as a set."""
    source, crystals, targets = folder / f"{name}.jsonl.gz", dataset.table, dataset.targets
    if not source.exists():
        source.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(source, "wt") as stream:
            for split, row in ((split, row) for split, rows in splits.items() for row in rows):
                atoms = slice(*crystals.atom_offset[row : row + 2])
                elements = [Element.from_Z(int(number)) for number in crystals.species[atoms]]
                place = crystals.lattice[row], elements, crystals.position[atoms]
                structure = Structure(*place, coords_are_cartesian=True)
                record = {"id": str(crystals.ids[row]), "split": split, "structure": structure.as_dict()}
                labels = zip(targets, dataset.labels[row].tolist(), strict=True)
                stream.write(json.dumps(record | {target.name: label for target, label in labels}) + "\n")
    command = [sys.executable, "scripts/prepare_data.py", f"--target_set={name}", f"--source={source}"]
    command += [f"--targets={','.join(target.name for target in targets)}"]
    command += [f"--units={','.join(target.unit for target in targets)}"]
    subprocess.run([*command, f"--data_dir={data_dir}"], check=True)


def lines_of(name: str, folder: Path, data_dir: str, flags: list[str]) -> list[list[str]]:
    """Trains on the sets of a case in both ways; a line for each target."""
    case, summaries = CASES[name], {}
    config = f"configs/finetune.py:{case.variant}"
    sets = [made for s in case.target_sets for made in sets_of(s, case, folder, data_dir)]
    for way, changes in (("from scratch", FROM_SCRATCH), ("fine-tuned", {})):
        settings = {"targets": ",".join(case.targets), "n_epochs": case.epochs, "data_dir": data_dir} | changes
        runs = {s: folder / name / way.replace(" ", "_") / s for s in sets}
        summaries[way] = [train(runs[s], config, {"target_set": s, **settings}, flags) for s in sets]
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
