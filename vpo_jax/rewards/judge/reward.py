"""The analytic judge of the embedded world as a Reward that scores results and is never used for training."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from vpo_jax.rewards.protocol import PyTree, repeat_rows
from vpo_jax.runtime.errors import UserError
from vpo_jax.shapes import judge, world


@dataclasses.dataclass(frozen=True, eq=False)
class JudgeReward:
    """Its eight graded measures in clean videos' standard deviations, and their mean, `overall`; see `Reward`."""

    name: str = "judge"
    dimensions: tuple[str, ...] = ("overall", *judge.MEASURES)
    # From the values of the worst videos to the best value of a clean one.
    ranges: tuple[tuple[float, float], ...] = ((-20.0, 5.0),) * (1 + len(judge.MEASURES))
    trains: bool = False
    jittable: bool = False
    params: PyTree = dataclasses.field(default_factory=dict)

    def frame_indices(self, num_frames: int) -> tuple[int, ...]:
        """All frames: flicker and jitter are differences of neighbours."""
        return tuple(range(num_frames))

    def prepare(self, prompts: Sequence[str]) -> np.ndarray:
        """What the captions name, int32 [P, 5].

        Raises:
          UserError: a prompt is no caption of the embedded world.
        """
        rows = [world.parse_caption(prompt) for prompt in prompts]
        for prompt, row in zip(prompts, rows, strict=True):
            if row is None:
                raise UserError(
                    f"held_out.scorers: the judge reads captions of the shapes world, and {prompt!r} is none; "
                    "take another scorer"
                )
        return np.array(rows, np.int32)

    def score(self, params: PyTree, videos: jax.Array | np.ndarray, prepared: PyTree) -> np.ndarray:
        """uint8 [P * N, F, 32, 32, 3] -> float32 [P * N, 9]."""
        captions = [world.make_caption(row) for row in repeat_rows(np.asarray(prepared), len(videos))]
        measures = judge.measure(np.asarray(videos), captions)
        graded = judge.in_clean_deviations(measures)
        columns = [judge.overall(measures), *(graded[name] for name in judge.MEASURES)]
        return np.stack(columns, axis=1).astype(np.float32)
