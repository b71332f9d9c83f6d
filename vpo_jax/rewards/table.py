"""Every scorer by name: one line for one folder. A scorer of one's own needs none, see `rewards.custom`."""

from collections.abc import Mapping

from vpo_jax.rewards import classical, judge, shapes, videoreward, videoscore
from vpo_jax.rewards.entry import Entry

SCORERS: Mapping[str, Entry] = {
    "classical": classical.SCORER,
    "judge": judge.SCORER,
    "shapes": shapes.SCORER,
    "videoreward": videoreward.SCORER,
    "videoscore": videoscore.SCORER,
}
