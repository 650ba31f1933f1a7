"""Train one small model by the official recipe and by the recommended one, on several sets, and compare the errors.

    python scripts/compare_recipes.py [--sets NAME,...] [--mp_2018 FILE]

About an hour on two cores for the sets that ship with the package; it continues where it was stopped, and runs that
are there are only read. The model is that of configs/quickstart.py. The official recipe has a quarter more epochs,
which take at least as long. --mp_2018 adds 8,000 crystals of at most 16 atoms of a file of MEGNet's crystals (lines of
JSON with id, lattice, species, frac_coords, e_form, gap_pbe, split): those whose ids have the smallest SHA-256.
"""

import argparse
import gzip
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from crystalframer_jax.cli.common import reporting_errors
from crystalframer_jax.config import TrainConfig
from crystalframer_jax.configs import recommended
from crystalframer_jax.text import table

SEEDS = (123, 124, 125)
SWA_SHARE = 4  # of the epochs of the official recipe, one of so many is averaged
OFFICIAL = {key: getattr(TrainConfig(), key) for key in recommended.RECIPE} | {"batch_size": 64}
# The recommended recipe without one of its ingredients, or with another; one seed, on mp_flla and phonons
CHANGES: dict[str, dict[str, Any]] = {
    "adamw, lr 1e-3": {"optimizer": "adamw", "lr": 1e-3},
    "element references": {"element_references": True},
    "batches of 64": {"batch_size": 64},
    "linear schedule": {"lr_sch": "linear"},
    "lr 1.5e-3": {"lr": 1.5e-3},
    "lr 6e-3": {"lr": 6e-3},
    "ties chosen by the crystal": {"ties": "intrinsic"},
    "average over the last quarter": {"swa_epochs": 0},  # of as many as SWA_SHARE says
    "exponential average": {"ema_decay": 0.99},
}


class Case(NamedTuple):
    """A set to train on, and for how long."""

    target_set: str
    targets: tuple[str, ...]
    epochs: int


CASES = {
    "mp_flla": Case("mp_flla_2015", ("e_form",), 12),
    "elastic": Case("mp_elastic_2015", ("bulk_modulus", "shear_modulus"), 40),
    "phonons": Case("matbench_phonons-fold_0", ("last_phdos_peak",), 40),
    "mp_2018": Case("mp_2018_small", ("e_form", "gap_pbe"), 6),
}


class Recipe(NamedTuple):
    """Changes of configs/quickstart.py, and the seeds to train with."""

    name: str
    epochs: int
    changes: dict[str, Any]
    seeds: tuple[int, ...]


