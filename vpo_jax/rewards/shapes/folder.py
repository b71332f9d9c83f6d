"""The folder of a small video scorer: config.json, model.safetensors, tokenizer.json."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from vpo_jax.checkpoints import safetensors_io as io
from vpo_jax.checkpoints.keys import from_torch, init_shapes
from vpo_jax.checkpoints.scorer_folder import read_tokenizer, write_scorer_folder
from vpo_jax.checkpoints.untrusted import open_folder
from vpo_jax.models.video_scorer import VideoScorer, VideoScorerConfig
from vpo_jax.rewards.protocol import PyTree
from vpo_jax.runtime.trees import cast_floating

CLASSES = ("VideoScorer",)  # what config.json calls it
_PAD, _UNKNOWN = "[PAD]", "[UNK]"


@dataclasses.dataclass(frozen=True)
class ScorerParts:
    """What a scorer's folder holds.

    Attributes:
        config: of the model.
        params: its parameter tree.
        tokenizer: of tokenizer.json; it pads and truncates captions to `config.max_length` tokens.
    """

    config: VideoScorerConfig
    params: PyTree
    tokenizer: Tokenizer


def make_word_tokenizer(words: Sequence[str], max_length: int) -> Tokenizer:
    """One token a word, in lower case: padding is 0, any other word 1, `words` from 2 on."""
    vocabulary = {token: i for i, token in enumerate([_PAD, _UNKNOWN, *sorted(set(words))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding(pad_id=0, pad_token=_PAD, length=max_length)
    return tokenizer


def encode_captions(tokenizer: Tokenizer, captions: Sequence[str]) -> np.ndarray:
    """Token ids of captions, padded with 0: int32 [B, max_length]."""
    return np.array([encoding.ids for encoding in tokenizer.encode_batch(list(captions))], np.int32)


def read_scorer(folder: str | Path) -> ScorerParts:
    """The scorer in `folder`, with parameters in float32.

    Raises:
        UserError: a file is missing, damaged, or does not belong to the others.
    """
    folder = open_folder(folder)
    config = VideoScorerConfig.from_dict(io.read_json(folder / "config.json"))
    tokenizer = read_tokenizer(folder, config.vocab_size)
    tokenizer.enable_truncation(config.max_length)
    tokenizer.enable_padding(pad_id=0, pad_token=_PAD, length=config.max_length)
    state = io.read_weights(folder, io.TRANSFORMERS_STEM)
    return ScorerParts(config, from_torch(state, scorer_shapes(config), str(folder)), tokenizer)


def scorer_shapes(config: VideoScorerConfig) -> PyTree:
    """The tree of `ShapeDtypeStruct` of a scorer's parameters."""
    video = (1, config.num_frames, config.image_size, config.image_size, 3)
    return init_shapes(
        VideoScorer(config),
        jax.ShapeDtypeStruct(video, jnp.uint8),
        jax.ShapeDtypeStruct((1, config.max_length), jnp.int32),
    )


def write_scorer(
    folder: str | Path,
    parts: ScorerParts,
    extra: Mapping[str, Mapping[str, Any]] | None = None,
    dtype: Any = np.float16,
) -> None:
    """Writes the scorer beside `folder` and renames it, so that a folder of that name is always whole.

    Args:
        folder: replaced where it holds a scorer already.
        extra: JSON files to write into it, by name.
        dtype: of the weights on disk.

    Raises:
        UserError: the name is taken by something else, or the disk refuses.
    """
    values = {"config.json": parts.config.to_dict()} | dict(extra or {})
    files = {name: json.dumps(value, indent=2) + "\n" for name, value in values.items()}
    files["tokenizer.json"] = parts.tokenizer.to_str(pretty=True)
    write_scorer_folder(folder, files, cast_floating(jax.device_get(parts.params), dtype))
