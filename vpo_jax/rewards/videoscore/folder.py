"""The folder of a VideoScore: config.json, model.safetensors (or shards), tokenizer.json, preprocessor_config.json."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer

from vpo_jax.checkpoints import safetensors_io as io
from vpo_jax.checkpoints.keys import from_torch, init_shapes
from vpo_jax.checkpoints.scorer_folder import (
    check_dtype,
    dtype_to_load,
    read_plain_tokenizer,
    read_text,
    write_scorer_folder,
)
from vpo_jax.checkpoints.untrusted import check_layers, open_folder
from vpo_jax.models.idefics2 import Idefics2ForSequenceClassification
from vpo_jax.models.idefics2_config import Idefics2Config
from vpo_jax.rewards.protocol import PyTree
from vpo_jax.rewards.query import QUERY_FILE
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.trees import cast_floating

CLASSES = ("Idefics2ForSequenceClassification",)  # what config.json calls it
_HEAD = "score.weight"


@dataclasses.dataclass(frozen=True)
class VideoScoreParts:
    """What a VideoScore's folder holds.

    Attributes:
        config: of the model.
        params: its parameter tree.
        tokenizer: of tokenizer.json; it neither pads nor truncates.
        image_processor: parsed preprocessor_config.json, or its part of processor_config.json.
        query_prompt: text of query_prompt.txt, None where there is none.
    """

    config: Idefics2Config
    params: PyTree
    tokenizer: Tokenizer
    image_processor: Mapping[str, Any]
    query_prompt: str | None


def read_videoscore(folder: str | Path, num_labels: int, dtype: str = "") -> VideoScoreParts:
    """The scorer in `folder`.

    Args:
        folder: saved as `Idefics2ForSequenceClassification`.
        num_labels: outputs that the head must have.
        dtype: "float32" or "bfloat16" of the parameters; "" keeps bfloat16 and makes anything else float32.

    Raises:
        UserError: a file is missing, damaged, or does not belong to the others.
    """
    folder = open_folder(folder)
    config = Idefics2Config.from_dict(io.read_json(folder / "config.json"))
    tokenizer = read_plain_tokenizer(folder, config.text.vocab_size)
    processor = _image_processor(folder, config)
    query = read_text(folder / QUERY_FILE) if (folder / QUERY_FILE).is_file() else None
    check_dtype(dtype)
    state = io.read_weights(folder, io.TRANSFORMERS_STEM)
    head = state.get(_HEAD)
    if head is None:
        raise UserError(
            f"{folder}: has no head ({_HEAD}), so it is a language model and no scorer; "
            f"give the folder that was saved as {CLASSES[0]}"
        )
    if not head.ndim or head.shape[0] != num_labels:
        raise UserError(f"{folder}: {_HEAD} has {head.shape[0]} outputs, a VideoScore has {num_labels}; give another")
    check_layers(config.original, len(state), str(folder))
    shapes = videoscore_shapes(config, num_labels)
    params = from_torch(state, shapes, str(folder), dtype_to_load(dtype, head))
    return VideoScoreParts(config, params, tokenizer, processor, query)


def write_videoscore(
    folder: str | Path,
    parts: VideoScoreParts,
    extra: Mapping[str, Mapping[str, Any]] | None = None,
    dtype: Any = jnp.float32,
) -> None:
    """Writes a folder that `read_videoscore` and transformers read, whole or not at all.

    Args:
        folder: replaced where it holds a scorer already.
        parts: what goes into it.
        extra: JSON files to write into it, by name.
        dtype: of the weights on disk.

    Raises:
        UserError: the name is taken by something that is no scorer, or the disk refuses.
    """
    values = {"config.json": parts.config.to_dict(), "preprocessor_config.json": parts.image_processor}
    values |= dict(extra or {})
    files = {name: json.dumps(value, indent=2) + "\n" for name, value in values.items()}
    files["tokenizer.json"] = parts.tokenizer.to_str(pretty=True)
    if parts.query_prompt is not None:
        files[QUERY_FILE] = parts.query_prompt
    write_scorer_folder(folder, files, cast_floating(jax.device_get(parts.params), dtype))


def videoscore_shapes(config: Idefics2Config, num_labels: int) -> PyTree:
    """The tree of `ShapeDtypeStruct` of the parameters, computing nothing."""
    tokens, side = config.perceiver.resampler_n_latents, config.vision.patch_size
    return init_shapes(
        Idefics2ForSequenceClassification(config, num_labels),
        jax.ShapeDtypeStruct((1, tokens), jnp.int32),
        jax.ShapeDtypeStruct((1, tokens), jnp.bool_),
        jax.ShapeDtypeStruct((1, 1, side, side, 3), jnp.float32),
    )


def _image_processor(folder: Path, config: Idefics2Config) -> Mapping[str, Any]:
    whole = io.read_json(folder / "processor_config.json") if (folder / "processor_config.json").is_file() else {}
    tokens = whole.get("image_seq_len", config.perceiver.resampler_n_latents)
    if tokens != config.perceiver.resampler_n_latents:
        raise UserError(
            f"{folder / 'processor_config.json'}: image_seq_len is {tokens}, but config.json makes "
            f"{config.perceiver.resampler_n_latents} tokens of an image; use the files of one model"
        )
    if isinstance(whole.get("image_processor"), dict):
        part: dict[str, Any] = whole["image_processor"]
        return part
    return io.read_json(folder / "preprocessor_config.json")
