"""The analytic judge of the embedded world."""

from vpo_jax.rewards.entry import Entry
from vpo_jax.rewards.judge.reward import JudgeReward

__all__ = ["SCORER", "JudgeReward"]

SCORER = Entry(make=JudgeReward)
