"""Classical measures without weights and without a reference."""

from vpo_jax.rewards.classical.reward import ClassicalReward
from vpo_jax.rewards.entry import Entry

__all__ = ["SCORER", "ClassicalReward"]

SCORER = Entry(make=ClassicalReward)
