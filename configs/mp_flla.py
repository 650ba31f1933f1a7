"""Full default model on the bundled Materials Project set (3,938 crystals, formation energy).

crystalframer train --config=mp_flla --workdir=runs/mp_flla
"""

from ml_collections import ConfigDict

from crystalframer_jax.configs import default


def get_config() -> ConfigDict:
    """The default model, trained for 100 epochs with weight averaging over the last 20."""
    config = default.get_config()
    config.update(batch_size=64, n_epochs=100, swa_epochs=20)
    return config
