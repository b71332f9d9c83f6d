"""Looks at the policy from outside its loss: fixed prompts, fixed seeds, judges that do not train it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from vpo_jax.evaluation.alarms import Alarm, check_alarms
from vpo_jax.rewards.combine import MOTION, dimension_names
from vpo_jax.rewards.scoring import Scores, Weights
from vpo_jax.runtime.keys import stream_key
from vpo_jax.runtime.metrics import MetricsWriter
from vpo_jax.runtime.processes import fetch, is_main
from vpo_jax.runtime.video import write_webp

Tree = Any


class Look(NamedTuple):
    """What one look saw.

    Attributes:
      scores: "scorer/dimension" -> float32 [number of prompts].
      videos: uint8 [number of videos kept, F, H, W, 3], all frames, of the first prompts.
    """

    scores: dict[str, np.ndarray]
    videos: np.ndarray


class Watch:
    """Samples the tuning prompts with fixed seeds and scores them; the training scorers and the held-out judges.

    Attributes:
      prompts: the tuning prompts; never those that the result is reported on.
      trained: names of the training scorers' dimensions.
      held_out: names of the held-out judges' dimensions. They may steer the run (the best checkpoint, an adaptive
        reference), so a judge that has to stay untouched does not belong here.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        rewards: Sequence[Any],
        held_out: Sequence[Any],
        weights: Weights,
        generate: Callable[[Tree, Sequence[str], jax.Array], jax.Array],
        clips: int,
        num_frames: int,
        seed: int,
        keep_videos: int,
        microbatch: int = 0,
    ) -> None:
        """`generate(adapters, prompts [clips], keys [clips]) -> uint8 [clips, F, H, W, 3]`, on `clips` at a time."""
        self.prompts = tuple(prompts)
        self.trained, self.held_out = dimension_names(rewards), dimension_names(held_out)
        self._generate, self._clips, self._keep, self._seed = generate, clips, keep_videos, seed
        self._score = Scores((*rewards, *held_out), weights, num_frames, range(num_frames), microbatch)
        self._keys = jax.jit(jax.vmap(lambda slot: stream_key(seed, "eval", 0, slot)))

    def look(self, adapters: Tree) -> Look:
        """Samples and scores one set of adapters; the same noise for the same prompt every time."""
        scores, videos = [], []
        for first in range(0, len(self.prompts), self._clips):
            slots = np.arange(first, first + self._clips)
            # The last batch is filled up with what is there, so that one compiled program serves all.
            prompts = [self.prompts[slot % len(self.prompts)] for slot in slots]
            clips = self._generate(adapters, prompts, self._keys(slots))
            scores.append(fetch(self._score(clips, prompts)))
            if first < self._keep:
                videos.append(fetch(clips[: self._keep - first]))
        table = np.concatenate(scores)[: len(self.prompts)]
        names = (*self.trained, *self.held_out)
        kept = np.concatenate(videos)[: len(self.prompts)] if videos else np.zeros((0,), np.uint8)
        return Look({name: table[:, column] for column, name in enumerate(names)}, kept)

    def compare(self, base: Mapping[str, Sequence[float]], now: Look) -> dict[str, float]:
        """The trained gain, means of now, and each dimension's win rate against the base, ties counted one half."""
        metrics = {"eval/gain": gain(base, now.scores, self.trained)}
        for name, values in now.scores.items():
            room = "held_out" if name in self.held_out else "eval"
            metrics[f"{room}/{name}"] = float(np.mean(values))
            difference = values - np.asarray(base[name], np.float32)
            metrics[f"{room}/win_rate/{name}"] = float(np.mean((difference > 0) + 0.5 * (difference == 0)))
        return metrics

    def held_out_gain(self, base: Mapping[str, Sequence[float]], now: Look) -> float | None:
        """The held-out judges' gain, which chooses the best checkpoint: it steers. None without such a judge."""
        return gain(base, now.scores, self.held_out) if self.held_out else None

    def alarms(self, looks: Sequence[Mapping[str, float]]) -> tuple[Alarm, ...]:
        """What the newest of these looks' metrics warns of; the first is the base model's."""
        return check_alarms(
            looks,
            reward="eval/gain",
            judges=[f"held_out/{name}" for name in self.held_out],
            motion=[f"eval/{name}" for name in self.trained if name.rpartition("/")[2] == MOTION],
            rising="policy/winner_error_rises",
            watched="policy/watched_pairs",
        )


def gain(base: Mapping[str, Sequence[float]], now: Mapping[str, np.ndarray], names: Sequence[str]) -> float:
    """Mean over dimensions of what was gained on the base, in the base's standard deviations over prompts."""
    gains = []
    for name in names:
        before = np.asarray(base[name], np.float32)
        gains.append(float(np.mean(now[name] - before)) / (float(before.std()) or 1.0))
    return float(np.mean(gains))


def save_samples(folder: Path, writer: MetricsWriter, step: int, videos: np.ndarray) -> None:
    """Writes a look's videos, uint8 [B, F, H, W, 3], as folder/step_NNNNNN/II.webp and to the event files."""
    if not is_main():
        return
    target = folder / f"step_{step:06d}"
    target.mkdir(parents=True, exist_ok=True)
    for i, video in enumerate(videos):
        write_webp(target / f"{i:02d}.webp", video)
        writer.video(step, f"samples/{i:02d}", video)
