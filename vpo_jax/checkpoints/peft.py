"""LoRA adapters as a PEFT adapter folder: `PeftModel.from_pretrained(module, folder)` reads it."""

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vpo_jax.checkpoints.adapter_config import refuse_unusual
from vpo_jax.checkpoints.keys import compare_names
from vpo_jax.checkpoints.lora_layouts import CONFIG, find_lora_file, read_lora_file
from vpo_jax.checkpoints.safetensors_io import read_json, write_weights
from vpo_jax.checkpoints.untrusted import open_folder
from vpo_jax.models.lora import LoRAConfig
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.paths import user_path
from vpo_jax.runtime.trees import flatten, is_stacked, layer_paths, stack_layers, unflatten, unstack_layers

PREFIX = "base_model.model."


def read_adapter(path: str | Path, shapes: Mapping[str, Any], lora: LoRAConfig) -> dict[str, Any]:
    """The adapters of a folder or file, float32, where they are of the rank, alpha and layers that a run is to train.

    Args:
        path: a PEFT folder (adapter_config.json, adapter_model.safetensors), or a LoRA's safetensors as diffusers or
            kohya's scripts write it, or a folder with one such file; see `lora_layouts`.
        shapes: tree of the run's own adapters (arrays or ShapeDtypeStruct), `lora_A` [..., in, r], `lora_B` [r, out].
        lora: the run's rank and alpha.

    Raises:
        UserError: no such folder, a pickle, another kind of adapter, or one of another rank, alpha or other layers;
            what of a file cannot be mapped is named.
    """
    path = open_folder(path, "lora.path")
    wanted = _shapes_by_layer(shapes)
    modules = {name.rpartition("/")[0].replace("/", "."): name.rpartition("/")[0] for name in wanted}
    file, has_config = find_lora_file(path, "lora.path")
    if has_config:
        _check_config(read_json(path / CONFIG), lora, path / CONFIG)
    tensors, alphas = read_lora_file(file, modules, "lora.path")
    if has_config and alphas:
        raise UserError(f"lora.path: {file}: has alphas beside {CONFIG}; keep one of them")
    if not has_config:
        _check_factors(tensors, alphas, modules, lora, file)
    keys = {f"{dotted}/{which}": f"{at}/{which}" for dotted, at in modules.items() for which in ("lora_A", "lora_B")}
    compare_names(set(keys), set(tensors), f"lora.path: {file}", "lora.targets", "name there the layers that it adapts")
    adapters = {}
    for key, name in keys.items():
        array = _to_flax(tensors[key].astype(np.float32), len(wanted[name]) if key.endswith("lora_A") else 2)
        if array.shape != wanted[name]:
            raise UserError(f"lora.path: {file}: {key} does not fit this model's layer; use an adapter of this model")
        if not np.isfinite(array).all():
            raise UserError(f"lora.path: {file}: {key} holds NaN or infinite values; use an undamaged copy")
        adapters[name] = np.ascontiguousarray(array)
    return stack_layers(unflatten(adapters), shapes)


def _shapes_by_layer(shapes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    wanted: dict[str, tuple[int, ...]] = {}
    for name, leaf in flatten(shapes).items():
        if is_stacked(name):
            wanted |= dict.fromkeys(layer_paths(name, leaf.shape[0]), tuple(leaf.shape[1:]))
        else:
            wanted[name] = tuple(leaf.shape)
    return wanted


def _to_flax(array: np.ndarray, rank: int) -> np.ndarray:
    """[r, in, window...] -> [window..., in, r]; a window of 1 that the layer does not have is taken off."""
    if array.ndim > rank and array.shape[rank:] == (1,) * (array.ndim - rank):
        array = array.reshape(array.shape[:rank])
    return array.transpose(*range(2, array.ndim), 1, 0) if array.ndim >= 2 else array


def _check_factors(
    tensors: Mapping[str, np.ndarray],
    alphas: Mapping[str, float],
    modules: Collection[str],
    lora: LoRAConfig,
    file: Path,
) -> None:
    """Of a file without a config: one rank, one scale, the run's. Without alpha the scale is 1, as its writers say."""
    for module in modules:
        factor = tensors.get(f"{module}/lora_A")
        if factor is None or not factor.ndim:
            continue  # named with the other missing ones
        rank = factor.shape[0]
        alpha = alphas.get(module, alphas.get("", float(rank)))
        for name, ours, theirs in (("rank", lora.rank, rank), ("alpha", lora.alpha, alpha)):
            if ours != theirs:
                raise UserError(
                    f"lora.path: {file}: {module} has {name} {theirs:g}, but lora.{name} is {ours:g}; "
                    f"give --config.lora.{name}={theirs:g}"
                )


def _check_config(config: Mapping[str, Any], lora: LoRAConfig, file: Path) -> None:
    refuse_unusual(config, f"lora.path: {file}")
    for field, ours, name in (("r", lora.rank, "rank"), ("lora_alpha", lora.alpha, "alpha")):
        if config.get(field) != ours:
            raise UserError(
                f"lora.path: {file}: {field} is {config.get(field)!r}, but lora.{name} is {ours:g}; "
                f"give --config.lora.{name}={config.get(field)}"
            )


def check_adapter_target(path: Path) -> None:
    """Raises UserError for what `write_adapter` would not write over; writes nothing."""
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not (path / "adapter_config.json").exists())):
        raise UserError(f"--output: {path} is there already and is no adapter folder; choose another one")


def write_adapter(path: str | Path, adapters: Mapping[str, Any], lora: LoRAConfig, base: str) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`, in float32.

    Args:
        path: the folder to make.
        adapters: tree with `lora_A` [..., in, r] and `lora_B` [r, out], as `init_lora` makes.
        lora: what they were made with; the scale is alpha / rank, as PEFT's.
        base: name or path of the model that they belong to.

    Raises:
        UserError: the name is taken, or the disk refuses.
    """
    path = user_path(path, "--output").resolve()
    check_adapter_target(path)
    tensors, modules = {}, []
    adapters = unstack_layers(adapters)
    for name, leaf in flatten(adapters).items():
        module, _, which = name.rpartition("/")
        dotted = module.replace("/", ".")
        tensors[f"{PREFIX}{dotted}.{which}.weight"] = _to_torch(np.asarray(leaf, np.float32), adapters, name)
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
        shutil.move(partial, path)
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
