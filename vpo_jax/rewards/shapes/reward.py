"""The video quality scorer of the embedded world, and any other folder of its kind, as a Reward."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from vpo_jax.models.video_scorer import VideoScorer, VideoScorerConfig
from vpo_jax.rewards.protocol import PyTree, even_indices, repeat_rows
from vpo_jax.rewards.shapes.folder import encode_captions, read_scorer

SHIPPED = Path(__file__).resolve().parents[2] / "shapes" / "assets" / "scorer"


@dataclasses.dataclass(frozen=True, eq=False)
class VideoScorerReward:
    """A `VideoScorer` with its weights and tokenizer; see `Reward`."""

    name: str
    config: VideoScorerConfig
    params: PyTree
    tokenizer: Tokenizer
    trains: bool = True
    jittable: bool = True

    @property
    def dimensions(self) -> tuple[str, ...]:
        """The scorer's outputs."""
        return self.config.dimensions

    @property
    def ranges(self) -> tuple[tuple[float, float], ...]:
        """Lowest and highest value of each output."""
        return self.config.ranges

    def frame_indices(self, num_frames: int) -> tuple[int, ...]:
        """As many frames as it was trained on, evenly; all of less than twice as many, since steps are compared."""
        if num_frames < 2 * self.config.num_frames:
            return tuple(range(num_frames))
        return even_indices(num_frames, self.config.num_frames)

    def prepare(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Token ids, int32 [P, L]."""
        return {"input_ids": encode_captions(self.tokenizer, prompts)}

    def score(self, params: PyTree, videos: jax.Array | np.ndarray, prepared: PyTree) -> jax.Array:
        """uint8 [P * N, f, H, W, 3] -> float32 [P * N, dimensions]; videos of another size are resized."""
        videos = jnp.asarray(videos)
        if videos.shape[1] == 1:
            videos = jnp.repeat(videos, 2, axis=1)  # a still image is a video in which nothing happens
        size = self.config.image_size
        if videos.shape[2:4] != (size, size):
            shape = (*videos.shape[:2], size, size, 3)
            resized = jax.image.resize(videos.astype(jnp.float32), shape, "linear", antialias=True)
            videos = jnp.clip(jnp.round(resized), 0, 255).astype(jnp.uint8)
        ids = repeat_rows(prepared["input_ids"], len(videos))
        return jnp.asarray(VideoScorer(self.config).apply({"params": params}, videos, ids))


def load(folder: str | Path, name: str | None = None) -> VideoScorerReward:
    """The scorer of a folder; it is called by the folder's name unless `name` is given.

    Raises:
      UserError: as `read_scorer`.
    """
    parts = read_scorer(folder)
    return VideoScorerReward(name or Path(folder).resolve().name, parts.config, parts.params, parts.tokenizer)


def load_shipped() -> VideoScorerReward:
    """The scorer of the embedded world that ships with the package."""
    return load(SHIPPED, "shapes")
