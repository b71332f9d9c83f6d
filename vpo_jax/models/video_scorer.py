"""A small video quality scorer: uint8 frames and a caption in, one number a dimension out.

Frames are read at full resolution together with their differences, so that grain, flicker and jitter of a
fraction of a pixel are seen. What a frame holds is summed up by maps with a mass, a place and a spread; how it
changes is summed up by its straight line over time and by what departs from that line.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vpo_jax.models.config_fields import read_fields, require
from vpo_jax.models.layers import Conv, Dense, LayerNorm

ALIGNMENT = "text_to_video_alignment"


@dataclasses.dataclass(frozen=True)
class VideoScorerConfig:
    """Sizes of a scorer, and what its outputs mean.

    Attributes:
        dimensions: name of each output.
        ranges: (lowest, highest) value of each output; the outputs cannot leave it.
        num_frames: frames that it reads; they are taken evenly from longer clips.
        image_size: height and width of the frames; others are resized.
        vocab_size, max_length: of the captions' tokens; 0 is the padding token.
        channels: of the convolutions at half and at quarter resolution.
        maps: heatmaps whose mass, place and spread are followed through the clip.
        text_width, hidden: widths of the text tower and of the heads.
    """

    dimensions: tuple[str, ...]
    ranges: tuple[tuple[float, float], ...]
    num_frames: int
    image_size: int
    vocab_size: int
    max_length: int = 24
    channels: tuple[int, int] = (32, 48)
    maps: int = 12
    text_width: int = 64
    hidden: int = 128

    @staticmethod
    def from_dict(config: Mapping[str, Any]) -> "VideoScorerConfig":
        """The config of a scorer's config.json.

        Raises:
            UserError: a field is unknown or absent, or dimensions and ranges do not fit together.
        """
        values = read_fields(VideoScorerConfig, config, "scorer")
        for field in dataclasses.fields(VideoScorerConfig):
            present = field.name in values or field.default is not dataclasses.MISSING
            require(present, f"scorer.{field.name}", "is missing from config.json; use the scorer's own config.json")
        fits = len(values["ranges"]) == len(values["dimensions"]) and all(len(pair) == 2 for pair in values["ranges"])
        require(fits, "scorer.ranges", "must have one (lowest, highest) pair for each of the dimensions")
        return VideoScorerConfig(**values)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` reads it back."""
        return {"_class_name": "VideoScorer", **dataclasses.asdict(self)}


class _Residual(nn.Module):
    channels: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = Conv(self.channels, (3, 3), padding=1, name="conv")(nn.silu(x))
        return x + 0.5 * h


