"""Trees of arrays as folders that Orbax writes and reads, without its messages, waiting and silent conversions."""

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from crystalframer_jax.parallel.devices import Tree


def write_arrays(folder: Path, tree: Tree) -> None:
    """Writes a tree of NumPy arrays into a new folder."""
    with _orbax() as orbax:
        orbax.save(folder.absolute(), args=ocp.args.StandardSave(tree))


def read_arrays(folder: Path, like: Tree) -> Tree:
    """Reads a tree with the structure, shapes and placement of `like`, and the types that were stored.

    BatchNorm in float64 begins with float32 averages. Raises ValueError naming an array that does not fit.
    """
    with _orbax() as orbax:
        stored: Any = orbax.metadata(folder.absolute()).item_metadata
        found = {leaf.name: leaf for leaf in jax.tree.leaves(stored.tree, is_leaf=lambda leaf: hasattr(leaf, "name"))}
        _check_fits(found, {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(like)})
        typed = jax.tree_util.tree_map_with_path(
            lambda path, leaf: ocp.utils.to_shape_dtype_struct(leaf, found[_name(path)].dtype), like
        )
        return orbax.restore(folder.absolute(), args=ocp.args.StandardRestore(typed))


@contextlib.contextmanager
def _orbax() -> Iterator[ocp.Checkpointer]:
    """Gives an Orbax for folders that only this process uses: in a distributed training it would wait for the others.

    What it logs is dropped: what matters of it is in our errors.
    """
    index, logger = jax.process_index(), logging.getLogger("absl")
    alone = ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process_{index}"
    )

    def is_from_elsewhere(record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname

    logger.addFilter(is_from_elsewhere)
    try:
        handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as orbax:
            yield orbax
    except Exception:
        _silence_leftovers()
        raise
    finally:
        logger.removeFilter(is_from_elsewhere)


def _silence_leftovers() -> None:
    """Leaves out what Python would tell, later, of each of the other reads and writes after one has failed."""
    logging.getLogger("asyncio").addFilter(_is_no_leftover)  # once, however often
    if getattr(sys.unraisablehook, "func", None) is not _print_unraisable:
        sys.unraisablehook = functools.partial(_print_unraisable, sys.unraisablehook)


def _is_no_leftover(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return "exception was never retrieved" not in message or "tensorstore" not in message


def _print_unraisable(hook: Callable[[Any], None], unraisable: "sys.UnraisableHookArgs") -> None:
    if str(unraisable.exc_value) != "Event loop is closed":  # which TensorStore reports to
        hook(unraisable)


def _check_fits(stored: Tree, like: Tree) -> None:
    """Raises ValueError unless the same arrays are there, of types that are switched on (float64 may not be)."""
    differing = []
    for name in sorted(stored.keys() | like):
        there, here = stored.get(name), like.get(name)
        is_missing = there is None or here is None
        if is_missing or there.shape != here.shape or jax.dtypes.canonicalize_dtype(there.dtype) != there.dtype:
            differing.append(f"{name} is {_shown(there)} there, {_shown(here)} here")
    if differing:
        raise ValueError(f"{differing[0]}, and {len(differing) - 1} more differ")


def _shown(leaf: Any) -> str:
    return "missing" if leaf is None else f"{np.dtype(leaf.dtype)} {list(leaf.shape)}"


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
