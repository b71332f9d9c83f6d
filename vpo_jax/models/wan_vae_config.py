"""vae/config.json of Wan (diffusers `AutoencoderKLWan`) as a frozen dataclass, and the scaling of its latents."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vpo_jax.models.config_fields import LARGEST, MOST_BLOCKS, read_fields, require, require_int

_MOST_RES_BLOCKS = 16
# diffusers encodes four frames at a time, which a third halving in time does not divide.
_MOST_HALVINGS_IN_TIME = 2
_SMALLEST_STD = 1e-12


@dataclasses.dataclass(frozen=True)
class AutoencoderKLWanConfig:
    """The fields of diffusers' vae/config.json, with the defaults of the torch class: Wan 2.1.

    A config written before `is_residual`, `patch_size` and `scale_factor_*` existed leaves them out.
    `dropout` and `clip_output` are carried for diffusers and change nothing here: the first is for training the
    autoencoder, and diffusers reads the second nowhere and always clips.
    """

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    dropout: float = 0.0
    latents_mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )  # fmt: skip
    latents_std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )  # fmt: skip
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int = 4
    scale_factor_spatial: int = 8
    clip_output: bool = True
    original: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "AutoencoderKLWanConfig":
        """The config from a parsed vae/config.json.

        Raises:
            UserError: a field or value that this port does not honour, or fields that contradict each other, by name.
        """
        config = cls(**read_fields(cls, raw, "vae"), original=dict(raw))
        _check(config)
        return config

    def to_dict(self) -> dict[str, Any]:
        """What goes back into vae/config.json: the dict that was read, or every field of a config made by hand."""
        if self.original:
            return dict(self.original)
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "original"}
        listed = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
        return {"_class_name": "AutoencoderKLWan", **listed}

    @property
    def patch(self) -> int:
        """Side of the square of pixels that becomes channels before the encoder; 1 where there is none."""
        return self.patch_size or 1

    @property
    def pixel_channels(self) -> int:
        """Channels of the videos: 3 in every published model."""
        return self.in_channels // self.patch**2

    @property
    def encoder_dims(self) -> tuple[int, ...]:
        """Channels before the encoder's blocks and after each."""
        return tuple(self.base_dim * factor for factor in (1, *self.dim_mult))

    @property
    def decoder_dims(self) -> tuple[int, ...]:
        """Channels before the decoder's blocks and after each."""
        factors = (self.dim_mult[-1], *self.dim_mult[::-1])
        return tuple((self.decoder_base_dim or self.base_dim) * factor for factor in factors)

    def latent_frames(self, frames: int) -> int:
        """Latent frames that the first `frames` frames of a video depend on: 1 + ceil((frames - 1) / 4) in Wan."""
        return 1 + math.ceil((frames - 1) / self.scale_factor_temporal)

    def pixel_frames(self, latent_frames: int) -> int:
        """Frames of a video of `latent_frames` latent frames: 1 + 4 (latent_frames - 1) in Wan."""
        return 1 + self.scale_factor_temporal * (latent_frames - 1)


def normalise_latents(latents: jax.Array, config: AutoencoderKLWanConfig) -> jax.Array:
    """What the transformer works on: (latents - latents_mean) / latents_std by channel, [..., z], float32."""
    return (latents - jnp.array(config.latents_mean, jnp.float32)) / jnp.array(config.latents_std, jnp.float32)


def denormalise_latents(latents: jax.Array, config: AutoencoderKLWanConfig) -> jax.Array:
    """What the decoder reads: latents * latents_std + latents_mean by channel, [..., z], float32."""
    return latents * jnp.array(config.latents_std, jnp.float32) + jnp.array(config.latents_mean, jnp.float32)


def _check(config: AutoencoderKLWanConfig) -> None:
    counts = ("base_dim", "z_dim", "num_res_blocks", "in_channels", "out_channels")
    require_int("vae", config, (*counts, "scale_factor_temporal", "scale_factor_spatial"))
    optional = [name for name in ("decoder_base_dim", "patch_size") if getattr(config, name) is not None]
    require_int("vae", config, optional)
    few = f"more than {_MOST_RES_BLOCKS} residual blocks are not supported; use fewer"
    require(config.num_res_blocks <= _MOST_RES_BLOCKS, "vae.num_res_blocks", few)
    require(not config.attn_scales, "vae.attn_scales", "attention in the blocks is not supported; use []")
    levels = len(config.dim_mult)
    require(0 < levels <= MOST_BLOCKS, "vae.dim_mult", f"needs 1 to {MOST_BLOCKS} entries")
    for dims in (config.encoder_dims, config.decoder_dims):
        right = min(config.dim_mult) > 0 and max(dims) <= LARGEST
        require(right, "vae.dim_mult", f"makes {list(dims)} channels; give factors above 0, and at most {LARGEST} each")
    flags = config.temperal_downsample
    one_less = f"needs one entry less than dim_mult ({levels - 1}), found {len(flags)}"
    require(len(flags) == levels - 1, "vae.temperal_downsample", one_less)
    halvings = (
        f"more than {_MOST_HALVINGS_IN_TIME} true entries are not supported, by diffusers neither; set some false"
    )
    require(sum(flags) <= _MOST_HALVINGS_IN_TIME, "vae.temperal_downsample", halvings)
    for name in ("in_channels", "out_channels"):
        value, square = getattr(config, name), config.patch**2
        right = value % square == 0 and value // square == config.pixel_channels
        message = (
            f"{value} is not patch_size squared ({square}) times the channels of a video; give {3 * square} for RGB"
        )
        require(right, f"vae.{name}", message)
    for name, scale, fields in (
        ("scale_factor_temporal", 2 ** sum(flags), "temperal_downsample makes"),
        ("scale_factor_spatial", config.patch * 2 ** (levels - 1), "dim_mult and patch_size make"),
    ):
        value = getattr(config, name)
        require(value == scale, f"vae.{name}", f"{value} where {fields} {scale}; set it to {scale}")
    if config.is_residual:
        _check_shortcuts(config)
    _check_statistics(config)


def _check_shortcuts(config: AutoencoderKLWanConfig) -> None:
    """Whether the shortcuts, which have no parameters, can join the channels before and after every block."""
    volumes = [8 if flag else 4 for flag in config.temperal_downsample]  # positions that become one
    down, up = config.encoder_dims, config.decoder_dims
    pairs = list(zip(down[:-1], down[1:], [*volumes, 1], strict=True))
    pairs += zip(up[1:-1], up[:-2], volumes[::-1], strict=True)  # the decoder's last block has no shortcut
    for one, other, volume in pairs:
        message = f"no shortcut joins the {one} and {other} channels of a residual block; use factors like [1, 2, 4, 4]"
        require(one * volume % other == 0, "vae.dim_mult", message)


def _check_statistics(config: AutoencoderKLWanConfig) -> None:
    for name in ("latents_mean", "latents_std"):
        found = len(getattr(config, name))
        message = f"needs one number a latent channel (z_dim {config.z_dim}), found {found}; take the checkpoint's"
        require(found == config.z_dim, f"vae.{name}", message)
    smallest = min(config.latents_std)
    require(smallest >= _SMALLEST_STD, "vae.latents_std", f"{smallest} is not above zero; take the checkpoint's")
