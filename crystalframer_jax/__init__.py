"""CrystalFramer in JAX: property prediction for crystals with rotation-invariant dynamic frames.

from crystalframer_jax import Predictor
Predictor.load("runs/quickstart").predict(["NaCl.cif"])
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crystalframer_jax.inference.ensemble import Ensemble
    from crystalframer_jax.inference.frames import compute_frames
    from crystalframer_jax.inference.predictor import Predictor
    from crystalframer_jax.official.state import load_official

__all__ = ["Ensemble", "Predictor", "compute_frames", "load_official"]

HOMES = {
    "Ensemble": "inference.ensemble",
    "Predictor": "inference.predictor",
    "compute_frames": "inference.frames",
    "load_official": "official.state",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for, and no more: the processes that prepare data start without JAX."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)
