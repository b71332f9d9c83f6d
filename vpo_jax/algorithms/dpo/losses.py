"""Losses of Diffusion-DPO and of its forms for groups, as numbers per candidate.

P prompts, K candidates of each that are learnt from; e_i is a candidate's error, d_i = e_i(theta) - e_i(phi) its
change, s_i = -(beta/2) d_i its implicit reward. Every loss has the gradient of sum_i c_i e_i(theta) with constants c_i:
the loss is split so that no program that takes a gradient ever sees the reference. A difference of differences times a
large beta leaves no room for the rounding by which two differently compiled programs disagree.

Sources: Diffusion-DPO (arXiv 2311.12908, eq. 14), DGPO (arXiv 2510.08425), Diffusion-SDPO (the safeguard).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class GroupLoss(NamedTuple):
    """A loss of each prompt's group at given errors, with its gradient's constants.

    Attributes:
      loss: float32 [P].
      coefficients: d loss / d e_i, float32 [P, K]; they sum to 0 over a group, up to rounding.
      logit: float32 [P], the argument of the log sigmoid; of several pairs their mean.
      accuracy: float32 [P], implicit accuracy in [0, 1]; u = 0 counts one half.
      better: float32 [P, K], weights that sum to 1 over what the loss makes more likely; 0 elsewhere.
      worse: likewise of what it makes less likely.
    """

    loss: jax.Array
    coefficients: jax.Array
    logit: jax.Array
    accuracy: jax.Array
    better: jax.Array
    worse: jax.Array


# (changes d [P, K], rewards [P, K], preferred bool [P, K, K], learnt bool [P, K]) -> GroupLoss
LossFunction = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], GroupLoss]


def squared_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean over all of a video's elements of (prediction - target)^2, in float32.

    The mean runs over every axis but the first: over some of them it would be a loss per column, not per video.

    Args:
      prediction: [B, ...].
      target: [B, ...].

    Returns:
      float32 [B].
    """
    difference = prediction.astype(jnp.float32) - target.astype(jnp.float32)
    return jnp.mean(jnp.square(difference), axis=tuple(range(1, difference.ndim)))


def preference_label(rewards: jax.Array, temperature: float) -> jax.Array:
    """Probability that i is better than j: 1 at temperature 0, else sigmoid((r_i - r_j) / temperature), [P, K, K]."""
    difference = rewards[:, :, None] - rewards[:, None, :]
    return jnp.ones_like(difference) if temperature == 0.0 else jax.nn.sigmoid(difference / temperature)


def preference_loss(logit: jax.Array, label: jax.Array | float = 1.0) -> jax.Array:
    """L = -p log sigmoid(u) - (1 - p) log sigmoid(-u), of any shape.

    Written as softplus(-u) + (1 - p) u, which is the same and exactly ln 2 at u = 0 for every p.
    """
    return jax.nn.softplus(-logit) + (1.0 - label) * logit


def implicit_accuracy(logit: jax.Array) -> jax.Array:
    """1 where the policy prefers the better one more than the reference does, one half at u = 0."""
    return (logit > 0.0).astype(jnp.float32) + 0.5 * (logit == 0.0).astype(jnp.float32)


def make_pairwise_loss(beta: float, label_temperature: float = 0.0) -> LossFunction:
    """The mean over a prompt's pairs (i, j), i preferred, of the preference loss at u_ij = s_i - s_j.

    With one pair it is Diffusion-DPO's loss. For each pair, over their number,
    dL/de_i = -dL/de_j = (beta/2) (p sigmoid(-u) - (1 - p) sigmoid(u)).

    Args:
      beta: in the convention with the 1/2 and mean errors: about 5000 for full-scale epsilon models.
      label_temperature: of soft labels; 0 is hard ones.
    """

    def pairwise(change: jax.Array, rewards: jax.Array, preferred: jax.Array, learnt: jax.Array) -> GroupLoss:
        del learnt  # `preferred` says which pairs count
        logit = -0.5 * beta * (change[:, :, None] - change[:, None, :])  # [P, K, K]
        label = preference_label(rewards, label_temperature)
        number = jnp.maximum(1.0, jnp.sum(preferred, axis=(1, 2), dtype=jnp.float32))

        def mean(values: jax.Array) -> jax.Array:  # [P, K, K] -> [P]
            return jnp.sum(jnp.where(preferred, values, 0.0), axis=(1, 2)) / number

        # About the largest, so that the mean of equal losses, such as ln 2 at theta = phi, is exactly theirs.
        loss = preference_loss(logit, label)
        largest = jnp.max(jnp.where(preferred, loss, -jnp.inf), axis=(1, 2))
        largest = jnp.where(jnp.any(preferred, axis=(1, 2)), largest, 0.0)
        slope = 0.5 * beta * (label * jax.nn.sigmoid(-logit) - (1.0 - label) * jax.nn.sigmoid(logit))
        slope = jnp.where(preferred, slope, 0.0) / number[:, None, None]
        weight = preferred.astype(jnp.float32) / number[:, None, None]
        return GroupLoss(
            loss=largest + mean(loss - largest[:, None, None]),
            coefficients=jnp.sum(slope, axis=2) - jnp.sum(slope, axis=1),
            logit=mean(logit),
            accuracy=mean(implicit_accuracy(logit)),
            better=jnp.sum(weight, axis=2),
            worse=jnp.sum(weight, axis=1),
        )

    return pairwise


