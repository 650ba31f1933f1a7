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
from crystalframer_jax.ops.frames import Attention


def block_frames(
    method: str,
    q: jax.Array,
    k: jax.Array,
    a: jax.Array,
    batch: Batch,
    tie_tolerance: float,
    seeds: jax.Array | None = None,
    implementation: Implementation = "auto",
    attention: Attention | None = None,
) -> jax.Array:
    """Frames of one attention block by one of `ops.frames.METHODS`: [N, H, 3, 3] with rows e1, e2, e3.

    q, k [N, H, d_k] and a [N, H] (1/Å^2) as in `lattice_sums`. Among equally good frames `seeds` [N, H] uint32 draw,
    or the weights of `attention` (default: those of q, k and a) choose, see ops/ties.py. There is a kernel for max and
    max_static frames, see `framed_attention` for `implementation`.
    """
    own = Attention(*jax.lax.stop_gradient((q, k, a)))
    static = frames.static_attention(own.a)
    chosen_by = own if attention is None else jax.lax.stop_gradient(attention)
    seeing = None if seeds is not None else chosen_by

    def max_frames(scores: Attention) -> jax.Array:
        shapes = scores.q.shape[1:], None if seeing is None else seeing.q.shape[1:]
        check = functools.partial(_check_kernels, tie_tolerance, *shapes, q.dtype)
        taken = kernels if uses_kernels(implementation, "frames", check) else frames
        return taken.max_frames(scores, batch.rows, tie_tolerance, seeds, seeing)

    if method == "max":
        found = max_frames(own)
    elif method == "max_static":
        found = max_frames(static)
    elif method == "pca" and seeds is None:  # whose axes do not turn with a site: what counts is what the frames see
        found = frames.max_frames(static, batch.rows, tie_tolerance, None, seeing, frames.pca_axes(batch))
    elif method in ("weighted_pca", "pca"):
        axes = frames.pca_axes(batch) if method == "pca" else frames.weighted_pca_axes(*own, batch.rows)
        found = frames.pca_frames(*axes, max_frames(static), tie_tolerance, seeds)
    elif method == "lattice":
        found = frames.lattice_frames(batch, seeds, seeing)
    else:
        raise ValueError(f"frame_method={method!r} does not exist; allowed: {', '.join(frames.METHODS)}")
    return jnp.broadcast_to(found, (*q.shape[:2], 3, 3))


@functools.cache
def _check_kernels(
    tie_tolerance: float, q_shape: tuple[int, int], seen_shape: tuple[int, int] | None, dtype: np.dtype
) -> str:
    """Why the kernel cannot be used for q [N, *q_shape]; empty if it can.

    Ties are drawn, or chosen by the attention of the scores and by another of queries [N, *seen_shape].
    """
    q, k, a, seen_q, seen_k = check_arrays(dtype, q_shape, q_shape, q_shape[:1], *[seen_shape or q_shape] * 2)
    a = -np.abs(a)
    alike = Attention(np.ones_like(q), np.ones_like(k), np.full_like(a, -0.25)), check_rows(dtype, on_grid=True)
    inputs: tuple = (
        (Attention(q, k, a), check_rows(dtype), None),
        (*alike, None),
        (*alike, Attention(seen_q, seen_k, a)),
    )
    seeds: Any = np.arange(a.size, dtype=np.uint32).reshape(a.shape) if seen_shape is None else None

    def found(max_frames: Callable[..., jax.Array], *inputs: Any) -> list[jax.Array]:
        results = []
        for scores, rows, other in inputs:
            seeing = None if seeds is not None else other or scores
            results.append(max_frames(scores, rows, tie_tolerance, seeds, seeing))
        return results

    return difference(found, kernels.max_frames, frames.max_frames, inputs[: 2 if seen_shape is None else 3], dtype)
