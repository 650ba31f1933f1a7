"""A contribution to the JARVIS-Leaderboard: predictions of test crystals, what made them, and how to repeat that."""

import argparse
import datetime
import platform
import shlex
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from crystalframer_jax.cli.common import reporting_errors
from crystalframer_jax.cli.evaluate import dataset_of
from crystalframer_jax.config import ConfigError
from crystalframer_jax.files import check_replaceable
from crystalframer_jax.inference.ensemble import load_model
from crystalframer_jax.reporting.leaderboards import JARVIS, in_order_of, jarvis_ids, jarvis_name, write_jarvis
from crystalframer_jax.runs.run_directory import CONFIG_FILE, read_summary

INSTALL = "pip install crystalframer-jax"


@reporting_errors()
def run(arguments: argparse.Namespace) -> int:
    """Writes the contribution of a run."""
    folder, source = arguments.output.expanduser(), Path(arguments.run).expanduser()
    model = load_model(arguments.run, arguments.weights)
    target_set, names = model.config.target_set, [target.name for target in model.targets]
    known = {name: JARVIS[target_set, name] for name in names if (target_set, name) in JARVIS}
    target = arguments.target or next(iter(known), names[0])
    benchmark = arguments.benchmark or known.get(target, "")
    if target not in names or not benchmark:
        allowed = ", ".join(JARVIS.values())
        raise ConfigError(
            f"{arguments.run} was trained on {', '.join(names)} of {target_set}, of which the leaderboard has no "
            f"benchmark known here ({allowed}); name one by --benchmark, and the target by --target"
        )
    check_replaceable(folder / f"{jarvis_name(benchmark)}.csv.zip", b"PK")
    check_replaceable(folder / "run.sh", b"#!/bin/bash")
    check_replaceable(folder / "metadata.json", b'{\n "model_name"')
    dataset = dataset_of(model, arguments.run, arguments.data_dir)
    rows, column = dataset.splits["test"], names.index(target)
    rows = rows[np.isfinite(dataset.labels[rows, column])]
    if arguments.ids:
        wanted = jarvis_ids(arguments.ids.expanduser())
        rows = rows[in_order_of(wanted, dataset.table.ids[rows].tolist(), benchmark)]
    else:
        print(f"note: not compared with the ids of the leaderboard; --ids=FILE.json.zip takes its file of {benchmark}")
    predictions = model.predict_dataset(dataset, rows).value[:, column]
    commands = [
        INSTALL,
        shlex.join(["crystalframer", "prepare", f"--target_set={target_set}"]),
        f"crystalframer train --config={CONFIG_FILE} --workdir=run",
        shlex.join(["crystalframer", "export", "jarvis", "run", "--output=.", f"--target={target}"]),
    ]
    labels = dataset.labels[rows, column]
    ids = dataset.table.ids[rows].tolist()
    files = write_jarvis(folder, benchmark, ids, labels, predictions, _metadata(arguments, source), commands)
    if (source / CONFIG_FILE).is_file():
        shutil.copy(source / CONFIG_FILE, folder / CONFIG_FILE)
    print(f"{model.origin}: {len(rows):,} test crystals, MAE {np.abs(labels - predictions).mean():.4f}")
    print(f"wrote {', '.join(str(file) for file in files)}")
    return 0


def _metadata(arguments: argparse.Namespace, source: Path) -> dict[str, Any]:
    """Describes a contribution as the leaderboard wants it; what is not told is empty, for the user to fill in."""
    return {
        "model_name": arguments.model_name,
        "project_url": arguments.project_url,
        "date_submitted": datetime.date.today().strftime("%m-%d-%Y"),
        "author_email": arguments.author_email,
        "database_version": arguments.database_version,
        "team_name": arguments.team_name,
        "time_taken_seconds": str(round(read_summary(source).get("seconds", 0))) if source.is_dir() else "",
        "language": "python",
        "os": platform.system().lower(),
        "software_used": "crystalframer-jax,jax,flax,optax,pymatgen",
        "hardware_used": jax.devices()[0].device_kind,
        "git_url": [arguments.project_url] if arguments.project_url else [],
    }
