"""The config of diffusers' WanTransformer3DModel, text to video."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from vpo_jax.models.config_fields import read_fields, require, require_int, require_positive

_QK_NORM = "rms_norm_across_heads"
_IMAGE_TO_VIDEO = ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len")


@dataclasses.dataclass(frozen=True)
class WanTransformerConfig:
    """The fields of diffusers' WanTransformer3DModel, with its defaults.

    `out_channels` null is `in_channels`. `qk_norm` has one value: diffusers normalises whatever it says. The three
    fields of image to video (`image_dim`, `added_kv_proj_dim`, `pos_embed_seq_len`) are null.
    """

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int | None = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    qk_norm: str = _QK_NORM
    eps: float = 1e-6
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None
    rope_max_seq_len: int = 1024
    pos_embed_seq_len: int | None = None
    original: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "WanTransformerConfig":
        """The config of a parsed transformer/config.json.

        Raises:
          UserError: a field or value that this port does not honour, by name.
        """
        config = cls(**read_fields(cls, raw, "transformer"), original=dict(raw))
        _check(config)
        return config

    def to_dict(self) -> dict[str, Any]:
        """What goes back into transformer/config.json: the dict that was read, or one made from the fields."""
        if self.original:
            return dict(self.original)
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "original"}
        return {"_class_name": "WanTransformer3DModel", **fields, "patch_size": list(self.patch_size)}

    @property
    def width(self) -> int:
        """Size D of a token: heads times the size of a head."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def channels_out(self) -> int:
        """Channels of the prediction."""
        return self.out_channels or self.in_channels

    @property
    def patch_volume(self) -> int:
        """Latent positions of a token."""
        return math.prod(self.patch_size)


def _check(config: WanTransformerConfig) -> None:
    counts = ("num_attention_heads", "attention_head_dim", "in_channels", "text_dim", "freq_dim", "ffn_dim")
    require_int("transformer", config, (*counts, "num_layers", "rope_max_seq_len"))
    good = config.out_channels is None or config.out_channels > 0
    require(good, "transformer.out_channels", f"must be above zero or null, found {config.out_channels}")
    good = all(size > 0 for size in config.patch_size)
    require(good, "transformer.patch_size", f"must be three sizes above zero, found {list(config.patch_size)}")
    good = config.attention_head_dim % 2 == 0
    require(good, "transformer.attention_head_dim", f"must be even, found {config.attention_head_dim}")
    good = config.qk_norm == _QK_NORM
    require(good, "transformer.qk_norm", f"{config.qk_norm!r} is not supported; only {_QK_NORM!r} is")
    require_positive("transformer", config, ("eps",))
    for name in _IMAGE_TO_VIDEO:
        fix = "image to video is not supported; use the checkpoint of a text-to-video model"
        require(getattr(config, name) is None, f"transformer.{name}", fix)
