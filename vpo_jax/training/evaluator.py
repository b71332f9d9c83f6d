"""Evaluations during a run: tuning prompts, fixed seeds, training scorers and held-out scorers."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from vpo_jax.algorithms.protocol import Algorithm, Frozen
from vpo_jax.algorithms.state import TrainState
from vpo_jax.evaluation.alarms import Alarm, check_alarms
from vpo_jax.evaluation.gains import gain, metrics_against_base
from vpo_jax.rewards.combine import MOTION, dimension_names
from vpo_jax.rewards.scoring import Scores, Weights
from vpo_jax.runtime.keys import stream_key
from vpo_jax.runtime.metrics import MetricsWriter
from vpo_jax.runtime.processes import fetch, is_main
from vpo_jax.runtime.transfers import allowed
from vpo_jax.runtime.video import write_webp
from vpo_jax.training.record import RunRecord

Tree = Any


class Seen(NamedTuple):
    """Scores and videos of the tuning prompts with one set of parameters.

    Attributes:
      scores: "scorer/dimension" -> float32 [number of prompts].
      videos: uint8 [number of videos kept, F, H, W, 3], all frames, of the first prompts.
    """

    scores: dict[str, np.ndarray]
    videos: np.ndarray


class Evaluation(NamedTuple):
    """One evaluation of the policy.

    Attributes:
      metrics: for metrics.jsonl.
      gain: the held-out scorers' mean gain, which chooses the best checkpoint and when an adaptive reference moves:
        those scorers are used for selection. None without one.
      alarms: those that the metrics raise.
      videos: as in `Seen`.
      record: the run's, with this evaluation.
    """

    metrics: dict[str, float]
    gain: float | None
    alarms: tuple[Alarm, ...]
    videos: np.ndarray
    record: RunRecord


class Evaluator:
    """Samples the tuning prompts with fixed seeds and scores them.

    Attributes:
      prompts: disjoint from those that the result is reported on.
      trained: names of the training scorers' dimensions.
      held_out: names of the held-out scorers' dimensions. They may be used for selection (the best checkpoint, an
        adaptive reference), so a scorer that has to stay untouched does not belong here.
    """

    def __init__(
        self,
        config: Any,
        prompts: Sequence[str],
        rewards: Sequence[Any],
        held_out: Sequence[Any],
        weights: Weights,
        generate: Callable[[Tree, Sequence[str], jax.Array], jax.Array],
        num_frames: int,
        result: Callable[[TrainState], Tree],
        algorithm: Algorithm,
        frozen: Frozen,
    ) -> None:
        """`generate(trainable, prompts [B], keys [B]) -> uint8 [B, F, H, W, 3]`, B the videos of a step.

        `result(state)` are the trainable parameters that the run would return if it ended now.
        """
        self.prompts = tuple(prompts[: config.eval.prompts]) if config.eval.every else ()
        self.trained, self.held_out = dimension_names(rewards), dimension_names(held_out)
        self._every, self._steps, self._keep = config.eval.every, config.train.steps, config.log.samples
        self._batch = config.train.prompts_per_step * config.rollout.candidates
        self._generate, self._result, self._algorithm, self._frozen = generate, result, algorithm, frozen
        micro = config.rollout.microbatch
        self._score = Scores((*rewards, *held_out), weights, num_frames, range(num_frames), micro)
        seed = config.eval.seed
        self._keys = jax.jit(jax.vmap(lambda slot: stream_key(seed, "eval", 0, slot)))

    def due(self, step: int) -> bool:
        """Whether the policy is evaluated after `step` steps."""
        return bool(self.prompts) and due(step, self._every, self._steps)

    def of_initial(self, record: RunRecord) -> tuple[RunRecord, np.ndarray | None]:
        """The record with the initial policy's scores, against which every gain is measured, and its videos.

        None instead of videos where nothing is evaluated, or the record has those scores.
        """
        if not self.prompts or record.base_scores is not None:
            return record, None
        seen = self.sample(self._frozen.initial)
        scores = {name: values.tolist() for name, values in seen.scores.items()}
        record = dataclasses.replace(record, base_scores=scores)
        return record.with_evaluation(self._compare(scores, seen)), seen.videos

    def evaluate(self, state: TrainState, record: RunRecord) -> Evaluation:
        """The current result against the initial policy."""
        assert record.base_scores is not None
        with allowed():
            result = self._result(state)
            seen = self.sample(result)
            measured = self._algorithm.evaluate(state, self._frozen, result)
        metrics = self._compare(record.base_scores, seen) | measured
        gained = gain(record.base_scores, seen.scores, self.held_out) if self.held_out else None
        record = record.with_evaluation(metrics)
        alarms = self.alarms(record.evaluations)
        metrics = metrics | {f"alarm/{alarm.name}": 1.0 for alarm in alarms}
        return Evaluation(metrics, gained, alarms, seen.videos, record)

    def sample(self, trainable: Tree) -> Seen:
        """Videos and scores of one set of parameters; the same noise for the same prompt every time."""
        scores, videos = [], []
        for first in range(0, len(self.prompts), self._batch):
            slots = np.arange(first, first + self._batch)
            # The last batch is filled up with repeated prompts, so that one compiled program serves all.
            prompts = [self.prompts[slot % len(self.prompts)] for slot in slots]
            made = self._generate(trainable, prompts, self._keys(slots))
            scores.append(fetch(self._score(made, prompts)))
            if first < self._keep:
                videos.append(fetch(made[: self._keep - first]))
        table = np.concatenate(scores)[: len(self.prompts)]
        names = (*self.trained, *self.held_out)
        kept = np.concatenate(videos)[: len(self.prompts)] if videos else np.zeros((0,), np.uint8)
        return Seen({name: table[:, column] for column, name in enumerate(names)}, kept)

    def _compare(self, base: Mapping[str, Sequence[float]], now: Seen) -> dict[str, float]:
        return metrics_against_base(base, now.scores, self.trained, self.held_out)

    def alarms(self, evaluations: Sequence[Mapping[str, float]]) -> tuple[Alarm, ...]:
        """Alarms of the newest of these evaluations; the first one is the initial policy's."""
        return check_alarms(
            evaluations,
            reward="eval/gain",
            judges=[f"held_out/{name}" for name in self.held_out],
            motion=[f"eval/{name}" for name in self.trained if name.rpartition("/")[2] == MOTION],
            winners="policy/winner_error_change",
        )


def due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens after `step` steps."""
    return step == last or (every > 0 and step % every == 0)


def save_samples(folder: Path, writer: MetricsWriter, step: int, videos: np.ndarray) -> None:
    """Writes an evaluation's videos, uint8 [B, F, H, W, 3], as folder/step_NNNNNN/II.webp and to the event files."""
    if not is_main():
        return
    target = folder / f"step_{step:06d}"
    target.mkdir(parents=True, exist_ok=True)
    for i, video in enumerate(videos):
        write_webp(target / f"{i:02d}.webp", video)
        writer.video(step, f"samples/{i:02d}", video)
