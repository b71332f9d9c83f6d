"""Layers of Wan's autoencoder, causal in time: one call takes any number of frames and goes on where the last ended.

Every layer maps (x, past) to (y, kept). `past` is None where x begins with the first frame of a video; else it is
what the layer kept after the frames before. `kept` has the same keys, shapes and dtypes after every call, so that a
loop can carry it; in one call on a whole video nothing reads it, and XLA drops it. Keys are PyTorch's dotted names
("resnets.0.conv1"), below the layer that is called.
"""

from collections.abc import Sequence
from typing import Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from vpo_jax.models.attention import attention
from vpo_jax.models.layers import Conv
from vpo_jax.runtime.types import DType

Cache = dict[str, jax.Array]


class Layer(Protocol):
    """What `chain` runs."""

    name: str | None

    def __call__(self, x: jax.Array, past: Cache | None) -> tuple[jax.Array, Cache]:
        """x [B, T, H, W, C] and what was kept before to y and what is kept now."""


def chain(layers: Sequence[Layer], x: jax.Array, past: Cache | None) -> tuple[jax.Array, Cache]:
    """The layers one after the other; each keeps its frames under its name."""
    kept: Cache = {}
    for layer in layers:
        prefix = f"{layer.name}."
        own = None if past is None else {k.removeprefix(prefix): v for k, v in past.items() if k.startswith(prefix)}
        x, later = layer(x, own)
        kept |= {prefix + key: frames for key, frames in later.items()}
    return x, kept


def causal_conv(
    x: jax.Array,
    past: Cache | None,
    features: int,
    dtype: DType,
    name: str,
    window: tuple[int, int, int] = (3, 3, 3),
) -> tuple[jax.Array, Cache]:
    """A convolution, a submodule `name` of the caller, over a frame, the two before it and their pixels.

    Two frames of zeros stand before the first frame. [B, T, H, W, C] -> [B, T, H, W, features]; T may be 0.
    Keeps the last two frames of its input.
    """
    x = x.astype(dtype)
    sides = [(size // 2, size // 2) for size in window[1:]]
    if past is not None:
        x = jnp.concatenate([past[name], x], axis=1)
    conv = Conv(features, window, padding=[(2 if past is None else 0, 0), *sides], dtype=dtype, name=name)
    last = x[:, -2:]
    zeros = [(0, 0), (2 - last.shape[1], 0), (0, 0), (0, 0), (0, 0)]
    return conv(x), {name: jnp.pad(last, zeros)}


class ChannelNorm(nn.Module):
    """x / max(||x||, 1e-12) * sqrt(C) * gamma over the channels, in float32.

    No epsilon is added under the root: with one, inputs of a small scale would come out far too small.

    Attributes:
      trailing: axes of size 1 that PyTorch's gamma has after its channels: 3, or 2 in attention.
    """

    dtype: DType = jnp.float32
    trailing: int = 3

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [..., C]
        channels = x.shape[-1]
        gamma = self.param("gamma", nn.initializers.ones, (channels, *(1,) * self.trailing))
        x = x.astype(jnp.float32)
        # The bound is inside the root, so that the gradient at x = 0 is finite.
        factor = jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))
        return (x * factor * (channels**0.5 * gamma.reshape(channels))).astype(self.dtype)


class Resnet(nn.Module):
    """Two normalised causal convolutions and a shortcut (diffusers `WanResidualBlock`)."""

    features: int
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, past: Cache | None) -> tuple[jax.Array, Cache]:
        h = nn.silu(ChannelNorm(self.dtype, name="norm1")(x))
        h, first = causal_conv(h, past, self.features, self.dtype, "conv1")
        h = nn.silu(ChannelNorm(self.dtype, name="norm2")(h))
        h, second = causal_conv(h, past, self.features, self.dtype, "conv2")
        if x.shape[-1] != self.features:
            x = Conv(self.features, (1, 1, 1), dtype=self.dtype, name="conv_shortcut")(x)
        return x + h, first | second


