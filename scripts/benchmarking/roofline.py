"""The roofline: the least work that a batch asks for, and the time for it at the ceilings of the device.

Work is an array of KINDS, for the algorithm of `ops.lattice_sums` in one sweep over the real neighbors with nothing
written in between; docs/benchmark.md has the rules and the formulas.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from crystalframer_jax.batching.batch import Batch
from crystalframer_jax.config import ModelConfig
from crystalframer_jax.measuring.timing import Program, take_turns
from crystalframer_jax.model.encoder import value_bases

KINDS = ("exponentials", "flops", "bytes")  # a multiplication and an addition are two flops; of ceilings, per second
NUMBER = 4  # bytes of a float32 or int32
ROW_BYTES = 5 * NUMBER  # of a neighbor: its index, vector and square
PACKED_BYTES = NUMBER + 3 + 2 + ROW_BYTES + NUMBER  # of a neighbor, packed read and unpacked written
UPDATE_FLOPS = 20  # per parameter: clipping, two moments with bias correction, decay, the step
UPDATE_BYTES = 8 * NUMBER  # per parameter: itself and both moments read and written, the gradient written and read
PASSES = 30  # of what finds a ceiling, spread over seconds: one of them finds the machine less busy
TERMS = 16  # exponentials of each number, so that memory does not matter


class Size(NamedTuple):
    """Real atoms, crystals and neighbors (the atoms themselves among them) of a batch."""

    atoms: int
    crystals: int
    neighbors: int


def size_of(batch: Batch) -> Size:
    """Counts those of a packed or unpacked batch."""
    sizes = np.asarray(batch.crystal_sizes)
    return Size(int(sizes.sum()), int((sizes > 0).sum()), int(np.asarray(batch.rows.count).sum()))


def work(exponentials: float = 0.0, flops: float = 0.0, bytes: float = 0.0) -> np.ndarray:
    """Makes an array of KINDS."""
    return np.array([exponentials, flops, bytes])


def attention(config: ModelConfig, size: Size, training: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Counts frames and attention of one block, from q, k, v and a to [N, H, d_v], and the gradient of the attention.

    With `training` what the backward pass needs is written: the sums and the log-sum-exp of the softmax. Backward,
    with respect to q, k, v, a, W_dist and W_angle, frames are given and weights recomputed from the log-sum-exp.
    """
    N, E, H, dk, dv = size.atoms, size.neighbors, config.head_num, config.k_dim, config.v_dim
    bases = value_bases(config, 0)
    D_dist, D_angle = bases.sizes
    B = bases.angle.group_size if bases.angle else 1
    A, B = D_angle // B, B * bool(D_angle)  # the two kinds of angle factors: A groups of B
    others = (E - N) * bool(D_angle)  # the angle factors are not for the atom itself
    sums = dv + D_dist + 3 * D_angle
    weights = H * dv * (D_dist + 3 * D_angle)
    exponentials = E * (H + D_dist) + 3 * others * H * (A + B)
    shared = 9 * E + E * D_dist * (3 + 2 * H)  # distances; their Gaussians: arguments, contraction

    flops = shared + E * H * (2 * dk + 2 * dv) + 5 * E * H  # q . k, sum p v; softmax
    flops += 7 * others * H * (config.frame_method == "max")  # e1 . u, 1 - |cos|, times weight
    flops += 3 * others * H * (6 + 4 * A + B + 2 * A * B) + 2 * N * weights
    inputs, stored = 2 * dk + 2 * dv + 1, sums + 1  # q, k, v, (gradient of the) output, a; sums, log-sum-exp
    forward = work(exponentials, flops, ROW_BYTES * E + NUMBER * (N * H * (inputs + stored * training) + weights))

    flops = shared + E * H * (6 * dk + 4 * dv)  # logits again and v_j . gradient; gradients of q, k and v
    flops += 7 * E * H + 2 * N * H * sums  # softmax, a; the mean gradient <sums, gradient>
    flops += 3 * others * H * (6 + 5 * A + B + 2 * A * B) + 4 * N * weights
    moved = E + N * H * (inputs + stored + 2 * dk + dv + 1) + 2 * weights  # the reverse neighbors too
    return forward, work(exponentials, flops, ROW_BYTES * E + NUMBER * moved)


