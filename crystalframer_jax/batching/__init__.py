"""Batches: crystals with neighbor rows in one table, packed into padded arrays of few shapes."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
