"""Reading a checkpoint's config.json into a frozen dataclass, field by field."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from vpo_jax.runtime.errors import UserError

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
        UserError: a key that `cls` does not have; the message names it as `part.key`.
    """
    known = {field.name for field in dataclasses.fields(cls)} - {"original"}
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if key in known:
            values[key] = _frozen(value)
        elif not key.startswith("_") and key not in ignored and value is not None:
            raise UserError(f"{part}.{key}: not a field that this model class honours; remove it from config.json")
    return values


def require(condition: bool, field: str, message: str) -> None:
    """Raise UserError("field: message") unless the condition holds."""
    if not condition:
        raise UserError(f"{field}: {message}")


def require_int(part: str, config: Any, names: Collection[str], minimum: int = 1) -> None:
    """Raise UserError unless each named attribute of `config` is an int of at least `minimum`."""
    for name in names:
        value = getattr(config, name)
        good = isinstance(value, int) and not isinstance(value, bool) and value >= minimum
        require(good, f"{part}.{name}", f"must be an integer of at least {minimum}, found {value!r}")


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, (list, tuple)) else value
