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

from vpo_jax.models.config_fields import read_fields, require, require_int
from vpo_jax.models.layers import Conv, Dense, LayerNorm

ALIGNMENT = "text_to_video_alignment"

# Distance in colour, on values from -1 to 1, up to which a pixel counts as background: grain and stains stay below,
# and the path of what is above follows true speed most closely (rank correlation 0.93; 0.88 without a threshold).
_BACKGROUND = 0.3
_LARGEST_SIDE = 4096  # pixels
_MOST_FRAMES = 4096


@dataclasses.dataclass(frozen=True)
class VideoScorerConfig:
    """Sizes of a scorer, and what its outputs mean.

    Attributes:
        dimensions: name of each output.
        ranges: (lowest, highest) value of each output; the outputs cannot leave it.
        num_frames: frames that it reads; they are taken evenly from longer videos.
        image_size: height and width of the frames; others are resized.
        vocab_size, max_length: of the captions' tokens; 0 is the padding token.
        channels: of the convolutions at half and at quarter resolution.
        grain: filters that see fine detail alone.
        maps: heatmaps whose mass, place and spread are followed through the video.
        text_width, hidden: widths of the text tower and of the heads.
    """

    dimensions: tuple[str, ...]
    ranges: tuple[tuple[float, float], ...]
    num_frames: int
    image_size: int
    vocab_size: int
    max_length: int = 24
    channels: tuple[int, int] = (32, 48)
    grain: int = 16
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
        parsed = VideoScorerConfig(**values)
        sizes = ("num_frames", "image_size", "vocab_size", "max_length", "grain", "maps", "text_width", "hidden")
        require_int("scorer", parsed, sizes)
        require(min(parsed.channels) > 0, "scorer.channels", f"{parsed.channels} are no numbers of channels")
        even = parsed.image_size % 4 == 0 and parsed.image_size <= _LARGEST_SIDE
        require(even, "scorer.image_size", f"{parsed.image_size} is no multiple of 4 up to {_LARGEST_SIDE}")
        few = parsed.num_frames <= _MOST_FRAMES and parsed.max_length <= _MOST_FRAMES
        require(few, "scorer.num_frames", f"and max_length must be at most {_MOST_FRAMES}")
        names = parsed.dimensions
        require(0 < len(names) == len(set(names)), "scorer.dimensions", f"must be different names, found {names}")
        for low, high in parsed.ranges:
            require(low < high, "scorer.ranges", f"{low} is not below {high}")
        return parsed

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
    """What each frame holds, and where.

    [N, H, W, 6] (a frame and its difference to the one before) -> features [N, C], places of the maps [N, K, 2].
    """

    config: VideoScorerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        half, quarter = self.config.channels
        # Grain and the steepness of edges are small beside the colours, so they have filters of their own.
        detail = 4.0 * (x[..., :3] - _smooth(x[..., :3]))
        grain = Conv(self.config.grain, (3, 3), padding=1, use_bias=False, name="grain")(_fold(detail))
        # What stands out from the frame's border is the subject; its contrast is a heatmap that needs no learning.
        contrast = jnp.abs(x[..., :3] - _border(x[..., :3]))
        stands_out = nn.relu(jnp.sqrt(jnp.square(contrast).sum(-1, keepdims=True) + 1e-6) - _BACKGROUND)
        subject = _fold(jnp.square(stands_out)).mean(-1, keepdims=True)  # [N, h, w, 1]
        x = Conv(half, (3, 3), padding=1, name="conv_in")(_fold(jnp.concatenate([x, contrast], -1)))
        parts = [nn.silu(x).mean((1, 2)), *_energy(grain)]

        x = _Residual(half, name="res.0")(x)
        maps = nn.softplus(Conv(self.config.maps, (1, 1), name="maps")(nn.silu(x)) - 2.0)
        mass, places, spreads = _heatmaps(jnp.concatenate([maps, subject], -1))
        parts += [mass, spreads, places.reshape(len(places), -1)]

        x = Conv(quarter, (3, 3), (2, 2), padding=1, name="down")(nn.silu(x))
        x = nn.silu(_Residual(quarter, name="res.1")(x))
        parts += [x.mean((1, 2)), x.max((1, 2))]
        return jnp.concatenate(parts, -1), places


