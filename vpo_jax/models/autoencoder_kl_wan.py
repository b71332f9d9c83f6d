"""The video autoencoder of Wan 2.1 and 2.2 (diffusers `AutoencoderKLWan`) in Flax linen, channel-last.

It is causal: a latent frame depends on the frames before it only, and so does a decoded frame. The first frame has a
latent of its own, every four frames after it (`scale_factor_temporal`) share one. Module names are torch's dotted
names, so a parameter's path joined with "." is its key in the checkpoint.

Temporary memory of one video in float32, in GB, as XLA plans it for a CPU (half in bfloat16), by `chunk`:

                                          decode            encode
    chunk                                 0     1     4     0     1     4
    Wan 2.1, 81 frames of 480 x 832      49.8   7.2  14.6  49.8   5.3  12.7
    Wan 2.2, 121 frames of 704 x 1280   139.7  15.1  34.5  87.4   5.6  14.3

With `chunk` the decoder carries two frames of every causal convolution's input: 3.8 and 6.4 of these GB. The video
itself is 0.4 and 1.3.
"""

from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from vpo_jax.models.layers import Conv
from vpo_jax.models.wan_vae_config import AutoencoderKLWanConfig
from vpo_jax.models.wan_vae_layers import (
    Cache,
    ChannelNorm,
    Downsample,
    Layer,
    Middle,
    ResidualDown,
    Resnet,
    Up,
    causal_conv,
    chain,
    patchify,
    unpatchify,
)
from vpo_jax.runtime.types import DType


class Encoder(nn.Module):
    """Frames to the mean and log variance of their latents, before `quant_conv`."""

    config: AutoencoderKLWanConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, video: jax.Array, past: Cache | None) -> tuple[jax.Array, Cache]:  # [B,F,H,W,3] -> [B,f,h,w,2z]
        config = self.config
        x = patchify(video, config.patch)
        x, first = causal_conv(x, past, config.base_dim, self.dtype, "conv_in")
        x, between = chain([*self._blocks(), Middle(self.dtype, name="mid_block")], x, past)
        x = nn.silu(ChannelNorm(self.dtype, name="norm_out")(x))
        x, last = causal_conv(x, past, 2 * config.z_dim, self.dtype, "conv_out")
        return x, first | between | last

    def _blocks(self) -> list[Layer]:
        config = self.config
        blocks: list[Layer] = []
        for features, temporal in zip(config.encoder_dims[1:], (*config.temperal_downsample, None), strict=True):
            name = f"down_blocks.{len(blocks)}"
            if config.is_residual:
                blocks.append(ResidualDown(features, config.num_res_blocks, temporal, self.dtype, name=name))
                continue
            for _ in range(config.num_res_blocks):
                blocks.append(Resnet(features, self.dtype, name=f"down_blocks.{len(blocks)}"))
            if temporal is not None:
                blocks.append(Downsample(temporal, self.dtype, name=f"down_blocks.{len(blocks)}"))
        return blocks


class Decoder(nn.Module):
    """Latents, after `post_quant_conv`, to frames."""

    config: AutoencoderKLWanConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, past: Cache | None) -> tuple[jax.Array, Cache]:  # [B,f,h,w,z] -> [B,F,H,W,3]
        config, dims = self.config, self.config.decoder_dims
        x, first = causal_conv(x, past, dims[0], self.dtype, "conv_in")
        flags = (*config.temperal_downsample[::-1], None)
        blocks = [
            Up(features, config.num_res_blocks, temporal, config.is_residual, self.dtype, name=f"up_blocks.{i}")
            for i, (features, temporal) in enumerate(zip(dims[1:], flags, strict=True))
        ]
        x, between = chain([Middle(self.dtype, name="mid_block"), *blocks], x, past)
        x = nn.silu(ChannelNorm(self.dtype, name="norm_out")(x))
        x, last = causal_conv(x, past, config.out_channels, self.dtype, "conv_out")
        return unpatchify(x, config.patch), first | between | last


