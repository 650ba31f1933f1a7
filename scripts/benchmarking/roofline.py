"""The roofline: the least work that a batch asks for, and the time for it at the ceilings of the device.

Counted are the real atoms N, crystals and neighbors E of a batch (padding is waste) in exponentials, other
floating-point operations (a multiplication and an addition count two) and bytes, for the algorithm of
`ops.lattice_sums` in one sweep over the neighbors with nothing written in between; docs/benchmark.md has the formulas.

Frames need no exponentials: the best logit + log(1 - |cos|) is the best weight * (1 - |cos|). Every dense layer and
every attention reads its inputs and parameters and writes its outputs once, k_j and v_j once per atom, as if the cache
held them from then on.
"""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarking.timing import Program, take_turns
from crystalframer_jax.batching.batch import Batch
from crystalframer_jax.config import ModelConfig
from crystalframer_jax.model.encoder import value_bases

NUMBER = 4  # bytes of a float32 or int32
ROW_BYTES = 4 * NUMBER  # of a neighbor: its index and vector
PACKED_BYTES = NUMBER + 3 + 2 + ROW_BYTES + NUMBER  # of a neighbor, packed read and unpacked written
UPDATE_FLOPS = 20  # per parameter: clipping, two moments with bias correction, decay, the step
UPDATE_BYTES = 8 * NUMBER  # per parameter: itself and both moments read and written, the gradient written and read
PASSES = 30  # of what finds a ceiling, spread over seconds: one of them finds the machine less busy
TERMS = 16  # exponentials of each number, so that memory does not matter


@dataclasses.dataclass(frozen=True)
class Work:
    """What has to be computed and moved; as ceilings, rates per second."""

    exponentials: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.exponentials + other.exponentials, self.flops + other.flops, self.bytes + other.bytes)

    def __rmul__(self, times: int) -> "Work":
        return Work(times * self.exponentials, times * self.flops, times * self.bytes)

    def seconds(self, ceilings: "Work") -> float:
        """Divides by the ceilings: the largest of the three quotients."""
        return max(self.exponentials / ceilings.exponentials, self.flops / ceilings.flops, self.bytes / ceilings.bytes)


@dataclasses.dataclass(frozen=True)
class Size:
    """Real atoms, crystals and neighbors (the atoms themselves among them) of a batch."""

    atoms: int
    crystals: int
    neighbors: int

    @classmethod
    def of(cls, batch: Batch) -> "Size":
        """Counts those of a packed or unpacked batch."""
        sizes = np.asarray(batch.crystal_sizes)
        return cls(int(sizes.sum()), int((sizes > 0).sum()), int(np.asarray(batch.rows.count).sum()))


def attention(config: ModelConfig, size: Size, training: bool = False) -> Work:
    """Counts frames and attention of one block, forward: from q, k, v and a to [N, H, d_v].

    With `training` what the backward pass needs is written: the sums and the log-sum-exp of the softmax.
    """
    N, E, H, dk, dv = size.atoms, size.neighbors, config.head_num, config.k_dim, config.v_dim
    D_dist, D_angle, A, B = _bases(config)
    others = (E - N) * bool(D_angle)  # the angle factors are not for the atom itself
    sums = dv + D_dist + 3 * D_angle
    weights = H * dv * (D_dist + 3 * D_angle)
    flops = E * H * (2 * dk + 2 * dv)  # q . k, sum p v
    flops += 9 * E + 5 * E * H  # distances, softmax
    flops += E * D_dist * (3 + 2 * H)  # distance Gaussians: arguments, contraction
    flops += 7 * others * H * (config.frame_method == "max")  # e1 . u, 1 - |cos|, times weight
    flops += 3 * others * H * (6 + 4 * A + B + 2 * A * B)
    flops += 2 * N * weights
    stored = N * H * (sums + 1) * training
    moved = ROW_BYTES * E + NUMBER * (N * H * (2 * dk + 2 * dv + 1) + stored + weights)  # q, k, v, output, a
    return Work(E * (H + D_dist) + 3 * others * H * (A + B), flops, moved)


def attention_backward(config: ModelConfig, size: Size) -> Work:
    """Counts the gradient of `attention` with respect to q, k, v, a, W_dist and W_angle; frames are given.

    Weights are recomputed from the log-sum-exp.
    """
    N, E, H, dk, dv = size.atoms, size.neighbors, config.head_num, config.k_dim, config.v_dim
    D_dist, D_angle, A, B = _bases(config)
    others = (E - N) * bool(D_angle)
    sums = dv + D_dist + 3 * D_angle
    weights = H * dv * (D_dist + 3 * D_angle)
    flops = E * H * (6 * dk + 4 * dv)  # logits again and v_j . gradient; gradients of q, k and v
    flops += 9 * E + 7 * E * H + 2 * N * H * sums  # distances, softmax, a; the mean gradient <sums, gradient>
    flops += E * D_dist * (3 + 2 * H)
    flops += 3 * others * H * (6 + 5 * A + B + 2 * A * B)
    flops += 4 * N * weights
    read = N * H * (2 * dk + 2 * dv + 1 + sums + 1)  # q, k, v, output gradient, a, sums, log-sum-exp
    written = N * H * (2 * dk + dv + 1)
    moved = ROW_BYTES * E + NUMBER * (E + read + written + 2 * weights)  # the reverse neighbors too
    return Work(attention(config, size).exponentials, flops, moved)


