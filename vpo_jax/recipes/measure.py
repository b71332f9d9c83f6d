"""Measures a shipped base model and the scorer on held-out captions.

    python -m vpo_jax.recipes.measure --base=DIR --scorer=DIR --workdir=DIR --output=quality.json

The base model's samples are measured by the analytic judge, beside clean videos and the mixture that it was trained
on. The scorer is compared with the truth twice: on rendered videos, where the truth is how they were made, and on the
base model's samples, where it is what the judge measures. Rank correlations are Spearman's. Nothing here trains.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vpo_jax.pipeline import load_pipeline
from vpo_jax.recipes import base_videos, scorer_data
from vpo_jax.rewards.loading import load_scorer
from vpo_jax.rewards.protocol import DIMENSIONS
from vpo_jax.rewards.scoring import Scorer
from vpo_jax.runtime.backend import keep_compiled_programs, keep_freed_memory
from vpo_jax.runtime.cli import Parser, run
from vpo_jax.runtime.files import write_json
from vpo_jax.shapes import judge, world


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation, ties at their mean rank; 0 where one of the two is constant."""
    ranks = [_ranks(np.asarray(x, np.float64)) for x in (a, b)]
    if any(rank.std() == 0 for rank in ranks):
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[inverse]


def summarise(videos: np.ndarray, captions: Sequence[str]) -> dict[str, float]:
    """Mean of every measure, of the noise, of the overall score, and the share of each attribute that is right."""
    measures = judge.measure(videos, captions)
    result = {name: float(values.mean()) for name, values in measures.items()}
    result["noise"] = float(judge.noise_level(videos).mean())
    result["overall"] = float(judge.overall(measures).mean())
    return result | {f"right_{name}": float(x.mean()) for name, x in judge.matches(videos, captions).items()}


def reference_videos(
    count: int, probability: float, seed: int = 1, num_frames: int = world.NUM_FRAMES
) -> tuple[np.ndarray, list[str]]:
    """Rendered videos of training captions, degraded with `probability`, as the base model was trained on."""
    rows = np.resize(world.caption_indices("train"), count)
    videos = world.render_videos(jax.random.key(seed), rows, probability, num_frames)
    return np.asarray(world.to_uint8(videos.frames)), _captions(rows)


# Three videos in four have any one degradation. In the videos that a scorer learns from two in three share the best
# label of a dimension, and ties bound a rank correlation whatever the scorer does.
_PRESENCE = (0.75,) * 6


