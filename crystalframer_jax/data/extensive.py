"""Tells labels that grow with the number of atoms, such as total energies, from those that do not."""

import numpy as np

FEWEST = 12  # labels that are not zero, of cells of different sizes
NEAR_ZERO = 1e-3  # of the median |label|; smaller ones tell nothing of the size
SIGMAS = 4
LEAST_SHARE = 0.4  # of the variance of log |label| that log N explains: 0.9 for total energies, 0.2 for others


def size_exponent(labels: np.ndarray, atoms: np.ndarray) -> float | None:
    """Returns the exponent p of |label| ~ N^p if the labels look extensive, else None.

    That is the slope of log |label| over log N by least squares: 1 for extensive labels. As large cells differ from
    small ones also in their chemistry, it must be above 1/2 by four standard errors and below 2, and the size of the
    cells must explain LEAST_SHARE of the variance: formation energies per atom have a slope of 0.5 to 0.6, but a share
    of 0.1 to 0.2.

    Args:
      labels: [C], NaN where unknown.
      atoms: [C], atoms of the cells.
    """
    size = np.abs(labels[np.isfinite(labels) & (labels != 0)])
    chosen = np.abs(labels) > NEAR_ZERO * (np.median(size) if len(size) else np.inf)
    x, y = np.log(atoms[chosen]), np.log(np.abs(labels[chosen]))
    if len(x) < FEWEST or np.std(x) < 0.1:
        return None
    x, y = x - x.mean(), y - y.mean()
    slope = float(x @ y / (x @ x))
    rest = float(np.sum((y - slope * x) ** 2))
    error = np.sqrt(rest / (len(x) - 2) / (x @ x))
    is_extensive = 0.5 + SIGMAS * error < slope < 2 and rest < (1 - LEAST_SHARE) * (y @ y)
    return slope if is_extensive else None
