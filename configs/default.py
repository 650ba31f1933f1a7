"""The default hyperparameters: the JARVIS setting of the paper.

Every key, with its default and what it means, is a row of crystalframer_jax/config/hyperparameters.py. Other files of
this folder start from here and change a few values; any value can be changed on the command line: `--config.lr=1e-3`.
"""

from ml_collections import ConfigDict

from crystalframer_jax.config import TrainConfig


def get_config() -> ConfigDict:
    """The default hyperparameters; every key a training run knows is in it."""
    return ConfigDict(TrainConfig().as_dict())
