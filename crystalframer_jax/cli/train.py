"""Train a model, or continue a training that was interrupted."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from crystalframer_jax.cli import stored_config
from crystalframer_jax.cli.arguments import shipped_configs, train_parser
from crystalframer_jax.cli.common import reporting_errors
from crystalframer_jax.config import ConfigError, check_overrides

CONFIG_FILE = "config.json"  # in the directory of a run
START = time.monotonic()


def train_main(argv: Sequence[str] | None = None, prog: str = "train.py") -> int:
    """Trains as the command line says; returns 1 if a file of results could not be written, though all is trained."""
    return run(parse(sys.argv[1:] if argv is None else argv, prog))


@reporting_errors(if_interrupted=" at once; the same command continues from the last checkpoint")
def run(arguments: argparse.Namespace) -> int:
    """Trains with the arguments, of which `config` is read."""
    flags.FLAGS(["train"])  # those of absl's logging have their defaults
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)  # Orbax tells every step of a checkpoint otherwise
    # Slow, and after START: a misspelt flag is told at once, and --max_minutes count this as well.
    from crystalframer_jax.parallel.interruption import Interruption, TrainingInterrupted
    from crystalframer_jax.parallel.processes import failing_together, start
    from crystalframer_jax.training.logging import say
    from crystalframer_jax.training.loop import Options
    from crystalframer_jax.training.start import train

    interruption = Interruption(arguments.max_minutes, START)
    processes = arguments.coordinator_address, arguments.num_processes, arguments.process_id
    if arguments.distributed or processes != (None, None, None):
        start(*processes)
    try:
        with failing_together(60 * arguments.watchdog_minutes) as watchdog:
            options = Options(
                list(arguments.resume_with_changes),
                arguments.skip_nonfinite,
                arguments.wandb,
                implementation=arguments.implementation,
                report=watchdog.report,
            )
            summary = train(arguments.config, arguments.workdir, options, interruption)
    except TrainingInterrupted as interrupted:
        say(str(interrupted))
        return 0
    if missing := summary.get("not_written"):
        say(f"weights and summary are complete in {arguments.workdir}; not written: {', '.join(missing)}")
    return 1 if missing else 0


@reporting_errors()
def parse(argv: Sequence[str], prog: str) -> argparse.Namespace:
    """Parses the command line and reads the configuration; what is wrong with either is told in one line."""
    parser = train_parser(prog)
    of_config, others = _split(argv)
    arguments = parser.parse_args([*others, *(["--config=given"] if of_config else [])])
    try:
        check_overrides(of_config)
        arguments.config = _config(with_config_files(of_config))
    except BrokenPipeError:
        raise
    except (ConfigError, flags.Error, OSError) as error:  # of a configuration file, without its traceback
        parser.error(str(error).rpartition("ConfigError: ")[2])
    return arguments


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits arguments into those about the configuration, which are for ml_collections, and others."""
    of_config: list[str] = []
    others: list[str] = []
    chosen, may_follow = others, False
    for word in argv:
        if not (may_follow and not word.startswith("--")):  # else the value of the option before
            name, has_value, _ = word.partition("=")
            is_of_config = name.lstrip("-").removeprefix("no").split(".")[0] == "config" and name.startswith("-")
            chosen, may_follow = (of_config, not has_value) if is_of_config else (others, False)
        else:
            may_follow = False
        chosen.append(word)
    return of_config, others


def _config(argv: list[str]) -> ConfigDict:
    """Reads the configuration that arguments name and change."""
    values, words = flags.FlagValues(), ["train", *argv]
    holder = config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=words)
    if unexpected := values(words)[1:]:
        raise ConfigError(f"unexpected arguments: {' '.join(unexpected)}")
    if holder.value is None:
        raise ConfigError("--config is missing")
    return holder.value


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
    name, colon, variant = value.partition(":")
    file = Path(name).expanduser()
    if value and (file / CONFIG_FILE).is_file():
        file /= CONFIG_FILE
    if not file.is_file() and name in shipped_configs():
        return f"{shipped_configs()[name]}{colon}{variant}"
    if not file.is_file():
        known = ", ".join(shipped_configs())
        raise ConfigError(f"--config={name}: there is no such file, nor a configuration of that name ({known})")
    return f"{stored_config.__file__}:{file}" if file.suffix == ".json" else value
