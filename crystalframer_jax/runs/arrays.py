"""Trees of arrays as folders that Orbax writes, without its messages and waiting.

TensorStore, which is below Orbax, reads them: whatever Orbax reads leaves memory behind, by TensorStore's Spec.to_json.
"""

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
import tensorstore as ts

from crystalframer_jax.files import read_json
from crystalframer_jax.parallel.devices import Tree


def write_arrays(folder: Path, tree: Tree) -> None:
    """Writes a tree of NumPy arrays into a new folder."""
    import orbax.checkpoint as ocp  # takes 0.3 s, which a prediction need not wait for

    with _orbax() as orbax:
        orbax.save(folder.absolute(), args=ocp.args.StandardSave(tree))


def read_arrays(folder: Path, like: Tree) -> Tree:
    """Reads a tree with the structure, shapes and placement of `like`, and the types that were stored.

    BatchNorm in float64 begins with float32 averages. Raises ValueError naming an array that does not fit.
    """
    entries = read_json(folder / "_METADATA")["tree_metadata"].values()
    is_empty = {
        ".".join(key["key"] for key in entry["key_metadata"]): entry["value_metadata"]["skip_deserialize"]
        for entry in entries
    }
    stored = _open([name for name, empty in is_empty.items() if not empty], folder.absolute())
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    _check_fits(stored, {_name(path): leaf for path, leaf in leaves})
    _check_empty({name for name, empty in is_empty.items() if empty}, like)
    pending = [stored[_name(path)].read() for path, _ in leaves]
    arrays = [jax.device_put(p.result(), leaf.sharding) for p, (_, leaf) in zip(pending, leaves, strict=True)]
    return jax.tree.unflatten(structure, arrays)


def _open(names: list[str], folder: Path) -> dict[str, ts.TensorStore]:
    """Opens arrays of a folder as Orbax keeps them, in one database."""
    context, database = ts.Context(), {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}{os.sep}"}}
    specs = {name: {"driver": "auto", "kvstore": {**database, "path": f"{name}/"}} for name in names}
    pending = {name: ts.open(spec, context=context, open=True, read=True) for name, spec in specs.items()}
    return {name: opened.result() for name, opened in pending.items()}


@contextlib.contextmanager
def _orbax() -> Iterator[Any]:
    """Gives an Orbax for folders that only this process uses: in a distributed training it would wait for the others.

    What it logs is dropped: what matters of it is in our errors.
    """
    import orbax.checkpoint as ocp

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


def _check_fits(stored: dict[str, Any], like: dict[str, Any]) -> None:
    """Raises ValueError unless the same arrays are there, of types that are switched on (float64 may not be)."""
    differing = []
    for name in sorted(stored.keys() | like):
        there, here = stored.get(name), like.get(name)
        if there is None or here is None or there.shape != here.shape or not _is_switched_on(there.dtype.numpy_dtype):
            differing.append(f"{name} is {_shown(there)} there, {_shown(here)} here")
    if differing:
        raise ValueError(f"{differing[0]}, and {len(differing) - 1} more differ")


def _check_empty(stored: set[str], like: Tree) -> None:
    """Raises ValueError unless the same parts are there without arrays."""
    nodes = jax.tree_util.tree_leaves_with_path(like, is_leaf=_is_empty)
    here = {_name(path) for path, node in nodes if _is_empty(node)}
    if differing := sorted(stored ^ here):
        raise ValueError(f"{differing[0]} is empty {'there' if differing[0] in stored else 'here'} only")


def _is_empty(node: Any) -> bool:
    return node is None or (isinstance(node, dict | list | tuple) and not node)


def _is_switched_on(dtype: np.dtype) -> bool:
    return jax.dtypes.canonicalize_dtype(dtype) == dtype


def _shown(leaf: Any) -> str:
    if leaf is None:
        return "missing"
    return f"{getattr(leaf.dtype, 'name', leaf.dtype)} {list(leaf.shape)}"


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
