import numpy as np
import pytest

from vpo_jax.evaluation.gains import gain, metrics_against_base
from vpo_jax.evaluation.win_rate import win_rate, win_share

BASE = {"a/x": [1.0, 3.0], "a/y": [2.0, 2.0], "b/z": [0.0, 4.0]}


def scores(**changes):
    """The base's scores with one array per dimension replaced, as "a_x"."""
    replaced = {name.replace("_", "/"): values for name, values in changes.items()}
    return {name: np.asarray(replaced.get(name, values), np.float32) for name, values in BASE.items()}


def test_the_gain_is_in_standard_deviations_of_the_base_and_a_constant_base_counts_in_its_own_units():
    assert gain(BASE, scores(a_x=[2.0, 4.0]), ["a/x"]) == 1.0  # the base's deviation is 1
    assert gain(BASE, scores(b_z=[2.0, 6.0]), ["b/z"]) == 1.0  # 2 over a deviation of 2
    assert gain(BASE, scores(a_y=[2.5, 2.5]), ["a/y"]) == 0.5
    assert gain(BASE, scores(a_x=[2.0, 4.0]), ["a/x", "a/y"]) == 0.5


def test_metrics_against_the_base_stand_under_the_scorers_place():
    found = metrics_against_base(BASE, scores(a_x=[2.0, 3.0], b_z=[-1.0, 3.0]), ["a/x", "a/y"], ["b/z"])
    assert found == {
        "eval/gain": 0.25,
        "eval/a/x": 2.5,
        "eval/win_rate/a/x": 0.75,
        "eval/a/y": 2.0,
        "eval/win_rate/a/y": 0.5,
        "held_out/b/z": 1.0,
        "held_out/win_rate/b/z": 0.0,
        "standard_error/eval/a/x": pytest.approx(0.5),  # differences 1 and 0
        "standard_error/eval/a/y": 0.0,
        "standard_error/held_out/b/z": 0.0,
    }


@pytest.mark.parametrize("prompts", [1, 7, 48])
def test_the_win_share_is_the_rate_of_the_win_rate_without_its_interval(prompts):
    rng = np.random.default_rng(prompts)
    base, tuned = rng.integers(0, 4, (2, prompts)).astype(np.float32)
    assert win_share(base, tuned) == win_rate(base, tuned).rate
    assert win_share(base, tuned) == float(np.mean((tuned > base) + 0.5 * (tuned == base)))
    base, tuned = rng.normal(size=(2, prompts, 3)).astype(np.float32)
    assert win_share(base, tuned) == win_rate(base, tuned).rate


def test_the_win_share_leaves_out_what_is_not_finite_and_of_nothing_is_nan():
    assert win_share([0.0, np.nan, 0.0], [1.0, 1.0, 0.0]) == 0.75
    assert np.isnan(win_share([np.nan], [1.0]))