def _fold(x: jax.Array) -> jax.Array:
    """Two by two pixels as channels: nothing of the full resolution is lost, at a quarter of the positions."""
    frames, height, width, channels = x.shape
    x = x.reshape(frames, height // 2, 2, width // 2, 2, channels).swapaxes(2, 3)
    return x.reshape(frames, height // 2, width // 2, 4 * channels)


def _smooth(x: jax.Array) -> jax.Array:
    """Binomial 3 x 3 blur of [N, H, W, C], edges repeated."""
    for axis in (1, 2):
        size = x.shape[axis]
        padded = jnp.concatenate(
            [jax.lax.slice_in_dim(x, 0, 1, axis=axis), x, jax.lax.slice_in_dim(x, size - 1, size, axis=axis)], axis
        )
        before = jax.lax.slice_in_dim(padded, 0, size, axis=axis)
        after = jax.lax.slice_in_dim(padded, 2, size + 2, axis=axis)
        x = 0.25 * before + 0.5 * x + 0.25 * after
    return x


def _energy(x: jax.Array, cell: int = 4) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean, largest and smallest log energy over the cells of a frame: [N, h, w, C] -> three of [N, C].

    The loudest cell tells how steep the edges are, the quietest how much grain there is where nothing else is.
    """
    frames, height, width, channels = x.shape
    rows, columns = max(1, height // cell), max(1, width // cell)
    cells = jnp.square(x).reshape(frames, rows, height // rows, columns, width // columns, channels)
    log = 0.5 * jnp.log(1e-4 + cells.mean((2, 4)))
    return log.mean((1, 2)), log.max((1, 2)), log.min((1, 2))


def _border(x: jax.Array) -> jax.Array:
    """Mean over the border of each frame: [N, H, W, C] -> [N, 1, 1, C]."""
    edges = [x[:, 0], x[:, -1], x[:, :, 0], x[:, :, -1]]
    return jnp.concatenate(edges, 1).mean(1)[:, None, None]


def _heatmaps(weight: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log mass [N, K], place [N, K, 2] and spread [N, 2 K] of maps of weights of at least 0, [N, h, w, K].

    The place is a centre of mass, exact to a fraction of a pixel, where a softmax would jump between the points of
    the grid.
    """
    weight = weight + 1e-4
    mass = weight.sum((1, 2), keepdims=True)
    share = weight / mass
    places, spreads = [], []
    for axis in (1, 2):
        size = weight.shape[axis]
        place = (jnp.arange(size, dtype=jnp.float32) + 0.5) / size * 2.0 - 1.0
        shape = (1, size, 1, 1) if axis == 1 else (1, 1, size, 1)
        place = place.reshape(shape)
        mean = (share * place).sum((1, 2))
        spread = (share * (place - mean[:, None, None]) ** 2).sum((1, 2))
        places.append(4.0 * mean)
        spreads.append(jnp.sqrt(spread + 1e-4))
    return jnp.log(mass[:, 0, 0]), jnp.stack(places, -1), jnp.concatenate(spreads, -1)


def _line(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean and slope [B, C] of the straight line through [B, F, C] over time -1 to 1, and the rest."""
    time = jnp.linspace(-1.0, 1.0, x.shape[1])
    mean = x.mean(1)
    slope = jnp.einsum("f,bfc->bc", time, x) / jnp.sum(time * time)
    return mean, slope, x - mean[:, None] - time[:, None] * slope[:, None]


def _log_size(square: jax.Array) -> jax.Array:
    """Logarithm of a size from its square, flat below 0.01."""
    return jnp.log(0.01 + jnp.sqrt(square + 1e-6))


def _paths(places: jax.Array) -> jax.Array:
    """Speed along and distance from each map's straight path, whatever its direction: [B, F, K, 2] -> [B, 2 K]."""
    batch, frames, maps, _ = places.shape
    _, slope, rest = _line(places.reshape(batch, frames, -1))
    speed = jnp.square(slope).reshape(batch, maps, 2).sum(-1)
    away = jnp.square(rest).mean(1).reshape(batch, maps, 2).sum(-1)
    return jnp.concatenate([_log_size(speed), _log_size(away)], -1)


def _moments(x: jax.Array) -> jax.Array:
    """How features change over a video: [B, F, C] -> [B, 5, C].

    Mean and slope; and on a log scale, so that a little is told from none: the slope's size, the deviation from
    the straight line, and the step between frames.
    """
    mean, slope, rest = _line(x)
    squares = (jnp.square(slope), jnp.square(rest).mean(1), jnp.square(jnp.diff(x, axis=1)).mean(1))
    return jnp.stack([mean, slope, *(_log_size(square) for square in squares)], 1)


class VideoScorer(nn.Module):
    """Scores of videos against captions.

    videos uint8 [B, num_frames, image_size, image_size, 3], ids int32 [B, max_length] (0 = padding) -> float32
    [B, D], each within its declared range. The dimension `text_to_video_alignment` alone sees the caption.
    """

    config: VideoScorerConfig

    def setup(self) -> None:
        """Submodules, named as in the checkpoint."""
        config = self.config
        self.frames = FrameEncoder(config)
        self.norms = [LayerNorm() for _ in range(6)]
        self.quality = [Dense(config.hidden), Dense(config.hidden), Dense(len(config.dimensions))]
        # Speeds as they are: the norms, which share them out among the maps, leave little of their size.
        self.direct = Dense(len(config.dimensions), use_bias=False, kernel_init=nn.initializers.zeros)
        self.shown = [Dense(config.hidden), Dense(config.text_width)]
        self.tokens = self.param("tokens", nn.initializers.normal(0.3), (config.vocab_size, config.text_width))
        self.context = Conv(config.text_width, (3,), padding=1)
        self.importance = Dense(1)
        self.verdict = self.param("verdict", nn.initializers.constant(2.0), (1,))

    def see(self, videos: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Features of the video, without the caption: uint8 [B, F, H, W, 3] -> features [B, C], paths [B, 2 K]."""
        batch, frames = videos.shape[:2]
        x = videos.astype(jnp.float32) / 127.5 - 1.0
        before = jnp.concatenate([x[:, :1], x[:, :-1]], 1)
        seen = jnp.concatenate([x, x - before], -1)  # [B, F, H, W, 6]
        features, places = self.frames(seen.reshape(batch * frames, *seen.shape[2:]))
        moments = _moments(features.reshape(batch, frames, -1))
        paths = _paths(places.reshape(batch, frames, -1, 2))
        groups = [moments[:, i] for i in range(5)] + [paths]
        return jnp.concatenate([norm(group) for norm, group in zip(self.norms, groups, strict=True)], -1), paths

    def judge_quality(self, seen: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Logits of all dimensions from the video alone: what `see` gives -> [B, D]."""
        first, second, last = self.quality
        features, paths = seen
        return last(nn.silu(second(nn.silu(first(features))))) + self.direct(paths)

    def judge_match(self, seen: tuple[jax.Array, jax.Array], ids: jax.Array) -> jax.Array:
        """Logits of the alignment: what `see` gives, int32 [B, N, L] (N captions a video) -> [B, N].

        Every word, beside its neighbours, is searched for in the video; each that is not found lowers the score.
        """
        first, second = self.shown
        shown = second(nn.silu(first(seen[0])))  # [B, W]
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
