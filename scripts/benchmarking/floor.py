"""The least work that a batch asks for, and the time that a device needs for it at its measured ceilings.

Counted are the real atoms N, crystals B and neighbours E of a batch (padding is waste), in exponentials, other
floating-point operations (a multiplication and an addition count two) and bytes. Each count is that of the algorithm
of `model.lattice_sums`, evaluated in one sweep over the neighbours with nothing written in between:

exponentials, forward   E H for the softmax, E D_dist for the distance Gaussians that all heads share, and
                        3 (E - N) H (A + B) for the factors of the angle Gaussians (`AngleBasis`; not for the atom
                        itself). Frames need none: the best logit + log(1 - |cos|) is the best weight * (1 - |cos|).
operations, forward     dense layers 2 N in out; per neighbour q . k_j, sum p v_j, the contraction of the distance
                        Gaussians with the weights and that of the angle factors, and their arguments; per atom the
                        projections by W_dist and W_angle.
bytes, forward          every dense layer and every attention reads its inputs and writes its outputs once, its
                        parameters too. The attention reads the rows (index 4, vector 12 bytes per neighbour) once,
                        and k_j and v_j once per atom, as if the cache held them from then on.
backward                the same exponentials again (the weights are recomputed from the stored log-sum-exp), twice the
                        operations of dense layers and projections, those of the attention as `attention_backward`
                        lists them; bytes by the same rule, with the reverse neighbours and the stored sums.
update                  20 operations per parameter; parameters and both moments of AdamW read and written, the gradient
                        written and read.
"""

import dataclasses
import itertools

import numpy as np

from crystalframer_jax.batching.batch import Batch
from crystalframer_jax.config import ModelConfig
from crystalframer_jax.model.encoder import value_bases
from crystalframer_jax.ops.basis import AngleBasis

NUMBER = 4  # bytes of a float32 or int32
VECTOR = 3 * NUMBER
UPDATE_FLOPS = 20  # per parameter: clipping, two moments with bias correction, decay, the step


@dataclasses.dataclass(frozen=True)
class Work:
    """What has to be computed and moved."""

    exponentials: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.exponentials + other.exponentials, self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, ceilings: "Work") -> float:
        """Time at `ceilings`, which are rates per second: the largest of the three quotients."""
        return max(self.exponentials / ceilings.exponentials, self.flops / ceilings.flops, self.bytes / ceilings.bytes)


@dataclasses.dataclass(frozen=True)
class Size:
    """Real atoms, crystals and neighbours (the atoms themselves among them) of a batch."""

    atoms: int
    crystals: int
    neighbors: int

    @classmethod
    def of(cls, batch: Batch) -> "Size":
        """The size of a packed or unpacked batch."""
        sizes = np.asarray(batch.crystal_sizes)
        return cls(int(sizes.sum()), int((sizes > 0).sum()), int(np.asarray(batch.rows.count).sum()))


def attention(config: ModelConfig, size: Size, training: bool = False) -> Work:
    """Frames and attention of one block, forward: from q, k, v and a to [N, H, d_v].

    With `training` what the backward pass needs is written: the sums and the log-sum-exp of the softmax.
    """
    N, E, H, dk, dv = size.atoms, size.neighbors, config.head_num, config.k_dim, config.v_dim
    D_dist, D_angle, first, second = _bases(config)
    flops = 9.0 * E  # d^2, d, u
    flops += E * H * (2 * dk + 2 + 3 + 2 * dv)  # logits, softmax, values
    flops += E * D_dist * (3 + 2 * H)  # arguments of the Gaussians, contraction
    if D_angle:
        flops += (E - N) * H * (7.0 if config.frame_method == "max" else 0)  # e1 . u, 1 - |cos|, times weight
        flops += 3 * (E - N) * H * (5 + 3 * first + 1 + second + first + 2 * first * second)
    stored = size.atoms * H * (dv + D_dist + 3 * D_angle + 1)
    moved = _rows(E) + NUMBER * (N * H * (2 * dk + 2 * dv + 1) + stored * training)  # q, k, v, output; a
    return Work(_exponentials(config, size), flops, moved) + _projections(config, size)


