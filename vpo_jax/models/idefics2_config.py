"""The config.json of an Idefics2 (transformers `Idefics2Config`): vision, perceiver and text."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from vpo_jax.models.config_fields import BOOKKEEPING, as_object, read_fields, require, require_int

_ACTIVATIONS = ("gelu", "quick_gelu", "gelu_pytorch_tanh", "silu", "swish", "mish", "relu")
_TOP_IGNORED = BOOKKEEPING | {"vocab_size", "image_seq_len", "max_position_embeddings"}


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """`vision_config`: a SigLIP encoder whose position table is looked up by fractions of the image."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6

    @property
    def patches_per_side(self) -> int:
        """Side of the square table of positions."""
        return self.image_size // self.patch_size


@dataclasses.dataclass(frozen=True)
class PerceiverConfig:
    """`perceiver_config`: the resampler that makes `resampler_n_latents` tokens of an image's patches."""

    hidden_size: int
    rms_norm_eps: float
    hidden_act: str = "silu"
    resampler_n_latents: int = 64
    resampler_depth: int = 3
    resampler_n_heads: int = 16
    resampler_head_dim: int = 96
    num_key_value_heads: int = 4


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """`text_config`: a Mistral decoder. `head_dim` None is hidden_size / num_attention_heads."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096 * 32
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    sliding_window: int | None = 4096
    qkv_bias: ClassVar[bool] = False

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How far back each layer looks; None is all the way."""
        return (self.sliding_window,) * self.num_hidden_layers

    @property
    def head_size(self) -> int:
        """Channels of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


@dataclasses.dataclass(frozen=True)
class Idefics2Config:
    """The whole config.json.

    Attributes:
        vision, perceiver, text: of the three parts.
        image_token_id: of the token whose places the images' features take.
        original: the dict that was read.
    """

    vision: VisionConfig
    perceiver: PerceiverConfig
    text: TextConfig
    image_token_id: int = 32001
    original: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "Idefics2Config":
        """The config from a parsed config.json.

        Where `perceiver_config` names no `rms_norm_eps` the text's holds, as in the code that VideoScore was
        trained with; transformers 5 writes its own 1e-6 into the files that it saves, and then that holds.

        Raises:
            UserError: a field or value that this port does not honour, by name.
        """
        known = {"vision_config", "perceiver_config", "text_config"}
        top = read_fields(cls, {k: v for k, v in raw.items() if k not in known}, "config", _TOP_IGNORED)
        text = _text(raw.get("text_config"))
        parts = {name: raw.get(f"{name}_config") or {} for name in ("vision", "perceiver")}
        ignored = BOOKKEEPING
        vision = VisionConfig(**read_fields(VisionConfig, parts["vision"], "vision_config", ignored))
        fields = read_fields(PerceiverConfig, parts["perceiver"], "perceiver_config", ignored)
        fields = {"hidden_size": text.hidden_size, "rms_norm_eps": text.rms_norm_eps} | fields
        config = cls(vision, PerceiverConfig(**fields), text, **top, original=dict(raw))
        _check(config)
        return config

    def to_dict(self) -> dict[str, Any]:
        """What goes back into config.json: the dict that was read, or one made from the fields."""
        if self.original:
            return dict(self.original)
        text = dataclasses.asdict(self.text)
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": text.pop("rope_theta")}
        return {
            "architectures": ["Idefics2ForSequenceClassification"],
            "model_type": "idefics2",
            "image_token_id": self.image_token_id,
            "vision_config": dataclasses.asdict(self.vision),
            "perceiver_config": dataclasses.asdict(self.perceiver),
            "text_config": {"model_type": "mistral", **text},
        }


def _text(raw: Mapping[str, Any] | None) -> TextConfig:
    # transformers' values for an Idefics2 that says nothing about its text model
    values: dict[str, Any] = {"max_position_embeddings": 32768, "rms_norm_eps": 1e-5}
    values = values if raw is None else as_object(raw, "text_config")
    kind = values.get("model_type", "mistral")
    require(kind == "mistral", "text_config.model_type", f"{kind!r} is not mistral, the only text model known here")
    rope = values.pop("rope_parameters", None) or {}
    rope_type = rope.get("rope_type", "default")
    require(rope_type == "default", "text_config.rope_parameters", f"rope_type {rope_type!r} is not default")
    values |= {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    return TextConfig(**read_fields(TextConfig, values, "text_config", BOOKKEEPING))


def _check(config: Idefics2Config) -> None:
    vision, perceiver, text = config.vision, config.perceiver, config.text
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads")
    require_int("vision_config", vision, (*sizes, "num_channels", "image_size", "patch_size"))
    heads = ("resampler_n_heads", "resampler_head_dim", "num_key_value_heads")
    require_int("perceiver_config", perceiver, ("hidden_size", "resampler_n_latents", *heads))
    require_int("text_config", text, (*sizes, "num_key_value_heads", "vocab_size", "max_position_embeddings"))
    require_int("vision_config", vision, ("num_hidden_layers",), minimum=0)
    require_int("perceiver_config", perceiver, ("resampler_depth",), minimum=0)
    require_int("text_config", text, ("num_hidden_layers",), minimum=0)
    require_int("config", config, ("image_token_id",), minimum=0)
    for name in ("head_dim", "sliding_window"):
        if getattr(text, name) is not None:
            require_int("text_config", text, (name,))

    _divides("vision_config.num_attention_heads", vision.num_attention_heads, vision.hidden_size)
    _divides("perceiver_config.num_key_value_heads", perceiver.num_key_value_heads, perceiver.resampler_n_heads)
    _divides("text_config.num_key_value_heads", text.num_key_value_heads, text.num_attention_heads)
    if text.head_dim is None:
        _divides("text_config.num_attention_heads", text.num_attention_heads, text.hidden_size)
    require(text.head_size % 2 == 0, "text_config.head_dim", f"{text.head_size} is odd; rotary positions turn pairs")
    require(vision.num_channels == 3, "vision_config.num_channels", f"{vision.num_channels} is not 3 (RGB)")
    require(vision.patches_per_side > 0, "vision_config.patch_size", "is larger than image_size")
    widths = f"{perceiver.hidden_size} is not the text's hidden_size {text.hidden_size}"
    require(perceiver.hidden_size == text.hidden_size, "perceiver_config.hidden_size", widths)
    inside = config.image_token_id < text.vocab_size
    require(inside, "config.image_token_id", f"{config.image_token_id} is outside of the vocabulary {text.vocab_size}")
    acts = {
        "vision_config": vision.hidden_act,
        "perceiver_config": perceiver.hidden_act,
        "text_config": text.hidden_act,
    }
    for part, act in acts.items():
        require(act in _ACTIVATIONS, f"{part}.hidden_act", f"{act!r} is not one of {', '.join(_ACTIVATIONS)}")
    numbers = {
        "vision_config.layer_norm_eps": vision.layer_norm_eps,
        "perceiver_config.rms_norm_eps": perceiver.rms_norm_eps,
        "text_config.rms_norm_eps": text.rms_norm_eps,
        "text_config.rope_theta": text.rope_theta,
    }
    for field, value in numbers.items():
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1e12
        require(good, field, f"must be above zero, found {value!r:.60}")


def _divides(field: str, heads: int, whole: int) -> None:
    require(whole % heads == 0, field, f"{heads} does not divide {whole}")
