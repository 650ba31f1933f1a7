"""The devices that share the work of a batch, of one process or of several, and sums over them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding, PartitionSpec

from crystalframer_jax.config import ConfigError

AXIS = "devices"
FOR_CPU = {  # compiled in four fifths of the time, and a tenth faster
    "xla_backend_optimization_level": 1,
    "xla_cpu_prefer_vector_width": 512,
}
ROUNDS = 16  # of sharing out, that are dealt one by one
Tree = Any


@dataclasses.dataclass(frozen=True)
class Devices:
    """Devices that run the same program, each on its share of a batch."""

    all: tuple[jax.Device, ...] = ()  # in the order of their shares, process by process; empty: the default one alone

    @classmethod
    def of_this_process(cls, number: int = 0) -> "Devices":
        """Takes all devices of this process, or the first `number`; ConfigError if there are fewer."""
        return cls._of([jax.process_index()], number)

    @classmethod
    def of_all_processes(cls, number: int = 0) -> "Devices":
        """Takes all devices of the processes that run together, or the first `number` of each; ConfigError likewise."""
        return cls._of(range(jax.process_count()), number)

    @classmethod
    def _of(cls, processes: Sequence[int], number: int) -> "Devices":
        chosen: list[jax.Device] = []
        for process in processes:
            here = jax.local_devices(process)
            if number > len(here):
                where = f"process {process}" if len(processes) > 1 else "this machine"
                found = f"{where} has {len(here)} ({here[0].device_kind})"
                raise ConfigError(f"num_devices={number}: {found}; choose at most as many, or 0 for all")
            chosen += here[: number or len(here)]
        return cls(tuple(chosen) if len(chosen) > 1 else ())

    @property
    def count(self) -> int:
        """How many there are."""
        return max(len(self.all), 1)

    @property
    def axis(self) -> str | None:
        """Name of the axis that `each` maps over; None for one device."""
        return AXIS if self.all else None

    @property
    def of_process(self) -> list[int]:
        """Which of them belong to this process."""
        return [i for i, device in enumerate(self.all) if device.process_index == jax.process_index()] or [0]

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """All of them along AXIS."""
        return jax.sharding.Mesh(np.array(self.all), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))

    def each(
        self,
        function: Callable,
        split: Sequence[int],
        splits_result: bool = False,
        static: Sequence[str] = (),
        donate: Sequence[int] = (),
        runs_often: bool = True,
    ) -> Any:
        """Compiles a function (jax.jit) to run on every device.

        Of the arguments whose numbers are in `split` every device gets its own part (see `put`), of others the whole
        (see `replicate`). The results are parts as well if it `splits_result`, else the same on all devices. `static`
        are names of keyword arguments, `donate` numbers of arguments that are consumed, as in jax.jit. What
        `runs_often` is compiled with the options that suit the machine; JAX takes such a function in no other one.
        """
        options: dict[str, Any] = {"static_argnames": static, "donate_argnums": donate}
        if runs_often and jax.default_backend() == "cpu" and not jax.config.read("jax_disable_most_optimizations"):
            options["compiler_options"] = FOR_CPU
        if not self.all:
            return jax.jit(function, **options)

        def on_all(*arguments: Tree, **options: Any) -> Tree:
            def on_one(*arguments: Tree) -> Tree:
                own = [jax.tree.map(lambda x: x[0], a) if i in split else a for i, a in enumerate(arguments)]
                result = function(*own, **options)
                return jax.tree.map(lambda x: x[None], result) if splits_result else result

            part, whole = PartitionSpec(AXIS), PartitionSpec()
            specs = tuple(part if i in split else whole for i in range(len(arguments)))
            out = part if splits_result else whole
            return jax.shard_map(on_one, mesh=self.mesh, in_specs=specs, out_specs=out, check_vma=False)(*arguments)

        return jax.jit(on_all, **options)

    def stacked(self, parts: Sequence[Tree]) -> Tree:
        """Stacks trees of numpy arrays, one for each device of this process, as `put` takes them."""
        return jax.tree.map(lambda *x: np.stack(x), *parts) if self.all else parts[0]

    def put(self, parts: Tree) -> Tree:
        """Puts arrays of this process on its devices: along a first axis of them; on one device, whole."""
        if not self.all:
            return jax.device_put(parts)
        return jax.make_array_from_process_local_data(NamedSharding(self.mesh, PartitionSpec(AXIS)), parts)

    def replicate(self, tree: Tree) -> Tree:
        """Puts arrays (equal in all processes) on every device."""
        if not self.all:
            return jax.device_put(tree)
        sharding = NamedSharding(self.mesh, PartitionSpec())

        def of(x: Any) -> jax.Array:
            if isinstance(x, jax.core.Tracer) or (isinstance(x, jax.Array) and x.sharding == sharding):
                return x
            return jax.make_array_from_process_local_data(sharding, np.asarray(x), np.shape(x))

        return jax.tree.map(of, tree)


ONE_DEVICE = Devices()


def on_one_device(tree: Tree) -> Tree:
    """Takes arrays that are the same on all devices from one of this process."""
    return jax.tree.map(lambda x: x.addressable_data(0) if isinstance(x, jax.Array) else x, tree)


def sum_in_order(tree: Tree, axis: str | None) -> Tree:
    """Sums arrays over the devices of `axis` (None: one device), always the same bits; not to be differentiated.

    The numbers are added in an order that depends on how many devices there are, but not on which processes they belong
    to or how they are connected. Every device adds up one piece of the arrays: as many bytes as in other reductions.
    """
    if axis is None:
        return tree
    vector, restored = ravel_pytree(tree)
    number = jax.lax.axis_size(axis)
    pieces = jnp.pad(vector, (0, -len(vector) % number)).reshape(number, -1)
    pieces = jax.lax.all_to_all(pieces, axis, 0, 0)  # that of this device, from each
    while len(pieces) > 1:
        half = len(pieces) // 2
        pieces = jnp.concatenate([pieces[:half] + pieces[half : 2 * half], pieces[2 * half :]])
    return restored(jax.lax.all_gather(pieces[0], axis, tiled=True)[: len(vector)])


def psum(x: jax.Array, axis: str | None) -> jax.Array:
    """Sums an array over the devices of `axis` (None: one device), in any order; with its gradient."""
    return x if axis is None else jax.lax.psum(x, axis)


def share_out(work: np.ndarray, number: int) -> list[np.ndarray]:
    """Shares out the places in `work` [n]: nearly equal work, as equal as possible in number too; each ascending.

    Round by round, the most laborious pieces that are left go to the shares with the least work so far. Of very many
    rounds all but the last ROUNDS are dealt several at a time, there and back, which leaves hardly less equal sums.
    """
    if number == 1:
        return [np.arange(len(work))]
    rounds = -(-len(work) // number)
    scale = 65535 / max(work.max(initial=0), 1e-300)
    keys = (65535 - np.rint(work * scale)).astype(np.uint16)  # sorted ten times as fast as wider ones
    order = np.argsort(keys, kind="stable").astype(np.int32)
    places, amounts = np.full((rounds, number), len(work), np.int32), np.zeros((rounds, number))
    places.flat[: len(work)], amounts.flat[: len(work)] = order, work[order]
    many = max(0, rounds - ROUNDS)
    starts, load = [*range(0, many, max(1, -(-many // ROUNDS))), *range(many, rounds)], np.zeros(number)
    for start, end in zip(starts, [*starts[1:], rounds], strict=True):
        for dealt in (places, amounts):
            dealt[start + 1 : end : 2] = dealt[start + 1 : end : 2, ::-1]
        sums, chosen = amounts[start:end].sum(axis=0), np.empty(number, np.int64)
        chosen[np.argsort(load, kind="stable")] = np.argsort(-sums, kind="stable")
        places[start:end], load = places[start:end, chosen], load + sums[chosen]
    return [share[: np.searchsorted(share, len(work))] for share in np.sort(places, axis=0).T.astype(np.int64)]
