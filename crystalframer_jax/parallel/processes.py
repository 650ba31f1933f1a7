"""Processes that run together: who writes, and what the first one tells the others."""

import json
import math
from typing import Any

import jax
import numpy as np

from crystalframer_jax.parallel.devices import Tree


def is_first_process() -> bool:
    """Whether this is the process that writes files and messages."""
    return jax.process_index() == 0


def from_first_process(content: bytes) -> bytes:
    """The `content` of the first process, in all of them."""
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return content
    size = int(multihost_utils.broadcast_one_to_all(np.array(len(content), np.int32)))
    data = np.frombuffer(content, np.uint8) if is_first_process() else np.zeros(size, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(data)).astype(np.uint8).tobytes()


def json_from_first_process(value: Any) -> Any:
    """What JSON makes of a value of the first process, in all of them; with one process the value itself."""
    return json.loads(from_first_process(json.dumps(value).encode())) if jax.process_count() > 1 else value


def arrays_from_first_process(tree: Tree, like: Tree) -> Tree:
    """The numpy arrays of the first process, in all of them, bit for bit; `like` has their shapes and types."""
    leaves, structure = jax.tree.flatten(like)
    content = b""
    if is_first_process():
        content = b"".join(
            np.asarray(x, leaf.dtype).tobytes() for x, leaf in zip(jax.tree.leaves(tree), leaves, strict=True)
        )
    buffer, received, start = from_first_process(content), [], 0
    for leaf in leaves:
        number = math.prod(leaf.shape)
        received.append(np.frombuffer(buffer, leaf.dtype, number, start).reshape(leaf.shape))
        start += received[-1].nbytes
    return jax.tree.unflatten(structure, received)


def largest_of_processes(number: int) -> int:
    """The largest of the numbers that the processes give."""
    from jax.experimental import multihost_utils

    return int(np.max(multihost_utils.process_allgather(np.array(number)))) if jax.process_count() > 1 else number
