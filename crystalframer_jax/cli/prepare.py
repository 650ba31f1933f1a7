"""The command line of scripts/prepare_data.py."""

import argparse
import dataclasses
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from crystalframer_jax.cli.common import names, reporting_errors
from crystalframer_jax.config import ConfigError, TrainConfig
from crystalframer_jax.data.custom.fields import CustomData
from crystalframer_jax.data.custom.source import ACCEPTED, custom_source
from crystalframer_jax.data.datasets import folder_of, prepared_sets
from crystalframer_jax.data.owned import MANIFEST
from crystalframer_jax.data.prepare import Preparation, prepare
from crystalframer_jax.data.records import DataError, Source
from crystalframer_jax.data.registry import TARGET_SETS, TargetSet
from crystalframer_jax.data.sources import Bundled
from crystalframer_jax.data.store import ANOTHER_FOLDER, data_folder, load_dataset, read_set_manifest, targets_of
from crystalframer_jax.files import FileError, is_disk_full, locked
from crystalframer_jax.text import escaped, table, with_unit

DESCRIPTION = f"""Prepare a target set for training: one that is known (without --target_set they are listed), or your
own crystals. --source names them: {ACCEPTED}."""
FOLD_VAL_SHARE = 0.1  # of the crystals of the other folds
CUSTOM_FLAGS = tuple(field.name for field in dataclasses.fields(CustomData))


@reporting_errors("; the same command goes on from here", leave_at_once=False)
def prepare_main(argv: Sequence[str] | None = None) -> int:
    """Prepares a target set, or lists them."""
    arguments = _parser().parse_args(argv)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("prepare_data.py", description=DESCRIPTION, allow_abbrev=False)
    add = parser.add_argument
    add("--target_set", default="", metavar="NAME", help="a known target set, or a name for your own")
    add(
        "--source",
        type=lambda text: Path(text).expanduser(),
        help="file or folder to read; known target sets are downloaded without it",
    )
    add("--data_dir", default="", metavar="DIR", help="where prepared data are kept; default: the user's cache folder")
    add("--unofficial", action="store_true", help="take a source whose splits are not those of published numbers")
    share = Preparation.max_bad_share
    add("--max_bad_share", type=_share, default=share, metavar="SHARE", help=f"of records to skip; default: {share}")
    add("--workers", type=_count, default=0, metavar="N", help="processes; default: one for each core")
    add("--split_seed", type=int, default=Preparation.split_seed, metavar="SEED", help="of random splits")
    add = parser.add_argument_group("your own crystals").add_argument
    add("--targets", type=names, default=(), metavar="NAME,...", help="labels to take; default: all numeric ones")
    add("--units", type=names, default=(), metavar="UNIT,...", help="their units, such as eV/atom,GPa")
    add("--structure_column", default=CustomData.structure_column, metavar="NAME", help="of the file names in a CSV")
    add("--id_column", default=CustomData.id_column, metavar="NAME", help="column or field with the names of crystals")
    add("--split_column", default=CustomData.split_column, metavar="NAME", help="column or field with train, val, test")
    add("--group_column", default=CustomData.group_column, metavar="NAME", help="groups that must not be split up")
    add(
        "--test_fold",
        default=CustomData.test_fold,
        metavar="FOLD",
        help=f"this fold is the test set; of the others, --val_share (default: {FOLD_VAL_SHARE}) is for validation",
    )
    add("--fold_column", default=CustomData.fold_column, metavar="NAME", help="column or field with the folds")
    add(
        "--val_share",
        type=_share,
        default=0.0,
        metavar="SHARE",
        help="of the training crystals to take for validation, where only train and test are given",
    )
    add("--allow_pickle", action="store_true", help="read .pkl files, through an allow-list")
    return parser


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return share


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


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