class FrameAttention(nn.Module):
    """Self-attention over the pixels of each frame with one head as wide as the channels; keeps nothing."""

    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, past: Cache | None) -> tuple[jax.Array, Cache]:
        batch, frames, height, width, channels = x.shape
        h = ChannelNorm(self.dtype, trailing=2, name="norm")(x)
        h = Conv(3 * channels, (1, 1), dtype=self.dtype, name="to_qkv")(h)
        h = h.reshape(batch, frames, height * width, 1, 3 * channels)
        query, key, value = jnp.split(h, 3, axis=-1)  # [B, T, H*W, 1, C]
        h = attention(query, key, value).reshape(x.shape)
        return x + Conv(channels, (1, 1), dtype=self.dtype, name="proj")(h), {}


class Middle(nn.Module):
    """Resnet, attention, resnet."""

    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, past: Cache | None) -> tuple[jax.Array, Cache]:
        before, after = (Resnet(x.shape[-1], self.dtype, name=f"resnets.{i}") for i in range(2))
        return chain([before, FrameAttention(self.dtype, name="attentions.0"), after], x, past)


class Downsample(nn.Module):
    """Half the height and width and, where `temporal`, half the frames after the first, which stays by itself.

    Padding in space is on the far sides only. In time a frame out is made of three frames in, the last one even:
    (0), (0 1 2), (2 3 4), ... Keeps the last frame.
    """

    temporal: bool
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, past: Cache | None) -> tuple[jax.Array, Cache]:
        space = Conv(x.shape[-1], (3, 3), (2, 2), ((0, 1), (0, 1)), dtype=self.dtype, name="resample.1")
        x = space(x)
        if not self.temporal:
            return x, {}
        time = Conv(x.shape[-1], (3, 1, 1), (2, 1, 1), dtype=self.dtype, name="time_conv")
        kept = {"time_conv": x[:, -1:]}
        if past is None:
            return jnp.concatenate([x[:, :1], time(x)], axis=1), kept
        return time(jnp.concatenate([past["time_conv"], x], axis=1)), kept


class Upsample(nn.Module):
    """Twice the height and width and, where `temporal`, two frames for every frame but the first.

    The convolution in time never sees the first frame: zeros stand before the second.
    """

    features: int
    temporal: bool
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, past: Cache | None) -> tuple[jax.Array, Cache]:
        kept: Cache = {}
        if self.temporal:
            first, rest = (x[:, :1], x[:, 1:]) if past is None else (x[:, :0], x)
            channels = x.shape[-1]
            pairs, kept = causal_conv(rest, past, 2 * channels, self.dtype, "time_conv", (3, 1, 1))
            batch, frames, height, width, _ = pairs.shape
            pairs = jnp.moveaxis(pairs.reshape(batch, frames, height, width, 2, channels), 4, 2)
            x = jnp.concatenate([first, pairs.reshape(batch, 2 * frames, height, width, channels)], axis=1)
        batch, frames, height, width, channels = x.shape
        x = jnp.broadcast_to(x[:, :, :, None, :, None], (batch, frames, height, 2, width, 2, channels))
        x = x.reshape(batch, frames, 2 * height, 2 * width, channels)
        return Conv(self.features, (3, 3), padding=1, dtype=self.dtype, name="resample.1")(x), kept


class ResidualDown(nn.Module):
    """Resnets and a downsampler, with a shortcut of means (diffusers `WanResidualDownBlock`, Wan 2.2).

    Attributes:
      temporal: as in `Downsample`; None where the block does not resample.
    """

    features: int
    num_res_blocks: int
    temporal: bool | None
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, past: Cache | None) -> tuple[jax.Array, Cache]:
        layers: list[Layer] = [
            Resnet(self.features, self.dtype, name=f"resnets.{i}") for i in range(self.num_res_blocks)
        ]
        if self.temporal is not None:
            layers.append(Downsample(self.temporal, self.dtype, name="downsampler"))
        y, kept = chain(layers, x, past)
        factor = 1 if self.temporal is None else 2
        return y + average_down(x, self.features, 2 if self.temporal else 1, factor), kept