def dense(rows: int, inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts x W + b for `rows` rows, and its gradients with respect to x, W and b."""
    moved, weights = rows * (inputs + outputs), inputs * outputs
    forward = work(0, rows * outputs * (2 * inputs + 1), NUMBER * (moved + weights + outputs))
    # The gradients of parameters are written in the update.
    return forward, work(0, rows * outputs * (4 * inputs + 1), NUMBER * (moved + rows * inputs + weights))


def model(config: ModelConfig, size: Size, training: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Counts a prediction, from the packed batch, and the backward pass."""
    embedding = NUMBER * size.atoms * (1 + 2 * config.model_dim)
    pooling = work(0, size.atoms * config.model_dim, NUMBER * (size.atoms + size.crystals) * config.model_dim)
    width_logits = work(0, 2 * size.atoms * config.head_num * config.k_dim)
    parts = [(work(0, 0, PACKED_BYTES * size.neighbors + embedding), work()), (pooling, pooling)]
    parts += [attention(config, size, training), (width_logits, 2 * width_logits)] * config.num_layers
    forward, backward = np.sum([*parts, *itertools.starmap(dense, dense_layers(config, size))], axis=0)
    return forward, backward


def train_step(config: ModelConfig, size: Size, num_parameters: int) -> np.ndarray:
    """Counts forward pass, backward pass and update."""
    return sum(model(config, size, training=True)) + num_parameters * work(0, UPDATE_FLOPS, UPDATE_BYTES)


def dense_layers(config: ModelConfig, size: Size) -> list[tuple[int, int, int]]:
    """Lists (rows, inputs, outputs) of all dense layers.

    Those of a block are q, k, v (which read x together), out, linear1 and linear2; others come after pooling.
    """
    D, H, dk, dv = config.model_dim, config.head_num, config.k_dim, config.v_dim
    block = [(D, H * (2 * dk + dv)), (H * dv, D), (D, config.ff_dim), (config.ff_dim, D)]
    head = itertools.pairwise((D, *config.embedding_dim, config.num_targets))
    return [(size.atoms, *layer) for layer in block * config.num_layers] + [(size.crystals, *layer) for layer in head]


def measure_ceilings() -> np.ndarray:
    """Measures the rates per second of the default device, each the best of several runs of milliseconds.

    A matrix product in float32 at full precision; 16 exponentials of each number of an array, summed up in two ways of
    which the faster counts; x + 1 for a long array in place, bytes read plus bytes written.
    """
    on_cpu = jax.default_backend() == "cpu"
    matrix, long, many = (2048, 2**26, 2**20) if on_cpu else (8192, 2**30, 2**29)

    def fastest(function: Any, *shape: int, **advance: Any) -> float:
        (timing,) = take_turns([Program(function, lambda: (jnp.ones(shape),), **advance)], PASSES)
        if timing.failure:
            raise RuntimeError(f"the ceilings of the device cannot be measured: {timing.failure}")
        return min(timing.seconds)

    def terms(x: jax.Array) -> list[jax.Array]:
        return [jnp.exp(-i / TERMS * x) for i in range(1, TERMS + 1)]

    product = fastest(jax.jit(lambda x: jnp.matmul(x, x, precision="highest")), matrix, matrix)
    copy = fastest(jax.jit(lambda x: x + 1, donate_argnums=0), long, advance=lambda given, result: (result,))
    sums = jax.jit(lambda x: sum(terms(x))), jax.jit(lambda x: sum(map(jnp.sum, terms(x))))
    exponentials = min(fastest(function, many) for function in sums)
    return work(TERMS * many / exponentials, 2 * matrix**3 / product, 8 * long / copy)
