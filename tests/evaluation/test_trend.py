"""The trend of a run's own samples, against scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from vpo_jax.evaluation.trend import describe_trend, reward_trend, trend


def test_the_interval_is_welchs():
    rng = np.random.default_rng(0)
    values = rng.normal(0.7, 0.01, 48)
    values[-12:] += 0.02
    found = trend(values.tolist())
    expected = stats.ttest_ind(values[-12:], values[:12], equal_var=False).confidence_interval(0.95)
    assert found.low == pytest.approx(expected.low, rel=1e-12) and found.high == pytest.approx(expected.high, rel=1e-12)
    assert found.says == "rose"


def test_a_run_in_which_nothing_changes_stays():
    rng = np.random.default_rng(1)
    says = [trend(rng.normal(0.7, 0.01, 48).tolist()).says for _ in range(200)]
    # 5 % of such runs lie outside a 95 % interval: the bound is three standard errors above.
    assert says.count("stayed") >= 200 * 0.95 - 3 * math.sqrt(200 * 0.05 * 0.95)


def test_a_falling_reward_fell():
    assert trend(np.linspace(1.0, 0.0, 40).tolist()).says == "fell"


def test_steps_without_a_reward_are_left_out():
    lines = [{"reward/total": value} for value in (1.0, None, 1.0, 2.0, math.nan, 2.0, 3.0, 3.0, 4.0, 4.0)]
    assert reward_trend([*lines, {"step": 11}]).quarters == (1.0, 2.0, 3.0, 4.0)


def test_a_run_of_three_steps_has_no_trend_and_one_of_four_no_interval():
    assert trend([1.0, 2.0, 3.0]) is None
    found = trend([1.0, 2.0, 3.0, 4.0])
    assert found.difference == 3.0 and math.isnan(found.low) and found.says == "stayed"


def test_the_sentence_says_whether_the_reward_rose():
    rising = describe_trend(trend(np.linspace(0.0, 1.0, 40).tolist()))
    assert rising.startswith("the samples' own reward rose while training: 0.1154 in the first quarter")
    assert "did not change beyond chance" in describe_trend(trend([1.0, 2.0] * 20))
