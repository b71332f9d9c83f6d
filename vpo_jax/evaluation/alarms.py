"""Signs that preference training goes wrong, read from the metrics of a run. Pure functions; the run decides.

The DPO loss is no such sign: win rates rise while the loss looks flat.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vpo_jax.runtime.metrics import standard_error_of

LEAST_MOTION = 0.9
LARGEST_RISE = 0.5
_ONE_IN_HUNDRED = 2.326  # standard deviations


class Alarm(NamedTuple):
    """One sign: a name for metrics ("alarm/motion_lost") and a sentence for people."""

    name: str
    message: str


def judge_falls(reward: Sequence[float], judge: Sequence[float], errors: Sequence[float]) -> bool:
    """Whether a held-out scorer fell twice in a row while the trained reward rose: reward hacking.

    All are histories over the same evaluations, oldest first; the last three count. `errors` are the judge's standard
    errors; chance alone makes a fall of this size less than once in a hundred times.
    """
    if not len(reward) == len(judge) == len(errors):
        raise ValueError(f"histories of {len(reward)}, {len(judge)} and {len(errors)} evaluations")
    if len(judge) < 3:
        return False
    falls = judge[-1] < judge[-2] < judge[-3] and reward[-1] > reward[-3]
    return falls and judge[-3] - judge[-1] > _ONE_IN_HUNDRED * math.hypot(errors[-1], errors[-3])


def motion_lost(motion: float, base_motion: float, error: float = 0.0, least: float = LEAST_MOTION) -> bool:
    """Whether the policy moves less than `least` times as much as the base model, by more than chance.

    Preference training can freeze videos: a still video is consistent. `error` is the standard error of the difference.
    """
    return motion + _ONE_IN_HUNDRED * error < base_motion - (1 - least) * abs(base_motion)


def winners_forgotten(rise: float, error: float, most: float = LARGEST_RISE) -> bool:
    """Whether the winners are much less likely than under the initial policy: their error rose by more than `most`.

    `rise` is the mean relative change of e_w and `error` its standard error. A small rise is healthy: with DPO both
    errors of a pair rise, the loser's by more.
    """
    return rise - _ONE_IN_HUNDRED * error > most


def check_alarms(
    evaluations: Sequence[Mapping[str, float]],
    reward: str,
    judges: Sequence[str] = (),
    motion: Sequence[str] = (),
    winners: str | None = None,
) -> tuple[Alarm, ...]:
    """The alarms that the newest evaluation raises, each with what a person can do.

    The standard error of the metric NAME is the metric "standard_error/NAME"; without it the value counts as exact.

    Args:
      evaluations: metrics of every evaluation, oldest first; the first one is the base model.
      reward: name of the trained reward's metric.
      judges: names of the held-out scorers' metrics.
      motion: names of the metrics of motion, as a scorer's dynamic_degree.
      winners: name of the relative change of the winners' error.

    An evaluation without a metric, or with None for it, does not count for that metric.
    """
    if not evaluations:
        return ()
    alarms = []
    for judge in judges:
        both = [e for e in evaluations if _has(e, reward) and _has(e, judge)]
        values, errors = [e[judge] for e in both], [_error_of(e, judge) for e in both]
        if judge_falls([e[reward] for e in both], values, errors):
            what = (
                f"{judge} fell twice in a row to {values[-1]:.4g} while {reward} rose: the reward is exploited;"
                " take an earlier checkpoint (vpo_jax.convert --step), raise preference.anchor or add a scorer"
            )
            alarms.append(Alarm("judge_falls", what))
    for name in motion:
        seen = [e for e in evaluations if _has(e, name)]
        if seen and motion_lost(seen[-1][name], seen[0][name], _error_of(seen[-1], name)):
            what = (
                f"{name} is {seen[-1][name]:.4g}, below 90 % of the base's {seen[0][name]:.4g}: videos freeze;"
                " lower preference.motion_tolerance, or give dynamic_degree more weight in reward.weights"
            )
            alarms.append(Alarm("motion_lost", what))
    newest = evaluations[-1]
    if winners is not None and _has(newest, winners):
        rise = newest[winners]
        if winners_forgotten(rise, _error_of(newest, winners)):
            what = (
                f"the mean error of the first step's winners rose by {rise:.0%}: the policy leaves what it samples;"
                " lower optimizer.learning_rate or raise preference.anchor"
            )
            alarms.append(Alarm("winners_forgotten", what))
    return tuple(alarms)


def _error_of(evaluation: Mapping[str, float], name: str) -> float:
    return evaluation.get(standard_error_of(name)) or 0.0


def _has(evaluation: Mapping[str, float], name: str) -> bool:
    return evaluation.get(name) is not None
