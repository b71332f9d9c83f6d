"""A step's scores as one reward a candidate, with the metrics of them that every algorithm reports."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vpo_jax.algorithms.protocol import Metrics
from vpo_jax.rewards.combine import (
    Dimensions,
    RewardStatistics,
    dimension_names,
    dimension_ranges,
    motion_columns,
    normalise_and_combine,
    parse_weights,
    update_statistics,
)


class CandidateRewards(NamedTuple):
    """Rewards of P prompts with N candidates each.

    Attributes:
      reward: combined reward r, float32 [P, N]; 0 for a candidate that is not finite.
      finite: bool [P, N].
      motion: z of the training scorers' dynamic_degree, float32 [P, N]; None where no scorer has it.
    """

    reward: jax.Array
    finite: jax.Array
    motion: jax.Array | None


class RewardCombiner(NamedTuple):
    """How scores become rewards in one run.

    Attributes:
      names: "scorer/dimension", D of them.
      weights: float32 [D], sum |w| = 1.
      lows: lowest value of each dimension's declared range, float32 [D].
      ranges: width of it, float32 [D].
      motion: columns of dynamic_degree.
    """

    names: tuple[str, ...]
    weights: np.ndarray
    lows: np.ndarray
    ranges: np.ndarray
    motion: tuple[int, ...]

    def __call__(
        self, statistics: RewardStatistics, scores: jax.Array
    ) -> tuple[RewardStatistics, CandidateRewards, Metrics]:
        """The updated statistics, the rewards, and metrics of scores float32 [P, N, D]."""
        statistics = update_statistics(statistics, scores)
        reward, z, finite = normalise_and_combine(statistics, scores, self.weights, self.ranges)
        motion = jnp.mean(z[..., jnp.array(self.motion)], axis=-1) if self.motion else None
        one = jnp.ones((), jnp.float32)
        number = jnp.sum(finite.astype(jnp.float32))
        total = jnp.sum((scores - self.lows) / self.ranges * self.weights, axis=-1)
        metrics = {"reward/total": (jnp.sum(jnp.where(finite, total, 0.0)), number)}
        for column, name in enumerate(self.names):
            metrics[f"reward/{name}"] = (jnp.sum(jnp.where(finite, scores[..., column], 0.0)), number)
        metrics |= {
            "reward/non_finite": (jnp.sum((~finite).astype(jnp.float32)), one),
            "reward/all_non_finite": ((number == 0.0).astype(jnp.float32), one),
        }
        return statistics, CandidateRewards(reward, finite, motion), metrics


def make_combiner(config: Any, rewards: Sequence[Dimensions]) -> RewardCombiner:
    """The combiner of a run's training scorers; reads reward.weights.

    Raises:
      UserError: weights that do not fit the scorers.
    """
    return RewardCombiner(
        dimension_names(rewards),
        parse_weights(config.reward.weights, rewards),
        np.array([low for reward in rewards for low, _ in reward.ranges], np.float32),
        dimension_ranges(rewards),
        motion_columns(rewards),
    )
