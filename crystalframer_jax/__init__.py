"""CrystalFramer in JAX: property prediction for crystals with rotation-invariant dynamic frames.

from crystalframer_jax import Predictor
Predictor.load("runs/quickstart").predict(["NaCl.cif"])
"""

from crystalframer_jax.inference.ensemble import Ensemble
from crystalframer_jax.inference.frames import compute_frames
from crystalframer_jax.inference.official import load_official
from crystalframer_jax.inference.predictor import Predictor

__all__ = ["Ensemble", "Predictor", "compute_frames", "load_official"]
