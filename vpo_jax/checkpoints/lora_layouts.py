"""Files of LoRA weights in the layouts that are in use, under one set of names.

| written by | module | factors | scale |
| --- | --- | --- | --- |
| PEFT | `base_model.model.a.b` | `lora_A`, `lora_B` | adapter_config.json |
| diffusers | `unet.a.b`, `transformer.a.b` | `lora_A`, `lora_B`; older: `lora.down`, `lora.up`, `processor.to_q_lora.down` | `alpha` or the file's metadata; else 1 |
| kohya | `lora_unet_a_b` | `lora_down`, `lora_up` | `alpha`; else 1 |
| ComfyUI, original code | `diffusion_model.x.y`, `x.y` | `lora_A`, `lora_B`; `lora_down`, `lora_up` | `alpha`; else 1 |

`x.y` are the names of the model's original code, which kohya's layout may have too; a family says what they are.

Source: diffusers 0.42 (`loaders/lora_base.py`, `loaders/lora_conversion_utils.py`, `utils/state_dict_utils.py`),
kohya-ss/sd-scripts (`networks/lora.py`).
"""  # noqa: E501

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from vpo_jax.checkpoints.adapter_config import refuse_unusual
from vpo_jax.checkpoints.safetensors_io import PICKLES, read_file, read_metadata, refuse_pickle
from vpo_jax.runtime.errors import UserError

CONFIG, WEIGHTS, DIFFUSERS_WEIGHTS = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
)
METADATA = "lora_adapter_metadata"  # of a file that diffusers wrote: JSON of a PEFT config
# (pattern of a module's torch name, its name in the model's original code); the first that matches.
NameTable: TypeAlias = tuple[tuple[str, str], ...]

_PREFIXES = ("base_model.model.", "unet.", "transformer.", "diffusion_model.")
_KOHYA = "lora_unet_"
_TEXT_ENCODERS = ("text_encoder.", "text_encoder_2.", "lora_te_", "lora_te1_", "lora_te2_")
_PROCESSOR = re.compile(r"\.processor\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight$")
_FACTOR = re.compile(r"\.(lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(\.default)?\.weight$")
_NAMES = {"down": "lora_A", "up": "lora_B", "A": "lora_A", "B": "lora_B"}
# Tensors of LoHa, LoKr, OFT, DoRA, LoCon's core, adapted embeddings and full differences.
_OTHER = re.compile(
    r"\.(hada_\w+|lokr_\w+|oft_\w+|dora_scale|lora_magnitude_vector\S*|lora_mid\S*|lora_embedding_\w\S*|diff|diff_b)$"
)


class LoraFile(NamedTuple):
    """Factors under "MODULE/lora_A" and "MODULE/lora_B", and alpha by module where the file has it.

    What belongs to no module is under its own name.
    """

    tensors: Mapping[str, np.ndarray]
    alphas: Mapping[str, float]


def original_name(module: str, names: NameTable) -> str | None:
    """What the model's original code calls a module ("blocks.0.attn1.to_q"); None where the table has no such one."""
    return next((re.sub(pattern, name, module) for pattern, name in names if re.fullmatch(pattern, module)), None)


def find_lora_file(path: Path, field: str) -> tuple[Path, bool]:
    """The file of weights that `path` is or has in it, and whether a PEFT config lies beside it.

    Raises:
        UserError: naming `field`: nothing there, a pickle, or several files.
    """
    if path.is_file():
        if path.suffix in PICKLES:
            raise refuse_pickle(path)
        return path, False
    if not path.is_dir():
        raise UserError(f"{field}: there is no folder {path}; give a PEFT adapter folder or a LoRA's safetensors")
    if (path / CONFIG).is_file():
        if (path / WEIGHTS).is_file():
            return path / WEIGHTS, True
    elif (path / DIFFUSERS_WEIGHTS).is_file():
        return path / DIFFUSERS_WEIGHTS, False
    else:
        found = sorted(path.glob("*.safetensors"))
        if len(found) == 1:
            return found[0], False
        if found:
            raise UserError(f"{field}: {path} has {len(found)} safetensors files; give one of them, as {found[0]}")
    for pickle in sorted(file for file in path.iterdir() if file.suffix in PICKLES):
        raise refuse_pickle(pickle)
    absent = WEIGHTS if (path / CONFIG).is_file() else CONFIG
    raise UserError(f"{field}: {path / absent} is not there; copy the adapter folder again")


