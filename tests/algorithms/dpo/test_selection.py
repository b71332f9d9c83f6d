"""Which candidates make a pair, which pairs are dropped and why, and how long they live."""

import jax
import jax.numpy as jnp
import numpy as np
from vpo_jax.training.pairs import (
    DROP_REASONS,
    Pairs,
    choose_pairs,
    drop_older,
    empty_buffer,
    gather_pairs,
    make_pairing,
    push,
)

from vpo_jax.rewards.combine import init_statistics

ALL = jnp.ones((1, 4), bool)


def choose(rewards, finite=None, motion=None, margin=0.5, tolerance=0.5):
    rewards = jnp.asarray(rewards, jnp.float32)
    finite = jnp.ones(rewards.shape, bool) if finite is None else jnp.asarray(finite)
    return jax.jit(choose_pairs)(rewards, finite, None if motion is None else jnp.asarray(motion), margin, tolerance)


def dropped(choice):
    return {reason: int(count) for reason, count in choice.dropped.items() if int(count)}


def test_the_best_candidate_wins_against_the_worst():
    choice = choose([[0.1, 2.0, -1.0, 0.0]])
    assert (int(choice.winner[0]), int(choice.loser[0]), bool(choice.mask[0])) == (1, 2, True)
    assert float(choice.winner_reward[0] - choice.loser_reward[0]) == 3.0


def test_ties_go_to_the_lower_index():
    choice = choose([[2.0, 2.0, -1.0, -1.0]])
    assert (int(choice.winner[0]), int(choice.loser[0])) == (0, 2)


def test_a_group_of_equal_rewards_makes_no_pair_even_at_margin_0():
    choice = choose([[1.0] * 4], margin=0.0)
    assert not choice.mask[0]
    assert dropped(choice) == {"tie": 1}


def test_a_sample_is_never_paired_with_itself():
    rng = np.random.default_rng(0)
    rewards = rng.integers(0, 3, (500, 4)).astype(np.float32)
    choice = choose(rewards, rng.random((500, 4)) > 0.3, margin=0.0)
    assert np.all((np.asarray(choice.winner) != np.asarray(choice.loser))[np.asarray(choice.mask)])


def test_a_pair_at_the_margin_is_kept_and_one_below_it_is_dropped():
    choice = choose([[0.5, 0.0, 0.25, 0.25], [0.49, 0.0, 0.25, 0.25]])
    np.testing.assert_array_equal(choice.mask, [True, False])
    assert dropped(choice) == {"margin": 1}


def test_a_candidate_that_is_not_finite_neither_wins_nor_loses():
    choice = choose([[9.0, 2.0, -9.0, 0.0]], [[False, True, False, True]])
    assert (int(choice.winner[0]), int(choice.loser[0]), bool(choice.mask[0])) == (1, 3, True)


def test_a_prompt_with_fewer_than_two_finite_candidates_makes_no_pair():
    choice = choose([[9.0, 2.0, 0.0, 0.0]] * 2, [[True, False, False, False], [False] * 4])
    assert not choice.mask.any()
    assert dropped(choice) == {"non_finite": 2}
    assert np.isfinite(np.asarray(choice.winner_reward)).all()


def test_the_motion_gate_drops_a_winner_that_moves_too_much_less_than_the_loser():
    rewards = [[2.0, 0.0, 1.0, 1.0]] * 3
    motion = [[-0.25, 0.5, 0, 0], [0.0, 0.5, 0, 0], [3.0, 0.0, 0, 0]]
    choice = choose(rewards, motion=motion)
    np.testing.assert_array_equal(choice.mask, [False, True, True])
    assert dropped(choice) == {"motion": 1}
    assert choose(rewards).mask.all()


def test_every_dropped_pair_counts_under_exactly_one_reason():
    rng = np.random.default_rng(1)
    rewards = rng.normal(size=(300, 4)).round(1).astype(np.float32)
    finite = rng.random((300, 4)) > 0.4
    choice = choose(rewards, finite, rng.normal(size=(300, 4)), margin=0.8, tolerance=0.1)
    assert set(choice.dropped) == set(DROP_REASONS)
    assert sum(dropped(choice).values()) + int(choice.mask.sum()) == 300
    assert len(dropped(choice)) == len(DROP_REASONS)


