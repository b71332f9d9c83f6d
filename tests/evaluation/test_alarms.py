import pytest

from vpo_jax.evaluation.alarms import check_alarms, judge_falls, motion_lost, winners_forgotten


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
    assert judge_falls(reward, judge) == rings


def test_motion_below_90_percent_of_base_is_an_alarm():
    assert motion_lost(1.79, 2.0)
    assert not motion_lost(1.81, 2.0)
    # A score below zero: 90 % of it would be a demand to move more.
    assert not motion_lost(-1.0, -1.0)
    assert motion_lost(-1.2, -1.0)


@pytest.mark.parametrize(
    ("share", "pairs", "rings"),
    [(0.61, 1e6, True), (0.6, 1e6, False), (0.71, 64, True), (0.69, 64, False), (5 / 6, 6, False), (1.0, 6, True)],
)
def test_winners_that_become_less_likely_are_an_alarm_above_60_percent_and_chance(share, pairs, rings):
    assert winners_forgotten(share, pairs) == rings


def test_of_no_pairs_nothing_rings():
    assert not winners_forgotten(1.0, 0)


def test_all_three_alarms_ring_from_one_history_and_name_the_metric():
    history = [
        {"eval/total": 0.0, "held_out/x/quality": 3.0, "eval/x/dynamic_degree": 2.0},
        {"eval/total": 0.1, "held_out/x/quality": 2.5, "eval/x/dynamic_degree": 2.0},
        {"eval/total": 0.2, "held_out/x/quality": 2.0, "eval/x/dynamic_degree": 1.0}
        | {"policy/rises": 0.8, "policy/pairs": 40.0},
    ]
    alarms = check_alarms(
        history, "eval/total", ["held_out/x/quality"], ["eval/x/dynamic_degree"], "policy/rises", "policy/pairs"
    )
    assert [alarm.name for alarm in alarms] == ["judge_falls", "motion_lost", "winners_forgotten"]
    assert "held_out/x/quality" in alarms[0].message and "1" in alarms[1].message and "80% of 40" in alarms[2].message


def test_a_history_without_the_metrics_rings_nothing():
    assert check_alarms([], "eval/total", ["a"], ["b"], "c", "d") == ()
    assert check_alarms([{"eval/total": 1.0}, {"eval/total": None}], "eval/total", ["a"], ["b"], "c", "d") == ()
