"""Base against tuned: the same prompts, the same initial noise, every scorer's every dimension by itself."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from vpo_jax.evaluation.win_rate import mean_difference, win_rate
from vpo_jax.pipeline import Pipeline
from vpo_jax.rewards.protocol import Reward
from vpo_jax.rewards.scoring import Scorer, make_scorer
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.files import write_text_atomically
from vpo_jax.runtime.keys import stream_key
from vpo_jax.runtime.mesh import make_mesh
from vpo_jax.runtime.processes import largest, share, unshare
from vpo_jax.runtime.trees import bytes_of

# How a scorer was used to make the tuned model. Only a held-out scorer is independent evidence.
ROLES = ("trained", "used for selection", "held out", "measured", "unknown")
# Always in the table: preference training can freeze videos. Flicker counts as change too, so it has no win rate.
FRAME_CHANGE = "frames/change"

Tree = Any
Scores = dict[str, np.ndarray]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Row:
    """One dimension of one scorer. Means in the scorer's units; `low` and `high` bound `win_rate` at 95 %."""

    scorer: str
    dimension: str
    role: str
    base_mean: float
    tuned_mean: float
    difference: float
    difference_low: float
    difference_high: float
    win_rate: float
    low: float
    high: float
    prompts: int

    @property
    def name(self) -> str:
        """ "scorer/dimension"."""
        return f"{self.scorer}/{self.dimension}"


@dataclass(frozen=True, eq=False)
class Comparison:
    """All that was compared, with the first videos.

    `base_videos` and `tuned_videos` are uint8 [V, F, H, W, 3] of the first V prompts, sample 0; `base_scores` and
    `tuned_scores` map "scorer/dimension" to float32 [P, S] of S samples a prompt; `settings` says how videos were made.
    """

    rows: tuple[Row, ...]
    prompts: tuple[str, ...]
    settings: Mapping[str, Any]
    base_scores: Scores
    tuned_scores: Scores
    base_videos: np.ndarray
    tuned_videos: np.ndarray

    def row(self, name: str) -> Row:
        """The row of "scorer/dimension"."""
        return next(row for row in self.rows if row.name == name)


@dataclass(frozen=True)
class Sampling:
    """How videos are made; None leaves a choice to the pipeline. `seed` and `samples` fix the initial noise."""

    seed: int = 0
    samples: int = 1
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_rescale: float | None = None
    guidance_scale_2: float | None = None
    shift: float | None = None
    negative_prompt: str | None = None
    sampler: str | None = None
    batch: int = 16  # changes nothing but memory and time

    def arguments(self) -> dict[str, Any]:
        """Those that are chosen, as keyword arguments of a pipeline."""
        own = ("seed", "samples", "batch")
        return {key: value for key, value in asdict(self).items() if key not in own and value is not None}


def compare(
    base: Pipeline,
    tuned: Pipeline,
    prompts: Sequence[str],
    rewards: Sequence[Reward],
    sampling: Sampling | None = None,
    roles: Mapping[str, str] | None = None,
    keep: int = 8,
    progress: Progress | None = None,
) -> Comparison:
    """Generates with both pipelines, scores everything, and keeps the first `keep` videos of each.

    `roles` maps a scorer's name to one of ROLES ("unknown" where absent). `progress(what, done, total)` is called
    after every batch.
    """
    sampling = sampling or Sampling()
    mesh = local_mesh(base.params, rewards)
    scorers = [make_scorer(reward, mesh) for reward in rewards]
    (base_scores, base_videos), (tuned_scores, tuned_videos) = (
        _evaluate(pipeline, prompts, scorers, mesh, sampling, keep, progress and _named(progress, name))
        for name, pipeline in (("base", base), ("tuned", tuned))
    )
    return Comparison(
        rows=compare_scores(base_scores, tuned_scores, roles),
        prompts=tuple(prompts),
        settings={key: value for key, value in asdict(sampling).items() if value is not None and key != "batch"},
        base_scores=base_scores,
        tuned_scores=tuned_scores,
        base_videos=base_videos,
        tuned_videos=tuned_videos,
    )


