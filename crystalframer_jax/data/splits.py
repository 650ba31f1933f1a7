"""The official split of a dataset into training, validation and test crystals."""

import random

import numpy as np

SPLITS = ("train", "val", "test")


def split_80_10_10(labels: np.ndarray, seed: int = 123) -> dict[str, np.ndarray]:
    """Row indices of each split for labels [C, T] (all labels of the set; not finite where unknown).

    Rows with an unknown label drop out. The other N are shuffled; training takes the first int(0.8 N), test the last
    int(0.1 N), and validation the int(0.1 N) before those (the rule of the official index files).
    """
    rows = np.flatnonzero(np.isfinite(labels).all(axis=1))
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    n_train, n_held = int((1 - 0.1 - 0.1) * len(rows)), int(0.1 * len(rows))
    shuffled = rows[np.array(order, dtype=np.int64)]
    return {
        "train": shuffled[:n_train],
        "val": shuffled[len(rows) - 2 * n_held : len(rows) - n_held],
        "test": shuffled[len(rows) - n_held :],
    }
