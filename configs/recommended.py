"""The recommended recipe: what to train with unless published numbers are to be reproduced.

    crystalframer train --config=recommended --workdir=runs/e_form
    crystalframer train --config=recommended:lightweight --workdir=runs/lightweight

Muon for the matrices of the blocks, a learning rate that goes to zero, and small batches; the model is the paper's.
docs/training.md has what each of these is worth. Variants: those of configs/variants.py, default and lightweight among
them.
"""

from ml_collections import ConfigDict

from crystalframer_jax.configs import default, variants

RECIPE = {
    "optimizer": "muon",
    "lr": 3e-3,
    "lr_batch_size": 32,
    "lr_sch": "cosine",
    "sch_params": (0.02,),
    "batch_size": 32,
    "swa_epochs": 0,
}


def get_config(variant: str = "default") -> ConfigDict:
    """A model of the paper, trained for 100 epochs by the recommended recipe."""
    config = variants.with_variant(default.get_config(), variant)
    config.update(RECIPE, n_epochs=100)
    return config
