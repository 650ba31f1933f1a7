"""The frames of an attention block: which method, by kernels or by XLA operations."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from crystalframer_jax.batching.batch import Batch, Rows
from crystalframer_jax.kernels import frames as kernels
from crystalframer_jax.model.implementation import Implementation, check_arrays, check_rows, difference, uses_kernels
from crystalframer_jax.ops import frames
from crystalframer_jax.ops.frames import METHODS, PARALLEL, SMALLEST


def block_frames(
    method: str,
    q: jax.Array,
    k: jax.Array,
    a: jax.Array,
    batch: Batch,
    tie_tolerance: float,
    seeds: jax.Array | None = None,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Frames of one attention block by one of METHODS: [N, H, 3, 3] with rows e1, e2, e3.

    q, k [N, H, d_k] and a [N, H] (1/Å^2) as in `lattice_sums`; `seeds` [N, H] uint32 draw among equally good frames.
    There is a kernel for max and max_static frames, see `framed_attention` for `implementation`.
    """
    q, k, a = jax.lax.stop_gradient((q, k, a))
    choose = functools.partial(max_frames, implementation=implementation)
    if method == "max":
        found = choose(q, k, a, batch.rows, tie_tolerance, seeds)
    elif method == "max_static":
        found = frames.max_static_frames(batch.rows, tie_tolerance, seeds, choose)
    elif method == "weighted_pca":
        found = frames.weighted_pca_frames(q, k, a, batch.rows, tie_tolerance, seeds, choose)
    elif method == "pca":
        found = frames.pca_frames(batch, tie_tolerance, seeds, choose)
    elif method == "lattice":
        found = frames.lattice_frames(batch, tie_tolerance, seeds)
    else:
        raise ValueError(f"frame_method={method!r} does not exist; allowed: {', '.join(METHODS)}")
    return jnp.broadcast_to(found, (*q.shape[:2], 3, 3))


def max_frames(
    q: jax.Array,
    k: jax.Array,
    a: jax.Array,
    rows: Rows,
    tie_tolerance: float,
    seeds: jax.Array | None = None,
    implementation: Implementation = "auto",
) -> jax.Array:
    """`ops.frames.max_frames` by the implementation asked for."""
    check = functools.partial(_check_kernels, tie_tolerance, q.shape[1:], seeds is not None, q.dtype)
    if uses_kernels(implementation, "frames", check):
        return kernels.max_frames(q, k, a, rows, _limits(tie_tolerance), seeds)
    return frames.max_frames(q, k, a, rows, tie_tolerance, seeds)


def _limits(tie_tolerance: float) -> kernels.Limits:
    return kernels.Limits(tie_tolerance, PARALLEL, SMALLEST)


@functools.cache
def _check_kernels(tie_tolerance: float, q_shape: tuple[int, int], drawn: bool, dtype: np.dtype) -> str:
    """Why the kernel cannot be used for q [N, *q_shape], with or without seeds; empty if it can."""
    q, k, a = check_arrays(dtype, q_shape, q_shape, q_shape[:1])
    alike = (np.ones_like(q), np.ones_like(k), np.full_like(a, -0.25)), check_rows(dtype, on_grid=True)
    inputs = ((q, k, -np.abs(a)), check_rows(dtype)), alike
    seeds: Any = np.arange(a.size, dtype=np.uint32).reshape(a.shape) if drawn else None

    limits = _limits(tie_tolerance)

    def by_kernel(*inputs: Any) -> list[jax.Array]:
        return [kernels.max_frames(q, k, a, rows, limits, seeds) for (q, k, a), rows in inputs]

    def by_xla(*inputs: Any) -> list[jax.Array]:
        return [frames.max_frames(q, k, a, rows, tie_tolerance, seeds) for (q, k, a), rows in inputs]

    return difference(by_kernel, by_xla, inputs, dtype)
