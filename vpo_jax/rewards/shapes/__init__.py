"""The video quality scorer of the embedded world, and any other folder of its kind."""

from vpo_jax.rewards.entry import Entry
from vpo_jax.rewards.shapes.folder import CLASSES
from vpo_jax.rewards.shapes.reward import VideoScorerReward, load, load_shipped

__all__ = ["SCORER", "VideoScorerReward", "load"]

SCORER = Entry(make=load_shipped, load=load, classes=CLASSES)
