"""A person's own object or function as a Reward; its mistakes become UserErrors."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vpo_jax.rewards.custom.origin import Origin
from vpo_jax.rewards.protocol import PyTree, Reward, repeat_rows


@dataclasses.dataclass(frozen=True, eq=False)
class CustomReward:
    """A person's reward whose mistakes become UserErrors that name it; see `Reward`.

    Attributes:
      inner: follows `Reward`.
      timeout: seconds that `score` may take on the host; 0 is no limit.
    """

    origin: Origin
    inner: Reward
    timeout: float
    name: str
    dimensions: tuple[str, ...]
    ranges: tuple[tuple[float, float], ...]

    @property
    def trains(self) -> bool:
        """As the object says."""
        return bool(self.inner.trains)

    @property
    def jittable(self) -> bool:
        """As the object says."""
        return bool(self.inner.jittable)

    @property
    def params(self) -> PyTree:
        """As the object says."""
        return self.inner.params

    def frame_indices(self, num_frames: int) -> tuple[int, ...]:
        """Its frames.

        Raises:
          UserError: none, or not ascending, or not of the video.
        """
        given = self.origin.told(lambda: [int(i) for i in self.inner.frame_indices(num_frames)])
        if not given or sorted(set(given)) != given or given[0] < 0 or given[-1] >= num_frames:
            raise self.origin.wrong(
                f"gives {given} as frame_indices({num_frames}); give ascending numbers from 0 to {num_frames - 1}"
            )
        return tuple(given)

    def prepare(self, prompts: Sequence[str]) -> PyTree:
        """What it makes of the prompts."""
        return self.origin.told(lambda: self.inner.prepare(list(prompts)))

    def score(self, params: PyTree, videos: jax.Array | np.ndarray, prepared: PyTree) -> jax.Array | np.ndarray:
        """Scores [P * N, D], finite or not.

        Raises:
          UserError: an exception inside, another shape, or no answer within `timeout` seconds (on the host).
        """
        scores: jax.Array | np.ndarray
        if self.jittable:
            scores = self.origin.told(lambda: self.inner.score(params, videos, prepared))
        else:
            # A copy: what comes from a device cannot be written to.
            ask = lambda: np.asarray(self.inner.score(params, np.array(videos), prepared), np.float32)  # noqa: E731
            scores = self.origin.told(lambda: self.origin.in_time(self.timeout, len(videos), ask))
        wanted = (len(videos), len(self.dimensions))
        if getattr(scores, "shape", None) != wanted:
            raise self.origin.wrong(
                f"gives scores of shape {list(np.shape(scores))} for {wanted[0]} videos and {wanted[1]} dimensions; "
                f"give {list(wanted)}"
            )
        return scores


@dataclasses.dataclass(frozen=True, eq=False)
class FunctionReward:
    """A plain function as a Reward; the function gets one prompt a video, whatever the batch."""

    origin: Origin
    function: Callable[..., Any]
    dimensions: tuple[str, ...]
    trains: bool
    jittable: bool = False
    params: PyTree = dataclasses.field(default_factory=dict)

    def frame_indices(self, num_frames: int) -> tuple[int, ...]:
        """All frames."""
        return tuple(range(num_frames))

    def prepare(self, prompts: Sequence[str]) -> np.ndarray:
        """The prompts themselves: object [P]."""
        return np.array(list(prompts), dtype=object)

    def score(self, params: PyTree, videos: jax.Array | np.ndarray, prepared: np.ndarray) -> np.ndarray:
        """uint8 [P * N, F, H, W, 3] -> float32 [P * N, D].

        Raises:
          UserError: the function gives something else than a number a video for each dimension.
        """
        if not len(videos):
            return np.zeros((0, len(self.dimensions)), np.float32)
        prompts = list(repeat_rows(prepared, len(videos)))
        given = checked_answer(self.origin, self.function(videos, prompts), len(videos))
        if set(given) != set(self.dimensions):
            raise self.origin.wrong(
                f"gives the dimensions {', '.join(given)}, declared are {', '.join(self.dimensions)}; give those"
            )
        return np.stack([given[name] for name in self.dimensions], axis=1)


def checked_answer(origin: Origin, answer: Any, count: int) -> dict[str, np.ndarray]:
    """What a function gave for `count` videos, {dimension: float32 [count]}; raises UserError for anything else."""
    fix = f"give {{dimension: [one number a video]}}, here {count} each"
    if not isinstance(answer, Mapping) or not answer:
        raise origin.wrong(f"gives {type(answer).__name__}; {fix}")
    scores = {}
    for name, values in answer.items():
        try:
            column = np.asarray(values, np.float32)
        except (TypeError, ValueError) as error:
            raise origin.wrong(f"gives no numbers for {name!r} ({error}); {fix}") from error
        if column.shape != (count,):
            raise origin.wrong(f"gives shape {list(column.shape)} for {name!r}; {fix}")
        scores[str(name)] = column
    return scores
