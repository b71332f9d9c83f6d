"""LoRA adapters as a PEFT adapter folder: `PeftModel.from_pretrained(pipe.unet, folder)` reads it.

UNet3DConditionModel has no PEFT mixin, so `pipe.load_lora_weights` does not (diffusers 0.42.1).
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vpo_jax.checkpoints.safetensors_io import write_weights
from vpo_jax.models.lora import LoRAConfig
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.trees import flatten


def write_adapter(path: str | Path, adapters: Mapping[str, Any], lora: LoRAConfig, base: str) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`, in float32.

    Args:
        path: the folder to make.
        adapters: tree with `lora_A` [..., in, r] and `lora_B` [r, out].
        lora: what they were made with; the scale is alpha / rank, as PEFT's.
        base: name or path of the model that they belong to.

    Raises:
        UserError: the name is taken, or the disk refuses.
    """
    path = Path(path).resolve()
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not (path / "adapter_config.json").exists())):
        raise UserError(f"--output: {path} is there already and is no adapter folder; choose another one")
    tensors, modules = {}, []
    for name, leaf in flatten(adapters).items():
        module, _, which = name.rpartition("/")
        dotted = module.replace("/", ".")
        tensors[f"base_model.model.{dotted}.{which}.weight"] = _to_torch(np.asarray(leaf, np.float32), adapters, name)
        if which == "lora_A":
            modules.append(dotted)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": sorted(modules),
    }
    partial = path.with_name(f".{path.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_weights(partial, "adapter_model", tensors)
        (partial / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    except OSError as error:
        raise UserError(f"--output: {path} cannot be written ({error}); free space or choose another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _to_torch(leaf: np.ndarray, adapters: Mapping[str, Any], name: str) -> np.ndarray:
    if name.endswith("lora_A"):
        # [window..., in, r] -> [r, in, window...]
        window = range(leaf.ndim - 2)
        return np.ascontiguousarray(leaf.transpose(leaf.ndim - 1, leaf.ndim - 2, *window))
    # PEFT's B of a convolution is a convolution of window 1.
    window_rank = flatten(adapters)[name.removesuffix("lora_B") + "lora_A"].ndim - 2
    return np.ascontiguousarray(leaf.T).reshape(*leaf.T.shape, *(1,) * window_rank)
