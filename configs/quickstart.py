"""A small model of formation energies that trains in a few minutes on a laptop.

    python scripts/train.py --config=configs/quickstart.py --workdir=runs/quickstart

Two blocks with the paper's lightweight angle encoding, on the bundled Materials Project set (3,938 crystals).
"""

from ml_collections import ConfigDict

from crystalframer_jax.configs import default


def get_config() -> ConfigDict:
    """Two lightweight blocks, 12 epochs."""
    config = default.get_config()
    config.num_layers = 2
    config.value_pe_angle_real = 16
    config.value_pe_angle_wscale = 1.0
    config.value_pe_dist_coef = 1.5
    config.value_pe_angle_coef = 6.0
    config.batch_size = 64
    config.n_epochs = 12
    config.swa_epochs = 3
    return config