class Up(nn.Module):
    """Resnets and an upsampler (diffusers `WanUpBlock`, and with `residual` `WanResidualUpBlock`).

    Attributes:
      temporal: as in `Upsample`; None where the block does not resample.
      residual: Wan 2.2's: a shortcut of copies, and an upsampler that keeps the channels. Wan 2.1's halves them.
    """

    features: int
    num_res_blocks: int
    temporal: bool | None
    residual: bool
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, past: Cache | None) -> tuple[jax.Array, Cache]:
        layers: list[Layer] = [
            Resnet(self.features, self.dtype, name=f"resnets.{i}") for i in range(self.num_res_blocks + 1)
        ]
        if self.temporal is None:
            return chain(layers, x, past)
        features, name = (self.features, "upsampler") if self.residual else (self.features // 2, "upsamplers.0")
        layers.append(Upsample(features, self.temporal, self.dtype, name=name))
        y, kept = chain(layers, x, past)
        if not self.residual:
            return y, kept
        return y + duplicate_up(x, self.features, 2 if self.temporal else 1, 2, past is None), kept


def average_down(x: jax.Array, features: int, time: int, space: int) -> jax.Array:
    """Means over blocks of `time` x `space` x `space` positions and neighbouring channels (diffusers `AvgDown3D`).

    [B, T, H, W, C] -> [B, ceil(T / time), H / space, W / space, features]; zeros stand in front of an odd T.
    """
    x = jnp.pad(x, [(0, 0), (-x.shape[1] % time, 0), (0, 0), (0, 0), (0, 0)])
    batch, frames, height, width, channels = x.shape
    shape = (frames // time, height // space, width // space)
    x = x.reshape(batch, shape[0], time, shape[1], space, shape[2], space, channels)
    x = x.transpose(0, 1, 3, 5, 7, 2, 4, 6)  # [B, t, h, w, C, time, space, space]
    return x.reshape(batch, *shape, features, -1).mean(-1)


def duplicate_up(x: jax.Array, features: int, time: int, space: int, first: bool) -> jax.Array:
    """Copies of every position at `time` x `space` x `space` positions (diffusers `DupUp3D`).

    [B, T, H, W, C] -> [B, T time, H space, W space, features], without the first `time` - 1 frames where x begins
    with the first frame of a video.
    """
    batch, frames, height, width, channels = x.shape
    x = jnp.repeat(x, features * time * space**2 // channels, axis=-1)
    x = x.reshape(batch, frames, height, width, features, time, space, space)
    x = x.transpose(0, 1, 5, 2, 6, 3, 7, 4)  # [B, T, time, H, space, W, space, features]
    x = x.reshape(batch, frames * time, height * space, width * space, features)
    return x[:, time - 1 :] if first else x


def patchify(x: jax.Array, patch: int) -> jax.Array:
    """Squares of pixels to channels in the order (c, column, row): [B, T, H, W, C] -> [B, T, H/p, W/p, C p p]."""
    batch, frames, height, width, channels = x.shape
    x = x.reshape(batch, frames, height // patch, patch, width // patch, patch, channels)
    x = x.transpose(0, 1, 2, 4, 6, 5, 3)  # [B, T, H/p, W/p, C, column, row]
    return x.reshape(batch, frames, height // patch, width // patch, channels * patch**2)


def unpatchify(x: jax.Array, patch: int) -> jax.Array:
    """The inverse of `patchify`: [B, T, h, w, C p p] -> [B, T, h p, w p, C]."""
    batch, frames, height, width, channels = x.shape
    x = x.reshape(batch, frames, height, width, channels // patch**2, patch, patch)
    x = x.transpose(0, 1, 2, 6, 3, 5, 4)  # [B, T, h, row, w, column, C]
    return x.reshape(batch, frames, height * patch, width * patch, channels // patch**2)
