"""VideoScore (arXiv 2406.15252): an Idefics2 of 8 billion parameters with a head of five scores."""

from vpo_jax.rewards.entry import Entry
from vpo_jax.rewards.videoscore.folder import CLASSES
from vpo_jax.rewards.videoscore.published import abstract
from vpo_jax.rewards.videoscore.reward import Options, VideoScoreReward, load

__all__ = ["SCORER", "Options", "VideoScoreReward", "abstract", "load"]

SCORER = Entry(load=load, classes=CLASSES, options=Options, abstract=abstract)
