"""What Orbax does and a user should not meet: messages on the terminal, silent conversions of types, waiting."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from crystalframer_jax.parallel.devices import Tree


def this_process_alone() -> ocp.options.MultiprocessingOptions:
    """Options for folders that only this process uses: in a distributed training Orbax would wait for the others."""
    index = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process_{index}"
    )


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Drop what Orbax logs through absl, of any level: what matters of it is in our errors.

    And what TensorStore reports to event loops that Orbax has closed: on a full disk, the writes that fail after the
    first one.
    """
    print_unraisable = sys.unraisablehook

    def is_from_elsewhere(record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname

    def print_others(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            print_unraisable(unraisable)

    logger = logging.getLogger("absl")
    logger.addFilter(is_from_elsewhere)
    sys.unraisablehook = print_others
    try:
        yield
    finally:
        logger.removeFilter(is_from_elsewhere)
        if sys.unraisablehook is print_others:
            sys.unraisablehook = print_unraisable


def silence_leftovers() -> None:
    """After a write that has failed and was reported: asyncio would tell of each of Orbax's other writes, later."""
    logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())


def with_stored_types(like: Tree, stored: Tree) -> Tree:
    """`like` with the types of the stored arrays, which Orbax would otherwise convert silently.

    BatchNorm in float64 begins with float32 averages. Raises ValueError naming an array that does not fit.
    """

    def name_of(path: Any) -> str:
        return jax.tree_util.keystr(path, simple=True, separator=".")

    found = {leaf.name: leaf for leaf in jax.tree.leaves(stored, is_leaf=lambda leaf: hasattr(leaf, "name"))}
    wanted = {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(like)}
    differing = [name for name in sorted(found.keys() | wanted) if not _fits(found.get(name), wanted.get(name))]
    if differing:
        there, here = (
            "missing" if leaf is None else f"{np.dtype(leaf.dtype)} {list(leaf.shape)}"
            for leaf in (found.get(differing[0]), wanted.get(differing[0]))
        )
        raise ValueError(f"{differing[0]} is {there} there, {here} here, and {len(differing) - 1} more differ")
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: ocp.utils.to_shape_dtype_struct(leaf, found[name_of(path)].dtype), like
    )


def _fits(stored: Any, wanted: Any) -> bool:
    """Whether an array is there with the same shape, and of a type that is switched on (float64 may not be)."""
    is_there = stored is not None and wanted is not None
    return is_there and stored.shape == wanted.shape and jax.dtypes.canonicalize_dtype(stored.dtype) == stored.dtype
