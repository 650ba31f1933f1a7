"""Results of five runs, one for each fold, as Matbench v0.1 takes them."""

import argparse
import datetime
import importlib.metadata
import re
import shlex

import numpy as np

import crystalframer_jax
from crystalframer_jax.cli.common import reporting_errors
from crystalframer_jax.cli.evaluate import dataset_of
from crystalframer_jax.config import ConfigError
from crystalframer_jax.files import check_replaceable
from crystalframer_jax.inference.ensemble import load_model
from crystalframer_jax.reporting.leaderboards import matbench_results, write_matbench
from crystalframer_jax.runs.run_directory import as_json

FOLD_SET = r"(matbench_\w+)-(fold_[0-4])"  # name of the target set of a fold
BIBTEX = """@inproceedings{ito2025rethinking,
  title={Rethinking the role of frames for {SE(3)}-invariant crystal structure modeling},
  author={Ito, Yusei and Taniai, Tatsunori and Igarashi, Ryo and Ushiku, Yoshitaka and Ono, Kanta},
  booktitle={International Conference on Learning Representations},
  year={2025}
}"""


@reporting_errors()
def run(arguments: argparse.Namespace) -> int:
    """Writes the results of five runs."""
    folder = arguments.output.expanduser()
    check_replaceable(folder / "results.json.gz", b"\x1f\x8b")
    check_replaceable(folder / "info.json", b'{\n "authors"')
    check_replaceable(folder / "run.py", b"import subprocess")
    folds, parameters, tasks = {}, {}, set()
    for path in arguments.runs:
        model = load_model(path, arguments.weights)
        found = re.fullmatch(FOLD_SET, model.config.target_set)
        if not found or len(model.targets) != 1 or found[2] in folds:
            raise ConfigError(
                f"{path} was trained on {model.config.target_set!r}; give runs of one target, one for each of the "
                "sets matbench_NAME-fold_0 to -fold_4"
            )
        tasks.add(found[1])
        dataset = dataset_of(model, path, arguments.data_dir)
        rows = dataset.splits["test"]
        predictions = model.predict_dataset(dataset, rows).value[:, 0]
        folds[found[2]] = dataset.table.ids[rows].tolist(), dataset.labels[rows, 0], predictions
        parameters[found[2]] = as_json(model.config) | {"data_dir": ""}
        error = np.abs(predictions - dataset.labels[rows, 0]).mean()
        print(f"{found[0]}: {len(rows):,} test crystals, MAE {error:.4f}", flush=True)
    if len(tasks) != 1:
        raise ConfigError(f"the runs are of several tasks: {', '.join(sorted(tasks))}")
    (task,) = tasks
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y.%m.%d %H:%M.%S")
    results = matbench_results(task, folds, parameters, stamp)
    packages = ("jax", "flax", "optax", "numpy", "pymatgen")
    needed = [f"crystalframer-jax=={crystalframer_jax.__version__}"]
    needed += [f"{name}=={importlib.metadata.version(name)}" for name in packages]
    info = {
        "authors": arguments.authors,
        "algorithm": arguments.algorithm,
        "algorithm_long": arguments.algorithm_long,
        "bibtex_refs": BIBTEX,
        "notes": arguments.notes,
        "requirements": {"python": needed},
    }
    config = task if task == "matbench_phonons" else "recommended"
    commands = [
        shlex.join(
            ["crystalframer", "train", f"--config={config}", f"--config.target_set={task}-{fold}", f"--workdir={fold}"]
        )
        for fold in folds
    ]
    commands.append(shlex.join(["crystalframer", "export", "matbench", *folds, "--output=."]))
    files = write_matbench(folder, results, info, commands)
    print(f"wrote {', '.join(str(file) for file in files)}")
    return 0
