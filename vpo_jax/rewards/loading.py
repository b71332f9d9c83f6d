"""Scorers by name or folder, and the function that people call."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from vpo_jax.checkpoints import videoscore
from vpo_jax.checkpoints.scorers import CLASS, scorer_class
from vpo_jax.rewards.judge import JudgeReward
from vpo_jax.rewards.protocol import Reward
from vpo_jax.rewards.shapes import load_video_scorer
from vpo_jax.rewards.videoscore import load_videoscore
from vpo_jax.runtime.errors import UserError

SHIPPED_SCORER = Path(__file__).resolve().parents[1] / "shapes" / "assets" / "scorer"
_BATCH = 32  # clips scored in one compiled call, where the scorer has no number of its own


def _shipped() -> Reward:
    return load_video_scorer(SHIPPED_SCORER, "shapes")


_BY_NAME: dict[str, Callable[[], Reward]] = {"shapes": _shipped, "judge": JudgeReward}
_BY_CLASS: dict[str, Callable[[str], Reward]] = {CLASS: load_video_scorer, videoscore.CLASS: load_videoscore}


def load_reward(name_or_path: str) -> Reward:
    """The scorer called "shapes" (it ships with the package) or "judge" (analytic, never trains), or a folder.

    Raises:
      UserError: neither a known name nor a folder that holds a scorer.
    """
    if name_or_path in _BY_NAME:
        return _BY_NAME[name_or_path]()
    if not Path(name_or_path).is_dir():
        known = ", ".join(sorted(_BY_NAME))
        raise UserError(
            f"reward.scorers: {str(name_or_path)!r} is no scorer; known names are {known}, and a folder with "
            "config.json and model.safetensors is one too"
        )
    kind = scorer_class(name_or_path)
    if kind not in _BY_CLASS:
        raise UserError(
            f"{name_or_path}: config.json says {kind!r}, which is no scorer; known classes are {', '.join(_BY_CLASS)}"
        )
    return _BY_CLASS[kind](name_or_path)


def load_rewards(names: str, training: bool = False) -> tuple[Reward, ...]:
    """Scorers of a comma-separated list; with `training`, those that may only judge are refused.

    Raises:
      UserError: as `load_reward`; an empty list for training; the judge for training.
    """
    rewards = tuple(load_reward(name.strip()) for name in names.split(",") if name.strip())
    if training and not rewards:
        raise UserError("reward.scorers: is empty; name at least one scorer, as shapes")
    for reward in rewards:
        if training and not reward.trains:
            raise UserError(f"reward.scorers: {reward.name} only judges and never trains; use it in held_out.scorers")
    return rewards


@dataclasses.dataclass(frozen=True, eq=False)
class Scorer:
    """A scorer as a function of whole videos: `scorer(videos, prompts)`."""

    reward: Reward
    _score: Callable[..., jax.Array | np.ndarray]

    def __call__(self, videos: np.ndarray, prompts: str | Sequence[str]) -> dict[str, np.ndarray]:
        """Scores of uint8 [B, F, H, W, 3] against a prompt for each: {dimension: float32 [B]}.

        Raises:
          UserError: videos of another type or shape, or another number of prompts than of videos.
        """
        videos = np.asarray(videos)
        if videos.ndim != 5 or videos.shape[-1] != 3 or videos.dtype != np.uint8 or 0 in videos.shape:
            raise UserError(f"videos: must be uint8 [B, F, H, W, 3], found {videos.dtype} {list(videos.shape)}")
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if len(prompts) != len(videos):
            raise UserError(f"prompts: {len(prompts)} for {len(videos)} videos; give one to each")
        frames = list(self.reward.frame_indices(videos.shape[1]))
        prepared = self.reward.prepare(prompts)
        batch = min(getattr(self.reward, "clips_at_a_time", _BATCH), len(videos))
        parts = []
        for start in range(0, len(videos), batch):
            # The last batch is filled up with clips that are not returned: one shape, one compilation.
            rows = np.minimum(np.arange(start, start + batch), len(videos) - 1)
            part = self._score(
                self.reward.params, videos[rows][:, frames], jax.tree.map(lambda x, rows=rows: x[rows], prepared)
            )
            parts.append(np.asarray(part)[: len(videos) - start])
        scores = np.concatenate(parts).astype(np.float32)
        return {name: scores[:, i] for i, name in enumerate(self.reward.dimensions)}


def load_scorer(name_or_path: str) -> Scorer:
    """A scorer to call: `load_scorer("shapes")(videos, prompts)` -> {dimension: float32 [B]}.

    Raises:
      UserError: as `load_reward`.
    """
    reward = load_reward(str(name_or_path))
    return Scorer(reward, jax.jit(reward.score) if reward.jittable else reward.score)
