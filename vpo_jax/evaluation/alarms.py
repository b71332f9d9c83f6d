"""Signs that preference training goes wrong, read from the metrics of a run. Pure functions; the run decides.

The DPO loss is no such sign: win rates rise while the loss looks flat.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

LEAST_MOTION = 0.9
MOST_RISING = 0.6
_ONE_IN_TWENTY = 1.645  # standard deviations


class Alarm(NamedTuple):
    """One sign: a name for metrics ("alarm/motion_lost") and a sentence for people."""

    name: str
    message: str


def judge_falls(reward: Sequence[float], judge: Sequence[float]) -> bool:
    """Whether a held-out scorer fell twice in a row while the trained reward rose: reward hacking.

    Both are histories over the same evaluations, oldest first; the last three count.
    """
    if len(reward) != len(judge):
        raise ValueError(f"histories of {len(reward)} and {len(judge)} evaluations")
    if len(judge) < 3:
        return False
    return judge[-1] < judge[-2] < judge[-3] and reward[-1] > reward[-3]


def motion_lost(motion: float, base_motion: float, least: float = LEAST_MOTION) -> bool:
    """Whether the policy moves less than `least` times as much as the base model.

    Preference training can freeze videos: a still video is consistent.
    """
    return motion < base_motion - (1 - least) * abs(base_motion)


def winners_forgotten(share_rising: float, pairs: float, most: float = MOST_RISING) -> bool:
    """Whether too many winners are less likely than under the initial policy: P(e_w rises) > `most`.

    `share_rising` was measured on `pairs` stored pairs. It must exceed `most` by more than its sampling error: chance
    alone exceeds the bound once in twenty times.
    """
    chance = _ONE_IN_TWENTY * (most * (1 - most) / max(pairs, 1.0)) ** 0.5
    return share_rising > most + chance


def check_alarms(
    evaluations: Sequence[Mapping[str, float]],
    reward: str,
    judges: Sequence[str] = (),
    motion: Sequence[str] = (),
    rising: str | None = None,
    watched: str | None = None,
) -> tuple[Alarm, ...]:
    """The alarms that the newest evaluation raises.

    Args:
      evaluations: metrics of every evaluation, oldest first; the first one is the base model.
      reward: name of the trained reward's metric.
      judges: names of the held-out scorers' metrics.
      motion: names of the metrics of motion, as a scorer's dynamic_degree.
      rising: name of P(e_w rises).
      watched: name of the number of pairs that it was measured on.

    An evaluation without a metric, or with None for it, does not count for that metric.
    """
    if not evaluations:
        return ()
    alarms = []
    for judge in judges:
        both = [(e[reward], e[judge]) for e in evaluations if _has(e, reward) and _has(e, judge)]
        if judge_falls([r for r, _ in both], [j for _, j in both]):
            alarms.append(Alarm("judge_falls", f"{judge} fell twice in a row to {both[-1][1]:.4g} while {reward} rose"))
    for name in motion:
        seen = [e[name] for e in evaluations if _has(e, name)]
        if seen and motion_lost(seen[-1], seen[0]):
            alarms.append(Alarm("motion_lost", f"{name} is {seen[-1]:.4g}, below 90 % of the base's {seen[0]:.4g}"))
    newest = evaluations[-1]
    if rising is not None and watched is not None and _has(newest, rising) and _has(newest, watched):
        share, pairs = newest[rising], newest[watched]
        if winners_forgotten(share, pairs):
            what = f"{share:.0%} of {pairs:.0f} stored winners became less likely than at first"
            alarms.append(Alarm("winners_forgotten", what))
    return tuple(alarms)


def _has(evaluation: Mapping[str, float], name: str) -> bool:
    return evaluation.get(name) is not None
