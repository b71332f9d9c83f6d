"""LoRA adapters as a PEFT adapter folder: `PeftModel.from_pretrained(module, folder)` reads it."""

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vpo_jax.checkpoints.keys import compare_names
from vpo_jax.checkpoints.safetensors_io import PICKLES, read_file, read_json, refuse_pickle, write_weights
from vpo_jax.models.lora import LoRAConfig
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.trees import flatten, unflatten

PREFIX = "base_model.model."
# Fields of PEFT that change what an adapter computes, with the only value that is honoured.
_PLAIN = {"use_dora": False, "use_rslora": False, "fan_in_fan_out": False, "bias": "none", "lora_bias": False}
_EMPTY = ("rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication")


def read_adapter(path: str | Path, shapes: Mapping[str, Any], lora: LoRAConfig) -> dict[str, Any]:
    """The adapters of a PEFT folder, float32, where they are of the rank, alpha and layers that a run is to train.

    Args:
        path: holds adapter_config.json and adapter_model.safetensors.
        shapes: tree of the run's own adapters (arrays or ShapeDtypeStruct), `lora_A` [..., in, r], `lora_B` [r, out].
        lora: the run's rank and alpha.

    Raises:
        UserError: no such folder, a pickle, another kind of adapter, or one of another rank, alpha or other layers.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"lora.path: there is no folder {path}; give a PEFT adapter folder")
    config = read_json(path / "adapter_config.json")
    _check_config(config, lora, path / "adapter_config.json")
    file = path / "adapter_model.safetensors"
    if not file.is_file():
        for pickle in sorted(p for p in path.iterdir() if p.suffix in PICKLES):
            raise refuse_pickle(pickle)
        raise UserError(f"lora.path: {file} is not there; copy the adapter folder again")
    found = {key.removeprefix(PREFIX): array for key, array in read_file(file).items()}
    wanted = {f"{name.replace('/', '.')}.weight": (name, leaf.shape) for name, leaf in flatten(shapes).items()}
    compare_names(set(wanted), set(found), f"lora.path: {file}", "lora.targets", "name there the layers that it adapts")
    adapters = {}
    for key, (name, shape) in wanted.items():
        array = found[key].astype(np.float32)
        if name.endswith("lora_A"):
            array = array.transpose(*range(2, array.ndim), 1, 0)
        else:
            array = array.reshape(array.shape[:2]).T
        if array.shape != tuple(shape):
            raise UserError(f"lora.path: {file}: {key} does not fit this model's layer; use an adapter of this model")
        if not np.isfinite(array).all():
            raise UserError(f"lora.path: {file}: {key} holds NaN or infinite values; use an undamaged copy")
        adapters[name] = np.ascontiguousarray(array)
    return unflatten(adapters)


def refuse_unusual(config: Mapping[str, Any], where: str, honoured: Collection[str] = ()) -> None:
    """Raises UserError, beginning with `where`, for an adapter that is no plain LoRA.

    Args:
        config: parsed adapter_config.json.
        where: file, for the error message.
        honoured: fields that the caller sees to itself.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{where}: peft_type is {kind!r}; only LORA can be read")
    odd = [field for field, plain in _PLAIN.items() if config.get(field) not in (None, plain)]
    for field in odd + [field for field in _EMPTY if config.get(field)]:
        if field not in honoured:
            raise UserError(f"{where}: {field}={config[field]!r} is not supported; merge it into the base")


def _check_config(config: Mapping[str, Any], lora: LoRAConfig, file: Path) -> None:
    refuse_unusual(config, f"lora.path: {file}")
    for field, ours, name in (("r", lora.rank, "rank"), ("lora_alpha", lora.alpha, "alpha")):
        if config.get(field) != ours:
            raise UserError(
                f"lora.path: {file}: {field} is {config.get(field)!r}, but lora.{name} is {ours:g}; "
                f"give --config.lora.{name}={config.get(field)}"
            )


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
