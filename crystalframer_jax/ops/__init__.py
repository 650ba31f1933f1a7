"""Lattice sums, frames and what they are made of: pure functions of arrays, the reference for the kernels."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
