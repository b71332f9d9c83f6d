"""Frame numbers for a UNet3DConditionModel that is trained from nothing.

That UNet has no embedding of the frame index. The order of frames reaches it through the zero padding of its
temporal convolutions alone, and their last layers start at zero: to a fresh one a video is a set of frames, and
"moving left" says no more than "moving right". `wind` gives one group of channels of a temporal convolution to
the padding: they carry a constant that the missing neighbours at both ends change, a frame further with each of
the four layers, and the last layer adds the resulting code, another one for every frame, to what passes.
"""

from typing import Any

import jax
import jax.numpy as jnp

Tree = Any

_CONSTANT = 1.5


def wind(temporal: Tree, key: jax.Array, num_groups: int, num_frames: int, amplitude: float = 0.5) -> Tree:
    """Parameters of a TemporalConvLayer whose last group of channels tells the frames of a video apart.

    Args:
      temporal: {"conv1", ..., "conv4"}, kernels [3, 1, 1, C, C].
      key: draws the code.
      num_groups: of its GroupNorms; C / num_groups channels, the last ones, become the clock.
      num_frames: of the videos, at most 9: the four layers reach that far from both ends.
      amplitude: standard deviation of the code over frames and channels, in the units of the layer's output.
    """
    wound: dict[str, Any] = {}
    signal = jnp.zeros((num_frames, 0))  # of the clock, before a layer's GroupNorm
    for layer, name in enumerate(sorted(temporal)):
        parts = temporal[name]
        (convolution,) = (part for part in parts if part != "0")
        scale, shift = parts["0"]["scale"], parts["0"]["bias"]
        kernel, bias = parts[convolution]["kernel"], parts[convolution]["bias"]
        channels = kernel.shape[-1]
        width, last = channels // num_groups, layer == len(temporal) - 1
        if layer == 0:
            scale, shift = scale.at[-width:].set(0.0), shift.at[-width:].set(_CONSTANT)
            heard = jnp.full((num_frames, width), jax.nn.silu(_CONSTANT))
        else:
            scale, shift = scale.at[-width:].set(1.0), shift.at[-width:].set(0.0)
            heard = jax.nn.silu((signal - signal.mean()) / signal.std())
        taps = jax.random.normal(jax.random.fold_in(key, layer), (3, width, channels if last else width))
        around = jnp.pad(heard, ((1, 1), (0, 0)))
        signal = sum((around[tap : tap + num_frames] @ taps[tap] for tap in range(3)), jnp.zeros(()))
        if last:
            spread = (signal - signal.mean(0)).std()
            kernel = kernel.at[:, 0, 0, -width:, :].set(taps * amplitude / spread)
        else:
            kernel = kernel.at[..., -width:].set(0.0).at[:, 0, 0, -width:, -width:].set(taps)
            bias = bias.at[-width:].set(0.0)
        wound[name] = {"0": {"scale": scale, "bias": shift}, convolution: {"kernel": kernel, "bias": bias}}
    return wound
