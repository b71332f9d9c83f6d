"""The folder of a VideoReward: merged weights, or a LoRA beside or around those of Qwen2-VL.

    config.json              of the Qwen2-VL (Qwen/Qwen2-VL-2B-Instruct's for the published scorer)
    model_config.json        its authors': sizes of frames, frames a second, the head, normalisation
    model.safetensors        or shards, or adapter_model.safetensors with adapter_config.json
    tokenizer.json           or tokenizer/tokenizer.json
    preprocessor_config.json mean and standard deviation of pixels; Qwen2-VL's are taken where it is absent
    query_prompt.txt         the question, if it is to be the one that the scorer was trained with

Weights and tokenizer may stand in a folder checkpoint-N, as they are published; the last one is read.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import AddedToken, Tokenizer

from vpo_jax.checkpoints import safetensors_io as io
from vpo_jax.checkpoints.keys import from_torch, init_shapes
from vpo_jax.checkpoints.lora_merge import adapter_scale, merge_lora, unwrapped
from vpo_jax.checkpoints.scorer_folder import check_dtype, dtype_to_load, read_plain_tokenizer, read_text
from vpo_jax.checkpoints.untrusted import check_layers, open_folder
from vpo_jax.models.config_fields import require
from vpo_jax.models.qwen2_vl import Qwen2VLRewardModel
from vpo_jax.models.qwen2_vl_config import Qwen2VLConfig
from vpo_jax.rewards.protocol import PyTree
from vpo_jax.rewards.query import QUERY_FILE
from vpo_jax.runtime.errors import UserError

# The authors' class, and that of the Qwen2-VL whose config.json a folder may hold.
CLASSES = ("Qwen2VLRewardModelBT", "Qwen2VLForConditionalGeneration")
REWARD_TOKENS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
SETTINGS_FILE, ADAPTER_FILE = "model_config.json", "adapter_model.safetensors"
_REST = "non_lora_state_dict"  # what was trained beside an adapter: the head
_HEAD, _EMBEDDING = "rm_head.weight", "model.language_model.embed_tokens.weight"
_LANGUAGE = ("embed_tokens.", "layers.", "norm.")


@dataclasses.dataclass(frozen=True)
class RewardSettings:
    """What model_config.json says.

    Attributes:
        max_frame_pixels: most pixels of a frame that the model sees.
        fps: frames a second that it sees, where num_frames is None.
        num_frames: that it sees of a video of any length.
        outputs: of the head, 1 or 3.
        mean, std: of the three scores over the authors' data: (score - mean) / std is given out; None gives raw ones.
    """

    max_frame_pixels: int
    fps: float = 2.0
    num_frames: int | None = None
    outputs: int = 1
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True)
class VideoRewardParts:
    """What a VideoReward's folder holds.

    Attributes:
        config: of the model, with the vocabulary that the weights have.
        params: its parameter tree.
        tokenizer: of tokenizer.json, with the reward tokens; it neither pads nor truncates.
        image_processor: parsed preprocessor_config.json, empty where there is none.
        settings: of model_config.json.
        query_prompt: text of query_prompt.txt, None where there is none.
    """

    config: Qwen2VLConfig
    params: PyTree
    tokenizer: Tokenizer
    image_processor: Mapping[str, Any]
    settings: RewardSettings
    query_prompt: str | None


def read_videoreward(folder: str | Path, dtype: str = "") -> VideoRewardParts:
    """The scorer in `folder`; adapters are merged into their base.

    Args:
        folder: as above.
        dtype: "float32" or "bfloat16" of the parameters; "" keeps bfloat16 and makes anything else float32.

    Raises:
        UserError: a file is missing, damaged, or does not belong to the others.
    """
    folder = open_folder(folder)
    check_dtype(dtype)
    raw = io.read_json(folder / SETTINGS_FILE)
    settings = read_settings(raw, folder / SETTINGS_FILE)
    weights = _weights_folder(folder)
    base = _base_folder(weights) if (weights / ADAPTER_FILE).is_file() else None
    places = [weights, weights / "tokenizer", folder, *([] if base is None else [base])]
    model = io.read_json(_find_config(places))
    config = Qwen2VLConfig.from_dict(model)
    processor = _find("preprocessor_config.json", places)
    image_processor = io.read_json(processor) if processor.is_file() else {}
    query = read_text(folder / QUERY_FILE) if (folder / QUERY_FILE).is_file() else None

    state = _read_state(weights, base, raw, folder / SETTINGS_FILE)
    head = state.get(_HEAD)
    if head is None:
        raise UserError(
            f"{weights}: has no head ({_HEAD}), so it is a language model and no scorer; "
            f"give the folder of a {CLASSES[0]}"
        )
    if head.ndim != 2 or len(head) != settings.outputs:
        raise UserError(
            f"{weights}: {_HEAD} is {list(head.shape)}, but {SETTINGS_FILE} has output_dim {settings.outputs}; "
            "use the files of one scorer"
        )
    if _EMBEDDING not in state:
        raise UserError(f"{weights}: has no {_EMBEDDING}; give all weights, or an adapter with its base")
    # The authors give the embedding a row for each token of the tokenizer, and write it into no config.
    text = dataclasses.replace(config.text, vocab_size=len(state[_EMBEDDING]))
    config = dataclasses.replace(config, text=text)
    tokenizer = _read_tokenizer(_find("tokenizer.json", places).parent, text.vocab_size)
    check_layers(model, len(state), str(weights))
    shapes = videoreward_shapes(config, settings.outputs)
    params = from_torch(state, shapes, str(weights), dtype_to_load(dtype, state[_EMBEDDING]))
    return VideoRewardParts(config, params, tokenizer, image_processor, settings, query)


def videoreward_shapes(config: Qwen2VLConfig, outputs: int) -> PyTree:
    """The tree of `ShapeDtypeStruct` of the parameters, computing nothing."""
    vision = config.vision
    return init_shapes(
        Qwen2VLRewardModel(config, tuple(range(3)), outputs),
        jax.ShapeDtypeStruct((1, 4), jnp.int32),
        jax.ShapeDtypeStruct((1, 4), jnp.bool_),
        jax.ShapeDtypeStruct((3, 1, 4), jnp.int32),
        jax.ShapeDtypeStruct((1, vision.temporal_patch_size, vision.factor, vision.factor, 3), jnp.float32),
    )


def read_settings(raw: Mapping[str, Any], file: Path) -> RewardSettings:
    """Settings of a parsed model_config.json; what only training reads is passed over.

    Raises:
        UserError: a value that is not honoured, by name.
    """
    data, model, norm = (dict(raw.get(name) or {}) for name in ("data_config", "model_config", "inference_config"))
    where = f"{file}: "
    pixels = data.get("max_frame_pixels", 0)
    require(isinstance(pixels, int) and pixels > 0, f"{where}data_config.max_frame_pixels", f"is no size: {pixels!r}")
    fps, frames = 2.0 if data.get("fps") is None else data["fps"], data.get("num_frames")
    require(isinstance(fps, (int, float)) and fps > 0, f"{where}data_config.fps", f"is no rate: {fps!r}")
    whole = frames is None or (isinstance(frames, (int, float)) and frames >= 1)
    require(whole, f"{where}data_config.num_frames", f"is no number of frames: {frames!r}")
    sampling = data.get("sample_type", "uniform")
    require(sampling == "uniform", f"{where}data_config.sample_type", f"{sampling!r} is not uniform")
    special = model.get("use_special_tokens") or model.get("reward_token") == "special"
    read_at = f"scores are read at the tokens {', '.join(REWARD_TOKENS)}; other heads are not supported"
    require(bool(special), f"{where}model_config.reward_token", read_at)
    outputs = model.get("output_dim", 0)
    require(outputs in (1, 3), f"{where}model_config.output_dim", f"must be 1 or 3, found {outputs!r}")
    mean, std = (_constants(norm, kind, f"{where}inference_config") if norm else None for kind in ("mean", "std"))
    return RewardSettings(pixels, float(fps), None if frames is None else int(frames), outputs, mean, std)


def _constants(norm: Mapping[str, Any], kind: str, part: str) -> tuple[float, ...]:
    values = []
    for name in (f"{dimension}_{kind}" for dimension in ("VQ", "MQ", "TA")):
        value = norm.get(name)
        good = isinstance(value, (int, float)) and (kind == "mean" or value > 0)
        require(good, f"{part}.{name}", f"cannot normalise a score: {value!r}")
        values.append(float(norm[name]))
    return tuple(values)


def _find(name: str, places: list[Path]) -> Path:
    return next((place / name for place in places if (place / name).is_file()), places[-1] / name)


def _find_config(places: list[Path]) -> Path:
    file = _find("config.json", places)
    if not file.is_file():
        raise UserError(f"{file}: no such file; copy config.json of the scorer's base (Qwen/Qwen2-VL-2B-Instruct) in")
    return file


def _weights_folder(folder: Path) -> Path:
    """The folder itself, or its last checkpoint-N where only those have weights."""
    here = [*folder.glob("model*.safetensors*"), *folder.glob(ADAPTER_FILE)]
    steps = [path for path in folder.glob("checkpoint-*") if path.is_dir() and path.name.split("-")[-1].isdecimal()]
    return folder if here or not steps else max(steps, key=lambda path: int(path.name.split("-")[-1]))


def _base_folder(weights: Path) -> Path:
    """Where the weights are that an adapter belongs to."""
    file = weights / "adapter_config.json"
    name = io.read_json(file).get("base_model_name_or_path")
    for place in (weights / str(name), Path(str(name))):
        if name and place.is_dir():
            return place
    raise UserError(
        f"{file}: base_model_name_or_path is {name!r}, which is no folder; write there the folder of the Qwen2-VL that "
        "the adapter belongs to"
    )


def _read_state(weights: Path, base: Path | None, raw: Mapping[str, Any], settings: Path) -> dict[str, np.ndarray]:
    """Every tensor under its modern name, adapters merged."""
    if base is None:
        state = _renamed(io.read_weights(weights, io.TRANSFORMERS_STEM))
        if not any("lora_" in key for key in state):
            return state
        lora = raw.get("peft_lora_config") or {}
        names = {"r": "lora_r", "lora_alpha": "lora_alpha", "use_rslora": "use_rslora"}
        config = {"peft_type": "LORA"} | {name: lora.get(theirs) for name, theirs in names.items()}
        return merge_lora(state, adapter_scale(config, f"{settings}: peft_lora_config"), str(weights))
    file = weights / "adapter_config.json"
    scale = adapter_scale(io.read_json(file), str(file))
    state = _renamed(io.read_weights(base, io.TRANSFORMERS_STEM)) | _renamed(io.read_file(weights / ADAPTER_FILE))
    rest = weights / f"{_REST}.safetensors"
    if rest.is_file():
        state |= _renamed(io.read_file(rest))
    else:
        for pickle in (weights / f"{_REST}{suffix}" for suffix in io.PICKLES):
            if pickle.is_file():
                raise io.refuse_pickle(pickle)
    return merge_lora(state, scale, str(weights))


def _renamed(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The names that transformers 5 has in memory, without PEFT's prefix and without the head of words.

    Files have visual.* and model.layers.*, or model.visual.* and model.language_model.layers.*.
    """
    renamed = {}
    for key, array in unwrapped(state).items():
        if key.startswith("visual."):
            key = f"model.{key}"
        elif key.startswith(tuple(f"model.{name}" for name in _LANGUAGE)):
            key = key.replace("model.", "model.language_model.", 1)
        if not key.startswith("lm_head."):
            renamed[key] = array
    return renamed


def _read_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    tokenizer = read_plain_tokenizer(folder, vocab_size)
    # As the authors' code does with Qwen2-VL's own tokenizer; a tokenizer that has them stays as it is.
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in REWARD_TOKENS])
    if tokenizer.get_vocab_size() > vocab_size:
        raise UserError(
            f"{folder / 'tokenizer.json'}: {tokenizer.get_vocab_size()} tokens with the reward tokens, but the weights "
            f"have {vocab_size}; use the tokenizer that belongs to this scorer"
        )
    return tokenizer
