"""Train a model, or continue a training that was interrupted (the same command).

python scripts/train.py --config=configs/quickstart.py --workdir=runs/quickstart [--config.lr=1e-3 ...]
"""

import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from crystalframer_jax.cli import reporting_errors, use_compilation_cache
from crystalframer_jax.config import ConfigError, check_overrides

CONFIG = config_flags.DEFINE_config_file("config", None, "File of hyperparameters, such as configs/quickstart.py.")
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run: checkpoints, metrics, summary.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    """Train with the flags given."""
    if argv[1:]:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)  # Orbax tells every step of a checkpoint otherwise
    use_compilation_cache()
    from crystalframer_jax.training.loop import train

    with reporting_errors(if_interrupted="; the same command continues from the last finished epoch"):
        train(CONFIG.value, WORKDIR.value)


def parse(argv: list[str]) -> list[str]:
    """Parse the command line; a misspelt hyperparameter is an error in one line."""
    with reporting_errors():
        check_overrides(argv)
        for argument in argv:
            name, _, file = argument.partition("=")
            if name in ("--config", "-config") and not Path(file).is_file():
                raise ConfigError(f"--config={file}: there is no such file; see the folder configs/")
    try:
        return flags.FLAGS(argv)
    except (flags.Error, OSError) as error:
        sys.exit("error: " + " ".join(str(error).split()))


if __name__ == "__main__":
    sys.exit(app.run(main, flags_parser=parse))
