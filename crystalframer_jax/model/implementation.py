"""The choice between the implementations of attention and frames: XLA operations, or GPU kernels.

Before kernels are used they are compiled for the device and compared with the XLA operations on made-up rows, once for
each setting. What fails there is told once, and the XLA operations are used.
"""

import concurrent.futures
import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np

from crystalframer_jax.batch import Rows
from crystalframer_jax.kernels import backend

Implementation = Literal["auto", "xla", "pallas"]
IMPLEMENTATIONS = ("auto", "xla", "pallas")

CHECK_ATOMS, CHECK_NEIGHBORS = 48, 41  # of the made-up rows: more than one chunk of neighbours
TOLERANCE = {"float32": 1e-4, "float64": 1e-10}  # largest difference, relative to the largest number


class KernelWarning(UserWarning):
    """Kernels that the device should have are not used, for the reason given."""


def uses_kernels(implementation: Implementation, name: str, check: Callable[[], str]) -> bool:
    """Whether kernels are to be used for `name`, such as "frames"; `check` is theirs, see `difference`.

    Raises ValueError for an implementation that does not exist, or "pallas" where its kernels do not work.
    """
    if implementation not in IMPLEMENTATIONS:
        allowed = ", ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(f"implementation={implementation!r} is not available; allowed: {allowed}")
    if implementation == "xla":
        return False
    platform = jax.local_devices()[0].platform
    if implementation == "pallas" and platform == "cpu":
        return True  # interpreted
    reason = backend.problem() or check()
    if implementation == "pallas" and reason:
        raise ValueError(f"implementation='pallas' does not work for {name}: {reason}; choose 'auto' or 'xla'")
    if platform != "cpu":
        _tell(name, reason)
    return not reason


def difference(kernels: Callable[..., Any], operations: Callable[..., Any], arguments: tuple, dtype: np.dtype) -> str:
    """Why the results of `kernels(*arguments)` cannot be used instead of those of `operations`; empty if they can."""

    def compare() -> str:
        with jax.enable_x64(dtype == np.float64):
            found = jax.block_until_ready(jax.jit(kernels)(*arguments))
            expected = jax.jit(operations)(*arguments)
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            size, off = np.abs(y).max(initial=0), np.abs(np.asarray(x) - y).max(initial=0)
            if not off <= TOLERANCE[np.dtype(dtype).name] * size:
                return f"its results differ from those of XLA by {off:.1e} of {size:.1e}"
        return ""

    with concurrent.futures.ThreadPoolExecutor(1) as elsewhere:  # here a function may be being traced
        try:
            return elsewhere.submit(compare).result()
        except Exception as error:  # whatever keeps a kernel from being compiled or run
            return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@functools.cache
def check_rows(dtype: np.dtype) -> Rows:
    """Made-up neighbour rows: atoms at random places, each a neighbour of itself and of 20 before and after it."""
    rng = np.random.default_rng(0)
    atoms, columns = CHECK_ATOMS, CHECK_NEIGHBORS
    atom, column = np.arange(atoms)[:, None], np.arange(columns)
    step = np.where(column % 2, 1, -1) * ((column + 1) // 2)  # 0, 1, -1, 2, -2 ...
    neighbor = (atom + step) % atoms
    opposite = np.where(column % 2, column + 1, column - 1) * (column > 0)
    position = rng.uniform(-3, 3, (atoms, 3))
    vector = (position[neighbor] - position[atom]).astype(dtype)
    reverse = neighbor * columns + opposite
    arrays: Any = neighbor.astype(np.int32), vector, reverse.astype(np.int32), np.full(atoms, columns, np.int32)
    return Rows(*arrays)


def check_arrays(dtype: np.dtype, *shapes: tuple[int, ...]) -> list[Any]:
    """Random arrays [CHECK_ATOMS, *shape]."""
    rng = np.random.default_rng(1)
    return [rng.normal(size=(CHECK_ATOMS, *shape)).astype(dtype) for shape in shapes]


@functools.cache
def _tell(name: str, reason: str) -> None:
    """Say once what is used on this device, and why."""
    kind = jax.local_devices()[0].device_kind
    if reason:
        warnings.warn(f"{name}: XLA operations on {kind}, no kernels: {reason}", KernelWarning, stacklevel=4)
    else:
        print(f"{name}: Pallas kernels on {kind}", file=sys.stderr, flush=True)