def forward(config: ModelConfig, size: Size, training: bool = False) -> Work:
    """Counts a prediction, from the packed batch."""
    embedding = NUMBER * size.atoms * (1 + 2 * config.model_dim)
    work = Work(0, 0, PACKED_BYTES * size.neighbors + embedding) + _pooling(config, size)
    work += config.num_layers * (attention(config, size, training) + _width_logits(config, size))
    return sum(itertools.starmap(dense, dense_layers(config, size)), work)


def train_step(config: ModelConfig, size: Size, num_parameters: int) -> Work:
    """Counts forward pass, backward pass and update."""
    work = forward(config, size, training=True) + _pooling(config, size)
    work += config.num_layers * (attention_backward(config, size) + 2 * _width_logits(config, size))
    work += num_parameters * Work(0, UPDATE_FLOPS, UPDATE_BYTES)
    return sum(itertools.starmap(dense_backward, dense_layers(config, size)), work)


def dense(rows: int, inputs: int, outputs: int) -> Work:
    """Counts x W + b for `rows` rows."""
    moved = rows * (inputs + outputs) + (inputs + 1) * outputs
    return Work(0, rows * outputs * (2 * inputs + 1), NUMBER * moved)


def dense_backward(rows: int, inputs: int, outputs: int) -> Work:
    """Counts gradients with respect to x, W and b."""
    moved = rows * (2 * inputs + outputs) + inputs * outputs
    return Work(0, rows * outputs * (4 * inputs + 1), NUMBER * moved)  # gradients of parameters: see the update


def dense_layers(config: ModelConfig, size: Size) -> list[tuple[int, int, int]]:
    """Lists (rows, inputs, outputs) of all dense layers.

    Those of a block are q, k, v (which read x together), out, linear1 and linear2; others come after pooling.
    """
    D, H, dk, dv = config.model_dim, config.head_num, config.k_dim, config.v_dim
    block = [(D, H * (2 * dk + dv)), (H * dv, D), (D, config.ff_dim), (config.ff_dim, D)]
    head = itertools.pairwise((D, *config.embedding_dim, config.num_targets))
    return [(size.atoms, *layer) for layer in block * config.num_layers] + [(size.crystals, *layer) for layer in head]


def _pooling(config: ModelConfig, size: Size) -> Work:
    return Work(0, size.atoms * config.model_dim, NUMBER * (size.atoms + size.crystals) * config.model_dim)


def _width_logits(config: ModelConfig, size: Size) -> Work:
    return Work(0, 2 * size.atoms * config.head_num * config.k_dim)


def _bases(config: ModelConfig) -> tuple[int, int, int, int]:
    """Numbers of distance and angle Gaussians, and of the two kinds of angle factors (A groups of B)."""
    bases = value_bases(config, 0)
    groups = (bases.angle.size // bases.angle.group_size, bases.angle.group_size) if bases.angle else (0, 0)
    return *bases.sizes, *groups


def measure_ceilings() -> Work:
    """Measures the rates per second of the default device, each the best of several runs of milliseconds.

    A matrix product in float32 at full precision; 16 exponentials of each number of an array, summed up in two ways of
    which the faster counts; x + 1 for a long array in place, bytes read plus bytes written.
    """
    on_cpu = jax.default_backend() == "cpu"
    matrix, long, many = (2048, 2**26, 2**20) if on_cpu else (8192, 2**30, 2**29)

    def fastest(function: Callable, *shape: int, in_place: bool = False) -> float:
        program = Program(jax.jit(function, donate_argnums=0 if in_place else ()), lambda: (jnp.ones(shape),))
        if in_place:
            program.advance = lambda given, result: (result,)
        (timing,) = take_turns([program], PASSES)
        if timing.failure:
            raise RuntimeError(f"the ceilings of the device cannot be measured: {timing.failure}")
        return min(timing.seconds)

    def terms(x: jax.Array) -> list[jax.Array]:
        return [jnp.exp(-i / TERMS * x) for i in range(1, TERMS + 1)]

    product = fastest(lambda x: jnp.matmul(x, x, precision="highest"), matrix, matrix)
    copy = fastest(lambda x: x + 1, long, in_place=True)
    exponentials = min(fastest(lambda x: sum(terms(x)), many), fastest(lambda x: sum(map(jnp.sum, terms(x))), many))
    return Work(TERMS * many / exponentials, 2 * matrix**3 / product, 8 * long / copy)
