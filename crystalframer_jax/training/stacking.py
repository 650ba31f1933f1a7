"""Equal blocks of a model as one with a first axis: a training step of fewer arrays, which compiles sooner."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from crystalframer_jax.config import TrainConfig
from crystalframer_jax.parallel.devices import Tree, on_one_device


def stacked(tree: Tree, config: TrainConfig) -> Tree:
    """Takes "block_i" of every dict within a tree, and gives those of the same place in each period as "blocks_PLACE".

    Their arrays get a first axis of turns, in numpy; the others stay what they are. So do all if some layers are
    frozen, or each block has settings of its own.
    """
    blocks, period = config.num_layers, config.model.period_of_blocks
    if config.frozen_layers or period == blocks:
        return tree

    def of(found: dict[str, Tree]) -> dict[str, Tree]:
        places = [[found[f"block_{number}"] for number in range(place, blocks, period)] for place in range(period)]
        return {f"blocks_{place}": jax.tree.map(_stack, *turns) for place, turns in enumerate(places)}

    return _in_dicts(tree, "block_", of)


def separate(tree: Tree, config: TrainConfig) -> Tree:
    """Undoes `stacked`."""
    period = config.model.period_of_blocks

    def of(found: dict[str, Tree]) -> dict[str, Tree]:
        turns = [divmod(number, period) for number in range(config.num_layers)]
        return {f"block_{i}": _turn(found[f"blocks_{place}"], turn) for i, (turn, place) in enumerate(turns)}

    return _in_dicts(tree, "blocks_", of)


def _in_dicts(tree: Tree, prefix: str, change: Callable[[dict[str, Tree]], dict[str, Tree]]) -> Tree:
    """Gives every dict within a tree, for what begins with `prefix`, what `change` makes of it."""

    def has_blocks(x: Any) -> bool:
        return isinstance(x, dict) and f"{prefix}0" in x

    def changed(x: Any) -> Any:
        if not has_blocks(x):
            return x
        found = {name: value for name, value in x.items() if name.startswith(prefix)}
        return {name: value for name, value in x.items() if name not in found} | change(found)

    return jax.tree.map(changed, tree, is_leaf=has_blocks)


def _stack(*arrays: jax.Array) -> np.ndarray:
    return np.stack([np.asarray(x) for x in on_one_device(arrays)])


def _turn(tree: Tree, turn: int) -> Tree:
    """Copies what one turn has of stacked arrays."""
    return jax.tree.map(lambda x: np.array(x[turn]), on_one_device(tree))
