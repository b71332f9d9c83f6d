"""Weights, pooled variance and z values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpo_jax.rewards.combine import (
    dimension_names,
    dimension_ranges,
    init_statistics,
    motion_columns,
    normalise_and_combine,
    parse_weights,
    update_statistics,
)
from vpo_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Scorer:
    name: str
    dimensions: tuple[str, ...]
    ranges: tuple[tuple[float, float], ...]


A = Scorer("a", ("visual_quality", "dynamic_degree"), ((0.0, 1.0), (1.0, 4.0)))
B = Scorer("b", ("visual_quality", "flow"), ((-1.0, 1.0), (0.0, 10.0)))


def test_absent_weights_are_1_and_all_are_scaled_to_an_absolute_sum_of_1():
    np.testing.assert_allclose(parse_weights("", [A]), [0.5, 0.5])
    np.testing.assert_allclose(parse_weights("a/visual_quality=3", [A]), [0.75, 0.25])
    np.testing.assert_allclose(parse_weights(" flow = -2 , a/visual_quality=0", [A, B]), [0, 0.25, 0.25, -0.5])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sharpness=1", "known: a/visual_quality, a/dynamic_degree, b/visual_quality, b/flow"),
        ("c/flow=1", "known: a/visual_quality"),
        ("visual_quality=1", "a/visual_quality, b/visual_quality"),
        ("flow", "write flow=1.0"),
        ("flow=much", "gives no number"),
        ("flow=nan", "gives no number"),
        ("flow=1,b/flow=2", "twice"),
        ("a/visual_quality=0,dynamic_degree=0,b/visual_quality=0,flow=0", "every weight is 0"),
    ],
)
def test_a_wrong_weight_is_an_error_that_says_what_to_write(text, says):
    with pytest.raises(UserError, match=r"reward\.weights") as error:
        parse_weights(text, [A, B])
    assert says in str(error.value)


def test_two_scorers_of_one_name_are_refused():
    with pytest.raises(UserError, match="twice"):
        dimension_names([A, A])


def test_the_motion_gate_reads_the_dimension_called_dynamic_degree():
    assert motion_columns([B, A]) == (3,)
    assert motion_columns([B]) == ()
    np.testing.assert_array_equal(dimension_ranges([A, B]), [1.0, 3.0, 2.0, 10.0])


def test_the_variance_is_pooled_within_prompts_over_steps():
    rng = np.random.default_rng(0)
    steps = [rng.normal(size=(5, 4, 2)) * [1.0, 3.0] + rng.normal(size=(5, 1, 2)) * 50 for _ in range(6)]
    statistics = init_statistics(2)
    for scores in steps:
        statistics = jax.jit(update_statistics)(statistics, scores.astype(np.float32))
    groups = np.concatenate(steps)
    expected = ((groups - groups.mean(1, keepdims=True)) ** 2).sum((0, 1)) / (len(groups) * 3)
    np.testing.assert_allclose(statistics.variance, expected, rtol=1e-4)
    assert float(statistics.degrees_of_freedom) == 6 * 5 * 3


def test_candidates_that_are_not_finite_leave_the_statistics_alone():
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(3, 4, 2)).astype(np.float32)
    broken = scores.copy()
    broken[0, 1, 0], broken[2, 3, 1] = np.nan, np.inf
    statistics = update_statistics(init_statistics(2), broken)
    assert float(statistics.degrees_of_freedom) == 2 + 3 + 2
    kept = [np.delete(scores[0], 1, 0), scores[1], np.delete(scores[2], 3, 0)]
    expected = sum(((group - group.mean(0)) ** 2).sum(0) for group in kept) / 7
    np.testing.assert_allclose(statistics.variance, expected, rtol=1e-5)


def test_a_step_without_a_finite_score_changes_nothing():
    before = update_statistics(init_statistics(2), np.random.default_rng(2).normal(size=(3, 4, 2)))
    after = update_statistics(before, np.full((3, 4, 2), np.nan, np.float32))
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_z_is_the_deviation_from_the_prompts_mean_in_units_of_sigma():
    rng = np.random.default_rng(3)
    scores = rng.normal(size=(5, 4, 2)).astype(np.float32)
    statistics = update_statistics(init_statistics(2), scores)
    weights = parse_weights("visual_quality=3", [A])
    combined = normalise_and_combine(statistics, scores, weights, dimension_ranges([A]))
    z = (scores - scores.mean(1, keepdims=True)) / np.sqrt(np.asarray(statistics.variance))
    np.testing.assert_allclose(combined.z, z, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(combined.reward, z @ weights, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(combined.z.mean(1), 0.0, atol=1e-6)


def test_a_dead_dimension_is_not_amplified_noise():
    scores = np.zeros((4, 4, 1), np.float32)
    scores[0, 0, 0] = 1e-4  # of a range of 2
    statistics = update_statistics(init_statistics(1), scores)
    combined = normalise_and_combine(statistics, scores, jnp.ones(1), jnp.array([2.0]))
    # sigma is 1 % of the range, 0.02, where the pooled one would be 2.5e-5.
    np.testing.assert_allclose(combined.z[0, 0, 0], 0.75e-4 / 0.02, rtol=1e-4)


def test_a_candidate_with_one_score_that_is_not_finite_is_dropped_whole():
    scores = np.ones((1, 4, 2), np.float32)
    scores[0, 2, 1] = -np.inf
    combined = normalise_and_combine(init_statistics(2), scores, jnp.full(2, 0.5), jnp.ones(2))
    np.testing.assert_array_equal(combined.finite, [[True, True, False, True]])
    assert np.isfinite(np.asarray(combined.reward)).all()
