"""Low-rank adapters (LoRA, arXiv 2106.09685) as a tree of their own beside frozen parameters."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np

from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.stored import Stored
from vpo_jax.runtime.trees import flatten, is_stacked, unflatten
from vpo_jax.runtime.types import Tree

# Projections of an attention layer, by diffusers' names.
ATTENTION_TARGETS = (r"\.to_q$", r"\.to_k$", r"\.to_v$", r"\.to_out\.0$")


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Which layers get an adapter and how large.

    Attributes:
      rank: inner size r.
      alpha: the adapter's output is scaled by alpha / rank.
      targets: regular expressions, searched in a module's dotted PyTorch name.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ATTENTION_TARGETS

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


def init_lora(key: jax.Array, params: Tree, config: LoRAConfig) -> Tree:
    """Fresh adapters for every kernel whose module matches a target: A uniform, B zero, so the model is unchanged.

    Args:
      key: random key; each adapter's A depends on it and on the order of names only.
      params: the frozen tree; kernels are [..., in, out]. Stacked layers ("blocks.*") match together or not at all.
      config: rank and targets.

    Returns:
      Tree of the same nesting with `lora_A` [..., in, r] and `lora_B` [r, out] in float32; of stacked layers
      [layers, in, r] and [layers, r, out].

    Raises:
      UserError: no module matches.
    """
    adapters: dict[str, jax.Array] = {}
    for path, kernel in sorted(flatten(params).items()):
        module, _, leaf = path.rpartition("/")
        dotted = "." + module.replace("/", ".")
        if leaf != "kernel" or not any(re.search(pattern, dotted) for pattern in config.targets):
            continue
        *rest, fan_in, features = kernel.shape
        stack, window = (rest[:1], rest[1:]) if is_stacked(path) else ([], rest)
        bound = math.prod((*window, fan_in)) ** -0.5
        draw = jax.random.fold_in(key, len(adapters))
        shape = (*stack, *window, fan_in, config.rank)
        adapters[f"{module}/lora_A"] = jax.random.uniform(draw, shape, jnp.float32, -bound, bound)
        adapters[f"{module}/lora_B"] = jnp.zeros((*stack, config.rank, features), jnp.float32)
    if not adapters:
        stacked = " (blocks that are alike have one name, blocks.*)" if any(map(is_stacked, flatten(params))) else ""
        raise UserError(
            f"lora.targets: no layer matches any of {list(config.targets)}; the names are PyTorch's{stacked}"
        )
    return unflatten(adapters)


def merge_lora(params: Tree, adapters: Tree, scale: float) -> Tree:
    """Parameters with the adapters merged: kernel + scale * A B, computed in float32, kept in the kernel's dtype.

    Kernels on disk stay there, and are merged on the host whenever they are read.
    """
    merged = dict(flatten(params))
    flat = flatten(adapters)
    for path, down in flat.items():
        module, _, leaf = path.rpartition("/")
        if leaf == "lora_A":
            kernel, up = merged[f"{module}/kernel"], flat[f"{module}/lora_B"]
            if isinstance(kernel, Stored):
                merged[f"{module}/kernel"] = _merge_stored(kernel, np.asarray(down), np.asarray(up), scale)
                continue
            product = down @ up
            merged[f"{module}/kernel"] = (kernel.astype(jnp.float32) + scale * product).astype(kernel.dtype)
    return unflatten(merged)


def _merge_stored(kernel: Stored, down: np.ndarray, up: np.ndarray, scale: float) -> Stored:
    def merge(number: int, layer: np.ndarray) -> np.ndarray:
        product = down[number] @ up[number] if kernel.stacked else down @ up
        return (layer.astype(np.float32) + scale * product).astype(layer.dtype)

    return kernel.map(merge)
