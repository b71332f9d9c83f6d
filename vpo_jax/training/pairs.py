"""Winners and losers: which two candidates of a prompt make a pair, and the buffer that keeps pairs for some steps."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vpo_jax.families.protocol import Text
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

DROP_REASONS = ("non_finite", "tie", "margin", "motion")


class Choice(NamedTuple):
    """The pair of each prompt.

    Attributes:
      winner: int32 [P], index of the candidate.
      loser: int32 [P].
      mask: bool [P], whether the pair is kept.
      winner_reward: float32 [P], in units of the combined reward.
      loser_reward: float32 [P].
      dropped: reason -> int32 count; every dropped pair counts under the first reason that holds.
    """

    winner: jax.Array
    loser: jax.Array
    mask: jax.Array
    winner_reward: jax.Array
    loser_reward: jax.Array
    dropped: Mapping[str, jax.Array]


class Pairs(NamedTuple):
    """Preference pairs with what training on them needs; the first dimension of every leaf is the pair.

    Attributes:
      winner: clean latents [P, F, h, w, C] float32.
      loser: likewise.
      text: the encoding of P prompts.
      mask: bool [P]; a pair that is dropped stays, masked, so that shapes are static.
      winner_reward: float32 [P].
      loser_reward: float32 [P].
      slot: int32 [P], the prompt's place in its step.
      step: int32 [P], the step that made the pair.
    """

    winner: jax.Array
    loser: jax.Array
    text: Text
    mask: jax.Array
    winner_reward: jax.Array
    loser_reward: jax.Array
    slot: jax.Array
    step: jax.Array


def choose_pairs(
    rewards: jax.Array,
    finite: jax.Array,
    motion: jax.Array | None,
    margin: float,
    motion_tolerance: float,
) -> Choice:
    """The best against the worst candidate of each prompt, kept where the difference is real and motion is not lost.

    Args:
      rewards: combined reward r, [P, N].
      finite: bool [P, N]; a candidate that is not can neither win nor lose.
      motion: z of the training scorer's dynamic_degree, [P, N]; None switches the motion gate off.
      margin: least r_w - r_l.
      motion_tolerance: the winner's z may be below the loser's by this much.

    Returns:
      The choice; ties go to the lower index, and a group of equal rewards makes no pair at any margin.
    """
    winner = jnp.argmax(jnp.where(finite, rewards, -jnp.inf), axis=1)
    loser = jnp.argmin(jnp.where(finite, rewards, jnp.inf), axis=1)
    winner_reward, loser_reward = _of(rewards, winner), _of(rewards, loser)
    enough = jnp.sum(finite, axis=1) >= 2
    winner_reward = jnp.where(enough, winner_reward, 0.0)
    loser_reward = jnp.where(enough, loser_reward, 0.0)
    difference = winner_reward - loser_reward
    moves = jnp.ones_like(enough)
    if motion is not None:
        moves = _of(motion, winner) >= _of(motion, loser) - motion_tolerance
    fails = {
        "non_finite": ~enough,
        "tie": (winner == loser) | (difference <= 0.0),
        "margin": difference < margin,
        "motion": ~moves,
    }
    mask = jnp.ones_like(enough)
    dropped = {}
    for reason in DROP_REASONS:
        dropped[reason] = jnp.sum(mask & fails[reason], dtype=jnp.int32)
        mask = mask & ~fails[reason]
    return Choice(winner, loser, mask, winner_reward, loser_reward, dropped)


def _of(values: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values, index[:, None], axis=1)[:, 0]


def gather_pairs(choice: Choice, latents: jax.Array, text: Text, step: jax.Array) -> Pairs:
    """The chosen candidates' latents as pairs of this step.

    Args:
      choice: of P prompts.
      latents: [P, N, F, h, w, C].
      text: of P prompts.
      step: int32 scalar.

    Returns:
      Pairs in which a dropped pair's latents are zero: a candidate may have been dropped for not being finite, and
      a gradient of zero times infinity would still be NaN.
    """
    prompts = jnp.arange(latents.shape[0], dtype=jnp.int32)
    keep = choice.mask[:, None, None, None, None]

    def take(index: jax.Array) -> jax.Array:
        chosen = jnp.take_along_axis(latents, index[:, None, None, None, None, None], axis=1)[:, 0]
        return jnp.where(keep, chosen, 0.0)

    return Pairs(
        winner=take(choice.winner),
        loser=take(choice.loser),
        text=text,
        mask=choice.mask,
        winner_reward=choice.winner_reward,
        loser_reward=choice.loser_reward,
        slot=prompts,
        step=jnp.full_like(prompts, step),
    )


def empty_buffer(pairs: Pairs, max_age: int) -> Pairs:
    """A buffer for max_age + 1 steps' pairs, all masked; `pairs` gives shapes and dtypes only.

    Pair p of step s lies at p * (max_age + 1) + s % (max_age + 1), so that on a mesh a prompt's pairs stay where
    the prompt is.
    """
    blocks = max_age + 1
    empty = jax.tree.map(lambda x: jnp.zeros((x.shape[0] * blocks, *x.shape[1:]), x.dtype), pairs)
    return empty._replace(step=jnp.full(empty.step.shape, -1, empty.step.dtype))


def push(buffer: Pairs, pairs: Pairs, step: jax.Array) -> Pairs:
    """The buffer with this step's pairs in place of the oldest."""
    prompts = pairs.mask.shape[0]
    blocks = buffer.mask.shape[0] // prompts

    def write(old: jax.Array, new: jax.Array) -> jax.Array:
        grid = old.reshape(prompts, blocks, *old.shape[1:])
        return grid.at[:, step % blocks].set(new.astype(old.dtype)).reshape(old.shape)

    return jax.tree.map(write, buffer, pairs)


