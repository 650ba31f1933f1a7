"""Experiment configurations: one small file each, values only. `default` holds every hyperparameter."""