def evaluate(
    pipeline: Pipeline,
    prompts: Sequence[str],
    rewards: Sequence[Reward],
    sampling: Sampling,
    keep: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Scores, np.ndarray]:
    """Scores {"scorer/dimension": float32 [P, S]} of one pipeline, and its first `keep` prompts' videos.

    Each process makes its share of the videos on its own devices, and every process returns all scores.
    The noise of prompt i, sample s comes from `stream_key(seed, "eval", 0, i, s)`, whatever the batch and the model.
    """
    mesh = local_mesh(pipeline.params, rewards)
    scorers = [make_scorer(reward, mesh) for reward in rewards]
    return _evaluate(pipeline, prompts, scorers, mesh, sampling, keep, progress)


def local_mesh(params: Tree, rewards: Sequence[Reward]) -> Mesh:
    """A mesh of this process's devices: videos are divided among them, and each holds all weights if they fit.

    Otherwise the weights are sharded over as few devices as possible: see `shards_needed`.
    """
    devices = jax.local_devices()
    whole = bytes_of(params) + sum(bytes_of(reward.params) for reward in rewards if reward.jittable)
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")  # a CPU does not say
    shards = shards_needed(whole, limit, len(devices))
    return make_mesh(len(devices) // shards, shards, devices=devices)


def shards_needed(whole: int, limit: int | None, count: int) -> int:
    """The smallest divisor of `count` devices that makes `whole` bytes half of a device's `limit`; else `count`."""
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    return next((n for n in divisors if limit is None or whole / n <= limit / 2), count)


def _evaluate(
    pipeline: Pipeline,
    prompts: Sequence[str],
    scorers: Sequence[Scorer],
    mesh: Mesh,
    sampling: Sampling,
    keep: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[Scores, np.ndarray]:
    if not prompts:
        raise UserError("prompts: none to evaluate on; give at least one")
    every = np.array([(i, s) for i in range(len(prompts)) for s in range(sampling.samples)])  # [T, 2]
    tasks = share(every)
    most = -(-len(every) // jax.process_count())  # as many batches in each process, whatever its share
    parts: list[Scores] = []
    kept: np.ndarray | None = None
    size = min(sampling.batch, most)
    size += -size % mesh.size
    pipeline = pipeline.on_mesh(mesh)
    for start in range(0, most, size):
        chunk = tasks[start : start + size]
        # The last batch is padded with videos that do not count, so that all batches run one compiled program.
        filled = np.concatenate([chunk, np.resize(every[:1], (size - len(chunk), 2))])
        texts = [prompts[i] for i, _ in filled]
        latents = np.asarray(_noise(pipeline, filled, sampling))
        with jax.set_mesh(mesh):
            videos = np.asarray(pipeline(texts, latents=latents, **sampling.arguments()))
        scores = _score(scorers, videos, texts)
        parts.append({name: values[: len(chunk)] for name, values in scores.items()})
        if kept is None:
            kept = np.zeros((min(keep, len(prompts)), *videos.shape[1:]), np.uint8)
        for video, (i, s) in zip(videos, chunk, strict=False):
            if i < len(kept) and s == 0:
                kept[i] = video
        if progress is not None:
            progress(min((start + size) * jax.process_count(), len(every)), len(every))
    assert kept is not None
    shape = (len(prompts), sampling.samples)
    mine = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return {name: unshare(rows, len(every)).reshape(shape) for name, rows in mine.items()}, largest(kept)


def compare_scores(base: Scores, tuned: Scores, roles: Mapping[str, str] | None = None) -> tuple[Row, ...]:
    """A row for every "scorer/dimension" that both have."""
    rows = []
    for name in base:
        scorer, dimension = name.split("/", 1)
        role = "measured" if name == FRAME_CHANGE else (roles or {}).get(scorer, "unknown")
        wins, change = win_rate(base[name], tuned[name]), mean_difference(base[name], tuned[name])
        rows.append(
            Row(
                scorer=scorer,
                dimension=dimension,
                role=role,
                base_mean=_finite_mean(base[name]),
                tuned_mean=_finite_mean(tuned[name]),
                difference=change.rate,
                difference_low=change.low,
                difference_high=change.high,
                win_rate=wins.rate,
                low=wins.low,
                high=wins.high,
                prompts=wins.prompts,
            )
        )
    return tuple(rows)


def table(comparison: Comparison) -> Table:
    """The comparison for a terminal."""
    count, samples = len(comparison.prompts), comparison.settings.get("samples", 1)
    title = f"base against tuned: {count} prompts, {samples} sample{'s' if samples != 1 else ''} each, same noise"
    result = Table(
        title=title, caption=_caption(comparison.rows), title_justify="left", caption_justify="left", box=SIMPLE_HEAD
    )
    result.add_column("", no_wrap=True)
    for header in ("base", "tuned", "difference", "win rate"):
        result.add_column(header, justify="right", no_wrap=True)
    previous = None
    for row in comparison.rows:
        if row.scorer != previous:
            result.add_row(Text(f"{row.scorer} ({row.role})", style="bold"))
        judged = row.role != "measured"
        result.add_row(
            Text(f"  {row.dimension}"),
            number(row.base_mean),
            number(row.tuned_mean),
            f"{row.difference:+.3g}",
            f"{percent(row.win_rate)} ({interval(row)})" if judged else "",
            style="green" if judged and row.low > 0.5 else "red" if judged and row.high < 0.5 else None,
        )
        previous = row.scorer
    return result


def interval(row: Row) -> str:
    """The 95 % interval of a row's win rate for people, without the sign."""
    return "none" if math.isnan(row.low) else f"{100 * row.low:.0f} to {100 * row.high:.0f}"


def number(value: float) -> str:
    """A mean for people."""
    return "none" if math.isnan(value) else f"{value:.4g}"


def percent(share: float) -> str:
    """A share for people."""
    return "none" if math.isnan(share) else f"{100 * share:.0f} %"


def write_json(path: str | Path, comparison: Comparison) -> None:
    """evaluation.json: the rows, how videos were made, and every score; NaN is null. Whole or not at all."""
    document = {
        "rows": [asdict(row) for row in comparison.rows],
        "settings": dict(comparison.settings),
        "prompts": list(comparison.prompts),
        "base_scores": {name: scores.tolist() for name, scores in comparison.base_scores.items()},
        "tuned_scores": {name: scores.tolist() for name, scores in comparison.tuned_scores.items()},
    }
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, json.dumps(_without_nan(document), indent=1, ensure_ascii=False))
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}; choose another --output") from error


def _caption(rows: Sequence[Row]) -> str:
    words = {
        "trained": "trained: the model was trained on it",
        "used for selection": "used for selection: it chose the checkpoint or the reference",
        "held out": "held out: used neither for training nor for selection",
        "unknown": "unknown: not said whether it trained this model",
    }
    roles = [role for role in ROLES if role in words and any(row.role == role for row in rows)]
    return "\n".join(
        ["win rate: ties count one half; in brackets 95 %, bootstrap over prompts"] + [words[r] for r in roles]
    )


def _named(progress: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(what, done, total)


def _noise(pipeline: Pipeline, tasks: np.ndarray, sampling: Sampling) -> jax.Array:
    shape = pipeline.latent_shape(sampling.num_frames, sampling.height, sampling.width)
    slots, samples = jnp.asarray(tasks.T)
    keys = jax.vmap(lambda i, s: stream_key(sampling.seed, "eval", 0, i, s))(slots, samples)
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


def _score(scorers: Sequence[Scorer], videos: np.ndarray, prompts: Sequence[str]) -> Scores:
    scores: Scores = {}
    for scorer in scorers:
        scores |= {f"{scorer.reward.name}/{name}": values for name, values in scorer(videos, prompts).items()}
    steps = np.abs(np.diff(videos.astype(np.float32), axis=1))
    # In shades of 0 to 255; a single frame has no change.
    scores[FRAME_CHANGE] = steps.mean(axis=(1, 2, 3, 4)) if videos.shape[1] > 1 else np.zeros(len(videos), np.float32)
    return scores


def _finite_mean(scores: np.ndarray) -> float:
    finite = scores[np.isfinite(scores)]
    return float(finite.mean(dtype=np.float64)) if finite.size else math.nan


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
