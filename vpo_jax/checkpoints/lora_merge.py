"""LoRA adapters added into the weights that they belong to: W + scale * B A, once, when a model is loaded."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vpo_jax.checkpoints.adapter_config import refuse_unusual
from vpo_jax.checkpoints.peft import PREFIX
from vpo_jax.runtime.errors import UserError

_LARGEST = 1e6  # rank or alpha; a larger one is damage
# PEFT's files leave out the adapter's name; a state dict of a wrapped model has it.
_DOWN = re.compile(r"\.lora_A(\.default)?\.weight$")


def adapter_scale(config: Mapping[str, Any], where: str) -> float:
    """alpha / r, or alpha / sqrt(r) with rank stabilisation (arXiv 2312.03732), of a parsed adapter_config.json.

    Modules that were saved beside the adapter are tensors of their own, and are the caller's.

    Raises:
        UserError: no plain LoRA, or no rank and alpha in it.
    """
    refuse_unusual(config, where, ("use_rslora", "modules_to_save"))
    numbers = {}
    for name in ("r", "lora_alpha"):
        value = config.get(name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= _LARGEST:
            raise UserError(f"{where}: {name} must be a number above zero, found {value!r:.60}; copy the file again")
        numbers[name] = float(value)
    return numbers["lora_alpha"] / numbers["r"] ** (0.5 if config.get("use_rslora") else 1.0)


def unwrapped(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same tensors under the names that they have without PEFT around the model."""
    return {key.removeprefix(PREFIX).replace(".base_layer.", "."): array for key, array in state.items()}


def merge_lora(state: Mapping[str, np.ndarray], scale: float, where: str) -> dict[str, np.ndarray]:
    """`state` without its `lora_A` and `lora_B`, which are added to the weights of their modules.

    Sums are in float32, and the result is in the weight's own dtype. What is no adapter of a Linear stays as it is.

    Args:
        state: torch key -> array, as `unwrapped` names them.
        scale: of `adapter_scale`.
        where: file or folder, for the error messages.

    Raises:
        UserError: half of an adapter, or one without a weight of its size.
    """
    merged = dict(state)
    for key in [key for key in state if _DOWN.search(key)]:
        module = _DOWN.sub("", key)
        other, weight = key.replace(".lora_A", ".lora_B"), f"{module}.weight"
        for name in (other, weight):
            if name not in state:
                raise UserError(f"{where}: {name} is missing, which {key} belongs to; use the adapter of this model")
        down, up, whole = (np.asarray(state[name]) for name in (key, other, weight))
        if down.ndim != 2 or up.ndim != 2 or (*up.shape[:1], *down.shape[1:]) != whole.shape:
            raise UserError(
                f"{where}: {key} {list(down.shape)} and its lora_B {list(up.shape)} do not fit {weight} "
                f"{list(whole.shape)}; use the adapter of this model"
            )
        change = up.astype(np.float32) @ down.astype(np.float32)
        merged[weight] = (whole.astype(np.float32) + np.float32(scale) * change).astype(whole.dtype)
        del merged[key], merged[other]
    return merged
