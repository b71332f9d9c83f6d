"""The loss of a pair against its formula and against autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vpo_jax.training.losses import PairErrors

from vpo_jax.training import losses


def errors(seed, n=64, scale=1e-2):
    rng = np.random.default_rng(seed)
    return PairErrors(*(jnp.asarray(rng.uniform(0.5, 1.0, n) * scale, jnp.float32) for _ in range(2)))


def test_the_error_is_a_mean_over_every_axis_of_a_five_dimensional_latent():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3, 4, 5, 6, 7)).astype(np.float32)
    found = losses.squared_error(a, b)
    assert found.shape == (3,)
    np.testing.assert_allclose(found, ((a - b) ** 2).reshape(3, -1).mean(1), rtol=1e-6)


def test_errors_of_bfloat16_predictions_are_taken_in_float32():
    a = jnp.full((1, 2, 2, 2, 2), 1.0, jnp.bfloat16)
    assert losses.squared_error(a, jnp.zeros(a.shape, jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_loss_is_the_formula_of_the_paper(temperature):
    theta, phi, beta = errors(1), errors(2), 500.0
    label = losses.preference_label(jnp.linspace(0.5, 3, 64), jnp.zeros(64), temperature)
    logit = losses.preference_logit(theta, phi, beta)
    u = -beta / 2 * ((theta.winner - phi.winner) - (theta.loser - phi.loser))
    expected = -label * jax.nn.log_sigmoid(u) - (1 - label) * jax.nn.log_sigmoid(-u)
    np.testing.assert_allclose(losses.preference_loss(logit, label), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("label", [0.0, 0.3, 0.5, 0.77, 1.0])
def test_the_loss_is_exactly_ln_2_at_theta_equal_phi_for_every_label(label):
    theta = errors(3)
    logit = losses.preference_logit(theta, theta, 5000.0)
    assert np.all(np.asarray(logit) == 0.0)
    assert np.all(np.asarray(losses.preference_loss(logit, jnp.float32(label))) == np.float32(np.log(2.0)))


def test_a_soft_label_is_the_sigmoid_of_the_reward_difference_and_a_hard_one_is_1():
    reward = jnp.array([1.0, 2.0])
    np.testing.assert_array_equal(losses.preference_label(reward, reward - 1, 0.0), [1.0, 1.0])
    np.testing.assert_allclose(losses.preference_label(reward, reward - 1, 2.0), jax.nn.sigmoid(0.5), rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("penalty", [0.0, 3.0])
def test_the_constants_give_the_gradient_that_autodiff_takes_through_the_reference(temperature, penalty):
    theta, phi, beta = errors(4), errors(5), 500.0
    label = losses.preference_label(jnp.linspace(0.5, 3, 64), jnp.zeros(64), temperature)

    def direct(theta):
        loss = losses.preference_loss(losses.preference_logit(theta, phi, beta), label)
        return jnp.sum(loss + penalty * jnp.maximum(0.0, theta.winner - phi.winner))

    constants = losses.pair_coefficients(theta, phi, label, beta, penalty)
    split = jax.grad(lambda theta: jnp.sum(losses.weighted_errors(theta, constants)))(theta)
    for a, b in zip(split, jax.grad(direct)(theta), strict=True):
        # Two orders of the same float32 operations.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_a_hard_pair_at_theta_equal_phi_weighs_a_quarter_of_beta():
    theta = errors(6)
    constants = losses.pair_coefficients(theta, theta, jnp.ones(64), 500.0)
    np.testing.assert_array_equal(constants.winner, 125.0)
    np.testing.assert_array_equal(constants.loser, 125.0)


def test_a_small_step_on_the_predictions_never_raises_the_winners_error_under_the_safeguard():
    rng = np.random.default_rng(7)
    raised = 0
    for _ in range(200):
        shape = (1, 2, 3, 3, 4)
        winner, loser = rng.normal(size=(2, *shape)) * rng.uniform(0.01, 3.0, (2, 1, 1, 1, 1, 1))
        loser = loser + rng.uniform(0, 2) * winner  # often along the winner, where DPO alone would raise it
        target = np.zeros(shape)
        share = np.asarray(losses.safeguard_share(winner, target, loser, target, 0.9), np.float64)
        assert 0.0 <= share[0] <= 1.0
        # One direction for both predictions, as a shared parameter would move them.
        step = -1e-4 * (winner - share * loser)
        after, before = ((winner + step) ** 2).mean(), (winner**2).mean()
        assert after <= before
        raised += ((winner - 1e-4 * (winner - loser)) ** 2).mean() > before
    assert raised > 50  # without it the test would prove nothing


def test_the_safeguard_is_of_a_pair_and_not_of_a_microbatch():
    rng = np.random.default_rng(8)
    winner, loser = rng.normal(size=(2, 5, 2, 2, 2, 3)).astype(np.float32)
    loser = loser + winner
    zero = np.zeros_like(winner)
    together = losses.safeguard_share(winner, zero, loser, zero, 0.9)
    alone = [losses.safeguard_share(winner[i : i + 1], zero[:1], loser[i : i + 1], zero[:1], 0.9)[0] for i in range(5)]
    np.testing.assert_array_equal(together, np.array(alone))
    assert len(np.unique(np.asarray(together))) > 1


def test_the_safeguard_scales_the_losers_gradient_and_leaves_values_alone():
    theta, constants = errors(9), losses.PairCoefficients(jnp.full(64, 2.0), jnp.full(64, 3.0))
    share = jnp.linspace(0, 1, 64)
    plain = losses.weighted_errors(theta, constants)
    np.testing.assert_array_equal(losses.weighted_errors(theta, constants, share), plain)
    gradient = jax.grad(lambda theta: jnp.sum(losses.weighted_errors(theta, constants, share)))(theta)
    np.testing.assert_array_equal(gradient.winner, 2.0)
    np.testing.assert_allclose(gradient.loser, -3.0 * share, rtol=1e-6)


def test_opposed_gradients_leave_the_loser_its_whole_share():
    winner = np.ones((2, 1, 2, 2, 1), np.float32)
    zero = np.zeros_like(winner)
    np.testing.assert_array_equal(losses.safeguard_share(winner, zero, -winner, zero, 0.9), 1.0)
    np.testing.assert_array_equal(losses.safeguard_share(zero, zero, zero, zero, 0.9), 1.0)


def test_a_masked_pair_counts_nothing_even_when_it_is_not_finite():
    values, mask = jnp.array([1.0, jnp.nan, 3.0]), jnp.array([True, False, True])
    assert losses.masked_sum(values, mask) == 4.0
    assert losses.denominator(mask) == 2.0
    assert losses.denominator(jnp.zeros(3, bool)) == 1.0


def test_a_tie_counts_one_half_in_implicit_accuracy():
    np.testing.assert_array_equal(losses.implicit_accuracy(jnp.array([2.0, 0.0, -0.0, -1.0])), [1.0, 0.5, 0.5, 0.0])
