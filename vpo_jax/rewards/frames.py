"""Frames as a scorer's encoder wants them, inside jit: Pillow's resize to the bit, then scaled and normalised."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vpo_jax.models.config_fields import require

_BILINEAR = 2  # Pillow's number
_PRECISION = 22  # bits of a weight's fraction in Pillow's resize of 8-bit images


class FrameSettings(NamedTuple):
    """What preprocessor_config.json says about images.

    Attributes:
      shortest, longest: a side above `longest` shrinks the image to it, then each side grows to at least `shortest`.
      factor: of uint8 values before they are normalised.
      mean, std: of each channel.
    """

    shortest: int = 378
    longest: int = 980
    factor: float = 1 / 255
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> "FrameSettings":
        """Settings of an Idefics2 image processor; what the file leaves out is transformers' default.

        Raises:
          UserError: the file asks for what is not done here, by name.
        """
        defaults, part = FrameSettings(), "preprocessor_config"
        size = raw.get("size") or {"shortest_edge": defaults.shortest, "longest_edge": defaults.longest}
        names = ("shortest_edge", "longest_edge")
        given = [size.get(name) for name in names] if isinstance(size, Mapping) else []
        edges = [edge for edge in given if isinstance(edge, int) and edge > 0]
        require(len(edges) == 2, f"{part}.size", f"must give {' and '.join(names)}, found {size!r}")
        resample = raw.get("resample", _BILINEAR)
        require(resample == _BILINEAR, f"{part}.resample", f"{resample!r} is not 2 (bilinear)")
        splitting = raw.get("do_image_splitting", False)
        require(not splitting, f"{part}.do_image_splitting", "frames are never split here; set it to false")
        for name in ("do_resize", "do_rescale", "do_normalize"):
            require(raw.get(name, True) is True, f"{part}.{name}", "is always done here; set it to true")
        mean, std = (
            _channels(f"{part}.image_{name}", raw.get(f"image_{name}"), getattr(defaults, name))
            for name in ("mean", "std")
        )
        require(all(value > 0 for value in std), f"{part}.image_std", f"must be above zero, found {std!r}")
        factor = raw.get("rescale_factor", defaults.factor)
        require(isinstance(factor, (int, float)), f"{part}.rescale_factor", f"must be a number, found {factor!r}")
        return FrameSettings(edges[0], edges[1], factor, mean, std)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the resize. Growing changes the aspect ratio where one side alone is short."""
        aspect = width / height
        if width >= height and width > self.longest:
            height, width = int(self.longest / aspect), self.longest
        elif height > width and height > self.longest:
            height, width = self.longest, int(self.longest * aspect)
        return max(height, self.shortest), max(width, self.shortest)


def prepare_frames(settings: FrameSettings, frames: jax.Array) -> jax.Array:
    """uint8 [..., H, W, 3] -> float32 [..., H', W', 3], resized, scaled and normalised."""
    height, width = settings.output_size(*frames.shape[-3:-1])
    pixels = resize_bilinear(frames, height, width).astype(jnp.float32) * np.float32(settings.factor)
    return (pixels - np.array(settings.mean, np.float32)) / np.array(settings.std, np.float32)


def resize_bilinear(frames: jax.Array, height: int, width: int) -> jax.Array:
    """uint8 [..., H, W, C] -> uint8 [..., height, width, C], every bit as Pillow's `resize(..., BILINEAR)`.

    Pillow smooths when it shrinks, has weights of 22 bits, and rounds to uint8 after each of its two passes:
    integers, so that no order of summation and no precision of products can differ. The horizontal pass is the
    first, but since Pillow 13 not where the height loses more than twice what the width loses (its pull request
    9549); Pillow 12 is up to one level apart there.
    """
    rows, columns = frames.shape[-3:-1]
    passes = [(frames.ndim - 2, width), (frames.ndim - 3, height)]
    if height < rows and rows - height > 2 * (columns - width):
        passes.reverse()
    for axis, size in passes:
        frames = _resize_axis(frames, axis, size)
    return frames


def _resize_axis(frames: jax.Array, axis: int, size: int) -> jax.Array:
    if frames.shape[axis] == size:
        return frames
    indices, weights = bilinear_taps(frames.shape[axis], size)
    shape = [1] * frames.ndim
    shape[axis] = size
    total = jnp.full((), 1 << (_PRECISION - 1), jnp.int32)
    for index, weight in zip(indices, weights, strict=True):
        total = total + jnp.take(frames, index, axis=axis).astype(jnp.int32) * weight.reshape(shape)
    return jnp.clip(total >> _PRECISION, 0, 255).astype(jnp.uint8)


def bilinear_taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of `old` values make each of `new` ones, and with which weights: int32 [taps, new] both.

    Weights are in units of 2^-22; a place that has fewer taps than others has zeros.
    """
    scale = old / new
    support = max(scale, 1.0)  # a triangle of one old pixel, or of one new pixel where those are larger
    taps = math.ceil(support) * 2 + 1
    indices, weights = np.zeros((taps, new), np.int32), np.zeros((taps, new), np.int32)
    for place in range(new):
        centre = (place + 0.5) * scale
        first = max(int(centre - support + 0.5), 0)
        last = min(int(centre + support + 0.5), old)
        near = np.arange(first, last)
        triangle = np.maximum(0.0, 1.0 - np.abs((near - centre + 0.5) * (1.0 / support)))
        share = triangle / triangle.sum()
        indices[: len(near), place] = near
        weights[: len(near), place] = (share * (1 << _PRECISION) + 0.5).astype(np.int32)
    used = weights.any(1)
    return indices[used], weights[used]


def _channels(field: str, value: Any, default: tuple[float, float, float]) -> tuple[float, float, float]:
    values = default if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,) * 3
    good = len(values) == 3 and all(isinstance(item, (int, float)) for item in values)
    require(good, field, f"must be a number for each of 3 channels, found {value!r}")
    return (float(values[0]), float(values[1]), float(values[2]))
