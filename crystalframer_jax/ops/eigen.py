"""Eigenvectors of symmetric 3x3 matrices in a batch, and the axes they give a frame."""

import jax
import jax.numpy as jnp

from crystalframer_jax.ops.basis import EXACT

SWEEPS = 6  # of Jacobi rotations: enough for float64


def eigh3(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues, ascending, [..., 3] and eigenvectors (columns) [..., 3, 3] of symmetric matrices [..., 3, 3].

    Cyclic Jacobi rotations: elementwise operations only, orthogonal to rounding also for equal eigenvalues. A diagonal
    matrix keeps the coordinate axes.
    """

    def sweep(_: int, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        for p, q in ((0, 1), (0, 2), (1, 2)):
            state = _rotate(*state, p, q)
        return state

    axes = jnp.broadcast_to(jnp.eye(3, dtype=matrix.dtype), matrix.shape)
    matrix, axes = jax.lax.fori_loop(0, SWEEPS, sweep, (matrix, axes))
    values = jnp.diagonal(matrix, axis1=-2, axis2=-1)
    order = jnp.argsort(values, axis=-1)
    return jnp.take_along_axis(values, order, -1), jnp.take_along_axis(axes, order[..., None, :], -1)


def _rotate(matrix: jax.Array, axes: jax.Array, p: int, q: int) -> tuple[jax.Array, jax.Array]:
    """The Jacobi rotation in the plane (p, q) that makes matrix[p, q] zero (Golub and Van Loan, section 8.5)."""
    off = matrix[..., p, q]
    theta = (matrix[..., q, q] - matrix[..., p, p]) / jnp.where(off == 0, 1, 2 * off)
    tangent = jnp.where(theta < 0, -1.0, 1.0) / (jnp.abs(theta) + jnp.sqrt(theta**2 + 1))
    tangent = jnp.where(off == 0, 0, tangent)
    cosine = 1 / jnp.sqrt(tangent**2 + 1)
    sine = tangent * cosine

    def turned(x: jax.Array) -> jax.Array:
        """Columns p and q of x turned."""
        columns = [x[..., i] for i in range(3)]
        c, s = cosine[..., None], sine[..., None]
        columns[p], columns[q] = c * x[..., p] - s * x[..., q], s * x[..., p] + c * x[..., q]
        return jnp.stack(columns, -1)

    matrix = turned(turned(matrix).swapaxes(-1, -2)).swapaxes(-1, -2)
    return matrix, turned(axes)


def principal_frames(
    values: jax.Array, axes: jax.Array, anchor: jax.Array, tolerance: float, signs: jax.Array | None
) -> jax.Array:
    """Right-handed frames of eigenvectors, ascending eigenvalues: [..., 3, 3] with rows e1, e2, e3.

    `values` [..., 3] and `axes` [..., 3, 3] (columns) are those of a matrix of trace 1 (or 0). Eigenvectors of equal
    eigenvalues, and the signs of all, are not determined by the matrix. `anchor` [..., 3, 3], any frame (rows) that
    turns with the crystal, settles them, so that the result turns with the crystal too: eigenvalues closer than
    `tolerance` count as equal, and in the space that they share the principal axes of fixed weights of the axes of
    the anchor are taken. e1 and e2 point towards a fixed direction of the anchor, times `signs` [..., 2] (+-1).
    """
    level = jnp.cumsum(jnp.diff(values, prepend=values[..., :1]) >= tolerance, axis=-1)
    weights = jnp.asarray([1.0, 0.618, 0.283], axes.dtype)  # of no crystallographic meaning
    inside = jnp.einsum("...ax,...xi->...ai", anchor, axes, precision=EXACT)
    shared = jnp.einsum("...ai,...aj,a->...ij", inside, inside, weights, precision=EXACT)
    shared = jnp.where(level[..., :, None] == level[..., None, :], shared, 0)
    _, rotation = eigh3(shared + 3 * level[..., None, :] * jnp.eye(3, dtype=axes.dtype))
    axes = jnp.einsum("...xi,...ij->...jx", axes, rotation, precision=EXACT)
    e1, e2 = axes[..., 0, :], axes[..., 1, :]
    weights = jnp.asarray([1.0, 0.531, 0.277], axes.dtype)
    direction = jnp.einsum("a,...ax->...x", weights, anchor, precision=EXACT)
    toward = jnp.stack([jnp.sum(e * direction, axis=-1) for e in (e1, e2)], -1)
    toward = jnp.where(toward < 0, -1.0, 1.0)  # those of the eigenvectors do not turn with the crystal
    signs = toward if signs is None else toward * signs
    e1, e2 = e1 * signs[..., :1], e2 * signs[..., 1:]
    return jnp.stack([e1, e2, jnp.cross(e1, e2)], axis=-2).astype(axes.dtype)
