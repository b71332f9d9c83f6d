"""The loop around the algorithm: its steps, the clock, late metrics, checkpoints, signals and profiles."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import jax
import numpy as np

from vpo_jax.algorithms.protocol import Metrics
from vpo_jax.algorithms.state import TrainState
from vpo_jax.checkpoints.orbax_store import CheckpointStore
from vpo_jax.runtime.clock import Stopwatch
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.metrics import MetricsWriter
from vpo_jax.runtime.processes import fetch, is_main, main_first
from vpo_jax.runtime.profile import Profiler
from vpo_jax.runtime.signals import Interrupted, Stop
from vpo_jax.runtime.transfers import allowed, guarded
from vpo_jax.runtime.workdir import Workdir, write_json
from vpo_jax.training.evaluator import Evaluation, Evaluator, due, save_samples
from vpo_jax.training.progress import Progress
from vpo_jax.training.record import RunRecord
from vpo_jax.training.rollouts import Candidates


class NonFinite(Exception):
    """A loss, a gradient, or every score of a step was not finite; its inputs are under failure/step_N."""


class Alarmed(Exception):
    """An alarm was raised and `eval.on_alarm` is "stop"; the step is saved."""


class Line(NamedTuple):
    """A step whose metrics are still on the devices.

    Attributes:
      step: its number, from 1.
      metrics: (sum, count) by name, of each part of the step.
      measured: metrics that are numbers already.
      prompts: of the step.
      scores: float32 [P * N, D].
    """

    step: int
    metrics: Sequence[Metrics]
    measured: Mapping[str, float]
    prompts: list[str]
    scores: jax.Array


class Run:
    """A run in its workdir; a context manager that saves the last finished step when a signal comes.

    Inside it, only explicit copies from the host to the devices are allowed: see `runtime.transfers`.

    Attributes:
      state: after the last finished step.
      record: likewise.
    """

    def __init__(
        self, config: Any, workdir: Workdir, record: RunRecord, stop: Stop, videos: int, progress: Progress | None
    ) -> None:
        """`videos`: of a step; `record` is that of a new run; `progress` None makes one on stderr."""
        self._config, self._workdir, self._stop, self._videos = config, workdir, stop, videos
        self.record = record
        self.state: TrainState = None  # type: ignore[assignment]  # until `restore`
        self._store = CheckpointStore(workdir.checkpoints, config.checkpoint.keep)
        self._writer = MetricsWriter(workdir.path, config.log.tensorboard, silent=not is_main())
        self._progress = progress
        self._bar: Progress | None = None
        self._clock = Stopwatch()
        self._late: Line | None = None
        self._step = 0  # the number of the step that is under way, from 1
        self._guard = contextlib.ExitStack()
        self._profiler = Profiler(workdir.path / "profile", config.profile.steps)

    def restore(self, fresh: Any, abstract: TrainState) -> TrainState:
        """The newest checkpoint's state, or `fresh()` where there is none; metrics after it are removed.

        Raises:
          UserError: the checkpoint is of other prompts.
        """
        if self._store.latest() is None:
            self.state, kept = fresh(), -1
        else:
            kept, self.state, restored = self._store.restore(None, abstract)
            record = RunRecord.from_json(restored)
            if record.prompts != self.record.prompts:
                raise UserError("data.prompts: not the prompts that this run began with; choose another --workdir")
            self.record = record
        self._writer.truncate_after(kept)
        self._clock = Stopwatch(self.record.clock)
        return self.state

    def __enter__(self) -> "Run":
        began, steps = int(self.state.step), self._config.train.steps
        bar = self._progress or Progress(steps, began, self._config.log.every, silent=not is_main())
        self._bar = bar.__enter__()
        if began:
            self.say(f"continuing from step {began}")
        self._guard.enter_context(guarded())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._guard.close()
        with contextlib.closing(self._store), contextlib.closing(self._writer):
            try:
                self._profiler.stop()
                if kind is None or issubclass(kind, Interrupted):
                    self.log()
                if kind is not None and issubclass(kind, Interrupted):
                    self._save()
            finally:
                if self._bar is not None:
                    self._bar.__exit__(kind, error, traceback)

    def begin(self, evaluator: Evaluator) -> None:
        """Evaluates the initial policy where the run has not yet."""
        with allowed():
            self.record, videos = evaluator.of_initial(self.record)
        if videos is not None:
            self.show(0, videos)

    def steps(self) -> Iterator[int]:
        """The numbers of the remaining steps, from 0.

        Raises:
          Interrupted: a signal came.
        """
        for step in range(int(self.state.step), self._config.train.steps):
            self._stop.check()
            self._step = step + 1
            with self._profiler.step(step + 1):
                yield step
        self._stop.check()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the seconds inside to time/NAME. A signal stops the run after "rollout" and "score".

        An update donates the state's buffers, so a step whose update has begun runs to its end.
        """
        with self._clock.phase(name), jax.profiler.TraceAnnotation(name):
            yield
        if name in ("rollout", "score"):
            self._stop.check()

    def wait(self, candidates: Candidates) -> None:
        """Waits for the candidates; logs the previous step meanwhile, so that no device waits for the host."""
        self.log()
        with self.phase("rollout"):
            jax.block_until_ready(candidates.rollout)

    def say(self, text: str) -> None:
        """Prints a line for people; nothing for an empty one."""
        if text and self._bar is not None:
            self._bar.say(text)

    def show(self, step: int, videos: np.ndarray) -> None:
        """Writes an evaluation's videos."""
        save_samples(self._workdir.samples, self._writer, step, videos)

    def finish(
        self,
        state: TrainState,
        metrics: Sequence[Metrics],
        measured: Mapping[str, float],
        candidates: Candidates,
        scores: jax.Array,
        evaluation: Evaluation | None = None,
    ) -> None:
        """Ends a step: keeps its metrics for later, saves where a checkpoint is due, stops on an alarm if asked to.

        Raises:
          Alarmed: `eval.on_alarm` is "stop".
          NonFinite: what `log` raises.
        """
        self.state, step = state, self._step
        stopping = False
        if evaluation is not None:
            self.record = evaluation.record
            measured = {**measured, **evaluation.metrics}
            for alarm in evaluation.alarms:
                self.say(f"alarm at step {step}: {alarm.message}")
            self.show(step, evaluation.videos)
            stopping = bool(evaluation.alarms) and self._config.eval.on_alarm == "stop"
        self._late = Line(step, metrics, measured, candidates.prompts, scores)
        saves = stopping or due(step, self._config.checkpoint.every, self._config.train.steps)
        # Before a checkpoint: metrics.jsonl then has every step up to it. On a CPU nothing is left to wait for.
        if saves or jax.default_backend() == "cpu":
            self.log()
        if saves:
            self._save(evaluation.gain if evaluation else None)
        if stopping and evaluation is not None:
            said = evaluation.alarms[0].message
            raise Alarmed(f"step {step}: {said}; eval.on_alarm=warn goes on from here")

    def log(self) -> None:
        """Fetches the metrics of the last finished step, writes and shows them, if that was not done before.

        Raises:
          NonFinite: it was not finite; the last finite state is saved apart.
        """
        if self._late is None:
            return
        line, self._late = self._late, None
        with self._clock.phase("update"):  # on an accelerator this waits for most of the update
            values = mean_of(line.metrics) | dict(line.measured)
        times = self._clock.lap()
        values |= times | {"time/videos_per_second": self._videos / times["time/step"]}
        self._writer.write(line.step, values)
        if self._bar is not None:
            self._bar.update(line.step, values)
        if values["loss/non_finite"] > 0.0 or values["reward/all_non_finite"] > 0.0:
            self._fail(line, values)

    def _save(self, metric: float | None = None) -> None:
        self.record = dataclasses.replace(self.record, clock=self._clock.state)
        with allowed():
            self._store.save(int(self.state.step), self.state, self.record.as_json(), metric)

    def _fail(self, line: Line, values: Mapping[str, float]) -> None:
        """Saves the last finite state and the step's inputs under failure/step_N, and raises NonFinite."""
        folder = self._workdir.failure / f"step_{line.step}"
        main_first(lambda: folder.mkdir(parents=True, exist_ok=True))
        with allowed(), contextlib.closing(CheckpointStore(folder / "checkpoints", keep=1)) as store:
            store.save(int(self.state.step), self.state, self.record.as_json())
        report = {
            "step": line.step,
            "seed": self._config.seed,
            "keys": "stream_key(seed, stream, step - 1, slot, candidate or update)",
            "prompts": line.prompts,
            "scores": [[float(s) if np.isfinite(s) else str(s) for s in row] for row in fetch(line.scores)],
            "metrics": {name: value if np.isfinite(value) else str(value) for name, value in values.items()},
        }
        main_first(lambda: write_json(folder / "step.json", report))
        what = "every score" if values["reward/all_non_finite"] else "the loss or its gradient"
        raise NonFinite(
            f"step {line.step}: {what} was not finite; the last finite state and its inputs are in {folder}"
        )


def mean_of(metrics: Sequence[Metrics]) -> dict[str, float]:
    """Means by name of the (sum, count) pairs of a step and its updates; NaN where nothing was counted."""
    totals: dict[str, np.ndarray] = {}
    for part in jax.device_get(list(metrics)):
        for name, pair in part.items():
            totals[name] = totals.get(name, np.zeros(2)) + np.asarray(pair, np.float64)
    return {name: float(total / count) if count else float("nan") for name, (total, count) in totals.items()}
