"""LoRA adapters on disk: read in every layout that is in use, written as PEFT's folder or as one file of weights."""

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vpo_jax.checkpoints.adapter_config import refuse_unusual
from vpo_jax.checkpoints.keys import compare_names
from vpo_jax.checkpoints.lora_files import PEFT, is_adapter_folder, torch_factors, weights_name, write_lora_file
from vpo_jax.checkpoints.lora_layouts import CONFIG, NameTable, find_lora_file, read_lora_file
from vpo_jax.checkpoints.safetensors_io import read_json, write_weights
from vpo_jax.checkpoints.untrusted import open_folder
from vpo_jax.models.lora import LoRAConfig
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.paths import user_path
from vpo_jax.runtime.trees import flatten, is_stacked, layer_paths, stack_layers, unflatten

PREFIX = "base_model.model."


def read_adapter(
    path: str | Path,
    shapes: Mapping[str, Any],
    lora: LoRAConfig,
    names: NameTable = (),
    components: Sequence[str] = (),
) -> dict[str, Any]:
    """The adapters of a folder or file, float32, where they are of the rank, alpha and layers that a run is to train.

    Args:
        path: a PEFT folder (adapter_config.json, adapter_model.safetensors), or a LoRA's safetensors in one of the
            layouts of `lora_layouts`, or a folder with one such file. For several components a folder that has one of
            each: `weights_name(component)`, or a PEFT folder of the component's name.
        shapes: tree of the run's own adapters (arrays or ShapeDtypeStruct), `lora_A` [..., in, r], `lora_B` [r, out].
        lora: the run's rank and alpha.
        names: the modules' names in the model's original code.
        components: top level of `shapes` where it is a dict by component ("transformer", "transformer_2").

    Raises:
        UserError: no such folder, a pickle, another kind of adapter, or one of another rank, alpha or other layers;
            what of a file cannot be mapped is named.
    """
    path = open_folder(path, "lora.path")
    if components:
        return {name: _read(_of_component(path, name), shapes[name], lora, names) for name in components}
    if (second := path / weights_name("_2")).is_file():
        raise UserError(f"lora.path: {second}: this model trains one transformer; give one of the two files")
    return _read(path, shapes, lora, names)


def _of_component(path: Path, component: str) -> Path:
    """The PEFT folder or the file of one of several components."""
    folder, file = path / component, path / weights_name(component)
    if not (folder / CONFIG).is_file() and not file.is_file():
        raise UserError(
            f"lora.path: {file} is not there; give a folder in which the adapter of {component} has that name"
        )
    return folder if (folder / CONFIG).is_file() else file


def _read(path: Path, shapes: Mapping[str, Any], lora: LoRAConfig, names: NameTable) -> dict[str, Any]:
    wanted = _shapes_by_layer(shapes)
    modules = {name.rpartition("/")[0].replace("/", "."): name.rpartition("/")[0] for name in wanted}
    file, has_config = find_lora_file(path, "lora.path")
    if has_config:
        _check_config(read_json(path / CONFIG), lora, path / CONFIG)
    tensors, alphas = read_lora_file(file, modules, "lora.path", names)
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
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not is_adapter_folder(path))):
        raise UserError(f"--output: {path} is there already and is no adapter folder; choose another one")


def write_adapter(
    path: str | Path,
    adapters: Mapping[str, Any],
    lora: LoRAConfig,
    base: str,
    form: str = PEFT,
    names: NameTable = (),
    components: Sequence[str] = (),
) -> None:
    """Writes adapters in float32: a PEFT folder with alpha beside the factors, or a file with alpha / rank in `lora_B`.

    Args:
        path: the folder to make.
        adapters: tree with `lora_A` [..., in, r] and `lora_B` [r, out], as `init_lora` makes.
        lora: what they were made with; the scale is alpha / rank, as PEFT's.
        base: name or path of the model that they belong to.
        form: one of `lora_files.FORMS`.
        names: the modules' names in the model's original code; read for that form.
        components: top level of `adapters` where it is a dict by component. Each gets a file or a PEFT folder.

    Raises:
        UserError: the name is taken, a module has no original name, or the disk refuses.
    """
    path = user_path(path, "--output").resolve()
    check_adapter_target(path)
    parts = {name: adapters[name] for name in components} or {"": adapters}
    partial = path.with_name(f".{path.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, part in parts.items():
            if form == PEFT:
                _write_peft(partial / name, torch_factors(part), lora, base)
            else:
                write_lora_file(partial / weights_name(name), torch_factors(part), lora, form, names)
        shutil.rmtree(path, ignore_errors=True)
        shutil.move(partial, path)
    except OSError as error:
        raise UserError(f"--output: {path} cannot be written ({error}); free space or choose another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_peft(folder: Path, factors: Mapping[str, np.ndarray], lora: LoRAConfig, base: str) -> None:
    """`adapter_config.json` and `adapter_model.safetensors`: `PeftModel.from_pretrained(module, folder)` reads them."""
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
        "target_modules": sorted(key.removesuffix(".lora_A") for key in factors if key.endswith(".lora_A")),
    }
    folder.mkdir(exist_ok=True)
    write_weights(folder, "adapter_model", {f"{PREFIX}{key}.weight": array for key, array in factors.items()})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
