"""The order of prompts is a function of seed and step alone."""

import numpy as np

from vpo_jax.data.index import PromptIndex


def test_every_epoch_is_a_permutation_and_another_one():
    index = PromptIndex(size=10, prompts_per_step=4, seed=3)
    order = np.concatenate([index(step) for step in range(5)])
    first, second = order[:10], order[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert not np.array_equal(first, second)


def test_the_order_does_not_depend_on_the_steps_size_or_where_the_run_began():
    fine, coarse = PromptIndex(7, 2, 0), PromptIndex(7, 6, 0)
    np.testing.assert_array_equal(np.concatenate([fine(s) for s in range(3)]), coarse(0))
    np.testing.assert_array_equal(PromptIndex(7, 2, 0)(40), fine(40))


def test_seeds_give_different_orders():
    assert not np.array_equal(PromptIndex(50, 50, 0)(0), PromptIndex(50, 50, 1)(0))


def test_without_shuffling_the_list_repeats_in_its_own_order():
    index = PromptIndex(5, 3, 0, shuffle=False)
    np.testing.assert_array_equal(np.concatenate([index(s) for s in range(4)]), np.arange(12) % 5)


def test_a_step_larger_than_the_list_takes_prompts_several_times():
    assert sorted(PromptIndex(3, 9, 0)(0)) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
