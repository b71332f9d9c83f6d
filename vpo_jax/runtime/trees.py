"""Small pure helpers for pytrees of arrays."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vpo_jax.runtime.types import DType, Tree


def path_of(keypath: tuple[Any, ...]) -> str:
    """A jax key path as "a/b/c"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in keypath)


def flatten(tree: Tree) -> dict[str, Any]:
    """Leaves by their path, "a/b/c" -> leaf, in the tree's own order."""
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts from {"a/b/c": leaf}; the inverse of `flatten` for trees of dicts."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree


def is_stacked(path: str) -> bool:
    """Whether a path goes through layers that are stacked: "blocks.*/a/b", whose leaves are [layers, ...]."""
    return ".*/" in path


def layer_paths(path: str, layers: int) -> list[str]:
    """The path of each layer of a stacked one: "blocks.*/a" gives "blocks.0/a", "blocks.1/a", ..."""
    return [path.replace(".*/", f".{i}/", 1) for i in range(layers)]


def unstack_layers(tree: Tree) -> dict[str, Any]:
    """The tree with a subtree for each layer in place of stacked ones; leaves are numpy arrays."""
    flat: dict[str, Any] = {}
    for path, leaf in flatten(tree).items():
        if is_stacked(path):
            flat |= zip(layer_paths(path, leaf.shape[0]), np.asarray(leaf), strict=True)
        else:
            flat[path] = np.asarray(leaf)
    return unflatten(flat)


def stack_layers(tree: Tree, like: Tree) -> dict[str, Any]:
    """The inverse of `unstack_layers`; `like` has the paths and shapes of the result."""
    flat = flatten(tree)
    return unflatten(
        {
            path: np.stack([flat[layer] for layer in layer_paths(path, leaf.shape[0])])
            if is_stacked(path)
            else flat[path]
            for path, leaf in flatten(like).items()
        }
    )


def count(tree: Tree) -> int:
    """Number of scalars in the tree."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def bytes_of(tree: Tree) -> int:
    """Bytes that the tree's arrays take."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def cast_floating(tree: Tree, dtype: DType, but: Sequence[str] = ()) -> Tree:
    """Floating leaves cast to `dtype`, except where a pattern of `but` is found in the path; the others as they are."""

    def cast(keypath: tuple[Any, ...], x: Any) -> Any:
        kept = not jnp.issubdtype(x.dtype, jnp.floating) or matches(path_of(keypath), but)
        return x if kept else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, tree)


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Whether one of the regular expressions is found in a path "a/b/c"."""
    return any(re.search(pattern, path) for pattern in patterns)


def select(predicate: jax.Array, new: Tree, old: Tree) -> Tree:
    """`new` where the scalar predicate holds, else `old`, bitwise."""
    return jax.tree.map(lambda a, b: jnp.where(predicate, a, b), new, old)