def pairs_of(step, prompts=3, seed=0):
    rng = np.random.default_rng(seed + step)
    latents = jnp.asarray(rng.normal(size=(prompts, 4, 2, 3, 3, 4)), jnp.float32)
    text = jnp.asarray(rng.normal(size=(prompts, 5, 6)), jnp.float32)
    rewards = jnp.asarray(rng.normal(size=(prompts, 4)), jnp.float32)
    choice = choose(rewards, margin=0.0)
    return gather_pairs(choice, latents, text, step), choice, latents


def test_a_pair_holds_its_candidates_latents_its_slot_and_the_step_that_made_it():
    pairs, choice, latents = pairs_of(7)
    for p in range(3):
        np.testing.assert_array_equal(pairs.winner[p], latents[p, choice.winner[p]])
        np.testing.assert_array_equal(pairs.loser[p], latents[p, choice.loser[p]])
    np.testing.assert_array_equal(pairs.slot, [0, 1, 2])
    np.testing.assert_array_equal(pairs.step, 7)


def test_a_dropped_pairs_latents_are_zero_so_that_nan_cannot_reach_a_gradient():
    latents = jnp.full((1, 4, 2, 3, 3, 4), jnp.nan)
    choice = choose([[1.0, 0.0, 0.0, 0.0]], jnp.zeros((1, 4), bool))
    pairs = gather_pairs(choice, latents, jnp.zeros((1, 5, 6)), 0)
    assert float(jnp.abs(pairs.winner).sum() + jnp.abs(pairs.loser).sum()) == 0.0


def test_without_age_the_buffer_is_the_steps_own_pairs():
    first, second = pairs_of(0)[0], pairs_of(1)[0]
    buffer = push(push(empty_buffer(first, 0), first, 0), second, 1)
    jax.tree.map(np.testing.assert_array_equal, buffer, second)


def test_pairs_older_than_the_age_are_dropped():
    buffer = empty_buffer(pairs_of(0)[0], 2)
    assert not buffer.mask.any()
    for step in range(5):
        buffer = push(buffer, pairs_of(step)[0], step)
    assert sorted(np.unique(buffer.step).tolist()) == [2, 3, 4]
    young = drop_older(buffer, jnp.int32(5), 2)
    np.testing.assert_array_equal(young.mask, np.asarray(buffer.mask) & (np.asarray(buffer.step) >= 3))


def test_an_empty_buffer_never_trains_whatever_the_age():
    assert not drop_older(empty_buffer(pairs_of(0)[0], 2), jnp.int32(0), 100).mask.any()


def test_a_steps_scores_become_pairs_with_metrics_as_sums_and_counts(configure, toy_reward):
    config = configure(preference__margin=0.0, preference__motion_tolerance=100.0)
    pairing = make_pairing(config, [toy_reward()])
    rng = np.random.default_rng(3)
    scores = rng.random((2 * 4, 2)).astype(np.float32)
    scores[5, 0] = np.inf
    latents = rng.normal(size=(8, 2, 3, 3, 4)).astype(np.float32)
    statistics, pairs, metrics = pairing(init_statistics(2), latents, np.zeros((2, 5, 6), np.float32), scores, 0)
    assert isinstance(pairs, Pairs) and pairs.mask.all()
    assert float(statistics.freedom) == 3 + 2
    assert float(metrics["reward/non_finite"][0]) == 1.0
    total, count = metrics["reward/toy/visual_quality"]
    assert float(count) == 7.0
    np.testing.assert_allclose(total, np.delete(scores[:, 0], 5).sum(), rtol=1e-6)
    assert float(metrics["reward/all_non_finite"][0]) == 0.0


def test_a_scorer_without_dynamic_degree_switches_the_motion_gate_off(configure, toy_reward):
    config = configure(preference__margin=0.0, preference__motion_tolerance=0.0)
    still = toy_reward(dimensions=("visual_quality",), ranges=((0.0, 1.0),))
    rng = np.random.default_rng(4)
    scores = np.stack([np.tile([3.0, 2, 1, 0], 2), np.tile([0.0, 1, 2, 3], 2)], -1).astype(np.float32)
    latents, text = rng.normal(size=(8, 2, 3, 3, 4)).astype(np.float32), np.zeros((2, 5, 6), np.float32)
    config.reward.weights = "visual_quality=1,dynamic_degree=0.1"
    gated = make_pairing(config, [toy_reward()])(init_statistics(2), latents, text, scores, 0)
    assert float(gated[2]["pair/dropped_motion"][0]) == 2.0
    config.reward.weights = ""
    free = make_pairing(config, [still])(init_statistics(1), latents, text, scores[:, :1], 0)
    assert float(free[2]["pair/kept"][0]) == 2.0
    assert "pair/motion" not in free[2]