def attention_backward(config: ModelConfig, size: Size) -> Work:
    """The gradient of `attention` with respect to q, k, v, a, W_dist and W_angle; frames are given."""
    N, E, H, dk, dv = size.atoms, size.neighbors, config.head_num, config.k_dim, config.v_dim
    D_dist, D_angle, first, second = _bases(config)
    sums = dv + D_dist + 3 * D_angle
    flops = 9.0 * E + 2.0 * N * H * sums  # distances; the mean gradient <sums, gradient>
    flops += E * H * (2 * dk + 2 + 1)  # logits and weights again
    flops += E * H * (2 * dv + 2)  # v_j . gradient; the derivative of the softmax
    flops += E * H * (2 * dk + 2 * dk + 2 * dv + 2)  # gradients of q, k, v, a
    flops += E * D_dist * (3 + 2 * H)
    if D_angle:
        flops += 3 * (E - N) * H * (5 + 3 * first + 1 + second + 2 * first * second + 2 * first)
    read = N * H * (2 * dk + 2 * dv + 1 + sums + 1)  # q, k, v, output gradient, a, sums, log-sum-exp
    written = N * H * (2 * dk + dv + 1)
    projections = _projections(config, size)
    both = Work(0, 2 * projections.flops, 2 * projections.bytes)
    return Work(_exponentials(config, size), flops, _rows(E) + NUMBER * (E + read + written)) + both


def forward(config: ModelConfig, size: Size, training: bool = False) -> Work:
    """A prediction, from the packed batch."""
    N, B = size.atoms, size.crystals
    work = Work(bytes=(size.neighbors * (NUMBER + 3 + 2 + VECTOR + 2 * NUMBER)))  # packed rows in, rows out
    work += Work(bytes=NUMBER * N * (1 + 2 * config.model_dim))  # embedding
    for _ in range(config.num_layers):
        work += attention(config, size, training)
        work += Work(0, 2 * N * config.head_num * config.k_dim)  # width logits
        for inputs, outputs in block_layers(config):
            work += dense(N, inputs, outputs)
    work += Work(0, N * config.model_dim, NUMBER * (N + B) * config.model_dim)  # pooling
    for inputs, outputs in head_layers(config):
        work += dense(B, inputs, outputs)
    return work


def train_step(config: ModelConfig, size: Size, num_parameters: int) -> Work:
    """Forward, backward and update."""
    N, B = size.atoms, size.crystals
    work = forward(config, size, training=True)
    for _ in range(config.num_layers):
        work += attention_backward(config, size)
        work += Work(0, 4 * N * config.head_num * config.k_dim)
        for inputs, outputs in block_layers(config):
            work += dense_backward(N, inputs, outputs)
    work += Work(0, N * config.model_dim, NUMBER * (N + B) * config.model_dim)
    for inputs, outputs in head_layers(config):
        work += dense_backward(B, inputs, outputs)
    return work + Work(0, UPDATE_FLOPS * num_parameters, 8 * NUMBER * num_parameters)


def dense(rows: int, inputs: int, outputs: int) -> Work:
    """x W + b for `rows` rows."""
    moved = rows * (inputs + outputs) + (inputs + 1) * outputs
    return Work(0, rows * outputs * (2 * inputs + 1), NUMBER * moved)


def dense_backward(rows: int, inputs: int, outputs: int) -> Work:
    """Gradients with respect to x, W and b."""
    moved = rows * (2 * inputs + outputs) + inputs * outputs
    return Work(0, rows * outputs * (4 * inputs + 1), NUMBER * moved)  # gradients of parameters: see the update


def block_layers(config: ModelConfig) -> list[tuple[int, int]]:
    """(inputs, outputs) of the dense layers of a block: q, k, v (which read x together), out, linear1, linear2."""
    D, H, dk, dv = config.model_dim, config.head_num, config.k_dim, config.v_dim
    return [(D, H * (2 * dk + dv)), (H * dv, D), (D, config.ff_dim), (config.ff_dim, D)]


def head_layers(config: ModelConfig) -> list[tuple[int, int]]:
    """(inputs, outputs) of the dense layers after pooling."""
    widths = (config.model_dim, *config.embedding_dim, config.num_targets)
    return list(itertools.pairwise(widths))


def _bases(config: ModelConfig) -> tuple[int, int, int, int]:
    """Numbers of distance and angle Gaussians, and of the two kinds of angle factors (A groups of B)."""
    bases = value_bases(config, 0)
    angle: AngleBasis | None = bases.angle
    if angle is None:
        return *bases.sizes, 0, 0
    return *bases.sizes, angle.size // angle.group_size, angle.group_size


def _exponentials(config: ModelConfig, size: Size) -> float:
    D_dist, _, first, second = _bases(config)
    heads, others = config.head_num, size.neighbors - size.atoms
    return size.neighbors * (heads + D_dist) + 3 * others * heads * (first + second)


def _projections(config: ModelConfig, size: Size) -> Work:
    """c_dist W_dist and c_angle W_angle times the sums of every atom, added up."""
    D_dist, D_angle, _, _ = _bases(config)
    weights = config.head_num * config.v_dim * (D_dist + 3 * D_angle)
    return Work(0, 2.0 * size.atoms * weights, NUMBER * weights)


def _rows(neighbors: int) -> float:
    """Bytes of index and vector of the neighbours."""
    return neighbors * (NUMBER + VECTOR)
