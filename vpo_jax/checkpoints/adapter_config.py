"""PEFT's adapter_config.json: what is a plain LoRA, by a list of what is allowed."""

from collections.abc import Collection, Mapping
from typing import Any

from vpo_jax.runtime.errors import UserError

# Fields of PEFT (0.21) that change nothing of what the tensors of a plain LoRA mean, whatever their value: which
# modules were chosen (the tensors say that themselves), training, book-keeping, and how factors were first drawn.
_NEUTRAL = frozenset((
    "peft_type", "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "lora_dropout", "base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping",
    "peft_version", "megatron_core", "runtime_config", "qalora_group_size", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config",
))  # fmt: skip
# Initialisations that leave the base as it is. PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ change it, so that what was
# trained belongs to another base than the one that is loaded.
_PLAIN_STARTS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")
_SHOWN = 100  # characters of a value in an error message


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
    for field, value in config.items():
        if not _is_plain(field, value) and field not in honoured:
            shown = repr(value) if len(repr(value)) <= _SHOWN else f"{repr(value)[:_SHOWN]}..."
            raise UserError(
                f"{where}: {field}={shown} is not supported, since it changes what the adapter computes; merge it into "
                "the base with PEFT's merge_and_unload, and give that model"
            )


def _is_plain(field: str, value: Any) -> bool:
    if field == "init_lora_weights":
        return value is None or isinstance(value, bool) or (isinstance(value, str) and value.lower() in _PLAIN_STARTS)
    off = value is None or value is False or value in ([], {})
    return off or field in _NEUTRAL or (field == "bias" and value == "none")
