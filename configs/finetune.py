"""Fine-tune mp-2018, the model that comes with the package, on a small set of another property.

    crystalframer train --config=finetune --workdir=runs/phonons
    crystalframer train --config=finetune --config.target_set=mine --config.targets=modulus --workdir=runs/mine
    crystalframer train --config=finetune:many --config.target_set=mine --config.targets=modulus --workdir=runs/mine

The recipe is the recommended one with a stronger decay of the weights: smaller rates do not get as far in as many
steps. Variants differ in what is taken over of mp-2018. The rest begins anew: what it has learned is about energies
and gaps.

few   the embeddings and the first two of four blocks: for a few hundred crystals
many  the embeddings alone: for a thousand and more

docs/training.md has what that gains.
"""

from typing import Any

from ml_collections import ConfigDict

from crystalframer_jax.config import ConfigError
from crystalframer_jax.configs import recommended

VARIANTS: dict[str, dict[str, Any]] = {
    "few": {"reinit_layers": "block_2,block_3", "weight_decay": 1.0},
    "many": {"reinit_layers": "block_0,block_1,block_2,block_3", "weight_decay": 0.3},
}


def get_config(variant: str = "few") -> ConfigDict:
    """Peaks of phonons (the first fold of matbench_phonons), 40 epochs."""
    if variant not in VARIANTS:
        raise ConfigError(f"finetune:{variant}: there is no such variant; choose one of {', '.join(VARIANTS)}")
    config = recommended.get_config("lightweight")
    config.update(target_set="matbench_phonons-fold_0", targets="last_phdos_peak")
    config.update(pretrained_model="mp-2018", **VARIANTS[variant])
    config.update(tie_tolerance=1e-3, n_epochs=40)
    return config