def make_group_loss(beta: float) -> LossFunction:
    """DGPO's loss: -log sigmoid(R), R = 2 sum_i A_i s_i / sum_i |A_i|, A_i the centred reward; N = 2 is DPO.

    dL/de_i = (beta/2) sigmoid(-R) 2 A_i / sum |A|. Dividing A by its deviation in the group would change nothing.
    """

    def group(change: jax.Array, rewards: jax.Array, preferred: jax.Array, learnt: jax.Array) -> GroupLoss:
        del preferred
        share, better, worse = advantage_shares(rewards, learnt)
        logit = jnp.sum(share * (-0.5 * beta * change), axis=1)
        return GroupLoss(
            loss=preference_loss(logit),
            coefficients=0.5 * beta * jax.nn.sigmoid(-logit)[:, None] * share,
            logit=logit,
            accuracy=implicit_accuracy(logit),
            better=better,
            worse=worse,
        )

    return group


def make_listwise_loss(beta: float, label_temperature: float) -> LossFunction:
    """Cross-entropy of softmax(s) against softmax(r / temperature), over the candidates that are learnt from.

    dL/de_i = (beta/2) (softmax(r / T)_i - softmax(s)_i). Written as log sum exp s - sum of softmax(r / T) s, which is
    exactly ln n for n candidates at theta = phi.
    """

    def listwise(change: jax.Array, rewards: jax.Array, preferred: jax.Array, learnt: jax.Array) -> GroupLoss:
        del preferred
        implicit = -0.5 * beta * change
        wanted = _softmax(rewards / label_temperature, learnt)
        total = jax.nn.logsumexp(jnp.where(learnt, implicit, -jnp.inf), axis=1)
        share, better, worse = advantage_shares(rewards, learnt)
        logit = jnp.sum(share * implicit, axis=1)
        return GroupLoss(
            loss=total - jnp.sum(jnp.where(learnt, wanted * implicit, 0.0), axis=1),
            coefficients=jnp.where(learnt, 0.5 * beta * (wanted - _softmax(implicit, learnt)), 0.0),
            logit=logit,
            accuracy=implicit_accuracy(logit),
            better=better,
            worse=worse,
        )

    return listwise


def advantage_shares(rewards: jax.Array, learnt: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """2 A_i / sum |A|, and the positive and the negative advantages as weights that sum to 1; float32 [P, K] each.

    A is the reward less the mean over the candidates that are learnt from; all are 0 in a group of equal rewards.
    """
    number = jnp.maximum(1.0, jnp.sum(learnt, axis=1, dtype=jnp.float32))[:, None]
    mean = jnp.sum(jnp.where(learnt, rewards, 0.0), axis=1, keepdims=True) / number
    advantage = jnp.where(learnt, rewards - mean, 0.0)
    half = 0.5 * jnp.sum(jnp.abs(advantage), axis=1, keepdims=True)
    share = jnp.where(half > 0.0, advantage / jnp.where(half > 0.0, half, 1.0), 0.0)
    return share, jnp.maximum(share, 0.0), jnp.maximum(-share, 0.0)


def _softmax(values: jax.Array, keep: jax.Array) -> jax.Array:
    return jnp.where(keep, jax.nn.softmax(jnp.where(keep, values, -jnp.inf), axis=1), 0.0)


def winner_penalty(change: jax.Array, better: jax.Array, weight: float) -> tuple[jax.Array, jax.Array]:
    """weight sum_i w_i max(0, d_i) over the better candidates with their weights w, and its derivative by e_i.

    Args:
      change: d, [P, K].
      better: w of `GroupLoss.better`, [P, K].
      weight: alpha; 0 is off.

    Returns:
      float32 [P] and [P, K].
    """
    risen = (change > 0.0).astype(jnp.float32)
    penalty = weight * jnp.sum(better * jnp.maximum(0.0, change), axis=1)
    return penalty, weight * better * risen


def safeguard_share(residuals: jax.Array, coefficients: jax.Array, mu: float) -> jax.Array:
    """How much of the losers' gradient leaves the winners' error falling: lambda [P] in [0, 1].

    lambda = clip((1 - mu) |g_w|^2 / <g_w, g_l>, 0, 1), and 1 where <g_w, g_l> <= 0, for each group by itself. g_w is
    the sum of c_i g_i over c_i > 0 and g_l that of -c_i g_i over c_i < 0, with g = 2 (prediction - target) / D; the
    factor 2 / D cancels and is left out, since its square underflows.

    Args:
      residuals: prediction - target, [P, K, ...].
      coefficients: c, [P, K].
      mu: 0 lets lambda be largest; 1 leaves nothing of the losers where gradients agree.
    """
    flat = residuals.astype(jnp.float32).reshape(*coefficients.shape, -1)
    # Scaled by the largest, so that a large beta cannot overflow the square; the ratio does not change.
    scale = jnp.max(jnp.abs(coefficients), axis=1, keepdims=True)
    weights = coefficients / jnp.where(scale > 0.0, scale, 1.0)
    winner = jnp.einsum("pk,pkd->pd", jnp.maximum(weights, 0.0), flat)
    loser = jnp.einsum("pk,pkd->pd", jnp.maximum(-weights, 0.0), flat)
    product = jnp.sum(winner * loser, axis=1)
    share = (1.0 - mu) * jnp.sum(jnp.square(winner), axis=1) / jnp.where(product > 0.0, product, 1.0)
    return jnp.where(product > 0.0, jnp.clip(share, 0.0, 1.0), 1.0)


def masked_sum(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Sum of the values that the mask keeps; what is dropped may be non-finite."""
    return jnp.sum(jnp.where(mask, values, 0.0))


def denominator(mask: jax.Array) -> jax.Array:
    """max(1, number of groups kept): of the whole batch, however it is split into microbatches or sharded."""
    return jnp.maximum(1.0, jnp.sum(mask.astype(jnp.float32)))
