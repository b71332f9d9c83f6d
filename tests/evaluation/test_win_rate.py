import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vpo_jax.evaluation.win_rate import mean_difference, win_rate

SCORES = arrays(np.float32, st.integers(1, 30), elements=st.integers(-50, 50).map(lambda i: i / 8))


def test_ties_count_one_half():
    assert win_rate([1.0, 1.0, 1.0, 1.0], [2.0, 1.0, 0.0, 1.0]).rate == 0.5
    assert win_rate([1.0, 1.0], [1.0, 1.0])[:3] == (0.5, 0.5, 0.5)


def test_samples_are_averaged_within_their_prompt_first():
    base = np.zeros((2, 4))
    tuned = np.array([[1, 1, 1, 1], [1, -1, -1, -1]])
    assert win_rate(base, tuned).rate == (1.0 + 0.25) / 2
    assert win_rate(base, tuned).prompts == 2


def test_a_comparison_that_is_not_finite_is_left_out():
    result = win_rate([[0.0, 0.0], [np.nan, 0.0], [np.inf, np.nan]], [[1.0, 1.0], [1.0, -1.0], [np.inf, 1.0]])
    assert result.rate == 0.5 and result.prompts == 2


def test_nothing_to_compare_is_nan():
    result = win_rate([np.nan], [1.0])
    assert np.isnan(result.rate) and result.prompts == 0


def test_the_interval_is_of_prompts_and_not_of_samples():
    """Copies of a sample add no knowledge, so they may not narrow the interval."""
    base, tuned = np.random.default_rng(0).normal(size=(2, 40, 1))
    assert win_rate(base, tuned) == win_rate(base.repeat(50, 1), tuned.repeat(50, 1))


def test_the_interval_covers_the_truth_about_95_times_of_100():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        result = win_rate(np.zeros(60), rng.normal(0.5244, 1.0, 60))  # P(z > -0.5244) = 0.7
        covered += result.low <= 0.7 <= result.high
    # Binomial with 200 draws: 3.3 deviations of 1.5 % around the percentile bootstrap's 0.94.
    assert 0.89 <= covered / 200 <= 0.99


def test_the_same_scores_give_the_same_interval():
    base, tuned = np.random.default_rng(2).normal(size=(2, 30))
    assert win_rate(base, tuned) == win_rate(base, tuned)
    assert win_rate(base, tuned, seed=1).rate == win_rate(base, tuned).rate


@settings(deadline=None, max_examples=40)
@given(SCORES, st.integers(0, 10_000))
def test_swapping_the_sides_mirrors_the_rate(scores, seed):
    other = np.random.default_rng(seed).permutation(scores)
    there, back = win_rate(scores, other), win_rate(other, scores)
    assert there.rate == pytest.approx(1 - back.rate)
    assert 0 <= there.low <= there.rate + 1e-12 and there.rate <= there.high + 1e-12 <= 1 + 1e-9


@settings(deadline=None, max_examples=40)
@given(SCORES, st.floats(0.5, 4.0))
def test_only_the_order_of_two_scores_counts(scores, scale):
    other = np.roll(scores, 1)
    assert win_rate(scores, other) == win_rate(
        scores.astype(np.float64) * scale + 3, other.astype(np.float64) * scale + 3
    )


def test_mean_difference_is_in_the_units_of_the_score():
    result = mean_difference([1.0, 2.0, 3.0], [1.5, 2.5, 3.5])
    assert result[:3] == (0.5, 0.5, 0.5)


def test_scores_of_other_shapes_raise():
    with pytest.raises(ValueError, match="must both be"):
        win_rate([1.0], [1.0, 2.0])