def steps_kept(config: Any) -> int:
    """Steps after its own in which a pair is learnt from, so that none is older than preference.max_pair_age.

    Where scorers have devices of their own, its candidates are one step old when they are paired.
    """
    return config.preference.max_pair_age - (config.reward.devices > 0)


def drop_older(buffer: Pairs, step: jax.Array, max_age: int) -> Pairs:
    """The buffer with pairs masked that were made more than max_age steps before `step`."""
    young = (buffer.step >= 0) & (step - buffer.step <= max_age)
    return buffer._replace(mask=buffer.mask & young)


def make_pairing(config: Any, rewards: Sequence[Dimensions], out_shardings: Any = None) -> Callable:
    """`pairing(statistics, latents, text, scores, step) -> (statistics, pairs, metrics)`, jitted: a step's scores and
    candidates become its pairs.

    Args:
      config: reads preference.margin and .motion_tolerance, reward.weights.
      rewards: the training scorers.
      out_shardings: of the three results.

    The function takes latents [P * N, F, h, w, C], candidates side by side, text of P prompts, scores [P * N, D] and
    the number of completed steps; metrics are (sum, count).
    """
    names = dimension_names(rewards)
    weights = parse_weights(config.reward.weights, rewards)
    ranges = dimension_ranges(rewards)
    lows = jnp.array([low for reward in rewards for low, _ in reward.ranges], jnp.float32)
    columns = motion_columns(rewards)
    margin, tolerance = config.preference.margin, config.preference.motion_tolerance

    def pairing(
        statistics: RewardStatistics, latents: jax.Array, text: Text, scores: jax.Array, step: jax.Array
    ) -> tuple[RewardStatistics, Pairs, dict[str, tuple[jax.Array, jax.Array]]]:
        prompts = jax.tree.leaves(text)[0].shape[0]
        scores = scores.reshape(prompts, -1, scores.shape[-1])  # [P, N, D]
        statistics = update_statistics(statistics, scores)
        reward, z, finite = normalise_and_combine(statistics, scores, weights, ranges)
        motion = jnp.mean(z[..., jnp.array(columns)], axis=-1) if columns else None
        choice = choose_pairs(reward, finite, motion, margin, tolerance)
        pairs = gather_pairs(choice, latents.reshape(*reward.shape, *latents.shape[1:]), text, step)

        one = jnp.ones((), jnp.float32)
        number = jnp.sum(finite.astype(jnp.float32))
        total = jnp.sum((scores - lows) / ranges * weights, axis=-1)
        kept = jnp.sum(choice.mask.astype(jnp.float32))
        gap = jnp.where(choice.mask, choice.winner_reward - choice.loser_reward, 0.0)
        metrics = {"reward/total": (jnp.sum(jnp.where(finite, total, 0.0)), number)}
        for column, name in enumerate(names):
            metrics[f"reward/{name}"] = (jnp.sum(jnp.where(finite, scores[..., column], 0.0)), number)
        metrics |= {
            "reward/non_finite": (jnp.sum((~finite).astype(jnp.float32)), one),
            "reward/all_non_finite": ((number == 0.0).astype(jnp.float32), one),
            "pair/kept": (kept, one),
            "pair/margin": (jnp.sum(gap), kept),
        }
        for reason, count in choice.dropped.items():
            metrics[f"pair/dropped_{reason}"] = (count.astype(jnp.float32), one)
        if motion is not None:
            more = _of(motion, choice.winner) - _of(motion, choice.loser)
            metrics["pair/motion"] = (jnp.sum(jnp.where(choice.mask, more, 0.0)), kept)
        return statistics, pairs, metrics

    return jax.jit(pairing, out_shardings=out_shardings)
