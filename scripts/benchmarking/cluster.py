"""A model on paper of the training step on n GPUs, and the same arithmetic held against a measurement.

A step on n GPUs with b crystals each takes

    max(compute(b) + sum(n), host(n, b)),   compute(b) = fixed + b * balance * seconds per crystal

where the balance is the work of the GPU that has most over the mean (`parallel.share_out`, on real crystals), and the
host works ahead: it shares out the crystals of every batch among all GPUs, and packs those of its own GPUs unless the
crystals are kept on them. The gradient is summed as `parallel.devices.sum_in_order` does it, after the backward pass:

    all_to_all   a message of 1/n of the gradient to every other GPU
    all_gather   a ring in which 1/n of the gradient passes n - 1 times

so that every GPU sends 2 (n - 1)/n of its bytes; both have a latency that grows with n. Times are in seconds, rates in
bytes per second and GPU in each direction.
"""

import dataclasses
import time
from collections.abc import Sequence

import numpy as np

from crystalframer_jax.batching.shapes import plan_shapes, shared_out
from crystalframer_jax.data.store import Dataset
from crystalframer_jax.parallel.devices import imbalance

NUMBERS_OF_GPUS = (1, 2, 4, 8, 16, 64, 256, 1024)
STRONG, WEAK = (256, 2048), (32, 256)  # crystals in all, and of each GPU
BATCHES = 4  # random ones by which the balance and the time of sharing out are found


@dataclasses.dataclass(frozen=True)
class Compute:
    """Forward and backward pass and update on one device, for b crystals: fixed + b * per_crystal seconds."""

    fixed: float
    per_crystal: float

    def seconds(self, crystals: float) -> float:
        """Of a step without the sum."""
        return self.fixed + crystals * self.per_crystal

    @classmethod
    def fitted(cls, crystals: Sequence[int], seconds: Sequence[float]) -> "Compute":
        """Through measured steps of one device, by least squares of the relative errors; neither part is negative."""
        b, t = np.array(crystals, float), np.array(seconds, float)
        if len(set(crystals)) == 1:
            return cls(0.0, float(np.mean(t / b)))
        fixed, slope = np.linalg.lstsq(np.stack([1 / t, b / t], 1), np.ones(len(t)))[0]
        if fixed < 0 or slope < 0:
            x = b / t if fixed < 0 else 1 / t
            alone = np.sum(x) / np.sum(x**2)
            fixed, slope = (0.0, alone) if fixed < 0 else (alone, 0.0)
        return cls(float(fixed), float(slope))


# docs/benchmark.md: 1.7e9 warp instructions for 256 crystals at one per cycle and scheduler of an H200, and 400 further
# programs, 2 us each. It is the least that a step can take, and so the worst case for everything around it.
ESTIMATE = Compute(fixed=400 * 2e-6, per_crystal=1.8e-3 / 256)
PACKING = 1 / (450 * 256)  # of a crystal, by one process: 450 batches of 256 per second


@dataclasses.dataclass(frozen=True)
class Network:
    """Between nodes."""

    name: str
    bandwidth: float
    hop: float  # latency of a step of a ring from node to node: NCCL's for InfiniBand, a guess for sockets


