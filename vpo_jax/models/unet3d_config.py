"""The config of diffusers' UNet3DConditionModel."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vpo_jax.models.config_fields import MOST_BLOCKS, read_fields, require, require_int, require_positive
from vpo_jax.models.layers import activation

_DOWN_BLOCKS = ("CrossAttnDownBlock3D", "DownBlock3D")
_UP_BLOCKS = ("CrossAttnUpBlock3D", "UpBlock3D")


@dataclasses.dataclass(frozen=True)
class UNet3DConfig:
    """The fields of diffusers' UNet3DConditionModel, with its defaults, and two of VideoCrafter2's.

    `attention_head_dim` is the true size of a head; diffusers' blocks call it the number of heads. `fps_cond` adds an
    embedding of the frame rate to the timestep's, `fps` is the rate where a call names none. diffusers ignores both
    with a warning and keeps them in the config.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock3D",) * 3 + ("DownBlock3D",)
    up_block_types: tuple[str, ...] = ("UpBlock3D",) + ("CrossAttnUpBlock3D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1.0
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1024
    attention_head_dim: int = 64
    fps_cond: bool = False
    fps: float = 16  # lvdm's default

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "UNet3DConfig":
        """The config of a diffusers `unet/config.json`.

        Raises:
          UserError: a field, or a value of one, that the model does not honour.
        """
        self = cls(**read_fields(cls, config, "unet"))
        self._check()
        return self

    def _check(self) -> None:
        require_int("unet", self, ("in_channels", "out_channels", "layers_per_block", "norm_num_groups"))
        require_int("unet", self, ("cross_attention_dim", "attention_head_dim"))
        require(isinstance(self.fps_cond, bool), "unet.fps_cond", f"must be true or false, found {self.fps_cond!r}")
        number = isinstance(self.fps, int | float) and not isinstance(self.fps, bool) and self.fps > 0
        require(number, "unet.fps", f"must be a number above 0, found {self.fps!r}")
        stages = len(self.block_out_channels)
        for name, known in (("down_block_types", _DOWN_BLOCKS), ("up_block_types", _UP_BLOCKS)):
            types = getattr(self, name)
            require(len(types) == stages, f"unet.{name}", f"needs as many entries as block_out_channels ({stages})")
            for block in types:
                require(block in known, f"unet.{name}", f"{block!r} is not supported; use one of {', '.join(known)}")
        require_positive("unet", self, ("norm_eps", "mid_block_scale_factor"))
        require(0 < stages <= MOST_BLOCKS, "unet.block_out_channels", f"needs 1 to {MOST_BLOCKS} entries")
        for channels in self.block_out_channels:
            require(channels > 0, "unet.block_out_channels", f"{channels} is no number of channels")
            divides = channels % self.norm_num_groups == 0
            require(divides, "unet.norm_num_groups", f"{self.norm_num_groups} does not divide {channels} channels")
        activation(self.act_fn)
