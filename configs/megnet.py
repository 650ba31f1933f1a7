"""The Materials Project crystals of MEGNet (2018.6.1), the second benchmark of the paper: four targets.

    python scripts/train.py --config=configs/megnet.py --workdir=runs/megnet/default/e_form
    scripts/reproduce.sh megnet

The second command trains all targets, one after the other. Another target is chosen by two flags:
--config.target_set=jarvis__megnet-bulk_modulus --config.targets=bulk_modulus.

Variants: configs/megnet.py:lightweight, configs/megnet.py:crystalformer (configs/variants.py).

Published test MAE, 4 blocks:

| target_set                   | target        | unit      | train/val/test  | default | crystalformer |
|------------------------------|---------------|-----------|-----------------|---------|---------------|
| jarvis__megnet               | e_form        | eV/atom   | 60000/5000/4239 |  0.0172 |        0.0186 |
| jarvis__megnet               | bandgap       | eV        | 60000/5000/4239 |  0.185  |        0.198  |
| jarvis__megnet-bulk_modulus  | bulk_modulus  | log10 GPa | 4664/393/393    |  0.0338 |        0.0377 |
| jarvis__megnet-shear_modulus | shear_modulus | log10 GPa | 4664/392/393    |  0.0677 |        0.0689 |

Source: the Materials Project table of Ito et al., ICLR 2025 (arXiv:2503.02209), as on
https://omron-sinicx.github.io/crystalframer (default: max frames). The 500 epochs of Crystalformer are those of
params/latticeformer/default_mp.json in the official project.
"""

from ml_collections import ConfigDict

from crystalframer_jax.configs import default, variants
from crystalframer_jax.configs.variants import Benchmark

BENCHMARKS = (
    Benchmark("jarvis__megnet", "e_form", "eV/atom", {"default": 0.0172, "crystalformer": 0.0186}),
    Benchmark("jarvis__megnet", "bandgap", "eV", {"default": 0.185, "crystalformer": 0.198}),
    Benchmark("jarvis__megnet-bulk_modulus", "bulk_modulus", "log10 GPa", {"default": 0.0338, "crystalformer": 0.0377}),
    Benchmark(
        "jarvis__megnet-shear_modulus", "shear_modulus", "log10 GPa", {"default": 0.0677, "crystalformer": 0.0689}
    ),
)


def get_config(variant: str = "default") -> ConfigDict:
    """The paper's setting for the Materials Project; formation energies."""
    config = variants.with_variant(default.get_config(), variant)
    config.target_set = "jarvis__megnet"
    config.targets = "e_form"
    config.batch_size = 128
    config.n_epochs = 500 if variant == "crystalformer" else 800
    config.swa_epochs = 50
    return config
