"""What a scorer has to offer: a name, dimensions, and a pure function from videos to numbers."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

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

    Attributes:
      name: what configs, metrics and reports call it.
      dimensions: name of each column of `score`.
      ranges: (lowest, highest) value that each dimension is meant to take.
      trains: whether it may steer a training; False = it only looks at results, and `reward.scorers` refuses it.
      jittable: whether `score` may be traced; False = it runs on the host, outside jit.
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
        """Which frames of a clip of `num_frames` it looks at, ascending; the pipeline decodes no others."""
        ...

    def prepare(self, prompts: Sequence[str]) -> PyTree:
        """Prompts as arrays [B, ...], on the host: tokens, and whatever else can be made before a rollout."""
        ...

    def score(self, params: PyTree, videos: jax.Array | np.ndarray, prepared: PyTree) -> jax.Array | np.ndarray:
        """Scores of clips: uint8 [B, f, H, W, 3] of the frames of `frame_indices` -> float32 [B, dimensions]."""
        ...


def even_indices(num_frames: int, wanted: int) -> tuple[int, ...]:
    """At most `wanted` of `num_frames` frames, evenly from the first to the last, ascending, none twice."""
    if num_frames <= wanted:
        return tuple(range(num_frames))
    return tuple(round(float(place)) for place in np.linspace(0, num_frames - 1, wanted))
