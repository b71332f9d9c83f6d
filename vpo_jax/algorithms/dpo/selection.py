"""What a step's candidates teach: which are learnt from, which is preferred to which, and the buffer of them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

DROP_REASONS = ("non_finite", "tie", "margin", "motion")
# preference.pairs: which candidates are learnt from, and by which loss.
PAIRS = ("best_worst", "top_k", "all", "group", "listwise")
# Forms whose loss is of the whole group and not a mean over pairs.
OF_GROUPS = ("group", "listwise")

Tree = Any


class Choice(NamedTuple):
    """What is learnt from each prompt's candidates.

    Attributes:
      chosen: int32 [P, K], the candidates that are learnt from, if `learnt` says so.
      rewards: float32 [P, K], in units of the combined reward; 0 for a candidate that is not finite.
      preferred: bool [P, K, K], [p, i, j] whether i is preferred to j and the pair counts.
      learnt: bool [P, K], whether the candidate takes part.
      mask: bool [P], whether the prompt teaches anything.
      dropped: reason -> int32 count of pairs; every dropped pair counts under the first reason that holds.
    """

    chosen: jax.Array
    rewards: jax.Array
    preferred: jax.Array
    learnt: jax.Array
    mask: jax.Array
    dropped: Mapping[str, jax.Array]


class Groups(NamedTuple):
    """Candidates that are learnt from, with what training needs; the first dimension of every leaf is the prompt.

    Attributes:
      latents: clean, float32 [P, K, F, h, w, C].
      text: the prompt's encoding, every leaf [P, ...].
      rewards: float32 [P, K].
      preferred: bool [P, K, K].
      learnt: bool [P, K].
      mask: bool [P]; a group that is dropped stays, masked, so that shapes are static.
      slot: int32 [P], the prompt's place in its step.
      step: int32 [P], the step that made the group.
    """

    latents: jax.Array
    text: Tree
    rewards: jax.Array
    preferred: jax.Array
    learnt: jax.Array
    mask: jax.Array
    slot: jax.Array
    step: jax.Array


def group_size(pairs: str, candidates: int, top_k: int) -> int:
    """K, the candidates of a prompt that are learnt from."""
    return {"best_worst": 2, "top_k": 2 * top_k}.get(pairs, candidates)


def make_choose(
    pairs: str, top_k: int, margin: float, motion_tolerance: float
) -> Callable[[jax.Array, jax.Array, jax.Array | None], Choice]:
    """`choose(rewards [P, N], finite [P, N], motion [P, N] or None) -> Choice`.

    A candidate that is not finite is neither preferred nor dispreferred. `motion` is z of the training scorers'
    dynamic_degree; None switches the motion gate off.

    Args:
      pairs: one of `PAIRS`. "best_worst" and "top_k" learn from the k best against the k worst (ties go to the lower
        index), "all" from every pair; "group" and "listwise" from the whole group by its loss.
      top_k: k; best_worst is 1.
      margin: least r_i - r_j of a pair, or of the group's best and worst; a tie is no pair at any margin.
      motion_tolerance: z of the preferred may be below the other's by this much. For groups: below the group's mean,
        where its advantage is positive; such a candidate is dropped.
    """
    if pairs in OF_GROUPS:
        return lambda rewards, finite, motion: _choose_group(rewards, finite, motion, margin, motion_tolerance)
    k = {"best_worst": 1, "top_k": top_k}.get(pairs, 0)

    def choose(rewards: jax.Array, finite: jax.Array, motion: jax.Array | None) -> Choice:
        candidates = rewards.shape[1]
        if k:
            best = jax.lax.top_k(jnp.where(finite, rewards, -jnp.inf), k)[1]
            worst = jax.lax.top_k(jnp.where(finite, -rewards, -jnp.inf), k)[1]
            index = jnp.concatenate([best, worst], axis=1)  # [P, 2k]
            considered = (jnp.arange(2 * k)[:, None] < k) & (jnp.arange(2 * k)[None, :] >= k)
        else:
            index = jnp.broadcast_to(jnp.arange(candidates), rewards.shape)
            considered = ~jnp.eye(candidates, dtype=bool)
        usable = _take(finite, index) & (jnp.sum(finite, axis=1) >= 2)[:, None]
        reward = jnp.where(usable, _take(rewards, index), 0.0)
        difference = reward[:, :, None] - reward[:, None, :]
        moves = jnp.ones_like(difference, dtype=bool)
        if motion is not None:
            seen = _take(motion, index)
            moves = seen[:, :, None] >= seen[:, None, :] - motion_tolerance
        fails = {
            "non_finite": ~(usable[:, :, None] & usable[:, None, :]),
            "tie": difference <= 0.0 if k else difference == 0.0,
            "margin": difference < margin,
            "motion": ~moves,
        }
        # Of two candidates only the better one can be preferred: a pair is counted once, in that direction.
        better = difference > 0.0
        lower = jnp.arange(reward.shape[1])[:, None] < jnp.arange(reward.shape[1])[None, :]
        kept = considered & (jnp.ones_like(better) if k else better | ((difference == 0.0) & lower))
        dropped = {}
        for reason in DROP_REASONS:
            dropped[reason] = jnp.sum(kept & fails[reason], dtype=jnp.int32)
            kept = kept & ~fails[reason]
        learnt = jnp.any(kept, axis=2) | jnp.any(kept, axis=1)
        return Choice(index, reward, kept, learnt, jnp.any(kept, axis=(1, 2)), dropped)

    return choose


def _choose_group(
    rewards: jax.Array, finite: jax.Array, motion: jax.Array | None, margin: float, motion_tolerance: float
) -> Choice:
    """The whole group: `preferred` holds every pair of learnt candidates, `dropped` counts whole groups."""
    number = jnp.sum(finite, axis=1)
    reward = jnp.where(finite, rewards, 0.0)
    learnt = finite
    if motion is not None:
        count = jnp.maximum(1, number)
        centred = reward - (jnp.sum(reward, axis=1) / count)[:, None]
        mean_motion = jnp.sum(jnp.where(finite, motion, 0.0), axis=1) / count
        learnt = finite & ~((centred > 0.0) & (motion < mean_motion[:, None] - motion_tolerance))
    spread = _spread(reward, finite)
    fails = {
        "non_finite": number < 2,
        "tie": spread <= 0.0,
        "margin": spread < margin,
        "motion": _spread(reward, learnt) <= 0.0,
    }
    mask = jnp.ones_like(number, dtype=bool)
    dropped = {}
    for reason in DROP_REASONS:
        dropped[reason] = jnp.sum(mask & fails[reason], dtype=jnp.int32)
        mask = mask & ~fails[reason]
    learnt = learnt & mask[:, None]
    better = reward[:, :, None] > reward[:, None, :]
    preferred = better & learnt[:, :, None] & learnt[:, None, :]
    index = jnp.broadcast_to(jnp.arange(rewards.shape[1]), rewards.shape)
    return Choice(index, reward, preferred, learnt, mask, dropped)


def _spread(rewards: jax.Array, keep: jax.Array) -> jax.Array:
    """The best less the worst of what is kept, [P]; negative where nothing is."""
    return jnp.max(jnp.where(keep, rewards, -jnp.inf), axis=1) - jnp.min(jnp.where(keep, rewards, jnp.inf), axis=1)


def _take(values: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values, index, axis=1)


def gather(choice: Choice, latents: jax.Array, text: Tree, step: jax.Array) -> Groups:
    """The chosen candidates' latents as groups of this step.

    Args:
      choice: of P prompts.
      latents: [P, N, F, h, w, C].
      text: every leaf [P, ...].
      step: int32 scalar.

    Returns:
      Groups in which the latents of a candidate that is not learnt from are zero: it may have been dropped for not
      being finite, and a gradient of zero times infinity would still be NaN.
    """
    prompts = jnp.arange(latents.shape[0], dtype=jnp.int32)
    expand = (slice(None), slice(None), *(None,) * (latents.ndim - 2))
    found = jnp.take_along_axis(latents, choice.chosen[expand], axis=1)
    return Groups(
        latents=jnp.where(choice.learnt[expand], found, 0.0),
        text=text,
        rewards=choice.rewards,
        preferred=choice.preferred,
        learnt=choice.learnt,
        mask=choice.mask,
        slot=prompts,
        step=jnp.full_like(prompts, step),
    )


def abstract_groups(prompts: int, size: int, latents: jax.ShapeDtypeStruct, text: Tree) -> Groups:
    """Shapes and dtypes of a step's groups of `size` candidates; `latents` and `text` are of one video and prompt."""

    def array(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((prompts, *shape), dtype)

    return Groups(
        latents=array(jnp.float32, size, *latents.shape),
        text=jax.tree.map(lambda x: array(x.dtype, *x.shape), text),
        rewards=array(jnp.float32, size),
        preferred=array(jnp.bool_, size, size),
        learnt=array(jnp.bool_, size),
        mask=array(jnp.bool_),
        slot=array(jnp.int32),
        step=array(jnp.int32),
    )


def empty_buffer(groups: Groups, max_age: int) -> Groups:
    """A buffer for max_age + 1 steps' groups, all masked; `groups` gives shapes and dtypes only.

    Group p of step s lies at p * (max_age + 1) + s % (max_age + 1), so that on a mesh a prompt's groups stay where
    the prompt is.
    """
    blocks = max_age + 1
    empty = jax.tree.map(lambda x: jnp.zeros((x.shape[0] * blocks, *x.shape[1:]), x.dtype), groups)
    return empty._replace(step=jnp.full(empty.step.shape, -1, empty.step.dtype))


def push(buffer: Groups, groups: Groups, step: jax.Array) -> Groups:
    """The buffer with this step's groups in place of the oldest."""
    prompts = groups.mask.shape[0]
    blocks = buffer.mask.shape[0] // prompts

    def write(old: jax.Array, new: jax.Array) -> jax.Array:
        grid = old.reshape(prompts, blocks, *old.shape[1:])
        return grid.at[:, step % blocks].set(new.astype(old.dtype)).reshape(old.shape)

    return jax.tree.map(write, buffer, groups)


def steps_kept(config: Any) -> int:
    """Steps after its own in which a group is learnt from, so that none is older than preference.max_pair_age.

    Where scorers have devices of their own, its candidates are one step old when they are scored.
    """
    return config.preference.max_pair_age - (config.reward.devices > 0)


def drop_older(buffer: Groups, step: jax.Array, max_age: int) -> Groups:
    """The buffer with groups masked that were made more than max_age steps before `step`."""
    young = (buffer.step >= 0) & (step - buffer.step <= max_age)
    return buffer._replace(mask=buffer.mask & young)
