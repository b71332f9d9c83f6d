"""Frames as a scorer's encoder wants them, inside jit: Pillow's resize to the bit, then scaled and normalised."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from vpo_jax.models.config_fields import require

BILINEAR, BICUBIC = 2, 3  # Pillow's numbers
_PRECISION = 22  # bits of a weight's fraction in Pillow's resize of 8-bit images


class Settings(Protocol):
    """How frames are resized and scaled.

    Attributes:
      factor: of uint8 values before they are normalised.
      mean, std: of each channel.
      resample: Pillow's number of the filter.
    """

    @property
    def factor(self) -> float: ...

    @property
    def mean(self) -> tuple[float, float, float]: ...

    @property
    def std(self) -> tuple[float, float, float]: ...

    @property
    def resample(self) -> int: ...

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the resize."""
        ...


def read_scaling(
    raw: Mapping[str, Any], resample: int, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> tuple[float, tuple[float, float, float], tuple[float, float, float]]:
    """Factor, mean and standard deviation of a parsed preprocessor_config.json; `mean` and `std` where it has none.

    Raises:
      UserError: another filter than `resample`, or a step left out, by name.
    """
    part, name = "preprocessor_config", {BILINEAR: "bilinear", BICUBIC: "bicubic"}[resample]
    found = raw.get("resample", resample)
    require(found == resample, f"{part}.resample", f"{found!r} is not {resample} ({name})")
    for step in ("do_resize", "do_rescale", "do_normalize"):
        require(raw.get(step, True) is True, f"{part}.{step}", "is always done here; set it to true")
    mean = _channels(f"{part}.image_mean", raw.get("image_mean"), mean)
    std = _channels(f"{part}.image_std", raw.get("image_std"), std)
    require(all(value > 0 for value in std), f"{part}.image_std", f"must be above zero, found {std!r}")
    factor = raw.get("rescale_factor", 1 / 255)
    require(isinstance(factor, (int, float)), f"{part}.rescale_factor", f"must be a number, found {factor!r}")
    return factor, mean, std


def prepare_frames(settings: Settings, frames: jax.Array) -> jax.Array:
    """uint8 [..., H, W, 3] -> float32 [..., H', W', 3], resized, scaled and normalised."""
    height, width = settings.output_size(*frames.shape[-3:-1])
    pixels = resize(frames, height, width, settings.resample).astype(jnp.float32) * np.float32(settings.factor)
    return (pixels - np.array(settings.mean, np.float32)) / np.array(settings.std, np.float32)


def see_in_parts(see: Callable[[jax.Array], jax.Array], videos: jax.Array, together: int, unit: int = 1) -> jax.Array:
    """`see` of some frames of every video at a time, side by side again: the batch stays sharded over devices as it is.

    Args:
      see: [B, g, ...] -> [B, n, ...], where n grows with g.
      videos: [B, f, ...].
      together: most frames of a video at once; at least `unit` are taken.
      unit: g is a multiple of it, and f is too.
    """
    batch, frames = videos.shape[:2]
    size = max([n for n in range(unit, together + 1, unit) if frames % n == 0], default=unit)
    parts = videos.reshape(batch, frames // size, size, *videos.shape[2:]).swapaxes(0, 1)
    seen = see(parts[0])[None] if len(parts) == 1 else jax.lax.map(see, parts)
    return seen.swapaxes(0, 1).reshape(batch, -1, *seen.shape[3:])


def resize(frames: jax.Array, height: int, width: int, resample: int = BILINEAR) -> jax.Array:
    """uint8 [..., H, W, C] -> uint8 [..., height, width, C], every bit as Pillow's `resize(..., resample)`.

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
        frames = _resize_axis(frames, axis, size, resample)
    return frames


def _resize_axis(frames: jax.Array, axis: int, size: int, resample: int) -> jax.Array:
    if frames.shape[axis] == size:
        return frames
    indices, weights = resize_taps(frames.shape[axis], size, resample)
    shape = [1] * frames.ndim
    shape[axis] = size
    total = jnp.full((), 1 << (_PRECISION - 1), jnp.int32)
    for index, weight in zip(indices, weights, strict=True):
        total = total + jnp.take(frames, index, axis=axis).astype(jnp.int32) * weight.reshape(shape)
    return jnp.clip(total >> _PRECISION, 0, 255).astype(jnp.uint8)


def resize_taps(old: int, new: int, resample: int = BILINEAR) -> tuple[np.ndarray, np.ndarray]:
    """Which of `old` values make each of `new` ones, and with which weights: int32 [taps, new] both.

    Weights are in units of 2^-22; a place that has fewer taps than others has zeros.
    """
    scale = old / new
    stretch = max(scale, 1.0)  # the filter is of old pixels, or of new pixels where those are larger
    reach, curve = {BILINEAR: (1.0, _triangle), BICUBIC: (2.0, _cubic)}[resample]
    support = reach * stretch
    taps = math.ceil(support) * 2 + 1
    indices, weights = np.zeros((taps, new), np.int32), np.zeros((taps, new), np.int32)
    for place in range(new):
        centre = (place + 0.5) * scale
        first = max(int(centre - support + 0.5), 0)
        last = min(int(centre + support + 0.5), old)
        near = np.arange(first, last)
        share = curve(np.abs((near - centre + 0.5) * (1.0 / stretch)))
        share = share / np.cumsum(share)[-1]  # summed from the first to the last, as Pillow does
        indices[: len(near), place] = near
        weights[: len(near), place] = (share * (1 << _PRECISION) + np.copysign(0.5, share)).astype(np.int32)
    used = weights.any(1)
    return indices[used], weights[used]


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(0.0, 1.0 - x)


def _cubic(x: np.ndarray) -> np.ndarray:
    a = -0.5  # Keys' cubic convolution
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _channels(field: str, value: Any, default: tuple[float, float, float]) -> tuple[float, float, float]:
    values = default if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,) * 3
    good = len(values) == 3 and all(isinstance(item, (int, float)) for item in values)
    require(good, field, f"must be a number for each of 3 channels, found {value!r}")
    return (float(values[0]), float(values[1]), float(values[2]))
