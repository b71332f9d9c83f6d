"""What a VideoScore's preprocessor_config.json says about frames."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from vpo_jax.models.config_fields import require
from vpo_jax.rewards.frames import BILINEAR, read_scaling


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
        splitting = raw.get("do_image_splitting", False)
        require(not splitting, f"{part}.do_image_splitting", "frames are never split here; set it to false")
        return FrameSettings(edges[0], edges[1], *read_scaling(raw, BILINEAR, defaults.mean, defaults.std))

    @property
    def resample(self) -> int:
        """Pillow's number of the filter."""
        return BILINEAR

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the resize. Growing changes the aspect ratio where one side alone is short."""
        aspect = width / height
        if width >= height and width > self.longest:
            height, width = int(self.longest / aspect), self.longest
        elif height > width and height > self.longest:
            height, width = self.longest, int(self.longest * aspect)
        return max(height, self.shortest), max(width, self.shortest)
