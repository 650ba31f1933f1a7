"""Train a model, or continue a training that was interrupted."""

import sys
import time
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from crystalframer_jax.cli import stored_config
from crystalframer_jax.cli.common import reporting_errors
from crystalframer_jax.config import ConfigError, check_overrides

CONFIG_FILE = "config.json"  # in the directory of a run
START = time.monotonic()
ARGUMENTS: list[str] = []  # the command line as ml_collections is to see it
CONFIG_HELP = """File of hyperparameters, such as configs/quickstart.py, or FILE:VARIANT; or a run directory, or its
    config.json, for those of that run."""
CONFIG = config_flags.DEFINE_config_file("config", None, CONFIG_HELP, sys_argv=ARGUMENTS)
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run: checkpoints, metrics, summary.")
RESUME_WITH_CHANGES = flags.DEFINE_list(
    "resume_with_changes", [], "Hyperparameters, separated by commas, that may differ from those of the run so far."
)
SKIP_NONFINITE = flags.DEFINE_integer(
    "skip_nonfinite",
    0,
    "How many steps may be skipped because their loss or gradient is not finite.",
    lower_bound=0,
    upper_bound=10**9,
)
MAX_MINUTES = flags.DEFINE_float(
    "max_minutes", None, "Save and stop so many minutes after the start, at the latest.", lower_bound=0
)
IMPLEMENTATION = flags.DEFINE_enum(
    "implementation",
    "auto",
    ["auto", "xla", "pallas"],
    "Of the attention: GPU kernels (pallas) where they work, or XLA.",
)
WANDB = flags.DEFINE_string("wandb", "", "Weights & Biases project to log to as well (pip install '.[wandb]').")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Train together with the other processes that SLURM, Open MPI or Kubernetes has started."
)
COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address", None, "Train together with other processes: host:port of process 0, with a free port."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes train together.", lower_bound=1)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)
WATCHDOG_MINUTES = flags.DEFINE_float(
    "watchdog_minutes",
    10.0,
    "End processes that train together if one makes no progress for so long.",
    lower_bound=0.05,
    upper_bound=10**6,
)
for name in ("max_minutes", "watchdog_minutes"):
    flags.register_validator(name, lambda minutes: minutes is None or minutes == minutes, "is not a number")
flags.mark_flags_as_required(["config", "workdir"])


@reporting_errors(if_interrupted=" at once; the same command continues from the last checkpoint")
def main(argv: list[str]) -> int:
    """Trains with the flags given; returns 1 if a file of results could not be written, though all is trained."""
    if argv[1:]:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)  # Orbax tells every step of a checkpoint otherwise
    # Slow, and after START: a misspelt flag is told at once, and --max_minutes count this as well.
    from crystalframer_jax.parallel.interruption import Interruption, TrainingInterrupted
    from crystalframer_jax.parallel.processes import failing_together, start
    from crystalframer_jax.training.logging import say
    from crystalframer_jax.training.loop import Options
    from crystalframer_jax.training.start import train

    interruption = Interruption(MAX_MINUTES.value, START)
    processes = COORDINATOR_ADDRESS.value, NUM_PROCESSES.value, PROCESS_ID.value
    if DISTRIBUTED.value or processes != (None, None, None):
        start(*processes)
    try:
        with failing_together(60 * WATCHDOG_MINUTES.value) as watchdog:
            options = Options(
                RESUME_WITH_CHANGES.value,
                SKIP_NONFINITE.value,
                WANDB.value,
                implementation=IMPLEMENTATION.value,  # type: ignore[arg-type]  # one of its values
                report=watchdog.report,
            )
            summary = train(CONFIG.value, WORKDIR.value or "", options, interruption)
    except TrainingInterrupted as interrupted:
        say(str(interrupted))
        return 0
    if missing := summary.get("not_written"):
        say(f"weights and summary are complete in {WORKDIR.value}; not written: {', '.join(missing)}")
    return 1 if missing else 0


def with_config_files(argv: list[str]) -> list[str]:
    """Writes "--config FILE" with "=", and JSON files and run directories as configuration files of Python."""
    arguments = iter(argv)
    found = []
    for argument in arguments:
        name, is_given, value = argument.partition("=")
        if name in ("--config", "-config"):
            argument = f"--config={_config_file(value if is_given else next(arguments, ''))}"
        found.append(argument)
    return found


def _config_file(value: str) -> str:
    file = Path(value.partition(":")[0]).expanduser()  # what follows names a variant
    if file.is_dir() and value:
        file /= CONFIG_FILE
    if not file.is_file():
        raise ConfigError(f"--config={file if value else ''}: there is no such file; see the folder configs/")
    return f"{stored_config.__file__}:{file}" if file.suffix == ".json" else value


@reporting_errors()
def parse(argv: list[str]) -> list[str]:
    """Parses the command line; a misspelt hyperparameter is an error in one line."""
    check_overrides(argv)
    ARGUMENTS[:] = argv = with_config_files(["--help" if argument == "-h" else argument for argument in argv])
    try:
        return flags.FLAGS(argv)
    except SystemExit:  # of --help, with the status of an error
        sys.exit(0)
    except BrokenPipeError:
        raise
    except (flags.Error, OSError) as error:
        text = str(error).rpartition("ConfigError: ")[2]  # of a configuration file, without its traceback
        sys.exit("error: " + " ".join(text.split()))


def train_main() -> None:
    """Trains as the command line says."""
    app.run(main, flags_parser=parse)
