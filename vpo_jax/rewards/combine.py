"""Several scorers' dimensions as one reward: pooled within-prompt variance, z values, weights."""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from vpo_jax.runtime.errors import UserError

MOTION = "dynamic_degree"
# Least sigma as a share of a dimension's range: the noise of a dimension that hardly varies is not amplified.
SIGMA_FLOOR = 0.01


class Dimensions(Protocol):
    """What combining needs to know of a scorer; every Reward has it."""

    @property
    def name(self) -> str: ...

    @property
    def dimensions(self) -> tuple[str, ...]: ...

    @property
    def ranges(self) -> tuple[tuple[float, float], ...]: ...


class RewardStatistics(NamedTuple):
    """Pooled within-prompt variance of each dimension since the run began.

    Attributes:
      variance: float32 [D].
      degrees_of_freedom: float32 scalar, of that variance: the sum over prompts of (finite candidates - 1).
    """

    variance: jax.Array
    degrees_of_freedom: jax.Array


class Combined(NamedTuple):
    """A step's rewards.

    Attributes:
      reward: r, float32 [P, N]; 0 for a candidate that is not finite.
      z: float32 [P, N, D]; 0 likewise.
      finite: bool [P, N].
    """

    reward: jax.Array
    z: jax.Array
    finite: jax.Array


def dimension_names(rewards: Sequence[Dimensions]) -> tuple[str, ...]:
    """Each dimension as "scorer/dimension", in the order in which scores are concatenated.

    Raises UserError when two scorers have one name.
    """
    names = [reward.name for reward in rewards]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"reward.scorers: {name!r} stands twice; name every scorer once")
    return tuple(f"{reward.name}/{dimension}" for reward in rewards for dimension in reward.dimensions)


def dimension_ranges(rewards: Sequence[Dimensions]) -> np.ndarray:
    """Width of each dimension's declared range, float32 [D]."""
    return np.array([high - low for reward in rewards for low, high in reward.ranges], np.float32)


def motion_columns(rewards: Sequence[Dimensions]) -> tuple[int, ...]:
    """Columns of the scores that hold a scorer's dynamic_degree; empty switches the motion gate off."""
    names = dimension_names(rewards)
    return tuple(i for i, name in enumerate(names) if name.rpartition("/")[2] == MOTION)


def parse_weights(text: str, rewards: Sequence[Dimensions]) -> np.ndarray:
    """Weights of all dimensions from "scorer/dimension=weight,dimension=weight", scaled to sum |w| = 1.

    Args:
      text: may be empty; a dimension that is not named weighs 1, a bare one must be unique among the scorers.
      rewards: the training scorers.

    Returns:
      float32 [D], in the order of `dimension_names`.

    Raises:
      UserError: an unknown, ambiguous or repeated name, something that is no number, or all weights 0.
    """
    names = dimension_names(rewards)
    known = "known: " + ", ".join(names)
    weights = dict.fromkeys(names, 1.0)
    seen: set[str] = set()
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, equals, number = (part.strip() for part in entry.partition("="))
        matches = [full for full in names if name in (full, full.rpartition("/")[2])]
        if not matches:
            raise UserError(f"reward.weights: no scorer has a dimension {name!r}; {known}")
        if len(matches) > 1:
            raise UserError(f"reward.weights: {name!r} is in several scorers; write one of {', '.join(matches)}")
        if matches[0] in seen:
            raise UserError(f"reward.weights: {matches[0]!r} is given twice; leave one")
        try:
            weight = float(number) if equals else math.nan
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise UserError(f"reward.weights: {entry!r} gives no number; write {name}=1.0")
        seen.add(matches[0])
        weights[matches[0]] = weight
    total = sum(abs(weight) for weight in weights.values())
    if total == 0.0:
        raise UserError(f"reward.weights: every weight is 0, so no video is better than another; {known}")
    return np.array([weights[name] / total for name in names], np.float32)


def init_statistics(num_dimensions: int) -> RewardStatistics:
    """Statistics before the first step."""
    return RewardStatistics(jnp.zeros(num_dimensions, jnp.float32), jnp.zeros((), jnp.float32))


def finite_candidates(scores: jax.Array) -> jax.Array:
    """Whether all of a candidate's scores are finite: [P, N, D] -> bool [P, N]."""
    return jnp.all(jnp.isfinite(scores), axis=-1)


def _centre(scores: jax.Array, finite: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scores less the mean of the prompt's finite candidates, 0 for the others; and how many there are, [P]."""
    keep = finite[..., None]
    number = jnp.sum(finite, axis=1).astype(jnp.float32)
    safe = jnp.where(keep, scores.astype(jnp.float32), 0.0)
    mean = jnp.sum(safe, axis=1) / jnp.maximum(number, 1.0)[:, None]
    return jnp.where(keep, safe - mean[:, None, :], 0.0), number


def update_statistics(statistics: RewardStatistics, scores: jax.Array) -> RewardStatistics:
    """Welford's update of the pooled within-prompt variance with a step's scores [P, N, D].

    A running mean of squared deviations rather than their running sum: float32 keeps it exact for longer.
    """
    deviations, number = _centre(scores, finite_candidates(scores))
    added = jnp.sum(jnp.maximum(number - 1.0, 0.0))
    degrees_of_freedom = statistics.degrees_of_freedom + added
    # The new scores count as added * (their own variance), so with added = 0 nothing changes.
    surplus = jnp.sum(jnp.square(deviations), axis=(0, 1)) - added * statistics.variance
    variance = statistics.variance + surplus / jnp.maximum(degrees_of_freedom, 1.0)
    return RewardStatistics(variance, degrees_of_freedom)


def normalise_and_combine(
    statistics: RewardStatistics, scores: jax.Array, weights: jax.typing.ArrayLike, ranges: jax.typing.ArrayLike
) -> Combined:
    """z = (s - mean over the prompt's finite candidates) / sigma_d, and r = sum_d w_d z_d.

    Args:
      statistics: already updated with these scores.
      scores: float32 [P, N, D].
      weights: [D], sum |w| = 1.
      ranges: width of each dimension's declared range, [D]; sigma_d is at least 1 % of it.
    """
    finite = finite_candidates(scores)
    deviations, _ = _centre(scores, finite)
    sigma = jnp.maximum(jnp.sqrt(statistics.variance), SIGMA_FLOOR * jnp.asarray(ranges))
    z = deviations / sigma
    return Combined(jnp.sum(z * jnp.asarray(weights), axis=-1), z, finite)
