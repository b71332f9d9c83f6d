"""The config.json of a Qwen2-VL (transformers `Qwen2VLConfig`): vision and text, nested or flat as on the hub."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from vpo_jax.models.config_fields import BOOKKEEPING, as_object, read_fields, require, require_int

_ACTIVATIONS = ("gelu", "quick_gelu", "gelu_pytorch_tanh", "silu", "swish", "mish", "relu")
_FULL, _SLIDING = "full_attention", "sliding_attention"
# Other names that transformers takes, and names in the published files that it does not read.
_VISION_NAMES = {"num_attention_heads": "num_heads", "num_hidden_layers": "depth"}
_VISION_IGNORED = BOOKKEEPING | {"in_chans", "spatial_patch_size"}
# Ids that the tokenizer knows by name; a scorer shows no images.
_TOP_IGNORED = BOOKKEEPING | {
    "image_token_id", "vision_token_id", "vision_start_token_id", "vision_end_token_id", "tokenizer_padding_side",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """`vision_config`: a transformer over patches of `temporal_patch_size` frames, with rotary rows and columns."""

    depth: int = 32
    embed_dim: int = 1280
    hidden_size: int = 3584
    hidden_act: str = "quick_gelu"
    mlp_ratio: float = 4
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    rope_theta: float = 10000.0

    @property
    def head_size(self) -> int:
        """Channels of a head."""
        return self.embed_dim // self.num_heads

    @property
    def factor(self) -> int:
        """Pixels along a side that one token of the text stands for: frames' sides are multiples of it."""
        return self.patch_size * self.spatial_merge_size


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """`text_config`, or a flat file's fields of that name: a Qwen2 decoder.

    `mrope_section` says how many pairs of a head's channels turn with a token's time, row and column. `layer_types`
    None lets `use_sliding_window` and `max_window_layers` decide.
    """

    vocab_size: int = 152064
    hidden_size: int = 8192
    intermediate_size: int = 29568
    num_hidden_layers: int = 80
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-5
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 80
    layer_types: tuple[str, ...] | None = None
    rope_theta: float = 1000000.0
    mrope_section: tuple[int, ...] = (16, 24, 24)
    qkv_bias: ClassVar[bool] = True

    @property
    def head_size(self) -> int:
        """Channels of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How far back each layer looks; None is all the way."""
        window = self.sliding_window if self.use_sliding_window else None
        layers = range(self.num_hidden_layers)
        types = self.layer_types or tuple(_SLIDING if i >= self.max_window_layers else _FULL for i in layers)
        return tuple(window if kind == _SLIDING else None for kind in types)


_ROPE = ("rope_parameters", "rope_scaling", "rope_theta")
_TEXT_FIELDS = {field.name for field in dataclasses.fields(TextConfig)} - {"mrope_section"} | set(_ROPE)


@dataclasses.dataclass(frozen=True)
class Qwen2VLConfig:
    """The whole config.json.

    Attributes:
        vision, text: of the two parts.
        video_token_id: of the token whose places the video's features take.
    """

    vision: VisionConfig
    text: TextConfig
    video_token_id: int = 151656

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "Qwen2VLConfig":
        """The config from a parsed config.json; what it leaves out is transformers' default.

        Raises:
            UserError: a field or value that this port does not honour, by name.
        """
        nested = raw.get("text_config")
        # transformers reads the text's fields from one place or from the other, never from both
        text = {key: raw[key] for key in _TEXT_FIELDS if key in raw} if nested is None else nested
        rest = {key: raw[key] for key in raw if key not in _TEXT_FIELDS | {"vision_config", "text_config"}}
        top = read_fields(cls, rest, "config", _TOP_IGNORED)
        part = "config" if nested is None else "text_config"
        config = cls(_vision(raw.get("vision_config") or {}), _text(text, part), **top)
        _check_vision(config.vision)
        _check_text(config.text, part)
        _check_together(config)
        return config


def _vision(raw: Mapping[str, Any]) -> VisionConfig:
    part = "vision_config"
    values = {_VISION_NAMES.get(key, key): value for key, value in as_object(raw, part).items()}
    rope = _rope(values.pop("rope_parameters", None), f"{part}.rope_parameters", ("axial",), {"rope_theta"})
    return VisionConfig(**read_fields(VisionConfig, values | rope, part, _VISION_IGNORED))


