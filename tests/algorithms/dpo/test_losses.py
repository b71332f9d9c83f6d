"""The losses of pairs and of groups against their formulas and against autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpo_jax.algorithms.dpo import losses

BETA = 500.0


def errors(seed, n=64, scale=1e-2):
    """Of n pairs, float32 [n, 2]: the winner's and the loser's."""
    rng = np.random.default_rng(seed)
    return jnp.stack([jnp.asarray(rng.uniform(0.5, 1.0, n) * scale, jnp.float32) for _ in range(2)], axis=1)


def pair_rewards(n=64):
    return jnp.stack([jnp.linspace(0.5, 3, n), jnp.zeros(n)], axis=1)


def of_pairs(change, temperature=0.0, beta=BETA, rewards=None):
    """The pairwise loss of [n, 2], of which the first is always preferred."""
    n = len(change)
    preferred = jnp.zeros((n, 2, 2), bool).at[:, 0, 1].set(True)
    rewards = pair_rewards(n) if rewards is None else rewards
    return losses.make_pairwise_loss(beta, temperature)(change, rewards, preferred, jnp.ones((n, 2), bool))


def logit_of(change, beta=BETA):
    return -0.5 * beta * (change[:, 0] - change[:, 1])


def pair_share(winner, loser, mu=0.9, weights=(1.0, -1.0)):
    """The safeguard of pairs [n, ...] of residuals."""
    coefficients = jnp.broadcast_to(jnp.array(weights, jnp.float32), (len(winner), 2))
    return losses.safeguard_share(jnp.stack([winner, loser], axis=1), coefficients, mu)


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
    theta, phi = errors(1), errors(2)
    label = losses.preference_label(pair_rewards(), temperature)[:, 0, 1]
    found = of_pairs(theta - phi, temperature)
    u = -BETA / 2 * ((theta[:, 0] - phi[:, 0]) - (theta[:, 1] - phi[:, 1]))
    expected = -label * jax.nn.log_sigmoid(u) - (1 - label) * jax.nn.log_sigmoid(-u)
    np.testing.assert_allclose(found.loss, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.logit, u, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("label", [0.0, 0.3, 0.5, 0.77, 1.0])
def test_the_loss_is_exactly_ln_2_at_theta_equal_phi_for_every_label(label):
    theta = errors(3)
    logit = of_pairs(theta - theta, beta=5000.0).logit
    assert np.all(np.asarray(logit) == 0.0)
    assert np.all(np.asarray(losses.preference_loss(logit, jnp.float32(label))) == np.float32(np.log(2.0)))


def test_a_soft_label_is_the_sigmoid_of_the_reward_difference_and_a_hard_one_is_1():
    reward = jnp.array([1.0, 2.0])
    rewards = jnp.stack([reward, reward - 1], axis=1)
    np.testing.assert_array_equal(losses.preference_label(rewards, 0.0)[:, 0, 1], [1.0, 1.0])
    np.testing.assert_allclose(losses.preference_label(rewards, 2.0)[:, 0, 1], jax.nn.sigmoid(0.5), rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("penalty", [0.0, 3.0])
def test_the_constants_give_the_gradient_that_autodiff_takes_through_the_reference(temperature, penalty):
    theta, phi = errors(4), errors(5)
    label = losses.preference_label(pair_rewards(), temperature)[:, 0, 1]

    def direct(theta):
        loss = losses.preference_loss(logit_of(theta - phi), label)
        return jnp.sum(loss + penalty * jnp.maximum(0.0, theta[:, 0] - phi[:, 0]))

    found = of_pairs(theta - phi, temperature)
    value, risen = losses.winner_penalty(theta - phi, found.better, penalty)
    constants = found.coefficients + risen
    split = jax.grad(lambda theta: jnp.sum(constants * theta))(theta)
    # Two orders of the same float32 operations.
    np.testing.assert_allclose(split, jax.grad(direct)(theta), rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(value, penalty * jnp.maximum(0.0, theta[:, 0] - phi[:, 0]))


def test_a_hard_pair_at_theta_equal_phi_weighs_a_quarter_of_beta():
    theta = errors(6)
    constants = of_pairs(theta - theta).coefficients
    np.testing.assert_array_equal(constants[:, 0], 125.0)
    np.testing.assert_array_equal(constants[:, 1], -125.0)


def test_a_small_step_on_the_predictions_never_raises_the_winners_error_under_the_safeguard():
    rng = np.random.default_rng(7)
    raised = 0
    for _ in range(200):
        shape = (1, 2, 3, 3, 4)
        winner, loser = rng.normal(size=(2, *shape)) * rng.uniform(0.01, 3.0, (2, 1, 1, 1, 1, 1))
        loser = loser + rng.uniform(0, 2) * winner  # often along the winner, where DPO alone would raise it
        share = np.asarray(pair_share(winner, loser), np.float64)
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
    together = pair_share(winner, loser)
    alone = [pair_share(winner[i : i + 1], loser[i : i + 1])[0] for i in range(5)]
    np.testing.assert_array_equal(together, np.array(alone))
    assert len(np.unique(np.asarray(together))) > 1


def test_opposed_gradients_leave_the_loser_its_whole_share():
    winner = np.ones((2, 1, 2, 2, 1), np.float32)
    zero = np.zeros_like(winner)
    np.testing.assert_array_equal(pair_share(winner, -winner), 1.0)
    np.testing.assert_array_equal(pair_share(zero, zero), 1.0)


def test_a_masked_pair_counts_nothing_even_when_it_is_not_finite():
    values, mask = jnp.array([1.0, jnp.nan, 3.0]), jnp.array([True, False, True])
    assert losses.masked_sum(values, mask) == 4.0
    assert losses.denominator(mask) == 2.0
    assert losses.denominator(jnp.zeros(3, bool)) == 1.0


def test_a_tie_counts_one_half_in_implicit_accuracy():
    np.testing.assert_array_equal(losses.implicit_accuracy(jnp.array([2.0, 0.0, -0.0, -1.0])), [1.0, 0.5, 0.5, 0.0])


# ---- Groups ----

FORMS = {
    "all": losses.make_pairwise_loss(BETA),
    "all, soft": losses.make_pairwise_loss(BETA, 0.7),
    "group": losses.make_group_loss(BETA),
    "listwise": losses.make_listwise_loss(BETA, 0.7),
}


def group_of(seed, size=5, prompts=40, dropped=0.25):
    """Errors of theta and phi [P, K], rewards [P, K], preferred [P, K, K], learnt [P, K]; at least two are learnt."""
    rng = np.random.default_rng(seed)
    theta, phi = (jnp.asarray(rng.uniform(0.5, 1.0, (prompts, size)) * 1e-2, jnp.float32) for _ in range(2))
    rewards = jnp.asarray(rng.normal(size=(prompts, size)), jnp.float32)
    learnt = rng.random((prompts, size)) >= dropped
    learnt[:, :2] = True
    both = learnt[:, :, None] & learnt[:, None, :]
    preferred = jnp.asarray(both) & (rewards[:, :, None] > rewards[:, None, :])
    return theta, phi, rewards, preferred, jnp.asarray(learnt)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_a_group_at_theta_equal_phi_has_the_loss_of_an_untouched_policy_exactly(form, size):
    theta, _, rewards, preferred, learnt = group_of(10, size)
    found = FORMS[form](theta - theta, rewards, preferred, learnt)
    np.testing.assert_array_equal(np.abs(found.logit), 0.0)
    np.testing.assert_array_equal(found.accuracy, 0.5)
    # ln n as float32's logarithm rounds it.
    expected = jnp.log(jnp.sum(learnt, axis=1, dtype=jnp.float32)) if form == "listwise" else np.float32(np.log(2.0))
    np.testing.assert_array_equal(found.loss, jnp.broadcast_to(expected, 40))


@pytest.mark.parametrize("form", FORMS)
def test_a_groups_constants_are_what_autodiff_takes_through_the_reference(form):
    theta, phi, rewards, preferred, learnt = group_of(11)

    def direct(theta):
        return jnp.sum(FORMS[form](theta - phi, rewards, preferred, learnt).loss)

    found = FORMS[form](theta - phi, rewards, preferred, learnt).coefficients
    # Two orders of the same float32 operations.
    np.testing.assert_allclose(found, jax.grad(direct)(theta), rtol=1e-4, atol=1e-3)
    assert np.abs(found).max() > 10.0
    np.testing.assert_array_equal(np.asarray(found)[~np.asarray(learnt)], 0.0)


@pytest.mark.parametrize("form", FORMS)
def test_a_groups_constants_sum_to_0_up_to_rounding(form):
    theta, phi, rewards, preferred, learnt = group_of(12, size=8)
    found = FORMS[form](theta - phi, rewards, preferred, learnt).coefficients
    np.testing.assert_allclose(jnp.sum(found, axis=1), 0.0, atol=1e-6 * float(jnp.abs(found).max()))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_all_pairs_are_the_explicit_sum_over_pairs(temperature):
    theta, phi, rewards, preferred, learnt = group_of(13)
    found = losses.make_pairwise_loss(BETA, temperature)(theta - phi, rewards, preferred, learnt)
    e, r = np.asarray(theta - phi, np.float64), np.asarray(rewards, np.float64)
    for p in range(len(e)):
        total, constants, number = 0.0, np.zeros(e.shape[1]), 0
        for i in range(e.shape[1]):
            for j in range(e.shape[1]):
                if not (learnt[p, i] and learnt[p, j] and r[p, i] > r[p, j]):
                    continue
                label = 1.0 if temperature == 0.0 else 1 / (1 + np.exp(-(r[p, i] - r[p, j]) / temperature))
                found_i = 1 / (1 + np.exp(BETA / 2 * (e[p, i] - e[p, j])))
                total -= label * np.log(found_i) + (1 - label) * np.log(1 - found_i)
                constants[i] += BETA / 2 * (label - found_i)
                constants[j] -= BETA / 2 * (label - found_i)
                number += 1
        # Float32 against float64.
        np.testing.assert_allclose(found.loss[p], total / number, rtol=1e-5)
        np.testing.assert_allclose(found.coefficients[p], constants / number, rtol=1e-4, atol=1e-3)


def test_the_group_loss_of_two_candidates_is_dpo():
    theta, phi = errors(14), errors(15)
    pairs = of_pairs(theta - phi)
    learnt = jnp.ones((64, 2), bool)
    found = losses.make_group_loss(BETA)(theta - phi, pair_rewards(), jnp.zeros((64, 2, 2), bool), learnt)
    for name in pairs._fields:
        # The advantages of two are equal and opposite up to rounding.
        np.testing.assert_allclose(getattr(found, name), getattr(pairs, name), rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_group_loss_is_the_formula_of_dgpo_whatever_the_rewards_deviation():
    theta, phi, rewards, preferred, learnt = group_of(16)
    found = losses.make_group_loss(BETA)(theta - phi, rewards, preferred, learnt)
    s = -BETA / 2 * np.asarray(theta - phi, np.float64)
    for p in range(len(s)):
        keep = np.asarray(learnt[p])
        r = np.asarray(rewards[p], np.float64)[keep]
        advantage = (r - r.mean()) / r.std()
        u = 2 * np.sum(advantage * s[p][keep]) / np.abs(advantage).sum()
        np.testing.assert_allclose(found.logit[p], u, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.loss[p], np.log1p(np.exp(-u)), rtol=1e-5)


def test_the_listwise_loss_is_a_cross_entropy_of_two_softmaxes():
    theta, phi, rewards, preferred, learnt = group_of(17)
    found = losses.make_listwise_loss(BETA, 0.7)(theta - phi, rewards, preferred, learnt)
    s = -BETA / 2 * np.asarray(theta - phi, np.float64)
    for p in range(len(s)):
        keep = np.asarray(learnt[p])
        wanted = np.exp(np.asarray(rewards[p], np.float64)[keep] / 0.7)
        log_found = s[p][keep] - np.log(np.exp(s[p][keep]).sum())
        np.testing.assert_allclose(found.loss[p], -np.sum(wanted / wanted.sum() * log_found), rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_weights_of_the_better_and_the_worse_sum_to_1_and_never_overlap_with_the_dropped(form):
    theta, phi, rewards, preferred, learnt = group_of(18)
    found = FORMS[form](theta - phi, rewards, preferred, learnt)
    for weights in (found.better, found.worse):
        assert np.all(np.asarray(weights) >= 0.0)
        np.testing.assert_allclose(jnp.sum(weights, axis=1), 1.0, rtol=1e-6)
        np.testing.assert_array_equal(np.asarray(weights)[~np.asarray(learnt)], 0.0)


@pytest.mark.parametrize("form", ["group", "listwise"])
def test_a_dropped_candidate_changes_nothing_of_its_group(form):
    theta, phi, rewards, preferred, learnt = group_of(19)
    other = jnp.where(learnt, theta, 7.0), phi, jnp.where(learnt, rewards, -9.0)
    a = FORMS[form](theta - phi, rewards, preferred, learnt)
    b = FORMS[form](other[0] - other[1], other[2], preferred, learnt)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("form", FORMS)
def test_a_group_of_equal_rewards_has_finite_numbers(form):
    """It is masked, and 0 times NaN would still be NaN."""
    theta, phi, rewards, _, learnt = group_of(20)
    nothing = jnp.zeros((40, 5, 5), bool)
    found = FORMS[form](theta - phi, jnp.zeros_like(rewards), nothing, learnt)
    assert all(np.isfinite(x).all() for x in found)


def test_the_safeguard_of_two_is_the_formula_of_a_pair():
    rng = np.random.default_rng(21)
    winner, loser = rng.normal(size=(2, 50, 2, 3, 3, 4)).astype(np.float32)
    loser = loser + rng.uniform(-1, 2, (50, 1, 1, 1, 1)).astype(np.float32) * winner
    axes = (1, 2, 3, 4)
    product = (winner * loser).sum(axes, dtype=np.float64)
    expected = np.clip(0.1 * (winner.astype(np.float64) ** 2).sum(axes) / np.where(product > 0, product, 1.0), 0, 1)
    expected = np.where(product > 0, expected, 1.0)
    for weight in (1.0, 125.0, 1e30):  # a pair's constants are equal and opposite, of any size
        np.testing.assert_allclose(pair_share(winner, loser, 0.9, (weight, -weight)), expected, rtol=1e-4)
    assert 5 < (expected == 1.0).sum() < 45


@pytest.mark.parametrize("form", FORMS)
def test_a_small_step_never_raises_the_winners_weighted_error_of_a_group_under_the_safeguard(form):
    rng = np.random.default_rng(22)
    theta, phi, rewards, preferred, learnt = group_of(22, prompts=100)
    c = FORMS[form](theta - phi, rewards, preferred, learnt).coefficients
    shape = (100, 5, 2, 3, 3, 4)
    # Candidates of a prompt share noise, so their residuals are alike: DPO alone raises many winners' errors.
    residuals = rng.normal(size=(100, 1, *shape[2:])) + 0.5 * rng.normal(size=shape)
    residuals *= rng.uniform(0.3, 3.0, (100, 5, 1, 1, 1, 1))
    share = np.asarray(losses.safeguard_share(jnp.asarray(residuals), c, 0.9), np.float64)
    assert np.all((share >= 0.0) & (share <= 1.0))
    c, raised = np.asarray(c, np.float64), 0
    for p in range(100):
        winners, losers = np.maximum(c[p], 0.0), np.maximum(-c[p], 0.0)

        def weighted(step, p=p, winners=winners):
            # In float64 and relative to before, so that 1e-6 of a step shows.
            return sum(w * ((e + step) ** 2 - e**2).mean() for w, e in zip(winners, residuals[p], strict=True))

        up, down = np.tensordot(winners, residuals[p], 1), np.tensordot(losers, residuals[p], 1)
        scale = 1e-6 / winners.sum()
        assert weighted(-scale * (up - share[p] * down)) <= 0.0
        raised += weighted(-scale * (up - down)) > 0.0
    assert raised > 10  # without it the test would prove nothing