def synthetic_videos(
    count: int, seed: int, presence: Sequence[float] | None = _PRESENCE
) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Rendered videos of held-out captions, what is asked of each, and the labels in [0, 1]: [count, 5]."""
    rows = jnp.asarray(world.caption_indices("held_out"))
    video_key, ask_key = jax.random.split(jax.random.key(seed))
    make = jax.jit(lambda key: scorer_data.make_videos(key, count, rows, disturbed=False, presence=presence))
    labelled = make(video_key)
    asked, match = jax.vmap(scorer_data.ask)(jax.random.split(ask_key, count), labelled.rows, labelled.freeze)
    truth = np.array(labelled.goodness)
    truth[:, scorer_data.ALIGNMENT] = np.asarray(match)
    return np.asarray(labelled.videos), _captions(np.asarray(asked)), truth


def synthetic_correlations(
    scorer: Scorer, count: int = 768, seed: int = 2, presence: Sequence[float] | None = _PRESENCE
) -> dict[str, float]:
    """Spearman of each dimension with the labels of rendered held-out videos that no training has seen.

    `presence` None draws degradations as the training does.
    """
    videos, captions, truth = synthetic_videos(count, seed, presence)
    scores = scorer(videos, captions)
    return {name: spearman(scores[name], truth[:, i]) for i, name in enumerate(DIMENSIONS)}


def bounds(truth: np.ndarray) -> dict[str, float]:
    """The largest Spearman that scores without ties can have with labels [B, 5], ties and all."""
    order = np.arange(len(truth))
    untied = [np.argsort(np.lexsort((order, column))) for column in truth.T]
    return {name: spearman(untied[i], truth[:, i]) for i, name in enumerate(DIMENSIONS)}


def real_truths(videos: np.ndarray, captions: Sequence[str]) -> dict[str, np.ndarray]:
    """What four dimensions should agree with on a model's samples, higher better: {dimension: [B]}.

    Factual consistency has no counterpart among the judge's measures. Flicker and jitter are added in units of
    their clean means; sharpness and noise in units of the clean mean and of full-strength noise.
    """
    measures = judge.measure(videos, captions)
    unsteady = sum(measures[name] / judge.CLEAN_MEAN[name] for name in ("flicker", "jitter"))
    sharpness = measures["sharpness"] / judge.CLEAN_MEAN["sharpness"]
    return {
        "visual_quality": sharpness - judge.noise_level(videos) / world.NOISE_STD,
        "temporal_consistency": -np.asarray(unsteady),
        "dynamic_degree": measures["speed"],
        "text_to_video_alignment": np.sum(list(judge.matches(videos, captions).values()), axis=0),
    }


def real_correlations(scorer: Scorer, videos: np.ndarray, captions: Sequence[str]) -> dict[str, float]:
    """Spearman of each dimension with the judge's measures on a model's samples.

    A model that follows its captions has nearly all matches right, so for the alignment samples are asked for
    captions with some attributes exchanged, as rendered videos are.
    """
    rows = np.array([world.parse_caption(caption) for caption in captions], np.int32)
    keys = jax.random.split(jax.random.key(3), len(rows))
    asked, _ = jax.vmap(scorer_data.ask)(keys, jnp.asarray(_indices(rows)), jnp.zeros(len(rows)))
    mixed = _captions(np.asarray(asked))
    scores, truths = scorer(videos, captions), real_truths(videos, captions)
    alignment = "text_to_video_alignment"
    scores[alignment], truths[alignment] = scorer(videos, mixed)[alignment], real_truths(videos, mixed)[alignment]
    return {name: spearman(scores[name], truth) for name, truth in truths.items()}


def _indices(attributes: np.ndarray) -> np.ndarray:
    """Rows of world.ALL_ATTRIBUTES that hold these attributes [B, 5]."""
    return (attributes[:, None] == world.ALL_ATTRIBUTES).all(-1).argmax(1)


def measure_all(base: str | Path, scorer: str | Path, count: int, seed: int, workdir: Path) -> dict[str, Any]:
    """Everything that quality.json holds; samples are kept in `workdir` and made once."""
    pipeline = load_pipeline(base)
    videos, rows = base_videos.base_samples(pipeline, "held_out", seed, count, workdir)
    captions = _captions(rows)
    loaded = load_scorer(str(scorer))
    return {
        "samples": count,
        "seed": seed,
        "base": summarise(videos, captions),
        "clean": summarise(*reference_videos(960, 0.0, num_frames=videos.shape[1])),
        "mixture": summarise(*reference_videos(960, 0.5, num_frames=videos.shape[1])),
        "scorer": {
            "spearman_synthetic": synthetic_correlations(loaded),
            "spearman_as_trained": synthetic_correlations(loaded, presence=None),
            "spearman_as_trained_at_most": bounds(synthetic_videos(768, 2, None)[2]),
            "spearman_real": real_correlations(loaded, videos, captions),
        },
    }


def _captions(rows: np.ndarray) -> list[str]:
    return [world.make_caption(world.ALL_ATTRIBUTES[row]) for row in rows]


def _show(quality: Mapping[str, Any]) -> None:
    for name in quality["base"]:
        values = "  ".join(f"{part} {quality[part][name]:8.4f}" for part in ("base", "clean", "mixture"))
        print(f"{name:18s} {values}")
    for part, values in quality["scorer"].items():
        print(part, "  ".join(f"{name} {value:.3f}" for name, value in values.items()))


def main(argv: Sequence[str]) -> None:
    """Measures and writes the file."""
    keep_compiled_programs()
    keep_freed_memory()
    parser = Parser("vpo_jax.recipes.measure", __doc__ or "")
    parser.add_argument("--base", type=Path, required=True, help="diffusers folder of the base model")
    parser.add_argument("--scorer", required=True, help="folder of the scorer, or its name")
    parser.add_argument("--workdir", type=Path, required=True, help="keeps the samples")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--count", type=int, default=384, help="samples of the base model")
    parser.add_argument("--seed", type=int, default=1000)
    flags = parser.parse(argv)
    quality = measure_all(flags.base, flags.scorer, flags.count, flags.seed, flags.workdir)
    _show(quality)
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(flags.output, quality)
    print(f"wrote {flags.output}")


if __name__ == "__main__":
    run(main, sys.argv[1:])
