import numpy as np
import pytest

from vpo_jax.evaluation.alarms import check_alarms, judge_falls, motion_lost, winners_forgotten
from vpo_jax.evaluation.gains import metrics_against_base

PROMPTS, RUNS = 48, 2000


@pytest.mark.parametrize(
    ("reward", "judge", "rings"),
    [
        ([1, 2, 3], [3, 2, 1], True),
        ([9, 1, 2, 3], [0, 3, 2, 1], True),
        ([1, 2, 3], [3, 2, 2], False),
        ([1, 2, 3], [3, 1, 2], False),
        ([3, 2, 1], [3, 2, 1], False),
        ([1, 2], [2, 1], False),
    ],
)
def test_a_judge_that_falls_twice_while_the_reward_rises_is_an_alarm(reward, judge, rings):
    assert judge_falls(reward, judge, [0.0] * len(judge)) == rings


def test_a_fall_within_the_errors_is_no_alarm():
    assert not judge_falls([1, 2, 3], [3, 2, 1], [0.0, 0.0, 0.9])
    assert judge_falls([1, 2, 3], [3, 2, 1], [0.0, 9.0, 0.8])


def test_motion_below_90_percent_of_base_is_an_alarm():
    assert motion_lost(1.79, 2.0)
    assert not motion_lost(1.81, 2.0)
    assert not motion_lost(1.79, 2.0, error=0.01)
    # A score below zero: 90 % of it would be a demand to move more.
    assert not motion_lost(-1.0, -1.0)
    assert motion_lost(-1.2, -1.0)


@pytest.mark.parametrize(
    ("rise", "error", "rings"),
    [
        (0.51, 0.0, True),
        (0.5, 0.0, False),
        (0.9, 0.1, True),
        (0.7, 0.1, False),
        (0.17, 0.02, False),
        (-0.1, 0.0, False),
    ],
)
def test_winners_whose_error_rises_by_half_and_more_than_chance_are_an_alarm(rise, error, rings):
    assert winners_forgotten(rise, error) == rings


def share_of_runs_that_ring(name, motion=1.0, judge=(0.0, 0.0)):
    """Of simulated runs of three evaluations; `motion` of the base's, drifts of the judge in deviations of prompts."""
    rng, rings = np.random.default_rng(0), 0
    for _ in range(RUNS):
        base = {"s/dynamic_degree": rng.normal(3.3, 0.5, PROMPTS), "j/quality": rng.normal(0.0, 1.0, PROMPTS)}
        history = []
        for level in (None, judge[0], judge[1]):
            now = dict(base)
            if level is not None:
                now["s/dynamic_degree"] = motion * base["s/dynamic_degree"] + rng.normal(0.0, 0.5, PROMPTS)
                now["j/quality"] = base["j/quality"] + level + rng.normal(0.0, 1.0, PROMPTS)
            metrics = metrics_against_base(base, now, ["s/dynamic_degree"], ["j/quality"])
            history.append(metrics | {"eval/gain": 0.1 * len(history)})
        found = check_alarms(history, "eval/gain", ["held_out/j/quality"], ["eval/s/dynamic_degree"])
        rings += name in [alarm.name for alarm in found]
    return rings / RUNS


def test_chance_rings_in_less_than_one_run_in_a_hundred_and_faults_ring_in_nine_of_ten():
    assert share_of_runs_that_ring("motion_lost", motion=0.95) < 0.01
    assert share_of_runs_that_ring("judge_falls") < 0.01
    assert share_of_runs_that_ring("motion_lost", motion=0.8) > 0.9
    assert share_of_runs_that_ring("judge_falls", judge=(-0.5, -1.0)) > 0.9


def test_all_three_alarms_ring_from_one_history_name_the_metric_and_say_what_to_do():
    history = [
        {"eval/total": 0.0, "held_out/x/quality": 3.0, "eval/x/dynamic_degree": 2.0},
        {"eval/total": 0.1, "held_out/x/quality": 2.5, "eval/x/dynamic_degree": 2.0},
        {"eval/total": 0.2, "held_out/x/quality": 2.0, "eval/x/dynamic_degree": 1.0}
        | {"policy/change": 0.8, "standard_error/policy/change": 0.1},
    ]
    alarms = check_alarms(history, "eval/total", ["held_out/x/quality"], ["eval/x/dynamic_degree"], "policy/change")
    assert [alarm.name for alarm in alarms] == ["judge_falls", "motion_lost", "winners_forgotten"]
    assert "held_out/x/quality" in alarms[0].message and "is 1," in alarms[1].message and "80%" in alarms[2].message
    for alarm, fix in zip(alarms, ("preference.anchor", "motion_tolerance", "learning_rate"), strict=True):
        assert fix in alarm.message


def test_a_history_without_the_metrics_rings_nothing():
    assert check_alarms([], "eval/total", ["a"], ["b"], "c") == ()
    assert check_alarms([{"eval/total": 1.0}, {"eval/total": None}], "eval/total", ["a"], ["b"], "c") == ()
