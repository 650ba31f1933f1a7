"""Datasets: target sets, splits, the prepared store and the input pipeline."""
