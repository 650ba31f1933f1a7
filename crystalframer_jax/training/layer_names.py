"""Layers named in a configuration: "embedding,block_0/attention" are paths in the tree of parameters."""

import jax

from crystalframer_jax.config import ConfigError
from crystalframer_jax.parallel.devices import Tree


def layer_mask(params: Tree, layers: str, key: str) -> Tree:
    """Makes a tree like `params`: whether a parameter belongs to one of the layers, separated by commas.

    Raises ConfigError about the hyperparameter `key` if a name is no layer.
    """
    names = [name.strip().strip("/") for name in layers.split(",") if name.strip()]
    paths = jax.tree.map_with_path(lambda path, _: "/".join(entry.key for entry in path), params)
    for name in names:
        if not any(_is_within(path, name) for path in jax.tree.leaves(paths)):
            raise ConfigError(f"{key}: there is no layer {name!r}; there are {', '.join(params)} and what is in them")
    return jax.tree.map(lambda path: any(_is_within(path, name) for name in names), paths)


def _is_within(path: str, name: str) -> bool:
    return f"{path}/".startswith(f"{name}/")


def count_parameters(params: Tree, frozen_layers: str = "") -> int:
    """Counts the trainable parameters."""
    is_frozen = layer_mask(params, frozen_layers, "frozen_layers")
    sizes = jax.tree.map(lambda leaf, frozen: 0 if frozen else leaf.size, params, is_frozen)
    return sum(jax.tree.leaves(sizes))
