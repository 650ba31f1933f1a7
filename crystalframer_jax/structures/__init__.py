"""Crystals: from files and other packages, their lattices and neighbors."""
