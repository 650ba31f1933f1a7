"""The frames of an attention block: which method, by kernels or by XLA operations."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from crystalframer_jax.batching.batch import Batch
from crystalframer_jax.kernels import frames as kernels
from crystalframer_jax.model.implementation import Implementation, check_arrays, check_rows, difference, uses_kernels
from crystalframer_jax.ops import frames


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
    """Frames of one attention block by one of `ops.frames.METHODS`: [N, H, 3, 3] with rows e1, e2, e3.

    q, k [N, H, d_k] and a [N, H] (1/Å^2) as in `lattice_sums`; `seeds` [N, H] uint32 draw among equally good frames.
    There is a kernel for max and max_static frames, see `framed_attention` for `implementation`.
    """
    q, k, a = jax.lax.stop_gradient((q, k, a))

    def max_frames(q: jax.Array, k: jax.Array, a: jax.Array) -> jax.Array:
        check = functools.partial(_check_kernels, tie_tolerance, q.shape[1:], seeds is not None, q.dtype)
        taken = kernels if uses_kernels(implementation, "frames", check) else frames
        return taken.max_frames(q, k, a, batch.rows, tie_tolerance, seeds)

    if method == "max":
        found = max_frames(q, k, a)
    elif method == "max_static":
        found = max_frames(*frames.static_weights(batch.rows, seeds))
    elif method in ("weighted_pca", "pca"):
        axes = frames.pca_axes(batch) if method == "pca" else frames.weighted_pca_axes(q, k, a, batch.rows)
        static = max_frames(*frames.static_weights(batch.rows, seeds))
        found = frames.pca_frames(*axes, static, tie_tolerance, seeds)
    elif method == "lattice":
        found = frames.lattice_frames(batch, tie_tolerance, seeds)
    else:
        raise ValueError(f"frame_method={method!r} does not exist; allowed: {', '.join(frames.METHODS)}")
    return jnp.broadcast_to(found, (*q.shape[:2], 3, 3))


@functools.cache
def _check_kernels(tie_tolerance: float, q_shape: tuple[int, int], drawn: bool, dtype: np.dtype) -> str:
    """Why the kernel cannot be used for q [N, *q_shape], with or without seeds; empty if it can."""
    q, k, a = check_arrays(dtype, q_shape, q_shape, q_shape[:1])
    alike = (np.ones_like(q), np.ones_like(k), np.full_like(a, -0.25)), check_rows(dtype, on_grid=True)
    inputs = ((q, k, -np.abs(a)), check_rows(dtype)), alike
    seeds: Any = np.arange(a.size, dtype=np.uint32).reshape(a.shape) if drawn else None

    def found(max_frames: Callable[..., jax.Array], *inputs: Any) -> list[jax.Array]:
        return [max_frames(*qka, rows, tie_tolerance, seeds) for qka, rows in inputs]

    return difference(found, kernels.max_frames, frames.max_frames, inputs, dtype)