def read_lora_file(file: Path, modules: Collection[str], field: str, names: NameTable = ()) -> LoraFile:
    """The factors of a file in any of the layouts.

    Args:
        file: safetensors.
        modules: torch names ("a.0.to_q") of the modules that may be adapted; kohya's names say where their dots were.
        field: what errors name.
        names: the modules' names in the model's original code, where a file may have those.

    Raises:
        UserError: a broken file, one whose scale is not clear, adapters of a text encoder, or another method than
            LoRA, by the tensor's name.
    """
    where = f"{field}: {file}"
    by_name = _by_original_name(modules, names)
    by_underscore = {name.replace(".", "_"): module for name, module in by_name.items()}
    tensors: dict[str, np.ndarray] = {}
    said, alphas = _metadata_alphas(file, where), {}
    for key, array in read_file(file).items():
        _refuse_other(key, where)
        written, kind = _split(key)
        if is_kohyas := written.startswith(_KOHYA):
            written = by_underscore.get(written.removeprefix(_KOHYA), written)
        written = _without_prefix(written)
        module = by_name.get(written, written)
        if kind == "alpha":
            # The loaders of such models read alpha from the metadata alone and refuse these keys, or pass over them.
            is_torchs = not is_kohyas and written in modules and original_name(written, names) not in (None, written)
            if is_torchs or key.endswith(".lora_alpha"):
                raise UserError(
                    f"{where}: {key}: diffusers reads no alpha beside these names, so the scale is not clear; multiply "
                    "each lora_B by alpha / rank and remove the alphas"
                )
            alphas[module] = _alpha(array, f"{where}: {key}")
        else:
            name = f"{module}/{kind}" if kind else key
            if name in tensors:
                raise UserError(f"{where}: {key} stands there twice in two layouts; keep one of them")
            tensors[name] = array
    if said and alphas:
        raise UserError(f"{where}: has alphas beside {METADATA}; keep one of them")
    return LoraFile(tensors, said or alphas)


def _by_original_name(modules: Collection[str], names: NameTable) -> dict[str, str]:
    """Modules by their torch names and, where they have one, by their names in the original code."""
    originals = {original_name(module, names): module for module in modules}
    return {name: module for name, module in originals.items() if name} | {module: module for module in modules}


def _split(key: str) -> tuple[str, str]:
    """Module and "lora_A", "lora_B", "alpha", or "" for what is none of them."""
    if found := _PROCESSOR.search(key):
        layer = "to_out.0" if found[1] == "to_out" else found[1]
        return f"{key[: found.start()]}.{layer}", _NAMES[found[2]]
    if found := _FACTOR.search(key):
        return key[: found.start()], _NAMES[re.split(r"[._]", found[1])[-1]]
    if key.endswith((".alpha", ".lora_alpha")):
        return key.rpartition(".")[0], "alpha"
    return key, ""


def _without_prefix(module: str) -> str:
    for prefix in _PREFIXES:
        module = module.removeprefix(prefix)
    return module


def _refuse_other(key: str, where: str) -> None:
    if key.startswith(_TEXT_ENCODERS):
        raise UserError(f"{where}: {key} adapts a text encoder, which never trains; give the denoiser's part alone")
    if _OTHER.search(key):
        raise UserError(f"{where}: {key} is of another method than LoRA; merge it into the base and give that model")


def _alpha(array: Any, where: str) -> float:
    value = np.asarray(array, np.float64) if np.size(array) == 1 else np.array(np.nan)
    if not np.isfinite(value).all() or float(value.reshape(())) <= 0:
        raise UserError(f"{where}: alpha is no number above 0; use an undamaged copy")
    return float(value.reshape(()))


def _metadata_alphas(file: Path, where: str) -> dict[str, float]:
    """Of diffusers' metadata {"unet.r": ..., "unet.lora_alpha": ...}: alpha, under the module name ""."""
    text = read_metadata(file).get(METADATA)
    if not isinstance(text, str):
        return {}
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {METADATA} is not JSON; use an undamaged copy") from error
    if not isinstance(raw, dict):
        raise UserError(f"{where}: {METADATA} is no JSON object; use an undamaged copy")
    prefix = next((prefix for prefix in ("unet.", "transformer.") if any(key.startswith(prefix) for key in raw)), "")
    config = {key.removeprefix(prefix): value for key, value in raw.items() if key.startswith(prefix)}
    refuse_unusual({"peft_type": "LORA", **config}, f"{where}: {METADATA}")
    if "lora_alpha" not in config:
        raise UserError(
            f"{where}: {METADATA} has no lora_alpha, and diffusers would take PEFT's default of 8; write "
            f"{prefix or 'transformer.'}lora_alpha into it, or remove {METADATA}: the scale is then 1"
        )
    return {"": _alpha(config["lora_alpha"], f"{where}: {METADATA}")}
