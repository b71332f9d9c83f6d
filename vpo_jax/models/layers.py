"""Layers that every model here is made of: parameters in float32, computation in `dtype`, room for adapters.

A submodule carries the name that PyTorch gives it ("resnets.0", "to_out.0"), so a path in the tree, joined
with dots, is the checkpoint's key. Leaves are `kernel` (input before output, space before both), `bias`,
`scale` and `embedding`.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.mesh import frames_are_sharded
from vpo_jax.runtime.types import DType

# PyTorch's default for Linear and Conv: uniform within 1 / sqrt(fan_in).
default_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "swish": nn.silu,
    "mish": lambda x: x * jnp.tanh(nn.softplus(x)),
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "relu": nn.relu,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The activation that diffusers and transformers call `name`.

    Raises:
      UserError: an unknown name, with the known ones.
    """
    if name not in _ACTIVATIONS:
        raise UserError(f"act_fn: unknown activation {name!r}; known: {', '.join(sorted(_ACTIVATIONS))}")
    return _ACTIVATIONS[name]


def timestep_embedding(timesteps: jax.Array, dim: int) -> jax.Array:
    """Sinusoids [cos, sin] of the timestep at frequencies 10000^(-i / (dim / 2)), float32 [B, dim]."""
    half = dim // 2
    frequencies = np.exp(-np.log(10000.0) * np.arange(half, dtype=np.float32) / half).astype(np.float32)
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies
    return jnp.pad(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1), ((0, 0), (0, dim % 2)))


def adapter(module: nn.Module, dtype: DType) -> tuple[jax.Array, jax.Array]:
    """The module's low-rank pair (A, B) in the computation's dtype."""
    down: jax.Array = module.get_variable("lora", "lora_A")
    up: jax.Array = module.get_variable("lora", "lora_B")
    return down.astype(dtype), up.astype(dtype)


