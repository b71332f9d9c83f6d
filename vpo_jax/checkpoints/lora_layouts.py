"""Files of LoRA weights as PEFT, diffusers and kohya's scripts write them, under one set of names.

| written by | module | factors | scale |
| --- | --- | --- | --- |
| PEFT | `base_model.model.a.b` | `lora_A`, `lora_B` | adapter_config.json |
| diffusers | `unet.a.b`, `transformer.a.b` | `lora_A`, `lora_B`; older: `lora.down`, `lora.up`, `processor.to_q_lora.down` | `alpha` or the file's metadata; else 1 |
| kohya | `lora_unet_a_b` | `lora_down`, `lora_up` | `alpha`; else 1 |

Source: diffusers 0.42 (`loaders/lora_base.py`, `utils/state_dict_utils.py`), kohya-ss/sd-scripts (`networks/lora.py`).
"""  # noqa: E501

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vpo_jax.checkpoints.adapter_config import refuse_unusual
from vpo_jax.checkpoints.safetensors_io import PICKLES, read_file, read_metadata, refuse_pickle
from vpo_jax.runtime.errors import UserError

CONFIG, WEIGHTS, DIFFUSERS_WEIGHTS = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
)
_PREFIXES = ("base_model.model.", "unet.", "transformer.")
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


def read_lora_file(file: Path, modules: Collection[str], field: str) -> LoraFile:
    """The factors of a file in any of the three layouts.

    Args:
        file: safetensors.
        modules: torch names ("a.0.to_q") of the modules that may be adapted; kohya's names say where their dots were.
        field: what errors name.

    Raises:
        UserError: a broken file, adapters of a text encoder, or another method than LoRA, by the tensor's name.
    """
    where = f"{field}: {file}"
    by_underscore = {module.replace(".", "_"): module for module in modules}
    tensors: dict[str, np.ndarray] = {}
    alphas = _metadata_alphas(file, where)
    for key, array in read_file(file).items():
        _refuse_other(key, where)
        module, kind = _split(key)
        if module.startswith(_KOHYA):
            module = by_underscore.get(module.removeprefix(_KOHYA), module)
        module = _without_prefix(module)
        if kind == "alpha":
            alphas[module] = _alpha(array, f"{where}: {key}")
        else:
            name = f"{module}/{kind}" if kind else key
            if name in tensors:
                raise UserError(f"{where}: {key} stands there twice in two layouts; keep one of them")
            tensors[name] = array
    return LoraFile(tensors, alphas)


def _split(key: str) -> tuple[str, str]:
    """Module and "lora_A", "lora_B", "alpha", or "" for what is none of them."""
    if found := _PROCESSOR.search(key):
        layer = "to_out.0" if found[1] == "to_out" else found[1]
        return f"{key[: found.start()]}.{layer}", _NAMES[found[2]]
    if found := _FACTOR.search(key):
        return key[: found.start()], _NAMES[re.split(r"[._]", found[1])[-1]]
    if key.endswith(".alpha"):
        return key.removesuffix(".alpha"), "alpha"
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
    """diffusers' `lora_adapter_metadata`: {"unet.r": ..., "unet.lora_alpha": ...}, under the module name ""."""
    text = read_metadata(file).get("lora_adapter_metadata")
    if not isinstance(text, str):
        return {}
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: lora_adapter_metadata is not JSON; use an undamaged copy") from error
    if not isinstance(raw, dict):
        raise UserError(f"{where}: lora_adapter_metadata is no JSON object; use an undamaged copy")
    prefix = next((prefix for prefix in ("unet.", "transformer.") if any(key.startswith(prefix) for key in raw)), "")
    config = {key.removeprefix(prefix): value for key, value in raw.items() if key.startswith(prefix)}
    refuse_unusual({"peft_type": "LORA", **config}, f"{where}: lora_adapter_metadata")
    return {"": _alpha(config["lora_alpha"], where)} if "lora_alpha" in config else {}
