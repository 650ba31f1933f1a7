"""Hyperparameters: their defaults, what is allowed, and the frozen configurations of a training and of a model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
