"""The devices that share the work of a batch, of one process or of several, and sums over them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding, PartitionSpec

from crystalframer_jax.config import ConfigError

AXIS = "devices"
# How programs are compiled for a CPU.
TO_RUN_OFTEN: dict[str, Any] = {  # compiled in four fifths of the time, and a tenth faster
    "xla_backend_optimization_level": 1,
    "xla_cpu_prefer_vector_width": 512,
}
TO_RUN_ONCE = dict(TO_RUN_OFTEN)  # compiled in two thirds of the time, and a third slower
if jax.__version_info__ < (0, 11):  # later ones leave no choice
    TO_RUN_ONCE["xla_cpu_use_fusion_emitters"] = False
ROUNDS = 10  # of sharing out, that are dealt one by one, and at most as many times several
LEVELS = 16  # of work
FEW = 256  # numbers are sorted exactly
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
        for_cpu: Mapping[str, Any] = TO_RUN_OFTEN,
    ) -> Any:
        """Compiles a function (jax.jit) to run on every device.

        Of the arguments whose numbers are in `split` every device gets its own part (see `put`), of others the whole
        (see `replicate`). The results are parts as well if it `splits_result`, else the same on all devices. `static`
        are names of keyword arguments, `donate` numbers of arguments that are consumed, as in jax.jit. `for_cpu` are
        options of the compiler where the devices are those of a CPU; none for a function that other programs take in.
        """
        options: dict[str, Any] = {"static_argnames": static, "donate_argnums": donate}
        if for_cpu and jax.default_backend() == "cpu" and not jax.config.read("jax_disable_most_optimizations"):
            options["compiler_options"] = for_cpu
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


class Shares(Sequence[np.ndarray]):
    """The places of a batch that each of some devices gets, ascending; all are dealt out, one is listed when asked for.

    The work is nearly equal, and as equal as possible in number too. It depends on the work in the batch and the number
    of devices only, not on which processes they belong to. Round by round, the most laborious pieces that are left go
    to the devices with the least work so far; roughly so, since unequal pieces are what levels out the work. Of many
    rounds all but the last are dealt several at a time.
    """

    def __init__(self, work: np.ndarray, number: int):
        """Deals out work [n], none of it negative, to a number of devices."""
        rounds = -(-len(work) // number)
        self._order = _roughly_descending(work) if number > 1 else np.arange(len(work))  # [n] as they are dealt
        amounts = np.empty((rounds, number), work.dtype)
        np.take(work, self._order, out=amounts.reshape(-1)[: len(work)], mode="clip")
        amounts.reshape(-1)[len(work) :] = 0
        single = ROUNDS if number > 1 else 0
        many = max(0, rounds - single)
        starts = [*range(0, many, max(1, -(-many // max(1, single)))), *range(many, rounds)]
        self._rounds = np.diff([*starts, rounds])  # [S] that are dealt at a time
        self._columns = np.zeros((len(starts), number), np.int32)  # [S, number] what each device gets of them
        self.loads = np.zeros(number, work.dtype)  # [number] work of each device
        for columns, start, length in zip(self._columns, starts, self._rounds, strict=True):
            sums = amounts[start : start + length].sum(axis=0)
            columns[_descending(-self.loads)] = _descending(sums)
            self.loads += sums[columns]

    def __len__(self) -> int:
        return len(self.loads)

    def __getitem__(self, device: Any) -> Any:
        columns = np.repeat(self._columns[:, range(len(self))[device]], self._rounds)
        dealt = len(self) * np.arange(len(columns)) + columns
        return np.sort(self._order[dealt[dealt < len(self._order)]])


def _roughly_descending(work: np.ndarray) -> np.ndarray:
    """Sorts work by LEVELS of equal width, each in the order given."""
    levels = np.empty(len(work), np.uint8)
    np.multiply(work, LEVELS / max(work.max(initial=0), 1e-300), out=levels, casting="unsafe")
    return np.argsort(np.invert(levels, out=levels), kind="stable")


def _descending(numbers: np.ndarray) -> np.ndarray:
    """Sorts numbers, the same on all machines; many by 16 bits only, which takes a fifth of the time."""
    if len(numbers) <= FEW:
        return np.argsort(-numbers, kind="stable")
    below = numbers.max() - numbers
    scale = 65535 / max(below.max(), 1e-300)
    return np.argsort(np.multiply(below, scale, out=np.empty(len(below), np.uint16), casting="unsafe"), kind="stable")
