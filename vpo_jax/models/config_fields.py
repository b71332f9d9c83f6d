"""Reading a checkpoint's config.json into a frozen dataclass, field by field."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from vpo_jax.runtime.errors import UserError


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