class AutoencoderKLWan(nn.Module):
    """Videos to latents and back; `latents_mean` and `latents_std` are not applied here, the pipeline does that.

    Attributes:
      chunk: 0 for all frames in one pass; n for the first frame and then n latent frames at a time in one compiled
        loop, which gives the same numbers. Memory and compile time then do not grow with the length of a video, but
        for the video and its latents. Use 0 where the mesh shards frames: a loop over them would gather them.
    """

    config: AutoencoderKLWanConfig
    dtype: DType = jnp.float32
    chunk: int = 0

    def setup(self) -> None:
        if self.chunk < 0:
            raise ValueError(f"chunk: {self.chunk} is not a number of latent frames; give 0 for one pass, or more")
        channels = self.config.z_dim
        self.encoder = Encoder(self.config, self.dtype)
        self.decoder = Decoder(self.config, self.dtype)
        self.quant_conv = Conv(2 * channels, (1, 1, 1), dtype=self.dtype)
        self.post_quant_conv = Conv(channels, (1, 1, 1), dtype=self.dtype)

    def encode(self, video: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and log variance of the latents, each [B, f, h, w, z], of a video [B, F, H, W, 3] in [-1, 1].

        f = 1 + (F - 1) / scale_factor_temporal; h and w are H and W over scale_factor_spatial. The log variance is
        clipped to [-30, 20] as in diffusers' `DiagonalGaussianDistribution`.

        Raises:
            ValueError: a number of frames, which diffusers would silently lower, or a size that has no latents.
        """
        _check_size(video.shape, self.config)
        moments = self.quant_conv(self._run(self.encoder, video, self.config.scale_factor_temporal))
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def decode(self, latents: jax.Array, num_frames: int | None = None, clip: bool = True) -> jax.Array:
        """The video [B, F, H, W, 3] of latents [B, f, h, w, z], clipped to [-1, 1] as in diffusers unless told not to.

        F = 1 + scale_factor_temporal (f - 1), or `num_frames`: the first ones of the same video, for which only the
        latent frames that they depend on are decoded.

        Raises:
            ValueError: more frames than the latents have, or none.
        """
        most = self.config.pixel_frames(latents.shape[1])
        frames = most if num_frames is None else num_frames
        if not 1 <= frames <= most:
            raise ValueError(f"num_frames: {frames} of a video that has {most}; give 1 to {most}")
        latents = self.post_quant_conv(latents[:, : self.config.latent_frames(frames)])
        video = self._run(self.decoder, latents, 1)[:, :frames]
        return jnp.clip(video, -1.0, 1.0) if clip else video

    def _run(self, module: Encoder | Decoder, x: jax.Array, rate: int) -> jax.Array:
        """All of x [B, T, ...] through the encoder or the decoder; `rate` frames of x belong to a latent frame."""
        if self.chunk == 0 or self.is_initializing():
            return module(x, None)[0]
        # A pure function of the parameters, which the loop reads and does not carry.
        unbound, variables = module.unbind()

        def step(part: jax.Array, past: Cache | None) -> tuple[jax.Array, Cache]:
            return cast(tuple[jax.Array, Cache], unbound.apply(variables, part, past))

        def body(past: Cache, start: jax.Array) -> tuple[Cache, jax.Array]:
            y, kept = step(jax.lax.dynamic_slice_in_dim(x, start, size, axis=1), past)
            return kept, y

        size = rate * self.chunk
        head = 1 + (x.shape[1] - 1) % size  # the remainder goes with the first frame
        first, kept = step(x[:, :head], None)
        starts = jnp.arange(head, x.shape[1], size)
        if not len(starts):
            return first
        rest = jnp.moveaxis(jax.lax.scan(body, kept, starts)[1], 0, 1)  # [B, steps, t, ...]
        return jnp.concatenate([first, rest.reshape(rest.shape[0], -1, *rest.shape[3:])], axis=1)

    def __call__(self, video: jax.Array) -> jax.Array:
        """The reconstruction from the latents' mean: touches every parameter, so `init` makes them all."""
        return self.decode(self.encode(video)[0])


def _check_size(shape: tuple[int, ...], config: AutoencoderKLWanConfig) -> None:
    frames, height, width = shape[1:4]
    nearest = config.pixel_frames(config.latent_frames(frames))
    if frames != nearest:
        lower = nearest - config.scale_factor_temporal
        raise ValueError(
            f"video: {frames} frames have no whole number of latent frames; give {max(lower, 1)} or {nearest}"
        )
    scale = config.scale_factor_spatial
    divisor = scale if config.is_residual else config.patch
    if min(height, width) < scale or height % divisor or width % divisor:
        raise ValueError(f"video: {height} x {width} pixels; give multiples of {scale}")