class FrameEncoder(nn.Module):
    """What each frame holds: [N, H, W, 6] (a frame and its difference to the one before) -> [N, features]."""

    config: VideoScorerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        half, quarter = self.config.channels
        frames, height, width, channels = x.shape
        # Two by two pixels become channels: nothing of the full resolution is lost, at a quarter of the positions.
        x = x.reshape(frames, height // 2, 2, width // 2, 2, channels).swapaxes(2, 3)
        x = x.reshape(frames, height // 2, width // 2, 4 * channels)
        x = Conv(half, (3, 3), padding=1, name="conv_in")(x)
        fine = nn.silu(x)
        # The deviation of these responses over a frame is its grain and the steepness of its edges.
        deviation = jnp.sqrt(jnp.square(fine - fine.mean((1, 2), keepdims=True)).mean((1, 2)) + 1e-5)
        parts = [fine.mean((1, 2)), jnp.log(0.02 + deviation)]

        x = _Residual(half, name="res.0")(x)
        parts.append(_heatmaps(Conv(self.config.maps, (1, 1), name="maps")(nn.silu(x))))

        x = Conv(quarter, (3, 3), (2, 2), padding=1, name="down")(nn.silu(x))
        x = nn.silu(_Residual(quarter, name="res.1")(x))
        parts += [x.mean((1, 2)), x.max((1, 2))]
        return jnp.concatenate(parts, -1)


def _heatmaps(logits: jax.Array) -> jax.Array:
    """Mass, place and spread of each map: [N, h, w, K] -> [N, 5 K].

    Weights are linear in a strong response, not exponential, so that the place is a centre of mass, exact to a
    fraction of a pixel, where a softmax would jump between the grid's points.
    """
    weight = nn.softplus(logits) + 1e-4
    mass = weight.sum((1, 2), keepdims=True)
    share = weight / mass
    results = [jnp.log(mass[:, 0, 0])]
    for axis in (1, 2):
        size = logits.shape[axis]
        place = (jnp.arange(size, dtype=jnp.float32) + 0.5) / size * 2.0 - 1.0
        shape = (1, size, 1, 1) if axis == 1 else (1, 1, size, 1)
        place = place.reshape(shape)
        mean = (share * place).sum((1, 2))
        spread = (share * (place - mean[:, None, None]) ** 2).sum((1, 2))
        results += [4.0 * mean, jnp.sqrt(spread + 1e-4)]
    return jnp.concatenate(results, -1)


def _moments(x: jax.Array) -> jax.Array:
    """How features change over a clip: [B, F, C] -> [B, 4, C].

    Mean, slope, and on a log scale (so that a little unsteadiness is told from none) the deviation from the
    straight line and the step between frames.
    """
    frames = x.shape[1]
    time = jnp.linspace(-1.0, 1.0, frames)
    mean = x.mean(1)
    slope = jnp.einsum("f,bfc->bc", time, x) / jnp.sum(time * time)
    rest = x - mean[:, None] - time[:, None] * slope[:, None]
    rest = jnp.log(0.01 + jnp.sqrt(jnp.square(rest).mean(1) + 1e-6))
    step = jnp.log(0.01 + jnp.sqrt(jnp.square(jnp.diff(x, axis=1)).mean(1) + 1e-6))
    return jnp.stack([mean, slope, rest, step], 1)


class VideoScorer(nn.Module):
    """Scores of clips against captions.

    videos uint8 [B, num_frames, image_size, image_size, 3], ids int32 [B, max_length] (0 = padding) -> float32
    [B, D], each within its declared range. The dimension `text_to_video_alignment` alone sees the caption.
    """

    config: VideoScorerConfig

    def setup(self) -> None:
        """Submodules, named as in the checkpoint."""
        config = self.config
        self.frames = FrameEncoder(config)
        self.norms = [LayerNorm() for _ in range(4)]
        self.quality = [Dense(config.hidden), Dense(config.hidden), Dense(len(config.dimensions))]
        self.shown = [Dense(config.hidden), Dense(config.text_width)]
        self.tokens = self.param("tokens", nn.initializers.normal(0.3), (config.vocab_size, config.text_width))
        self.context = Conv(config.text_width, (3,), padding=1)
        self.importance = Dense(1)
        self.verdict = self.param("verdict", nn.initializers.constant(2.0), (1,))

    def see(self, videos: jax.Array) -> jax.Array:
        """What a clip shows, whatever was asked for: uint8 [B, F, H, W, 3] -> [B, features]."""
        batch, frames = videos.shape[:2]
        x = videos.astype(jnp.float32) / 127.5 - 1.0
        before = jnp.concatenate([x[:, :1], x[:, :-1]], 1)
        seen = jnp.concatenate([x, x - before], -1)  # [B, F, H, W, 6]
        features = self.frames(seen.reshape(batch * frames, *seen.shape[2:])).reshape(batch, frames, -1)
        moments = _moments(features)
        return jnp.concatenate([norm(moments[:, i]) for i, norm in enumerate(self.norms)], -1)

    def judge_quality(self, seen: jax.Array) -> jax.Array:
        """Logits of all dimensions from the clip alone: [B, features] -> [B, D]."""
        first, second, last = self.quality
        return last(nn.silu(second(nn.silu(first(seen)))))

    def judge_match(self, seen: jax.Array, ids: jax.Array) -> jax.Array:
        """Logits of the alignment: [B, features], int32 [B, N, L] (N captions a clip) -> [B, N].

        Every word, beside its neighbours, is looked for in the clip; each that is not found takes from the score.
        """
        first, second = self.shown
        shown = second(nn.silu(first(seen)))  # [B, W]
        mask = (ids != 0).astype(jnp.float32)
        words = self.tokens[ids] * mask[..., None]
        flat = words.reshape(-1, *words.shape[2:])
        words = words + self.context(flat).reshape(words.shape)
        found = jnp.einsum("bnlw,bw->bnl", words, shown)
        weight = nn.softplus(self.importance(words)[..., 0]) * mask
        return self.verdict + (weight * nn.log_sigmoid(found)).sum(-1)

    def to_range(self, logits: jax.Array, dimension: int | None = None) -> jax.Array:
        """Logits [..., D], or of one dimension, within the declared range."""
        low, high = jnp.array(self.config.ranges).T
        if dimension is not None:
            low, high = low[dimension], high[dimension]
        return low + (high - low) * nn.sigmoid(logits)

    def __call__(self, videos: jax.Array, ids: jax.Array) -> jax.Array:
        seen = self.see(videos)
        quality = self.judge_quality(seen)
        match = self.judge_match(seen, ids[:, None])  # [B, 1]
        reads_text = jnp.array([name == ALIGNMENT for name in self.config.dimensions])
        return self.to_range(jnp.where(reads_text, match, quality))
