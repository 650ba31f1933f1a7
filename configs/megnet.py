"""The Materials Project crystals of MEGNet (2018.6.1), the second benchmark of the paper: four targets.

    crystalframer train --config=megnet --workdir=runs/megnet/default/e_form
    scripts/reproduce.sh megnet

The second command trains all targets, one after the other. Another target:
--config.target_set=jarvis__megnet-bulk_modulus --config.targets=bulk_modulus.
Variants: configs/megnet.py:lightweight, configs/megnet.py:crystalformer. docs/paper.md has the published errors.
"""

from ml_collections import ConfigDict

from crystalframer_jax.configs import default, variants
from crystalframer_jax.configs.variants import Benchmark

BENCHMARKS = (
    Benchmark("jarvis__megnet", "e_form", {"default": 0.0172, "crystalformer": 0.0186}),
    Benchmark("jarvis__megnet", "bandgap", {"default": 0.185, "crystalformer": 0.198}),
    Benchmark("jarvis__megnet-bulk_modulus", "bulk_modulus", {"default": 0.0338, "crystalformer": 0.0377}),
    Benchmark("jarvis__megnet-shear_modulus", "shear_modulus", {"default": 0.0677, "crystalformer": 0.0689}),
)


def get_config(variant: str = "default") -> ConfigDict:
    """The paper's setting for the Materials Project; formation energies."""
    config = variants.with_variant(default.get_config(), variant)
    config.update(target_set="jarvis__megnet", targets="e_form", batch_size=128, swa_epochs=50)
    config.n_epochs = 500 if variant == "crystalformer" else 800
    return config
