"""The configuration of a run as a configuration file: train takes a config.json, or a run directory, as --config."""

from pathlib import Path

from ml_collections import ConfigDict

from crystalframer_jax.config import ConfigError, validate_given
from crystalframer_jax.files import FileError, read_json


def get_config(file: str) -> ConfigDict:
    """Reads hyperparameters from JSON; those that it does not name have their defaults."""
    try:
        return ConfigDict(validate_given(read_json(Path(file))).as_dict())
    except (FileError, ConfigError) as error:
        reason = str(error).removeprefix(f"{file} ")
        raise ConfigError(f"--config={file}: {reason}") from error
