"""The arguments of every subcommand; nothing here imports what takes long, so that --help answers at once."""

import argparse
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from crystalframer_jax import configs
from crystalframer_jax.text import escaped

DEFAULT_MODEL = "mp-2018"  # of the package
WEIGHTS = ("best", "last", "swa", "ema")
PRECISIONS = ("float32", "float64")
WEIGHTS_HELP = "default: those that the finished run selected by validation error, else best"
MODEL_HELP = """run directory, of one model or of an ensemble, a checkpoint (RUN/checkpoints/STEP), or a model of the
    package by name"""
CRYSTALS = """files with crystals (CIF, POSCAR, extended XYZ, vasprun.xml, CSV, JSON, .zip, ASE .db or .traj, also .gz),
    folders of them or with id_prop.csv, patterns such as 'cifs/*.cif', or - for a list of files on stdin"""
SPLITS = ("train", "val", "test")
MAX_BAD_SHARE, SPLIT_SEED, FOLD_VAL_SHARE = 0.05, 123, 0.1  # the first two are those of `Preparation`, see its tests


class Parser(argparse.ArgumentParser):
    """A parser with examples below its help: command lines that the tests execute."""

    def __init__(self, prog: str, description: str, examples: str = "", brief_errors: bool = False):
        """Errors are told with the usage, or in one line (`brief_errors`)."""
        self.brief_errors = brief_errors
        super().__init__(
            prog,
            description=textwrap.fill(" ".join(description.split()), 100),
            epilog=f"examples:\n{examples}" if examples else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def _print_message(self, message: str, file: Any = None) -> None:
        (file or sys.stderr).write(message)  # a closed pipe is noticed, which argparse would pass over

    def error(self, message: str) -> NoReturn:
        """Ends the command with status 2."""
        if self.brief_errors:
            self.exit(2, f"error: {escaped(' '.join(message.split()))}; see {self.prog} --help\n")
        super().error(message)


def names(text: str) -> tuple[str, ...]:
    """Reads names separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def model_parser(prog: str, description: str, examples: str = "", model_first: bool = False) -> Parser:
    """Makes a parser of what every command that predicts takes: the model, its weights, draws of frames.

    With `model_first` the model is the first positional argument, as the scripts have it, and must be named.
    """
    parser = Parser(prog, description, examples)
    if model_first:
        parser.add_argument("model", metavar="RUN", help=MODEL_HELP)
    else:
        parser.add_argument("--model", metavar="NAME_OR_RUN", help=f"{MODEL_HELP}; default: {DEFAULT_MODEL}")
    parser.add_argument("--weights", choices=WEIGHTS, help=WEIGHTS_HELP)
    samples_help = "average K draws among equally good frames and show their spread; default: as configured for the run"
    parser.add_argument("--num_frame_samples", type=int, metavar="K", help=samples_help)
    precision_help = "default: float64 on a CPU (float32 takes half the time), on a GPU that of the training"
    parser.add_argument("--precision", choices=PRECISIONS, help=precision_help)
    return parser


# Prediction


def predict_parser(prog: str = "crystalframer predict", model_first: bool = False) -> Parser:
    """Makes the parser of predict."""
    examples = """\
  crystalframer predict examples/NaCl.cif
  crystalframer predict examples --csv=predictions.csv
  crystalframer predict 'examples/*.cif' --json=-
  ls examples/*.cif | crystalframer predict -
  crystalframer predict --model=runs/quickstart examples/NaCl.cif"""
    description = """Predict crystals with a trained model or an ensemble; without --model, with the one of the package.
        A warning tells, in a line for each file, of doubtful structures: elements that were not in the training set,
        cells or numbers of atoms far outside its range, atoms without neighbors, and what was noticed on reading. A
        file that cannot be used is told, and the others are predicted. Where files have labels, errors are printed
        too."""
    parser = model_parser(prog, description, "" if model_first else examples, model_first)
    parser.add_argument("files", metavar="FILE", nargs="+", help=CRYSTALS)
    _add_labels(parser)
    add = parser.add_argument
    csv_help = "write the predictions, and the warnings, to this CSV file; - prints it instead of the table"
    add("--csv", "--output", dest="output", type=Path, metavar="FILE", help=csv_help)
    add("--json", type=Path, metavar="FILE", help="write the same as JSON; - prints it instead of the table")
    return parser


def _add_labels(parser: Parser) -> None:
    labels_help = (
        "fields of the files with the labels, in the order of the targets, - for none; default: named as these"
    )
    parser.add_argument("--labels", type=names, default=(), metavar="FIELD,...", help=labels_help)


def embed_parser(prog: str = "crystalframer embed") -> Parser:
    """Makes the parser of embed."""
    examples = """\
  crystalframer embed examples --output=vectors.npz
  crystalframer embed examples/NaCl.cif --atoms --output=atoms.csv
  crystalframer embed examples/NaCl.cif --nearest=5 --among=vectors.npz"""
    description = """Write the vectors of crystals, and of their atoms, that a model has before its output layers, as
        features for other programs; or tell which crystals of a set are nearest by them."""
    parser = model_parser(prog, description, examples)
    add = parser.add_argument
    add("files", metavar="FILE", nargs="+", help=CRYSTALS)
    add("--output", type=_vectors_file, metavar="FILE", help="file of vectors to write, .npz or .csv")
    add("--atoms", action="store_true", help="also the vectors of all atoms (.npz), or these instead (.csv)")
    add("--nearest", type=_count, default=0, metavar="N", help="tell the N nearest crystals of --among")
    among_help = "a target set, or a file of vectors that this command wrote; default: mp_flla_2015"
    add("--among", default="mp_flla_2015", metavar="SET", help=among_help)
    add("--data_dir", default="", metavar="DIR", help="where prepared data are kept; default: the user's cache folder")
    return parser


def _vectors_file(text: str) -> Path:
    """Reads the name of a file of vectors."""
    if not text.endswith((".npz", ".csv")):
        raise argparse.ArgumentTypeError(f"{text!r} ends neither in .npz nor in .csv")
    return Path(text)


# Evaluation


def evaluate_parser(prog: str = "crystalframer evaluate", model_first: bool = False) -> Parser:
    """Makes the parser of evaluate."""
    examples = """\
  crystalframer evaluate --model=runs/quickstart --split=test --output=test.csv
  crystalframer evaluate --model=runs/quickstart --details --exclude_leaked --plot=parity.png
  crystalframer evaluate FOLDER --labels=energy,gap"""
    description = """Errors of a trained model or an ensemble: on the data that it was trained on, on another target set
        that is prepared, or on files with labels."""
    parser = model_parser(prog, description, "" if model_first else examples, model_first)
    add = parser.add_argument
    data_help = "a target set by name, or files and folders with labels; default: the data of the training"
    add("data", metavar="DATA", nargs="*", help=data_help)
    _add_labels(parser)
    add("--split", choices=(*SPLITS, "all"), default="test", help="of a target set; default: test")
    details_help = "also errors by number of atoms and by element, and the ten largest"
    add("--details", action="store_true", help=details_help)
    leaked_help = (
        "leave out crystals that are in training too, or in that of the model of the package that it started from"
    )
    add("--exclude_leaked", "--exclude-leaked", action="store_true", help=leaked_help)
    add("--output", type=Path, help="write id, labels and predictions to this CSV file")
    data_help = "where the data are prepared; default: where the run has them, only read, or the user's cache folder"
    add("--data_dir", default="", metavar="DIR", help=data_help)
    plot_help = """draw predictions against labels or, of an ensemble, errors against standard deviations (a figure for
        each target, its name added to FILE); of classes, ROC curves"""
    add("--plot", type=_png, metavar="FILE.png", help=plot_help)
    elements_help = "draw the mean absolute error of the crystals with each element as a periodic table"
    add("--plot_elements", type=_png, metavar="FILE.png", help=elements_help)
    suspects_help = "write the labels of all splits that all models of an ensemble agree against to this CSV file"
    add("--suspects", type=Path, metavar="FILE", help=suspects_help)
    return parser


def _png(text: str) -> Path:
    """Reads the name of a figure."""
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png")
    return Path(text)


# Data


def prepare_parser(prog: str = "crystalframer prepare") -> Parser:
    """Makes the parser of prepare."""
    examples = """\
  crystalframer prepare
  crystalframer prepare --target_set=mp_flla_2015
  crystalframer prepare --target_set=mine --source=FOLDER --targets=band_gap --units=eV"""
    description = """Prepare a target set for training: one that is known (without --target_set they are listed), or
        your own crystals. --source names them: a folder with id_prop.csv, or with train, val and test; a CSV file with
        a column of structure files (.csv, .tsv), extended XYZ (.extxyz, .xyz), JSON (.json, .jsonl), any of these as
        .gz; a .zip of structures and their table, or of JSON; an ASE database or trajectory (.db, .traj); or pickles of
        the official project."""
    parser = Parser(prog, description, examples)
    add = parser.add_argument
    add("--target_set", default="", metavar="NAME", help="a known target set, or a name for your own")
    source_help = "file or folder to read; known target sets are downloaded without it"
    add("--source", type=lambda text: Path(text).expanduser(), help=source_help)
    add("--data_dir", default="", metavar="DIR", help="where prepared data are kept; default: the user's cache folder")
    add("--unofficial", action="store_true", help="take a source whose splits are not those of published numbers")
    share_help = f"of records to skip; default: {MAX_BAD_SHARE}"
    add("--max_bad_share", type=_share, default=MAX_BAD_SHARE, metavar="SHARE", help=share_help)
    add("--workers", type=_count, default=0, metavar="N", help="processes; default: one for each core")
    add("--split_seed", type=int, default=SPLIT_SEED, metavar="SEED", help="of random splits")
    add = parser.add_argument_group("your own crystals").add_argument
    add("--targets", type=names, default=(), metavar="NAME,...", help="labels to take; default: all numeric ones")
    add("--units", type=names, default=(), metavar="UNIT,...", help="their units, such as eV/atom,GPa")
    add("--structure_column", default="", metavar="NAME", help="of the file names in a CSV")
    add("--id_column", default="", metavar="NAME", help="column or field with the names of crystals")
    add("--split_column", default="split", metavar="NAME", help="column or field with train, val, test")
    add("--group_column", default="", metavar="NAME", help="groups that must not be split up")
    fold_help = f"this fold is the test set; of the others, --val_share (default: {FOLD_VAL_SHARE}) is for validation"
    add("--test_fold", default="", metavar="FOLD", help=fold_help)
    add("--fold_column", default="fold", metavar="NAME", help="column or field with the folds")
    val_help = "of the training crystals to take for validation, where only train and test are given"
    add("--val_share", type=_share, default=0.0, metavar="SHARE", help=val_help)
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


# Training


def shipped_configs() -> dict[str, Path]:
    """Lists the configurations of the package: their files by name."""
    files = Path(configs.__file__).parent.glob("*.py")
    return {file.stem: file for file in sorted(files) if file.stem not in ("__init__", "variants")}


def train_parser(prog: str = "crystalframer train") -> Parser:
    """Makes the parser of train; --config and its values are for ml_collections, see cli/train.py."""
    examples = """\
  crystalframer train --config=quickstart --workdir=runs/quickstart
  crystalframer train --config=recommended:lightweight --workdir=runs/light --config.targets=e_above_hull
  crystalframer train --config=runs/quickstart --workdir=runs/again --config.seed=1"""
    description = """Train a model, or continue a training that was interrupted (the same command). SIGTERM, SIGUSR1,
        Ctrl-C and the end of --max_minutes save the training and end it with exit status 0."""
    parser = Parser(prog, description, examples, brief_errors=True)
    add = parser.add_argument
    config_help = f"""hyperparameters: some of the package by name ({", ".join(shipped_configs())}), or a file such as
        configs/quickstart.py, each with :VARIANT after it for a variant (default, lightweight, crystalformer); or a run
        directory, or its config.json, for those of that run"""
    add("--config", required=True, metavar="FILE", help=config_help)
    add("--config.KEY", metavar="VALUE", help="another value of a hyperparameter, such as --config.lr=1e-3")
    add("--workdir", required=True, metavar="RUN", help="directory of the run: checkpoints, metrics, summary")
    changes_help = "hyperparameters that may differ from those of the run so far"
    add("--resume_with_changes", type=names, default=(), metavar="KEY,...", help=changes_help)
    skip_help = "how many steps may be skipped because their loss or gradient is not finite"
    add("--skip_nonfinite", type=_count, default=0, metavar="N", help=skip_help)
    minutes_help = "save and stop so many minutes after the start, at the latest"
    add("--max_minutes", type=_at_least(0.0), metavar="MINUTES", help=minutes_help)
    kinds_help = "of the attention: GPU kernels (pallas) where they work, or XLA"
    add("--implementation", choices=("auto", "xla", "pallas"), default="auto", help=kinds_help)
    wandb_help = "Weights & Biases project to log to as well (pip install '.[wandb]')"
    add("--wandb", default="", metavar="PROJECT", help=wandb_help)
    add = parser.add_argument_group("several processes").add_argument
    distributed_help = "train together with the other processes that SLURM, Open MPI or Kubernetes has started"
    add("--distributed", action="store_true", help=distributed_help)
    address_help = "train together with other processes: address of process 0, with a free port"
    add("--coordinator_address", metavar="HOST:PORT", help=address_help)
    add("--num_processes", type=_count, metavar="N", help="how many processes train together")
    add("--process_id", type=_count, metavar="N", help="which of them this is, from 0")
    watchdog_help = "end processes that train together if one makes no progress for so long; default: 10"
    add("--watchdog_minutes", type=_at_least(0.05), default=10.0, metavar="MINUTES", help=watchdog_help)
    return parser


def _at_least(least: float) -> Callable[[str], float]:
    """Returns what reads numbers from `least` to a million."""

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = float("nan")
        if number != number:
            raise argparse.ArgumentTypeError(f"{text} is not a number")
        if not least <= number <= 10**6:
            raise argparse.ArgumentTypeError(f"{text} is not between {least:g} and a million")
        return number

    return read


# Checkpoints of the official project


def import_parser(prog: str = "crystalframer import") -> Parser:
    """Makes the parser of import."""
    examples = """\
  crystalframer import last.ckpt --workdir=runs/imported --target_set=mp_flla_2015 --targets=e_form"""
    description = "Make a run directory of a checkpoint of the official PyTorch implementation."
    parser = Parser(prog, description, examples)
    add = parser.add_argument
    add("file", metavar="FILE.ckpt", type=Path, help="Lightning checkpoint, or state dict (--config)")
    add("--workdir", type=Path, required=True, help="run directory to write; must not hold a run")
    config_help = "official hyperparameters not in the file"
    add("--config", dest="hyper_parameters", type=Path, metavar="FILE.json", help=config_help)
    add("--target_set", dest="data", default="", help="name of the data that the model was trained on")
    add("--targets", type=names, default=(), help="names instead of the official ones: a,b")
    add("--units", type=names, default=(), help="a unit for each target; default: of the target set")
    add("--target_mean", type=_numbers, default=(), help="of the training labels, if not in the file")
    add("--target_std", type=_numbers, default=(), help="of the training labels, if not in the file")
    weights_help = "used by default; without it swa if the file has averaged weights"
    add("--weights", choices=("model", "swa"), help=weights_help)
    return parser


def _numbers(text: str) -> tuple[float, ...]:
    """Reads numbers separated by commas."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} are not numbers separated by commas") from error


def export_torch_parser(prog: str = "crystalframer export torch") -> Parser:
    """Makes the parser of export torch."""
    description = "Write a run as a checkpoint that the official PyTorch implementation can load."
    parser = Parser(prog, description, "  crystalframer export torch runs/mp_flla mp_flla.ckpt")
    add = parser.add_argument
    add("run", metavar="RUN", help="run directory, or one of its checkpoints (RUN/checkpoints/STEP)")
    add("file", metavar="FILE.ckpt", type=Path, help="file to write")
    add("--weights", choices=("best", "last", "swa"), help=WEIGHTS_HELP)
    add("--overwrite", action="store_true", help="replace FILE.ckpt if it exists")
    return parser


# Leaderboards


def export_jarvis_parser(prog: str = "crystalframer export jarvis") -> Parser:
    """Makes the parser of export jarvis."""
    examples = """\
  crystalframer export jarvis runs/jarvis --output=crystalframer_jax --author_email=you@there.org"""
    description = """Write a contribution to the JARVIS-Leaderboard: the predictions of a run for the test crystals of a
        benchmark (csv.zip), metadata.json, of which the rest is to be filled in, and run.sh."""
    parser = Parser(prog, description, examples)
    add = parser.add_argument
    add("run", metavar="RUN", help="run directory, of one model or of an ensemble")
    add("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    add("--weights", choices=WEIGHTS, help=WEIGHTS_HELP)
    add("--target", default="", metavar="NAME", help="of the run; default: the first that has a benchmark")
    add("--benchmark", default="", metavar="PROPERTY-DATASET", help="default: that of the target set and target")
    ids_help = "file of the benchmark from the leaderboard: predictions are for its test crystals, in its order"
    add("--ids", type=Path, metavar="FILE.json.zip", help=ids_help)
    add("--data_dir", default="", metavar="DIR", help="where the data are prepared")
    add("--model_name", default="CrystalFramer", metavar="TEXT")
    for name in ("team_name", "author_email", "project_url", "database_version"):
        add(f"--{name}", default="", metavar="TEXT")
    return parser


def export_matbench_parser(prog: str = "crystalframer export matbench") -> Parser:
    """Makes the parser of export matbench."""
    examples = """\
  crystalframer export matbench runs/phonons/fold_* --output=crystalframer_jax --authors='A. Author'"""
    description = """Write the results of five runs, trained on matbench_NAME-fold_0 to -fold_4, as Matbench v0.1 takes
        them: results.json.gz, info.json and run.py."""
    parser = Parser(prog, description, examples)
    add = parser.add_argument
    add("runs", metavar="RUN", nargs=5, help="run directories, in any order")
    add("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    add("--weights", choices=WEIGHTS, help=WEIGHTS_HELP)
    add("--data_dir", default="", metavar="DIR", help="where the data are prepared")
    add("--authors", default="", metavar="TEXT")
    add("--algorithm", default="CrystalFramer (JAX)", metavar="TEXT")
    long_default = "Transformer over the periodic neighbors of atoms with dynamic frames (ICLR 2025), crystalframer_jax"
    add("--algorithm_long", default=long_default, metavar="TEXT")
    add("--notes", default="", metavar="TEXT")
    return parser


# The machine


def doctor_parser(prog: str = "crystalframer doctor") -> Parser:
    """Makes the parser of doctor."""
    examples = """\
  crystalframer doctor
  crystalframer doctor --gpu --json=gpu.json"""
    description = """Tell whether all works here: versions, devices, kernels, folders with their sizes, and a prediction
        against a stored number. --gpu measures a GPU instead, in at most six minutes: kernels and XLA against sums in
        float64, times of training steps and predictions of three models, memory, a cell of 10,000 atoms."""
    parser = Parser(prog, description, examples)
    parser.add_argument("--gpu", action="store_true", help="measure the GPU of this machine")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was found to this file")
    parser.add_argument("--size", choices=("full", "small"), default="full", help=argparse.SUPPRESS)  # for tests
    return parser
