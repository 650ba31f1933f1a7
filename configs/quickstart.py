"""A small model of formation energies that trains in a few minutes on a laptop.

    python scripts/train.py --config=configs/quickstart.py --workdir=runs/quickstart

Two blocks with the paper's lightweight angle encoding, on the bundled Materials Project set (3,938 crystals).
"""

from ml_collections import ConfigDict

from crystalframer_jax.configs import default, variants


def get_config() -> ConfigDict:
    """Two lightweight blocks, 12 epochs."""
    config = variants.with_variant(default.get_config(), "lightweight")
    config.update(num_layers=2, batch_size=64, n_epochs=12, swa_epochs=3)
    return config