def multiply(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., C] times a matrix [C, D], with all leading axes as one unless the mesh shards two of them.

    The gradient of the matrix is then one plain product too; over several axes XLA transposes their contraction by
    copying, which takes five times as long on a CPU.
    """
    if frames_are_sharded():
        return x @ kernel
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


class Dense(nn.Module):
    """y = x W + b, and + scale * (x A) B where an adapter is given.

    Attributes:
      features: size of the last axis of the output.
      use_bias: whether b exists.
      dtype: of the computation; parameters are float32.
      lora_scale: alpha / rank of the adapter in the `lora` collection, if there is one.
    """

    features: int
    use_bias: bool = True
    dtype: DType = jnp.float32
    lora_scale: float = 1.0
    kernel_init: Callable[..., jax.Array] = default_kernel_init

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        x = x.astype(self.dtype)
        y = multiply(x, kernel.astype(self.dtype))
        if self.has_variable("lora", "lora_A"):
            down, up = adapter(self, self.dtype)  # [in, r], [r, out]
            y = y + self.lora_scale * multiply(multiply(x, down), up)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return y


class Conv(nn.Module):
    """Convolution over the last axes but the channels', with an adapter where one is given.

    What stands before them is batch: [B, H, W, C] and [B, F, H, W, C] are both convolved frame by frame with a kernel
    of two sizes.

    Attributes:
      features: output channels.
      kernel_size: one size an axis; its length says how many axes are convolved.
      strides: one an axis; 1 if left out.
      padding: (low, high) an axis, or one int for all; as in PyTorch, zeros.
      use_bias, dtype, lora_scale: as in `Dense`.
    """

    features: int
    kernel_size: Sequence[int]
    strides: Sequence[int] | None = None
    padding: Sequence[tuple[int, int]] | int = 0
    use_bias: bool = True
    dtype: DType = jnp.float32
    lora_scale: float = 1.0
    kernel_init: Callable[..., jax.Array] = default_kernel_init

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (*self.kernel_size, x.shape[-1], self.features))
        x = x.astype(self.dtype)
        y = self._convolve(x, kernel)
        if self.has_variable("lora", "lora_A"):
            down, up = adapter(self, self.dtype)  # [*kernel_size, in, r], [r, out]
            y = y + self.lora_scale * multiply(self._convolve(x, down), up)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return y

    def _convolve(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        lead = x.shape[: x.ndim - len(self.kernel_size) - 1]
        strides = tuple(self.strides or (1,) * len(self.kernel_size))
        padding = self.padding
        if isinstance(padding, int):
            padding = [(padding, padding)] * len(self.kernel_size)
        if len(lead) == 2 and frames_are_sharded():
            # The second axis of the batch is convolved with a kernel of size 1, so that its sharding stays as it is.
            kernel, strides, padding = kernel[None], (1, *strides), [(0, 0), *padding]
        else:
            x = x.reshape(math.prod(lead), *x.shape[len(lead) :])  # -1 has no meaning for a video without frames
        kernel = kernel.astype(self.dtype)
        if len(strides) == 3 and len(lead) == 1:
            y = jax.lax.platform_dependent(
                x,
                kernel,
                cpu=partial(_convolve_by_frames, strides=strides, padding=padding),
                default=partial(_convolve, strides=strides, padding=padding),
            )
        else:
            y = _convolve(x, kernel, strides, padding)
        return y.reshape(*lead, *y.shape[y.ndim - len(self.kernel_size) - 1 :])


def _convolve(x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Sequence[tuple[int, int]]) -> jax.Array:
    axes = "DHW"[-len(strides) :]
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=strides,
        padding=padding,
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
    )


def _convolve_by_frames(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Sequence[tuple[int, int]]
) -> jax.Array:
    """The same over three axes, with a window's frames as channels: [B, F, H, W, C].

    XLA's CPU backend is four to six times as fast over two axes as over three, gradients included.
    """
    window, every = kernel.shape[0], strides[0]
    x = jnp.pad(x, [(0, 0), padding[0], (0, 0), (0, 0), (0, 0)])
    frames = (x.shape[1] - window) // every + 1
    parts = [x[:, i : i + (frames - 1) * every + 1 : every] for i in range(window)]
    joined = jnp.concatenate(parts, axis=-1)  # [B, f, H, W, window * C]
    kernel = jnp.moveaxis(kernel, 0, 2).reshape(*kernel.shape[1:3], -1, kernel.shape[-1])
    y = _convolve(joined.reshape(-1, *joined.shape[2:]), kernel, strides[1:], padding[1:])
    return y.reshape(*joined.shape[:2], *y.shape[1:])


class GroupNorm(nn.Module):
    """Group normalisation over every axis but the batch's and, within a group, the last; statistics in float32.

    [B, F, H, W, C] is normalised frame by frame with two axes of batch, all frames of a video jointly with one.
    """

    num_groups: int
    epsilon: float = 1e-5
    dtype: DType = jnp.float32
    batch_axes: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        flat = x.astype(jnp.float32).reshape(*x.shape[: self.batch_axes], -1, channels)

        def spread(y: jax.Array) -> jax.Array:
            # Channels stay the last axis throughout: reducing them within a group first is ten times slower on a CPU.
            groups = y.reshape(*y.shape[:-1], self.num_groups, -1).mean(-1)
            return jnp.repeat(groups, channels // self.num_groups, -1)[..., None, :]

        centred = flat - spread(flat.mean(-2))
        factor = jax.lax.rsqrt(spread(jnp.square(centred).mean(-2)) + self.epsilon) * scale
        return (centred * factor + bias).reshape(x.shape).astype(self.dtype)


def standardise(x: jax.Array, epsilon: float) -> jax.Array:
    """The last axis with mean 0 and variance 1, in float32: layer normalisation without parameters."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + epsilon)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis; statistics in float32."""

    epsilon: float = 1e-5
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return (standardise(x, self.epsilon) * scale + bias).astype(self.dtype)


class RMSNorm(nn.Module):
    """Division by the root mean square of the last axis; statistics in float32."""

    epsilon: float = 1e-6
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        factor = jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
        return (x * factor * scale).astype(self.dtype)


class GatedFeedForward(nn.Module):
    """down(act(gate(x)) * up(x)), without biases, as in language models."""

    hidden: int
    features: int
    act: str
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [..., C] -> [..., features]
        gate, up = (
            Dense(self.hidden, use_bias=False, dtype=self.dtype, name=name)(x) for name in ("gate_proj", "up_proj")
        )
        return Dense(self.features, use_bias=False, dtype=self.dtype, name="down_proj")(activation(self.act)(gate) * up)
