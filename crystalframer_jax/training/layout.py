"""The state of a training as its steps take it: in fewer arrays, which compile sooner."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from crystalframer_jax.config import TrainConfig
from crystalframer_jax.parallel.devices import Tree, on_one_device
from crystalframer_jax.training.state import TrainState


def for_steps(state: TrainState, config: TrainConfig) -> tuple[TrainState, Callable[[TrainState], TrainState]]:
    """Lays out a state for training steps; returns it, and the function that gives such a state its own layout again.

    Equal blocks are one with a first axis (see `stacked`); moments of Adam and averages of the weights are a vector
    each, of all arrays in their order. What is changed is in numpy, the other arrays are the same.
    """
    together = stacked(state, config)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), together)

    def undo(state: TrainState) -> TrainState:
        return separate(_in_vectors(state, shapes, _from_vector), config)

    return _in_vectors(together, shapes, _vector), undo


def _in_vectors(state: TrainState, shapes: TrainState, change: Callable[[Tree, Tree], Tree]) -> TrainState:
    """Gives moments and averages what `change` makes of them and of the trees of their shapes."""

    def is_adam(x: Any) -> bool:
        return isinstance(x, optax.ScaleByAdamState)

    def of(x: Any, like: Any) -> Any:
        return x._replace(mu=change(x.mu, like.mu), nu=change(x.nu, like.nu)) if is_adam(x) else x

    return dataclasses.replace(
        state,
        opt_state=jax.tree.map(of, state.opt_state, shapes.opt_state, is_leaf=is_adam),
        swa_params=change(state.swa_params, shapes.swa_params),
        ema_params=change(state.ema_params, shapes.ema_params),
    )


def _vector(tree: Tree, like: Tree) -> Tree:
    """All arrays of a tree in one, in the order of `ravel_pytree`; a tree without any stays what it is."""
    leaves = jax.tree.leaves(on_one_device(tree))
    return np.concatenate([np.ravel(x) for x in leaves]) if leaves else tree


def _from_vector(vector: Tree, like: Tree) -> Tree:
    shapes, structure = jax.tree.flatten(like)
    if not shapes:
        return vector
    ends = np.cumsum([np.prod(x.shape, dtype=int) for x in shapes])
    parts = np.split(np.array(on_one_device(vector)), ends[:-1])
    return jax.tree.unflatten(structure, [part.reshape(x.shape) for part, x in zip(parts, shapes, strict=True)])


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