NETWORKS = (
    Network("400 Gb/s", 50e9, 4e-6),
    Network("80 Gb/s", 10e9, 4e-6),
    Network("25 Gb/s", 3e9, 30e-6),
)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Nodes of GPUs; start and hops as NCCL estimates them (src/graph/tuning.cc, ring, LL128), a message as a guess."""

    network: Network
    per_node: int = 8
    node_bandwidth: float = 450e9  # NVLink 4
    node_hop: float = 1.9e-6  # latency of a step of a ring inside a node
    start: float = 10e-6  # of a collective
    message: float = 1e-6  # to one more GPU, of the messages that a GPU sends together

    def sum_seconds(self, gradient_bytes: float, gpus: int) -> float:
        """Time of the gradient sum; 0 for one GPU.

        Messages inside a node and between nodes go side by side; a ring is as fast as its slowest link.
        """
        if gpus == 1:
            return 0.0
        inside, share = min(gpus, self.per_node), gradient_bytes / gpus
        nodes = -(-gpus // self.per_node)
        within, between = (inside - 1) * share / self.node_bandwidth, (gpus - inside) * share / self.network.bandwidth
        all_to_all = self.start + (gpus - 1) * self.message + max(within, between)
        slowest = self.node_bandwidth if nodes == 1 else min(self.node_bandwidth, self.network.bandwidth)
        hops = (gpus - nodes) * self.node_hop + (nodes - 1) * self.network.hop
        return all_to_all + self.start + hops + (gpus - 1) * share / slowest


def bytes_sent(gradient_bytes: float, gpus: int) -> float:
    """What every GPU sends for the gradient sum, and receives."""
    return 2 * (gpus - 1) / gpus * gradient_bytes


@dataclasses.dataclass(frozen=True)
class Sharing:
    """How a batch is shared out: largest over mean work of a device, and the time of the host for it."""

    balance: float
    seconds: float


def sharing(dataset: Dataset, batch: int, devices: int, batches: int = BATCHES) -> Sharing:
    """Of random batches of training crystals, taken several times where there are too few; seconds are the shortest."""
    table, train, rng = dataset.table, dataset.splits["train"], np.random.default_rng(0)
    crystals = np.tile(train, -(-batch // len(train)))
    shapes = plan_shapes(table, crystals, -(-batch // devices), table.longest_row)
    ratios, seconds = [], []
    for _ in range(batches):
        rows = rng.permutation(crystals)[:batch]
        start = time.perf_counter()
        shares = shared_out(table, rows, shapes, devices).shares
        seconds.append(time.perf_counter() - start)
        ratios.append(imbalance(table.num_edges[rows], shares))
    return Sharing(float(np.mean(ratios)), min(seconds))


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A step on paper."""

    series: str  # "strong": the batch is given, "weak": the share of a GPU
    gpus: int
    batch: int  # crystals in all
    balance: float
    compute: float
    bytes: float  # sent by each GPU
    sums: list[float]  # of each network
    on_gpus: list[float]  # compute and sum, with each network
    sharing: float  # of the host, out of sight as long as it is shorter than compute and sum
    packing: float  # of the host, if the crystals are not on the GPUs; with a process for each GPU

    @property
    def step(self) -> float:
        """With the first network and the crystals on the GPUs."""
        return max(self.on_gpus[0], self.sharing)

    @property
    def packed_step(self) -> float:
        """With the first network and the crystals packed on the host."""
        return max(self.on_gpus[0], self.sharing + self.packing)

    def efficiency(self, single: "Prediction", seconds: float) -> float:
        """Crystals per second and GPU if a step takes `seconds`, over those of one GPU with the crystals on it."""
        return self.batch / seconds / self.gpus / (single.batch / single.step)


def predict(
    series: str,
    gpus: int,
    batch: int,
    compute: Compute,
    gradient_bytes: float,
    found: Sharing,
    clusters: Sequence[Cluster] | None = None,
) -> Prediction:
    """The step of a batch (crystals in all) on GPUs of some clusters (default: one for each of NETWORKS)."""
    clusters = clusters or [Cluster(network) for network in NETWORKS]
    each = batch / gpus
    busy = compute.seconds(each * found.balance)
    sums = [cluster.sum_seconds(gradient_bytes, gpus) for cluster in clusters]
    return Prediction(
        series=series,
        gpus=gpus,
        batch=batch,
        balance=found.balance,
        compute=busy,
        bytes=bytes_sent(gradient_bytes, gpus),
        sums=sums,
        on_gpus=[busy + taken for taken in sums],
        sharing=found.seconds,
        packing=each * PACKING,
    )


def predictions(dataset: Dataset, compute: Compute, gradient_bytes: float) -> list[list[Prediction]]:
    """Strong and weak scaling over NUMBERS_OF_GPUS, the first of every list for one GPU."""
    series = [[("strong", n, batch) for n in NUMBERS_OF_GPUS if n <= batch // 2] for batch in STRONG]
    series += [[("weak", n, n * each) for n in NUMBERS_OF_GPUS] for each in WEAK]
    return [
        [predict(name, n, batch, compute, gradient_bytes, sharing(dataset, batch, n)) for name, n, batch in one]
        for one in series
    ]


def predict_here(
    devices: int, crystals: float, compute: Compute, sum_seconds: float, cores_of_one: float = 1.0, cores: int = 0
) -> float:
    """Seconds of a step that can be measured: `crystals` for each of some devices, and a measured sum.

    `cores` that the devices share (0: every device is a machine of its own): a device alone keeps `cores_of_one` of
    them busy, so that n devices take n * cores_of_one / cores times as long as one as soon as that is above 1.
    """
    crowding = max(1.0, devices * cores_of_one / cores) if cores else 1.0
    return crowding * compute.seconds(crystals) + sum_seconds
