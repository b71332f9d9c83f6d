"""Initial parameters with which a fresh UNet3DConditionModel knows the index of a frame.

That UNet has no embedding of the frame index. The order of frames reaches it through the zero padding of its temporal
convolutions only, and the last convolution of each temporal layer starts at zero. So a fresh UNet treats a video as a
set of frames, and cannot tell "moving left" from "moving right".

`init_frame_code` reserves one group of channels of a temporal convolution. In the first layer they hold a constant. The
zero padding changes it at the first and the last frame, and each of the four layers carries the change one frame
further. The last layer adds the result to its output: a vector that differs from frame to frame.
"""

from typing import Any

import jax
import jax.numpy as jnp

Tree = Any

_CONSTANT = 1.5


def init_frame_code(temporal: Tree, key: jax.Array, num_groups: int, num_frames: int, amplitude: float = 0.5) -> Tree:
    """Parameters of a TemporalConvLayer that adds another vector to every frame of a video.

    Args:
      temporal: {"conv1", ..., "conv4"}, kernels [3, 1, 1, C, C].
      key: of the random code.
      num_groups: of its GroupNorms; the last C / num_groups channels are reserved for the code.
      num_frames: of the videos, at most 9: four layers carry the change by four frames from both ends.
      amplitude: standard deviation of the code over frames and channels, in the units of the layer's output.
    """
    coded: dict[str, Any] = {}
    signal = jnp.zeros((num_frames, 0))  # of the reserved channels, before a layer's GroupNorm; [F, width]
    for layer, name in enumerate(sorted(temporal)):
        parts = temporal[name]
        (convolution,) = (part for part in parts if part != "0")
        scale, shift = parts["0"]["scale"], parts["0"]["bias"]
        kernel, bias = parts[convolution]["kernel"], parts[convolution]["bias"]
        channels = kernel.shape[-1]
        width, last = channels // num_groups, layer == len(temporal) - 1
        if layer == 0:
            scale, shift = scale.at[-width:].set(0.0), shift.at[-width:].set(_CONSTANT)
            activation = jnp.full((num_frames, width), jax.nn.silu(_CONSTANT))
        else:
            scale, shift = scale.at[-width:].set(1.0), shift.at[-width:].set(0.0)
            activation = jax.nn.silu((signal - signal.mean()) / signal.std())
        taps = jax.random.normal(jax.random.fold_in(key, layer), (3, width, channels if last else width))
        around = jnp.pad(activation, ((1, 1), (0, 0)))
        signal = sum((around[tap : tap + num_frames] @ taps[tap] for tap in range(3)), jnp.zeros(()))
        if last:
            spread = (signal - signal.mean(0)).std()
            kernel = kernel.at[:, 0, 0, -width:, :].set(taps * amplitude / spread)
        else:
            kernel = kernel.at[..., -width:].set(0.0).at[:, 0, 0, -width:, -width:].set(taps)
            bias = bias.at[-width:].set(0.0)
        coded[name] = {"0": {"scale": scale, "bias": shift}, convolution: {"kernel": kernel, "bias": bias}}
    return coded
