"""Diffusion-DPO's loss (arXiv 2311.12908, eq. 14) as numbers per pair.

The loss is split in two so that no program that takes a gradient ever sees the reference: `pair_coefficients`
turns the four errors of a pair into two constants, and `weighted_errors` has the loss's exact gradient given those
constants. A difference of differences times a large beta leaves no room for the rounding by which two differently
compiled programs disagree.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class PairErrors(NamedTuple):
    """Mean squared errors of winners and losers under one set of adapters; float32 [P] each."""

    winner: jax.Array
    loser: jax.Array


class PairCoefficients(NamedTuple):
    """d loss / d error of a pair: the winner's, and the loser's with its sign turned; float32 [P] each."""

    winner: jax.Array
    loser: jax.Array


def squared_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean over all of a clip's elements of (prediction - target)^2, in float32.

    The mean runs over every axis but the first: over some of them it would be a loss per column, not per video.

    Args:
      prediction: [B, ...].
      target: [B, ...].

    Returns:
      float32 [B].
    """
    difference = prediction.astype(jnp.float32) - target.astype(jnp.float32)
    return jnp.mean(jnp.square(difference), axis=tuple(range(1, difference.ndim)))


def preference_logit(policy: PairErrors, reference: PairErrors, beta: float) -> jax.Array:
    """u = -(beta/2) [(e_w(theta) - e_w(phi)) - (e_l(theta) - e_l(phi))], float32 [P]; 0 where theta is phi."""
    return -0.5 * beta * ((policy.winner - reference.winner) - (policy.loser - reference.loser))


def preference_label(winner_reward: jax.Array, loser_reward: jax.Array, temperature: float) -> jax.Array:
    """Probability that the winner is better: 1 at temperature 0, else sigmoid((r_w - r_l) / temperature), [P]."""
    if temperature == 0.0:
        return jnp.ones_like(winner_reward)
    return jax.nn.sigmoid((winner_reward - loser_reward) / temperature)


def preference_loss(logit: jax.Array, label: jax.Array) -> jax.Array:
    """L = -p log sigmoid(u) - (1 - p) log sigmoid(-u), [P].

    Written as softplus(-u) + (1 - p) u, which is the same and exactly ln 2 at u = 0 for every p.
    """
    return jax.nn.softplus(-logit) + (1.0 - label) * logit


def pair_coefficients(
    policy: PairErrors,
    reference: PairErrors,
    label: jax.Array,
    beta: float,
    winner_penalty: float = 0.0,
) -> PairCoefficients:
    """The loss's derivative by the policy's errors, as constants for the gradient program.

    dL/de_w = -dL/de_l = (beta/2) (p sigmoid(-u) - (1-p) sigmoid(u)); the penalty alpha max(0, e_w(theta) - e_w(phi))
    adds alpha to the winner's where its error has risen.

    Args:
      policy: errors under theta, [P].
      reference: errors under phi, [P].
      label: [P] in [0, 1].
      beta: in the convention with the 1/2 and mean errors: about 5000 for full-scale epsilon models.
      winner_penalty: alpha; 0 is off.
    """
    logit = preference_logit(policy, reference, beta)
    slope = 0.5 * beta * (label * jax.nn.sigmoid(-logit) - (1.0 - label) * jax.nn.sigmoid(logit))
    risen = (policy.winner > reference.winner).astype(jnp.float32)
    return PairCoefficients(slope + winner_penalty * risen, slope)


def weighted_errors(
    errors: PairErrors,
    coefficients: PairCoefficients,
    loser_share: jax.Array | float = 1.0,
) -> jax.Array:
    """A sum with the preference loss's gradient by theta: c_w e_w - c_l e~_l, [P].

    e~_l = sg(e_l) + lambda (e_l - sg(e_l)) has e_l's value and lambda of its gradient (Diffusion-SDPO's safeguard).
    """
    constant = jax.lax.stop_gradient(errors.loser)
    loser = constant + loser_share * (errors.loser - constant)
    return coefficients.winner * errors.winner - coefficients.loser * loser


def safeguard_share(
    winner_prediction: jax.Array,
    winner_target: jax.Array,
    loser_prediction: jax.Array,
    loser_target: jax.Array,
    mu: float,
) -> jax.Array:
    """How much of the loser's gradient leaves the winner's error falling: lambda [B] in [0, 1], no gradient.

    lambda = clip((1 - mu) |g_w|^2 / <g_w, g_l>, 0, 1), and 1 where <g_w, g_l> <= 0, for each pair by itself, with
    g = 2 (prediction - target) / D; the factor 2 / D cancels and is left out, since its square underflows.
    All arguments are [B, ...].
    """
    winner = jax.lax.stop_gradient(winner_prediction.astype(jnp.float32) - winner_target.astype(jnp.float32))
    loser = jax.lax.stop_gradient(loser_prediction.astype(jnp.float32) - loser_target.astype(jnp.float32))
    axes = tuple(range(1, winner.ndim))
    product = jnp.sum(winner * loser, axis=axes)
    share = (1.0 - mu) * jnp.sum(jnp.square(winner), axis=axes) / jnp.where(product > 0.0, product, 1.0)
    return jnp.where(product > 0.0, jnp.clip(share, 0.0, 1.0), 1.0)


def masked_sum(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Sum of the values that the mask keeps; what is dropped may be non-finite."""
    return jnp.sum(jnp.where(mask, values, 0.0))


def denominator(mask: jax.Array) -> jax.Array:
    """max(1, number of pairs kept): of the whole batch, whatever is cut into microbatches or over devices."""
    return jnp.maximum(1.0, jnp.sum(mask.astype(jnp.float32)))


def implicit_accuracy(logit: jax.Array) -> jax.Array:
    """1 where the policy prefers the winner more than the reference does, one half at u = 0; [P]."""
    return (logit > 0.0).astype(jnp.float32) + 0.5 * (logit == 0.0).astype(jnp.float32)
