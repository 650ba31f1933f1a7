"""matbench_phonons (highest peak of the phonon density of states), by the recommended recipe: fold 0 of five.

    crystalframer train --config=matbench_phonons --workdir=runs/matbench_phonons/default/fold_0
    scripts/reproduce.sh matbench_phonons

The second command trains all folds, one after the other. The test crystals of each fold are those of Matbench v0.1.
Another fold: --config.target_set=matbench_phonons-fold_1. Variants: those of configs/recommended.py. docs/paper.md has
the published error.
"""

from ml_collections import ConfigDict

from crystalframer_jax.configs import recommended
from crystalframer_jax.configs.variants import Benchmark

TARGET = "last_phdos_peak"
BENCHMARKS = tuple(Benchmark(f"matbench_phonons-fold_{fold}", TARGET, {}) for fold in range(5))
PUBLISHED_MEAN = 28.8  # 1/cm, over the test crystals of all folds: the best of models trained on these crystals alone


def get_config(variant: str = "default") -> ConfigDict:
    """The recommended recipe for 80 epochs of about 900 crystals."""
    config = recommended.get_config(variant)
    config.update(target_set=BENCHMARKS[0].target_set, targets=TARGET, n_epochs=80)
    return config
