"""A small model of formation energies that trains in a few minutes on a laptop, by the recommended recipe.

    crystalframer train --config=quickstart --workdir=runs/quickstart

Two blocks with the paper's lightweight angle encoding, on the bundled Materials Project set (3,938 crystals).
"""

from ml_collections import ConfigDict

from crystalframer_jax.configs import recommended


def get_config() -> ConfigDict:
    """Two lightweight blocks, 12 epochs."""
    config = recommended.get_config("lightweight")
    config.update(num_layers=2, n_epochs=12)
    return config
