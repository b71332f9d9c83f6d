"""Which candidates are learnt from, which pairs and groups are dropped and why, and how long they live."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpo_jax.algorithms.dpo.algorithm import DPOState, make_select
from vpo_jax.algorithms.dpo.selection import (
    DROP_REASONS,
    OF_GROUPS,
    PAIRS,
    Groups,
    abstract_groups,
    drop_older,
    empty_buffer,
    gather,
    group_size,
    make_choose,
    push,
)
from vpo_jax.rewards.combine import init_statistics

LATENT, TEXT = (2, 3, 3, 4), (5, 6)


def choose(rewards, finite=None, motion=None, margin=0.5, tolerance=0.5, pairs="best_worst", top_k=1):
    rewards = jnp.asarray(rewards, jnp.float32)
    finite = jnp.ones(rewards.shape, bool) if finite is None else jnp.asarray(finite)
    function = make_choose(pairs, top_k, margin, tolerance)
    return jax.jit(function)(rewards, finite, None if motion is None else jnp.asarray(motion, jnp.float32))


def winner_and_loser(choice, p=0):
    return int(choice.chosen[p, 0]), int(choice.chosen[p, 1])


def dropped(choice):
    return {reason: int(count) for reason, count in choice.dropped.items() if int(count)}


def test_the_best_candidate_wins_against_the_worst():
    choice = choose([[0.1, 2.0, -1.0, 0.0]])
    assert (*winner_and_loser(choice), bool(choice.mask[0])) == (1, 2, True)
    assert float(choice.rewards[0, 0] - choice.rewards[0, 1]) == 3.0
    np.testing.assert_array_equal(choice.preferred[0], [[False, True], [False, False]])


def test_ties_go_to_the_lower_index():
    assert winner_and_loser(choose([[2.0, 2.0, -1.0, -1.0]])) == (0, 2)


def test_a_group_of_equal_rewards_makes_no_pair_even_at_margin_0():
    choice = choose([[1.0] * 4], margin=0.0)
    assert not choice.mask[0]
    assert dropped(choice) == {"tie": 1}


def test_a_sample_is_never_paired_with_itself():
    rng = np.random.default_rng(0)
    rewards = rng.integers(0, 3, (500, 4)).astype(np.float32)
    choice = choose(rewards, rng.random((500, 4)) > 0.3, margin=0.0)
    winner, loser = np.asarray(choice.chosen).T
    assert np.all((winner != loser)[np.asarray(choice.mask)])


def test_a_pair_at_the_margin_is_kept_and_one_below_it_is_dropped():
    choice = choose([[0.5, 0.0, 0.25, 0.25], [0.49, 0.0, 0.25, 0.25]])
    np.testing.assert_array_equal(choice.mask, [True, False])
    assert dropped(choice) == {"margin": 1}


def test_a_candidate_that_is_not_finite_neither_wins_nor_loses():
    choice = choose([[9.0, 2.0, -9.0, 0.0]], [[False, True, False, True]])
    assert (*winner_and_loser(choice), bool(choice.mask[0])) == (1, 3, True)


def test_a_prompt_with_fewer_than_two_finite_candidates_makes_no_pair():
    choice = choose([[9.0, 2.0, 0.0, 0.0]] * 2, [[True, False, False, False], [False] * 4])
    assert not choice.mask.any()
    assert dropped(choice) == {"non_finite": 2}
    assert np.isfinite(np.asarray(choice.rewards)).all()


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


# ---- Groups ----


def considered(pairs, candidates, top_k):
    """Of a prompt: pairs, or the one group."""
    return {"best_worst": 1, "top_k": top_k**2, "all": candidates * (candidates - 1) // 2}.get(pairs, 1)


def kept(choice, pairs):
    return int(choice.mask.sum() if pairs in OF_GROUPS else choice.preferred.sum())


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("gated", [False, True])
def test_what_is_kept_and_what_is_dropped_is_all_that_was_considered(pairs, gated):
    rng = np.random.default_rng(2)
    rewards = rng.normal(size=(300, 6)).round(1).astype(np.float32)
    rewards[:20] = 1.0
    finite = rng.random((300, 6)) > 0.6
    motion = rng.normal(size=(300, 6)) if gated else None
    choice = choose(rewards, finite, motion, margin=0.8, tolerance=0.1, pairs=pairs, top_k=2)
    assert sum(dropped(choice).values()) + kept(choice, pairs) == 300 * considered(pairs, 6, 2)
    assert set(dropped(choice)) == set(DROP_REASONS) - (set() if gated else {"motion"})
    assert choice.chosen.shape == (300, group_size(pairs, 6, 2)) == choice.learnt.shape == choice.rewards.shape
    # Nobody is preferred who is not learnt from, and a prompt counts where something is preferred.
    both = np.asarray(choice.learnt[:, :, None] & choice.learnt[:, None, :])
    assert not (np.asarray(choice.preferred) & ~both).any()
    np.testing.assert_array_equal(choice.mask, np.asarray(choice.preferred).any(axis=(1, 2)))
    seen = np.take_along_axis(finite, np.asarray(choice.chosen), 1)
    assert not (np.asarray(choice.learnt) & ~seen).any()
    gap = np.asarray(choice.rewards[:, :, None] - choice.rewards[:, None, :])
    assert (gap[np.asarray(choice.preferred)] > 0.0).all()


@pytest.mark.parametrize("gated", [False, True])
def test_the_best_against_the_worst_is_top_1(gated):
    rng = np.random.default_rng(3)
    rewards, finite = rng.normal(size=(200, 5)).round(1), rng.random((200, 5)) > 0.4
    motion = rng.normal(size=(200, 5)) if gated else None
    one, other = (choose(rewards, finite, motion, pairs=pairs, top_k=1) for pairs in ("best_worst", "top_k"))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_top_k_learns_from_the_k_best_against_the_k_worst():
    choice = choose([[0.0, 5.0, 1.0, 4.0, 2.0, 3.0]], pairs="top_k", top_k=2)
    np.testing.assert_array_equal(choice.chosen[0], [1, 3, 0, 2])
    expected = np.zeros((4, 4), bool)
    expected[:2, 2:] = True
    np.testing.assert_array_equal(choice.preferred[0], expected)


def test_top_k_of_fewer_finite_candidates_pairs_nobody_with_itself_and_no_worse_with_a_better():
    rng = np.random.default_rng(4)
    rewards, finite = rng.normal(size=(300, 6)), rng.random((300, 6)) > 0.5
    choice = choose(rewards, finite, margin=0.0, pairs="top_k", top_k=3)
    index, preferred = np.asarray(choice.chosen), np.asarray(choice.preferred)
    p, i, j = np.nonzero(preferred)
    assert (index[p, i] != index[p, j]).all() and (rewards[p, index[p, i]] > rewards[p, index[p, j]]).all()
    assert finite[p, index[p, i]].all() and finite[p, index[p, j]].all()


def test_all_pairs_are_those_whose_difference_reaches_the_margin():
    choice = choose([[0.0, 1.0, 0.7, 0.1]], pairs="all")
    wanted = {(1, 0), (2, 0), (1, 3), (2, 3)}
    assert set(zip(*map(np.ndarray.tolist, np.nonzero(np.asarray(choice.preferred[0]))), strict=True)) == wanted
    assert dropped(choice) == {"margin": 2} and choice.learnt.all()


@pytest.mark.parametrize("pairs", PAIRS)
def test_equal_rewards_teach_nothing_and_are_ties(pairs):
    choice = choose([[1.0] * 4], margin=0.0, pairs=pairs, top_k=2)
    assert not choice.mask[0] and not choice.preferred.any() and not choice.learnt.any()
    assert dropped(choice) == {"tie": considered(pairs, 4, 2)}


@pytest.mark.parametrize("pairs", PAIRS)
def test_one_candidate_that_is_not_finite_leaves_the_others_to_learn_from(pairs):
    choice = choose([[3.0, 2.0, 1.0, 0.0]], [[False, True, True, True]], pairs=pairs, top_k=2)
    learnt = set(np.asarray(choice.chosen[0])[np.asarray(choice.learnt[0])].tolist())
    assert choice.mask[0] and learnt == ({1, 3} if pairs == "best_worst" else {1, 2, 3})
    assert np.isfinite(np.asarray(choice.rewards)).all()
    # Every pair of it is counted; a group lives on without it. The second best of three is the second worst too.
    lost = {"top_k": {"tie": 1}, "all": {"non_finite": 3}}
    assert dropped(choice) == lost.get(pairs, {})


@pytest.mark.parametrize("pairs", PAIRS)
def test_one_finite_candidate_alone_teaches_nothing(pairs):
    choice = choose([[3.0, 2.0, 1.0, 0.0]], [[False, False, True, False]], pairs=pairs, top_k=2)
    assert not choice.mask[0] and not choice.learnt.any()
    assert dropped(choice) == {"non_finite": considered(pairs, 4, 2)}


@pytest.mark.parametrize("pairs", PAIRS)
def test_a_motion_gate_that_closes_for_every_better_candidate_drops_the_prompt(pairs):
    rewards, motion = [[3.0, 2.0, 1.0, 0.0]], [[-9.0, -6.0, 6.0, 9.0]]
    choice = choose(rewards, motion=motion, pairs=pairs, top_k=2)
    if pairs in OF_GROUPS:  # both above the mean are dropped, and what remains is still a group of two
        np.testing.assert_array_equal(choice.learnt[0], [False, False, True, True])
        choice = choose([[3.0, 3.0, 0.0, 0.0]], motion=motion, pairs=pairs)
    assert not choice.mask[0] and not choice.learnt.any()
    assert dropped(choice) == {"motion": considered(pairs, 4, 2)}


@pytest.mark.parametrize("pairs", OF_GROUPS)
def test_the_motion_gate_of_a_group_drops_a_candidate_above_the_mean_that_moves_less_than_the_mean(pairs):
    rewards = [[3.0, 2.0, 1.0, 0.0]]
    for motion, learnt in (
        ([[-2.1, 1.0, 1.0, 0.1]], [False, True, True, True]),  # mean 0: the best is 2.1 below it
        ([[-2.1, 1.0, 0.1, 1.0]], [False, True, True, True]),
        ([[1.0, 1.0, -3.0, 1.0]], [True] * 4),  # a candidate below the mean reward may move less
        ([[0.0, 1.0, -1.0, 0.0]], [True] * 4),
    ):
        choice = choose(rewards, motion=motion, pairs=pairs)
        np.testing.assert_array_equal(choice.learnt[0], learnt)
        assert choice.mask[0] and not dropped(choice)


# ---- The buffer ----


def groups_of(step, prompts=3, seed=0, pairs="best_worst"):
    rng = np.random.default_rng(seed + step)
    latents = jnp.asarray(rng.normal(size=(prompts, 4, *LATENT)), jnp.float32)
    text = jnp.asarray(rng.normal(size=(prompts, *TEXT)), jnp.float32)
    rewards = jnp.asarray(rng.normal(size=(prompts, 4)), jnp.float32)
    choice = choose(rewards, margin=0.0, pairs=pairs, top_k=2)
    return gather(choice, latents, text, step), choice, latents


@pytest.mark.parametrize("pairs", PAIRS)
def test_a_group_holds_its_candidates_latents_its_slot_and_the_step_that_made_it(pairs):
    groups, choice, latents = groups_of(7, pairs=pairs)
    for p in range(3):
        for k in range(group_size(pairs, 4, 2)):
            np.testing.assert_array_equal(groups.latents[p, k], latents[p, choice.chosen[p, k]])
    np.testing.assert_array_equal(groups.slot, [0, 1, 2])
    np.testing.assert_array_equal(groups.step, 7)
    shapes = abstract_groups(3, group_size(pairs, 4, 2), jax.ShapeDtypeStruct(LATENT, jnp.float32), groups.text[0])
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), groups)


@pytest.mark.parametrize("pairs", PAIRS)
def test_a_dropped_candidates_latents_are_zero_so_that_nan_cannot_reach_a_gradient(pairs):
    latents = jnp.full((1, 4, *LATENT), jnp.nan)
    choice = choose([[1.0, 0.0, 0.0, 0.0]], jnp.zeros((1, 4), bool), pairs=pairs)
    groups = gather(choice, latents, jnp.zeros((1, *TEXT)), 0)
    assert float(jnp.abs(groups.latents).sum()) == 0.0
    # One of several: the others stay.
    choice = choose([[3.0, 2.0, 1.0, 0.0]], [[False, True, True, True]], pairs=pairs)
    groups = gather(choice, jnp.ones((1, 4, *LATENT)).at[0, 0].set(jnp.nan), jnp.zeros((1, *TEXT)), 0)
    assert np.isfinite(np.asarray(groups.latents)).all() and groups.mask[0]


def test_without_age_the_buffer_is_the_steps_own_groups():
    first, second = groups_of(0)[0], groups_of(1)[0]
    buffer = push(push(empty_buffer(first, 0), first, 0), second, 1)
    jax.tree.map(np.testing.assert_array_equal, buffer, second)


@pytest.mark.parametrize("pairs", ["best_worst", "group"])
def test_groups_older_than_the_age_are_dropped(pairs):
    buffer = empty_buffer(groups_of(0, pairs=pairs)[0], 2)
    assert not buffer.mask.any()
    for step in range(5):
        buffer = push(buffer, groups_of(step, pairs=pairs)[0], step)
    assert sorted(np.unique(buffer.step).tolist()) == [2, 3, 4]
    young = drop_older(buffer, jnp.int32(5), 2)
    np.testing.assert_array_equal(young.mask, np.asarray(buffer.mask) & (np.asarray(buffer.step) >= 3))


def test_an_empty_buffer_never_trains_whatever_the_age():
    assert not drop_older(empty_buffer(groups_of(0)[0], 2), jnp.int32(0), 100).mask.any()


# ---- A step's scores ----


def select_step(config, rewards, scores, latents, text, step=0):
    """(statistics, the step's groups, metrics) of a step's scores, from nothing."""
    preference = config.preference
    prompts = len(jax.tree.leaves(text)[0])
    size = group_size(preference.pairs, config.rollout.candidates, preference.top_k)
    one = jax.ShapeDtypeStruct(latents.shape[1:], jnp.float32), jax.ShapeDtypeStruct(text.shape[1:], text.dtype)
    empty = empty_buffer(abstract_groups(prompts, size, *one), 0)
    choose = make_choose(preference.pairs, preference.top_k, preference.margin, preference.motion_tolerance)
    select = jax.jit(make_select(config, rewards, choose, preference.pairs in OF_GROUPS))
    own = DPOState(empty, empty, jnp.array(False))
    statistics = init_statistics(scores.shape[-1])
    statistics, own, metrics = select(statistics, own, jnp.asarray(latents), jnp.asarray(text), scores, step)
    return statistics, own.buffer, metrics


def test_a_steps_scores_become_pairs_with_metrics_as_sums_and_counts(configure, toy_reward):
    config = configure(preference__margin=0.0, preference__motion_tolerance=100.0)
    rng = np.random.default_rng(3)
    scores = rng.random((2 * 4, 2)).astype(np.float32)
    scores[5, 0] = np.inf
    latents = rng.normal(size=(8, *LATENT)).astype(np.float32)
    text = np.zeros((2, *TEXT), np.float32)
    statistics, groups, metrics = select_step(config, [toy_reward()], scores, latents, text)
    assert isinstance(groups, Groups) and groups.mask.all()
    assert float(statistics.degrees_of_freedom) == 3 + 2
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
    latents, text = rng.normal(size=(8, *LATENT)).astype(np.float32), np.zeros((2, *TEXT), np.float32)
    config.reward.weights = "visual_quality=1,dynamic_degree=0.1"
    gated = select_step(config, [toy_reward()], scores, latents, text)
    assert float(gated[2]["pair/dropped_motion"][0]) == 2.0
    config.reward.weights = ""
    free = select_step(config, [still], scores[:, :1], latents, text)
    assert float(free[2]["pair/kept"][0]) == 2.0
    assert "pair/motion" not in free[2]


@pytest.mark.parametrize("pairs", PAIRS)
def test_kept_and_dropped_in_the_metrics_are_all_that_was_considered(configure, toy_reward, pairs):
    temperature = 0.5 if pairs == "listwise" else 0.0
    config = configure(preference__pairs=pairs, preference__label_temperature=temperature)
    rng = np.random.default_rng(5)
    scores = rng.random((8 * 4, 2)).astype(np.float32)
    scores[:4] = 0.5
    scores[5] = np.nan
    scores[8:11] = np.nan
    latents = rng.normal(size=(32, *LATENT)).astype(np.float32)
    _, groups, metrics = select_step(config, [toy_reward()], scores, latents, np.zeros((8, *TEXT), np.float32))
    found = {name: float(total) for name, (total, _) in metrics.items() if name.startswith("pair/")}
    total = found["pair/kept"] + sum(v for name, v in found.items() if name.startswith("pair/dropped_"))
    assert total == 8 * considered(pairs, 4, 2)
    assert found["pair/dropped_tie"] >= considered(pairs, 4, 2) and found["pair/dropped_non_finite"] >= 1
    assert not groups.mask[0] and not groups.mask[2]
    assert all(np.isfinite(v) for v in found.values())
