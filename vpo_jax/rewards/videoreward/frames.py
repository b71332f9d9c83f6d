"""What a VideoReward sees of a frame: Qwen2-VL's sizes and scaling."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from vpo_jax.models.config_fields import require
from vpo_jax.rewards.frames import BICUBIC, read_scaling


class SmartFrameSettings(NamedTuple):
    """What a Qwen2-VL sees of a frame.

    Attributes:
      side: sides become multiples of it.
      min_pixels, max_pixels: of a resized frame, as far as `side` allows; its aspect ratio is kept where it can be.
      factor, mean, std: as in `FrameSettings`; CLIP's mean and standard deviation.
    """

    side: int = 28
    min_pixels: int = 128 * 28 * 28
    max_pixels: int = 768 * 28 * 28
    factor: float = 1 / 255
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @staticmethod
    def from_dict(raw: Mapping[str, Any], side: int, min_pixels: int, max_pixels: int) -> "SmartFrameSettings":
        """Settings of a Qwen2-VL image processor for frames of a size between the two.

        The processor has sizes of its own, and would resize what is outside of them a second time.

        Raises:
          UserError: the file asks for what is not done here, by name.
        """
        defaults, part = SmartFrameSettings(), "preprocessor_config"
        size = raw.get("size") or {}
        for name, edge, good in (
            ("min_pixels", "shortest_edge", lambda value: value <= min_pixels),
            ("max_pixels", "longest_edge", lambda value: value >= max_pixels),
        ):
            value = raw.get(name, size.get(edge))
            fits = value is None or (isinstance(value, int) and good(value))
            wanted = f"{value!r} would resize frames of {min_pixels} to {max_pixels} pixels again; use Qwen2-VL's file"
            require(fits, f"{part}.{name}", wanted)
        return SmartFrameSettings(
            side, min_pixels, max_pixels, *read_scaling(raw, BICUBIC, defaults.mean, defaults.std)
        )

    @property
    def resample(self) -> int:
        """Pillow's number of the filter."""
        return BICUBIC

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the resize (`smart_resize` of Qwen2-VL's code)."""
        rows, columns = (max(1, round(size / self.side)) * self.side for size in (height, width))
        if rows * columns > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            rows, columns = (max(1, math.floor(size / shrink / self.side)) * self.side for size in (height, width))
        elif rows * columns < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            rows, columns = (math.ceil(size * grow / self.side) * self.side for size in (height, width))
        return rows, columns
