"""Small pure helpers for pytrees of arrays."""

from collections.abc import Mapping
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


def count(tree: Tree) -> int:
    """Number of scalars in the tree."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def bytes_of(tree: Tree) -> int:
    """Bytes that the tree's arrays take."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def cast_floating(tree: Tree, dtype: DType) -> Tree:
    """Floating leaves cast to `dtype`; the others as they are."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def select(predicate: jax.Array, new: Tree, old: Tree) -> Tree:
    """`new` where the scalar predicate holds, else `old`, bitwise."""
    return jax.tree.map(lambda a, b: jnp.where(predicate, a, b), new, old)