def recipes_of(name: str) -> list[Recipe]:
    """Lists what a set is trained by."""
    epochs = CASES[name].epochs
    longer = round(1.25 * epochs)
    found = [
        Recipe("official", longer, {**OFFICIAL, "swa_epochs": longer // SWA_SHARE}, SEEDS),
        Recipe("recommended", epochs, {}, SEEDS),
    ]
    if name in ("mp_flla", "phonons"):
        for title, values in CHANGES.items():
            changed = {key: epochs // SWA_SHARE if key == "swa_epochs" else value for key, value in values.items()}
            found.append(Recipe(title, epochs, changed, SEEDS[:1]))
    return found


def train(run: Path, config: str, settings: dict[str, Any], flags: list[str]) -> dict[str, Any]:
    """Trains with some `settings` of a configuration file, unless that is done, and reads the summary of the run."""
    if not (run / "summary.json").exists():
        command = [sys.executable, "scripts/train.py", f"--config={config}", f"--workdir={run}"]
        command += [f"--config.{key}={value}" for key, value in settings.items()]
        print(f"== {run}", flush=True)
        subprocess.run([*command, *flags], check=True, stdin=subprocess.DEVNULL)
    return json.loads((run / "summary.json").read_text())


def train_by(recipe: Recipe, case: Case, seed: int, folder: Path, flags: list[str]) -> dict[str, Any]:
    """Trains the small model on a set."""
    settings = {"target_set": case.target_set, "targets": ",".join(case.targets), "n_epochs": recipe.epochs}
    run = folder / "".join(c if c.isalnum() else "_" for c in recipe.name) / f"seed_{seed}"
    return train(run, "configs/quickstart.py", settings | {"seed": seed, **recipe.changes}, flags)


def lines_of(name: str, folder: Path, flags: list[str]) -> list[list[str]]:
    """Trains on a set by all recipes; a line for each of them and each target."""
    case, lines = CASES[name], []
    means: dict[str, float] = {}
    for recipe in recipes_of(name):
        summaries = [train_by(recipe, case, seed, folder / name, flags) for seed in recipe.seeds]
        minutes = np.median([summary["seconds"] for summary in summaries]) / 60
        for target in case.targets:
            errors = [s["mae"][s["selected_weights"]]["val"][target] for s in summaries]
            mean = means.setdefault(target, float(np.mean(errors)))  # of the official recipe, the first
            spread = f"{np.std(errors, ddof=1):.4f}" if len(errors) > 1 else "-"
            test = np.mean([s["mae"][s["selected_weights"]]["test"][target] for s in summaries])
            baseline, unit = summaries[0]["mean_predictor_mae"]["val"][target], summaries[0]["units"][target]
            gain = f"{np.mean(errors) / mean - 1:+.1%}"
            numbers = [f"{np.mean(errors):.4f}", spread, gain, f"{test:.4f}", f"{baseline:.4f}"]
            lines.append([name, target, unit, recipe.name, str(recipe.epochs), f"{minutes:.1f}", *numbers])
    return lines


def small_crystals(file: Path, output: Path) -> None:
    """Writes the 8,000 small training crystals, and the small ones of the validation set, for test, as JSON lines."""
    with gzip.open(file, "rt") as stream:
        records = [record for record in map(json.loads, stream) if len(record["species"]) <= 16]
    records.sort(key=lambda record: hashlib.sha256(record["id"].encode()).hexdigest())
    chosen = [record for record in records if record["split"] == "train"][:8000]
    chosen += [{**record, "split": "test"} for record in records if record["split"] == "val"]
    output.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(output, "wt") as stream:
        stream.writelines(json.dumps(record) + "\n" for record in chosen)


@reporting_errors()
def main() -> None:
    """Trains what is not trained yet and prints the table."""
    parser = argparse.ArgumentParser("compare_recipes.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--sets", default="", metavar="NAME,...", help=f"of {', '.join(CASES)}; default: all there are")
    parser.add_argument("--mp_2018", type=Path, metavar="FILE", help="MEGNet's crystals as JSON lines, for mp_2018")
    parser.add_argument("--folder", type=Path, default=Path("runs/recipes"), metavar="DIR", help="of the runs")
    arguments, flags = parser.parse_known_args()  # the others are for train.py
    names = arguments.sets.split(",") if arguments.sets else [n for n in CASES if n != "mp_2018" or arguments.mp_2018]
    if unknown := set(names) - set(CASES):
        parser.error(f"--sets: there is no {', '.join(unknown)}")
    if "mp_2018" in names and arguments.mp_2018:
        source, case = arguments.folder / "mp_2018_small.jsonl.gz", CASES["mp_2018"]
        if not source.exists():
            small_crystals(arguments.mp_2018, source)
        data_dir = [flag.replace("--config.data_dir", "--data_dir") for flag in flags if "data_dir" in flag]
        command = [sys.executable, "scripts/prepare_data.py", f"--target_set={case.target_set}", f"--source={source}"]
        command += [f"--targets={','.join(case.targets)}", "--units=eV/atom,eV", "--val_share=0.1", *data_dir]
        subprocess.run(command, check=True)
    lines = [line for name in names for line in lines_of(name, arguments.folder, flags)]
    header = ["set", "target", "unit", "recipe", "epochs", "minutes", "val MAE", "std", "against official"]
    print(table([*header, "test MAE", "mean predictor"], lines, 4))


if __name__ == "__main__":
    main()
