"""JARVIS-DFT 3D 2021, the first benchmark of the paper: five targets, each with a model of its own.

    crystalframer train --config=jarvis --workdir=runs/jarvis/default/formation_energy
    scripts/reproduce.sh jarvis

The second command trains all targets, one after the other. Another target:
--config.target_set=jarvis__dft_3d_2021-ehull --config.targets=ehull.
Variants: configs/jarvis.py:lightweight, configs/jarvis.py:crystalformer. docs/paper.md has the published errors.
"""

from ml_collections import ConfigDict

from crystalframer_jax.configs import default, variants
from crystalframer_jax.configs.variants import Benchmark

BENCHMARKS = (
    Benchmark("jarvis__dft_3d_2021", "formation_energy", {"default": 0.0263, "crystalformer": 0.0306}),
    Benchmark("jarvis__dft_3d_2021", "total_energy", {"default": 0.0279, "crystalformer": 0.0320}),
    Benchmark("jarvis__dft_3d_2021", "opt_bandgap", {"default": 0.117, "crystalformer": 0.128}),
    Benchmark("jarvis__dft_3d_2021-mbj_bandgap", "mbj_bandgap", {"default": 0.242, "crystalformer": 0.274}),
    Benchmark("jarvis__dft_3d_2021-ehull", "ehull", {"default": 0.0471, "crystalformer": 0.0463}),
)


def get_config(variant: str = "default") -> ConfigDict:
    """The paper's setting for JARVIS, which is that of configs/default.py; formation energies."""
    config = variants.with_variant(default.get_config(), variant)
    config.update(target_set="jarvis__dft_3d_2021", targets="formation_energy", batch_size=256, swa_epochs=50)
    config.n_epochs = 800 if variant == "crystalformer" else 2000
    return config
