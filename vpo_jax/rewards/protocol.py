"""What a scorer has to offer: a name, dimensions, and a pure function from videos and prompts to numbers."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from vpo_jax.runtime.errors import UserError

DIMENSIONS = (
    "visual_quality",
    "temporal_consistency",
    "dynamic_degree",
    "text_to_video_alignment",
    "factual_consistency",
)  # of a VQA scorer, in VideoScore's order

PyTree = Any


@runtime_checkable
class Reward(Protocol):
    """A scorer of videos. Higher is better in every dimension.

    A batch holds P prompts with N candidate videos each, N the same for all and perhaps 1. The candidates of a prompt
    stand side by side: video i was made for prompt i // N. `prepare` gets the P prompts, so `score` computes once what
    belongs to a prompt alone; a scorer that wants a row for each video takes `repeat_rows`.

    Attributes:
      name: what configs, metrics and reports call it.
      dimensions: name of each column of `score`.
      ranges: (lowest, highest) value that each dimension is meant to take.
      trains: whether it may be used for selection in training; False: `reward.scorers` refuses it.
      jittable: whether `score` may be traced; False: it runs on the host, outside jit.
      params: weights, given back to `score` as an argument so that a compiled program does not hold a copy.
    """

    @property
    def name(self) -> str: ...

    @property
    def dimensions(self) -> tuple[str, ...]: ...

    @property
    def ranges(self) -> tuple[tuple[float, float], ...]: ...

    @property
    def trains(self) -> bool: ...

    @property
    def jittable(self) -> bool: ...

    @property
    def params(self) -> PyTree: ...

    def frame_indices(self, num_frames: int) -> tuple[int, ...]:
        """Which frames of a video of `num_frames` it reads, ascending; the pipeline decodes no others."""
        ...

    def prepare(self, prompts: Sequence[str]) -> PyTree:
        """P prompts as arrays [P, ...], on the host: tokens, and whatever else can be made before a rollout."""
        ...

    def score(self, params: PyTree, videos: jax.Array | np.ndarray, prepared: PyTree) -> jax.Array | np.ndarray:
        """Scores of P prompts' N candidates each, float32 [P * N, dimensions].

        Args:
          params: as above.
          videos: uint8 [P * N, f, H, W, 3], the frames of `frame_indices`.
          prepared: what `prepare` made of the P prompts.
        """
        ...


def even_indices(num_frames: int, wanted: int) -> tuple[int, ...]:
    """At most `wanted` of `num_frames` frames, evenly from the first to the last, ascending, none twice."""
    if num_frames <= wanted:
        return tuple(range(num_frames))
    return tuple(round(float(place)) for place in np.linspace(0, num_frames - 1, wanted))


def repeat_rows(prepared: PyTree, count: int) -> PyTree:
    """A row for each of `count` videos, [count, ...], from a row for each prompt, [P, ...].

    Where count = P the tree comes back as it is.

    Raises:
      UserError: the videos do not share out evenly among the prompts.
    """

    def one(x: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
        if len(x) == count:
            return x
        times = candidates_of(count, len(x))
        return np.repeat(x, times, axis=0) if isinstance(x, np.ndarray) else jnp.repeat(x, times, axis=0)

    return jax.tree.map(one, prepared)


def candidates_of(videos: int, prompts: int) -> int:
    """N of P * N videos and P prompts.

    Raises:
      UserError: the videos do not share out evenly among the prompts.
    """
    if not prompts or videos % prompts:
        raise UserError(f"prompts: {prompts} for {videos} videos; give each as many videos as the others")
    return videos // prompts


def check_videos(videos: jax.Array | np.ndarray) -> None:
    """Raises UserError for anything but uint8 [B, f, H, W, 3]."""
    if videos.ndim != 5 or videos.shape[-1] != 3 or videos.dtype != np.uint8 or 0 in videos.shape:
        raise UserError(f"videos: must be uint8 [B, f, H, W, 3], found {videos.dtype} {list(videos.shape)}")
