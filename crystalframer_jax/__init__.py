"""CrystalFramer in JAX: property prediction for crystals with rotation-invariant dynamic frames.

from crystalframer_jax import Predictor
Predictor.load("runs/quickstart").predict(["NaCl.cif"])
"""

import lazy_loader  # the processes that prepare data start without JAX

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"
