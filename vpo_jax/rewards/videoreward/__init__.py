"""VideoReward (arXiv 2501.13918): a Qwen2-VL of 2 billion parameters that scores at three tokens."""

from vpo_jax.rewards.entry import Entry
from vpo_jax.rewards.videoreward.folder import CLASSES, SETTINGS_FILE
from vpo_jax.rewards.videoreward.published import abstract
from vpo_jax.rewards.videoreward.reward import Options, VideoRewardReward, load

__all__ = ["SCORER", "Options", "VideoRewardReward", "abstract", "load"]

SCORER = Entry(load=load, classes=CLASSES, marker=SETTINGS_FILE, options=Options, abstract=abstract)
