"""LoRA adapters as one file of weights: diffusers' names, or those of the model's original code, as ComfyUI reads.

alpha / rank is multiplied into `lora_B`. A loader that reads no alpha then takes the scale 1, and that is exact.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vpo_jax.checkpoints.lora_layouts import CONFIG, DIFFUSERS_WEIGHTS, METADATA, NameTable, original_name
from vpo_jax.checkpoints.safetensors_io import write_file
from vpo_jax.models.lora import LoRAConfig
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.trees import flatten, unstack_layers

PEFT, DIFFUSERS, ORIGINAL = FORMS = ("peft", "diffusers", "original")

_DIFFUSERS_PREFIX = "transformer"
_ORIGINAL_PREFIX = "diffusion_model"
_CARD = "README.md"
_SECOND = re.compile(r"_\d+$")


def weights_name(component: str = "") -> str:
    """The file of a component's adapters: "pytorch_lora_weights.safetensors", of "transformer_2" with "_2" in it."""
    found = _SECOND.search(component)
    return DIFFUSERS_WEIGHTS.replace(".", f"{found[0]}.", 1) if found else DIFFUSERS_WEIGHTS


def torch_factors(adapters: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The factors in PyTorch's layout and float32, one for each layer: "blocks.0.attn1.to_q.lora_A" -> [r, in, ...].

    Args:
        adapters: tree with `lora_A` [..., in, r] and `lora_B` [r, out], as `init_lora` makes.
    """
    flat = flatten(unstack_layers(adapters))
    factors = {}
    for path, leaf in flat.items():
        array = np.asarray(leaf, np.float32)
        if path.endswith("lora_A"):
            window = range(array.ndim - 2)
            array = array.transpose(array.ndim - 1, array.ndim - 2, *window)  # [window..., in, r] -> [r, in, window...]
        else:
            # PEFT's B of a convolution is a convolution of window 1.
            window_rank = flat[path.removesuffix("lora_B") + "lora_A"].ndim - 2
            array = array.T.reshape(*array.T.shape, *(1,) * window_rank)
        factors[path.replace("/", ".")] = np.ascontiguousarray(array)
    return factors


def write_lora_file(
    file: Path, factors: Mapping[str, np.ndarray], lora: LoRAConfig, form: str, names: NameTable = ()
) -> None:
    """Writes the factors of one component with alpha / rank in `lora_B`.

    Args:
        file: safetensors to make.
        factors: of `torch_factors`.
        lora: what they were made with.
        form: DIFFUSERS or ORIGINAL.
        names: the modules' original names; read for ORIGINAL.

    Raises:
        UserError: a module that has no original name.
        OSError: the disk refuses.
    """
    tensors, modules = {}, []
    for key, array in factors.items():
        module, _, which = key.rpartition(".")
        if which == "lora_B":
            array = np.float32(lora.scale) * array
            modules.append(module)
        tensors[f"{_written_name(module, form, names)}.{which}.weight"] = array
    # diffusers reads rank, alpha and modules here, and nowhere else; without it, alpha is the rank.
    config = {"r": lora.rank, "lora_alpha": lora.rank, "target_modules": sorted(modules)}
    adapter = {f"{_DIFFUSERS_PREFIX}.{field}": value for field, value in config.items()}
    write_file(file, tensors, {METADATA: json.dumps(adapter, sort_keys=True)} if form == DIFFUSERS else {})


def _written_name(module: str, form: str, names: NameTable) -> str:
    if form == DIFFUSERS:
        return f"{_DIFFUSERS_PREFIX}.{module}"
    original = original_name(module, names)
    if original is None:
        raise UserError(
            f"--lora_format: {module} has no name in the original code; choose --lora_format={DIFFUSERS}, or leave the "
            "layer out of lora.targets"
        )
    return f"{_ORIGINAL_PREFIX}.{original}"


def is_adapter_folder(path: Path) -> bool:
    """Whether a folder holds an adapter in one of the forms, so that another one may take its place.

    Training scripts put a LoRA's file beside checkpoints, so a folder of such files must hold nothing else.
    """
    if (path / CONFIG).is_file():
        return True
    entries = [entry for entry in path.iterdir() if entry.name != _CARD]
    return bool(entries) and all(_is_ours(entry) for entry in entries)


def _is_ours(entry: Path) -> bool:
    if entry.is_dir():
        return _SECOND.sub("", entry.name) == _DIFFUSERS_PREFIX and (entry / CONFIG).is_file()
    return entry.name == weights_name(entry.stem)
