"""Reading a checkpoint's config.json into a frozen dataclass, field by field: each value of its type and bounded."""

import dataclasses
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any

from vpo_jax.runtime.errors import UserError

# A config may be anybody's. No model known here comes near these, and whatever is below them ends soon.
LARGEST = 2**20  # widths, positions, words of a vocabulary, ids of tokens
_MOST_ENTRIES = 256
MOST_BLOCKS = 8  # of a denoiser or autoencoder: each halves the sides
_LARGEST_FLOAT = 1e12
_LONGEST_TEXT = 1000
_SMALLEST_DIVISOR = 1e-12
LAYERS = {"layers_per_block": 16, "num_hidden_layers": 128, "num_layers": 128, "depth": 128, "resampler_depth": 128}

# Fields that transformers writes and that cannot change a last hidden state at inference: initialisation,
# dropout, outputs to collect, generation, book-keeping of releases.
BOOKKEEPING = frozenset((
    "architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "name_or_path",
    "attention_dropout", "dropout", "initializer_range", "bos_token_id",
    "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "output_attentions",
    "output_hidden_states", "return_dict", "return_dict_in_generate", "use_return_dict", "output_scores",
    "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "num_labels", "problem_type",
    "finetuning_task", "torchscript", "use_bfloat16", "tie_word_embeddings", "tf_legacy_loss", "pruned_heads",
    "gradient_checkpointing", "use_cache", "is_decoder", "add_cross_attention", "cross_attention_hidden_size",
    "tie_encoder_decoder", "tokenizer_class", "prefix", "task_specific_params", "max_length", "min_length",
    "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k",
    "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "forced_bos_token_id",
    "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
    "begin_suppress_tokens",
))  # fmt: skip


def read_fields(cls: type, raw: Mapping[str, Any], part: str, ignored: Collection[str] = ()) -> dict[str, Any]:
    """Keyword arguments for the dataclass `cls` from the dict `raw`; lists become tuples.

    Keys that start with "_", keys in `ignored` and unknown keys whose value is null are passed over.

    Raises:
        UserError: a key that `cls` does not have, or a value of another type than the field's or out of all bounds;
            the message names it as `part.key`.
    """
    raw = as_object(raw, part)
    known = {field.name for field in dataclasses.fields(cls)} - {"original"}
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if key in known:
            values[key] = _frozen(value)
            kind = hints[key]
            right = _fits(values[key], kind) and (key not in LAYERS or value <= LAYERS[key])
            require(right, f"{part}.{key}", f"must be {_words(kind, key)}, found {_short(value)}")
        elif not key.startswith("_") and key not in ignored and value is not None:
            raise UserError(f"{part}.{key}: not a field that this model class honours; remove it from config.json")
    return values


def as_object(raw: Any, part: str) -> dict[str, Any]:
    """A copy of a JSON object; raises UserError, naming `part`, for anything else."""
    require(isinstance(raw, Mapping), part, f"must be a JSON object, found {_short(raw)}")
    return dict(raw)


def require(condition: bool, field: str, message: str) -> None:
    """Raise UserError("field: message") unless the condition holds."""
    if not condition:
        raise UserError(f"{field}: {message}")


def require_int(part: str, config: Any, names: Collection[str], minimum: int = 1) -> None:
    """Raise UserError unless each named attribute of `config` is an int of at least `minimum`."""
    for name in names:
        value = getattr(config, name)
        good = _fits(value, int) and value >= minimum
        require(good, f"{part}.{name}", f"must be an integer of at least {minimum}, found {_short(value)}")


def require_positive(part: str, config: Any, names: Collection[str]) -> None:
    """Raise UserError unless each named attribute of `config` is a number above zero that may divide others."""
    for name in names:
        value = getattr(config, name)
        good = _fits(value, float) and value >= _SMALLEST_DIVISOR
        require(good, f"{part}.{name}", f"must be a number above zero, found {_short(value)}")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a declared type, and within the bounds above."""
    arguments = typing.get_args(kind)
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return any(_fits(value, argument) for argument in arguments)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, tuple) or len(value) > _MOST_ENTRIES:
            return False
        if arguments[-1] is Ellipsis:
            return all(_fits(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(_fits, value, arguments))
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST
    if kind is float:  # compared, since a whole number that no float can hold makes math.isfinite raise
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST_FLOAT
    if kind is str:
        return isinstance(value, str) and len(value) <= _LONGEST_TEXT
    return kind is Any or isinstance(value, typing.get_origin(kind) or kind)


def _words(kind: Any, key: str) -> str:
    if key in LAYERS:
        return f"an integer up to {LAYERS[key]}"
    names = {int: f"an integer up to {LARGEST}", float: "a finite number", bool: "true or false", str: "a text"}
    return names.get(kind, f"of the type {kind}")


def _short(value: Any) -> str:
    text = f"an integer of {value.bit_length()} bits" if type(value) is int and value.bit_length() > 64 else repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, (list, tuple)) else value
