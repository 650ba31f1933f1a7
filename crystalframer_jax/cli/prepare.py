"""Prepare a target set for training, or list them."""

import argparse
import dataclasses
import os
import shlex
from collections.abc import Sequence

import numpy as np

from crystalframer_jax.cli.arguments import FOLD_VAL_SHARE, prepare_parser
from crystalframer_jax.cli.common import parsed, reporting_errors
from crystalframer_jax.config import ConfigError, TrainConfig
from crystalframer_jax.data.custom.fields import CustomData
from crystalframer_jax.data.custom.source import custom_source
from crystalframer_jax.data.datasets import folder_of, prepared_sets
from crystalframer_jax.data.owned import MANIFEST
from crystalframer_jax.data.prepare import Preparation, prepare
from crystalframer_jax.data.records import DataError, Source
from crystalframer_jax.data.registry import TARGET_SETS, TargetSet
from crystalframer_jax.data.sources import Bundled
from crystalframer_jax.data.store import ANOTHER_FOLDER, data_folder, load_dataset, read_set_manifest, targets_of
from crystalframer_jax.files import FileError, is_disk_full, locked
from crystalframer_jax.text import escaped, table, with_unit

CUSTOM_FLAGS = tuple(field.name for field in dataclasses.fields(CustomData))


def prepare_main(argv: Sequence[str] | None = None) -> int:
    """Is scripts/prepare_data.py."""
    return run(parsed(prepare_parser("prepare_data.py"), argv))


@reporting_errors("; the same command goes on from here", leave_at_once=False)
def run(arguments: argparse.Namespace) -> int:
    """Prepares a target set, or lists them."""
    try:
        if arguments.target_set:
            _prepare(arguments.target_set, arguments)
        elif arguments.source:
            raise ConfigError("name the target set to make of --source by --target_set=NAME")
        else:
            print(_listing(arguments.data_dir))
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise DataError("the disk is full; make room, and the same command goes on with what is done") from error
    return 0


def _prepare(name: str, arguments: argparse.Namespace) -> None:
    folder, known = folder_of(name, arguments.data_dir), TARGET_SETS.get(name)
    if arguments.source is not None and not arguments.source.exists():
        raise DataError(f"--source={arguments.source}: there is no such file or folder")
    source = _known_source(known, arguments) if known else _custom_source(name, arguments)
    val_share = arguments.val_share or (FOLD_VAL_SHARE if arguments.test_fold else 0.0)
    options = Preparation(
        arguments.split_seed, arguments.max_bad_share, arguments.unofficial, arguments.workers, val_share
    )
    if not prepare(folder, source, known, options):
        print(f"{name} is prepared already, in {folder}")
    targets = tuple(target.name for target in source.targets)
    dataset = load_dataset(folder, targets, TrainConfig().cutoff, options.workers)
    trainable = [
        target
        for target, labels in zip(targets, dataset.labels.T, strict=True)
        if all(np.isfinite(labels[rows]).any() for rows in dataset.splits.values())
    ]
    flags = [f"--config.target_set={name}", f"--config.targets={','.join(trainable)}"]
    flags += [f"--config.data_dir={arguments.data_dir}"] if arguments.data_dir else []
    print(f"train on it with {shlex.join(flags)}")


def _known_source(known: TargetSet, arguments: argparse.Namespace) -> Source:
    """Opens the source of a known target set, downloaded unless it is given."""
    unused = [f"--{flag}" for flag in CUSTOM_FLAGS if getattr(arguments, flag) != getattr(CustomData, flag)]
    unused += ["--val_share"] if arguments.val_share else []
    if unused:
        raise ConfigError(f"{unused[0]} is for your own crystals; {known.name} is known, choose another name for yours")
    if known.official_splits and arguments.split_seed != Preparation.split_seed and not arguments.unofficial:
        raise ConfigError(f"{known.name} has official splits: leave --split_seed out, or add --unofficial")
    if isinstance(known.source, Bundled):
        if arguments.source:
            raise ConfigError(f"{known.name} comes with the package; leave --source out")
        return known.source.open(known.targets)
    if arguments.source:
        files = known.source.given(arguments.source)
    else:
        downloads = data_folder(arguments.data_dir) / "downloads"
        if downloads.is_symlink():
            raise DataError(f"{downloads} is a link, through which nothing is written; name another --data_dir")
        with locked(downloads / ".lock", remedy=ANOTHER_FOLDER):
            files = known.source.fetch(downloads)
    return known.source.open(files, known.targets)


def _custom_source(name: str, arguments: argparse.Namespace) -> Source:
    """Opens the source of a user's own crystals."""
    if not arguments.source:
        known = ", ".join(TARGET_SETS)
        raise ConfigError(
            f"target set {name!r} is not known: name your crystals with --source, or choose one of {known}"
        )
    if arguments.group_column and arguments.split_column != CustomData.split_column:
        raise ConfigError("--split_column and --group_column contradict each other: give one of them")
    if arguments.test_fold and (arguments.group_column or arguments.split_column != CustomData.split_column):
        raise ConfigError("--test_fold splits the crystals by folds: leave --split_column and --group_column out")
    return custom_source(arguments.source, CustomData(**{flag: getattr(arguments, flag) for flag in CUSTOM_FLAGS}))


def _listing(data_dir: str) -> str:
    """Tabulates all target sets, known and prepared."""
    root = data_folder(data_dir)
    rows = []
    for name in (*TARGET_SETS, *prepared_sets(root)):
        known = TARGET_SETS.get(name)
        state = "bundled" if known and isinstance(known.source, Bundled) else "not prepared"
        targets = known.targets if known else ()
        if os.path.lexists(root / name / "crystals" / MANIFEST):
            try:
                manifest = read_set_manifest(root / name)
                state, targets = f"{manifest['crystals']:,} crystals", targets_of(manifest)
            except FileError:
                state = "damaged"
        units = (with_unit(target.name, target.unit) for target in targets)
        rows.append([escaped(name), escaped(", ".join(units)), state])
    return table(["target set", "targets", f"in {root}"], rows, num_left=2)
