"""A scorer's options: dataclass fields that say what they may hold, for the scorer itself and for a run's config.

A scorer whose folder of weights and options stand in a config, under `reward.NAME`, has a frozen dataclass `Options`
whose fields are made by `option`. Those with `in_config` are the keys of `reward.NAME`, beside `path`.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, TypeVar

from vpo_jax.models.attention import BACKENDS
from vpo_jax.models.config_fields import require, require_int

T = TypeVar("T", bool, int, float, str)
_KEY = "limits"


class Limits(NamedTuple):
    """What an option may hold; its type is the dataclass field's.

    Attributes:
      choices: of text; any text where there are none.
      low: least value of a number.
      above: a number that it has to exceed.
      is_file: text that names a file; "" names none.
      in_config: whether it is a key of the config.
    """

    choices: Collection[str] = ()
    low: float | None = None
    above: float | None = None
    is_file: bool = False
    in_config: bool = False


def option(
    default: T,
    *,
    choices: Collection[str] = (),
    low: float | None = None,
    above: float | None = None,
    is_file: bool = False,
    in_config: bool = False,
) -> T:
    """A field of a scorer's `Options`; see `Limits`."""
    limits = Limits(choices, low, above, is_file, in_config)
    return dataclasses.field(default=default, metadata={_KEY: limits})


def limits_of(options: type) -> Mapping[str, tuple[type, Limits]]:
    """Name -> (type, limits) of the fields of an `Options`."""
    return {field.name: (_type_of(field), field.metadata[_KEY]) for field in dataclasses.fields(options)}


def config_limits(options: type) -> Mapping[str, tuple[type, Limits]]:
    """As `limits_of`, of the fields that a config has under `reward.NAME`; its `path` is not among them."""
    return {name: found for name, found in limits_of(options).items() if found[1].in_config}


def _type_of(field: dataclasses.Field[Any]) -> type:
    assert isinstance(field.type, type), f"{field.name}: the type of an option is bool, int, float or str"
    return field.type


def check_options(name: str, options: Any) -> None:
    """Raises UserError, as "name.field: ...", for an option that does not hold what its limits say."""
    for field, (kind, limits) in limits_of(type(options)).items():
        value, where = getattr(options, field), f"{name}.{field}"
        if kind is int:
            require_int(name, options, (field,), 0 if limits.low is None else int(limits.low))
        elif kind is float:
            above = 0.0 if limits.above is None else limits.above
            good = isinstance(value, int | float) and value > above
            require(good, where, f"must be above {above:g}, found {value!r}")
        elif limits.choices:
            require(value in limits.choices, where, f"{value!r} is not one of {', '.join(limits.choices)}")


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """How a scorer that is a language model is run.

    Attributes:
      query_prompt: a file with what it is asked, `{text_prompt}` where the video's prompt goes; "" takes
        query_prompt.txt of the scorer's folder, and without one a text of this package.
      max_prompt_tokens: longer prompts are truncated; every text is padded to this, so that nothing is compiled twice.
      frames_at_a_time: frames of each video in the vision encoder at once.
      videos_at_a_time: videos of a batch when it is called by itself; a rollout has `rollout.microbatch`.
      dtype: "float32" or "bfloat16" of weights and computation; "" takes what is stored.
      attention: a name in `models.attention.BACKENDS`; "cudnn" is for NVIDIA GPUs and bfloat16.
    """

    query_prompt: str = option("", is_file=True, in_config=True)
    max_prompt_tokens: int = option(128, low=0)
    frames_at_a_time: int = option(4, low=1)
    videos_at_a_time: int = option(4, low=1)
    dtype: str = option("")
    attention: str = option("xla", choices=BACKENDS, in_config=True)
