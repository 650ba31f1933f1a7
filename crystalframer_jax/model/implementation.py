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

from crystalframer_jax.batching.batch import Rows
from crystalframer_jax.errors import UserError
from crystalframer_jax.kernels import backend

Implementation = Literal["auto", "xla", "pallas"]
IMPLEMENTATIONS = ("auto", "xla", "pallas")

CHECK_ATOMS, CHECK_NEIGHBORS = 48, 41  # of the made-up rows: more than one chunk of neighbors
TOLERANCE = {"float32": 1e-4, "float64": 1e-10}  # largest difference, relative to the largest number


class ImplementationError(UserError, ValueError):
    """An implementation that was asked for does not work on this device."""


class KernelWarning(UserWarning):
    """Kernels that the device should have are not used, for the reason given."""


def uses_kernels(implementation: Implementation, name: str, check: Callable[[], str]) -> bool:
    """Whether kernels are to be used for `name`, such as "frames"; `check` is theirs, see `difference`.

    Raises ValueError for an implementation that does not exist, ImplementationError for "pallas" where its kernels do
    not work.
    """
    if implementation not in IMPLEMENTATIONS:
        allowed = ", ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(f"implementation={implementation!r} is not available; allowed: {allowed}")
    if implementation == "xla":
        return False
    platform = backend.device().platform
    if implementation == "pallas" and platform == "cpu" and not backend.MISSING:
        return True  # interpreted
    reason = backend.problem() or check()
    if implementation == "pallas" and reason:
        raise ImplementationError(f"implementation='pallas' does not work for {name}: {reason}; choose 'auto' or 'xla'")
    if platform != "cpu":
        _tell(name, reason)
    return not reason


def difference(
    function: Callable[..., Any], kernel: Callable, operation: Callable, arguments: tuple, dtype: np.dtype
) -> str:
    """Why `function(kernel, *arguments)` cannot stand for `function(operation, *arguments)`; empty if it can."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]  # that of this thread

    def compare() -> str:
        with jax.default_device(device), jax.enable_x64(dtype == np.float64):
            found = jax.device_get(jax.jit(function, static_argnums=0)(kernel, *arguments))
            expected = jax.device_get(jax.jit(function, static_argnums=0)(operation, *arguments))
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            size, off = np.abs(y).max(initial=0), np.abs(x - y).max(initial=0)
            if not off <= TOLERANCE[np.dtype(dtype).name] * size:
                return f"its results differ from those of XLA by {off:.1e} of {size:.1e}"
        return ""

    with concurrent.futures.ThreadPoolExecutor(1) as elsewhere:  # here a function may be being traced
        try:
            return elsewhere.submit(compare).result()
        except Exception as error:  # whatever keeps a kernel from being compiled or run
            return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@functools.cache
def check_rows(dtype: np.dtype, on_grid: bool = False) -> Rows:
    """Made-up neighbor rows: atoms at random places, each a neighbor of itself and of 20 before and after it.

    The last atom has itself only, the one before nothing. `on_grid` puts atoms on a grid, which makes ties.
    """
    rng = np.random.default_rng(0)
    atoms, columns = CHECK_ATOMS - 2, CHECK_NEIGHBORS
    column = np.arange(columns)
    step = np.where(column % 2, 1, -1) * ((column + 1) // 2)  # 0, 1, -1, 2, -2 ...
    neighbor = (np.arange(atoms)[:, None] + step) % atoms
    opposite = np.where(column % 2, column + 1, column - 1) * (column > 0)
    position = rng.integers(-2, 3, (atoms, 3)) if on_grid else rng.uniform(-3, 3, (atoms, 3))
    index, reverse = np.zeros((2, CHECK_ATOMS, columns), np.int32)
    index[:atoms], reverse[:atoms] = neighbor, neighbor * columns + opposite
    index[-1, 0], reverse[-1, 0] = atoms + 1, (atoms + 1) * columns
    vector = np.zeros((CHECK_ATOMS, columns, 3), dtype)
    vector[:atoms] = position[neighbor] - position[:, None]
    rows: Any = index, vector, np.sum(vector**2, axis=-1), reverse, np.array([columns] * atoms + [0, 1], np.int32)
    return Rows(*rows)


def check_arrays(dtype: np.dtype, *shapes: tuple[int, ...]) -> list[Any]:
    """Random arrays [CHECK_ATOMS, *shape]."""
    rng = np.random.default_rng(1)
    return [rng.normal(size=(CHECK_ATOMS, *shape)).astype(dtype) for shape in shapes]


@functools.cache
def _tell(name: str, reason: str) -> None:
    """Say once what is used on this device, and why."""
    kind = backend.device().device_kind
    if reason:
        warnings.warn(f"{name}: XLA operations on {kind}, no kernels: {reason}", KernelWarning, stacklevel=4)
    else:
        print(f"{name}: Pallas kernels on {kind}", file=sys.stderr, flush=True)
