"""Fine-tune mp-2018, the model that comes with the package, on a small set of another property.

    crystalframer train --config=finetune --workdir=runs/phonons
    crystalframer train --config=finetune --config.target_set=mine --config.targets=modulus --workdir=runs/mine

The model is that of mp-2018, whose embeddings and first two blocks are taken over; the others begin anew, as what they
have learned is about energies and gaps. The recipe is the recommended one with a strong decay of the weights: smaller
rates do not get as far in as many steps. docs/training.md has what that gains.
"""

from ml_collections import ConfigDict

from crystalframer_jax.configs import recommended


def get_config() -> ConfigDict:
    """Peaks of phonons (the first fold of matbench_phonons), 40 epochs."""
    config = recommended.get_config("lightweight")
    config.update(target_set="matbench_phonons-fold_0", targets="last_phdos_peak")
    config.update(pretrained_model="mp-2018", reinit_layers="block_2,block_3", weight_decay=1.0)
    config.update(tie_tolerance=1e-3, n_epochs=40)
    return config