def _text(raw: Mapping[str, Any], part: str) -> TextConfig:
    values = as_object(raw, part)
    outside = f"{part}.mrope_section"
    require("mrope_section" not in values, outside, "is read inside of rope_parameters only; move it there")
    given = {name: values.pop(name, None) for name in ("rope_scaling", "rope_parameters")}
    field = next((name for name in given if given[name]), "rope_parameters")
    rope = _rope(given[field], f"{part}.{field}", ("default", "mrope"), {"rope_theta", "mrope_section"})
    # null switches these off or leaves them to the default
    given = {k: v for k, v in values.items() if v is not None or k in ("sliding_window", "layer_types")}
    fields = read_fields(TextConfig, given | rope, part, BOOKKEEPING)
    if values.get("num_key_value_heads", 0) is None:
        fields["num_key_value_heads"] = fields.get("num_attention_heads", TextConfig.num_attention_heads)
    return TextConfig(**fields)


def _rope(raw: Any, field: str, types: tuple[str, ...], known: set[str]) -> dict[str, Any]:
    rope = as_object(raw or {}, field)
    for name in ("type", "rope_type"):
        kind = rope.pop(name, types[0])
        require(kind in types, field, f"{name} {kind!r} is not {' or '.join(types)}, which is all that is known here")
    odd = sorted(set(rope) - known)
    require(not odd, field, f"{', '.join(odd)} is not honoured by this model class; remove it from config.json")
    return rope


def _check_vision(vision: VisionConfig) -> None:
    part = "vision_config"
    sizes = ("embed_dim", "hidden_size", "num_heads", "patch_size", "spatial_merge_size", "temporal_patch_size")
    require_int(part, vision, sizes)
    require_int(part, vision, ("depth",), minimum=0)
    require(vision.in_channels == 3, f"{part}.in_channels", f"{vision.in_channels} is not 3 (RGB)")
    require(vision.embed_dim % vision.num_heads == 0, f"{part}.num_heads", f"does not divide {vision.embed_dim}")
    pairs = f"makes heads of {vision.head_size} channels; rotary rows and columns turn a multiple of 4"
    require(vision.head_size % 4 == 0, f"{part}.num_heads", pairs)
    for name in ("mlp_ratio", "rope_theta"):
        _positive(f"{part}.{name}", getattr(vision, name))
    _known_activation(part, vision.hidden_act)


def _check_text(text: TextConfig, part: str) -> None:
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    require_int(part, text, (*sizes, "max_position_embeddings"))
    require_int(part, text, ("num_hidden_layers", "max_window_layers"), minimum=0)
    heads, groups = text.num_attention_heads, text.num_key_value_heads
    require(text.hidden_size % heads == 0, f"{part}.num_attention_heads", f"{heads} does not divide {text.hidden_size}")
    require(heads % groups == 0, f"{part}.num_key_value_heads", f"{groups} does not divide {heads}")
    section = text.mrope_section
    whole = isinstance(section, tuple) and all(isinstance(n, int) and n >= 0 for n in section)
    fits = whole and 2 * sum(section) == text.head_size
    half = f"mrope_section {section!r} must sum to half a head's {text.head_size} channels"
    require(fits, f"{part}.rope_parameters", half)
    if text.use_sliding_window:
        require_int(part, text, ("sliding_window",))
    if text.layer_types is not None:
        right = len(text.layer_types) == text.num_hidden_layers and set(text.layer_types) <= {_FULL, _SLIDING}
        require(right, f"{part}.layer_types", f"must name {_FULL} or {_SLIDING} for each layer")
        windowed = text.use_sliding_window or _SLIDING not in text.layer_types
        require(windowed, f"{part}.layer_types", f"names {_SLIDING}, but use_sliding_window is false")
    _known_activation(part, text.hidden_act)
    for name in ("rms_norm_eps", "rope_theta"):
        _positive(f"{part}.{name}", getattr(text, name))


def _check_together(config: Qwen2VLConfig) -> None:
    require_int("config", config, ("video_token_id",), minimum=0)
    inside = config.video_token_id < config.text.vocab_size
    outside = f"{config.video_token_id} is outside of the vocabulary {config.text.vocab_size}"
    require(inside, "config.video_token_id", outside)
    widths = f"{config.vision.hidden_size} is not the text's hidden_size {config.text.hidden_size}"
    require(config.vision.hidden_size == config.text.hidden_size, "vision_config.hidden_size", widths)


def _known_activation(part: str, act: str) -> None:
    require(act in _ACTIVATIONS, f"{part}.hidden_act", f"{act!r} is not one of {', '.join(_ACTIVATIONS)}")


def _positive(field: str, value: Any) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1e12
    require(good, field, f"must be above zero, found {value!r:.60}")
