"""Trains the embedded world's video quality scorer.

    python -m vpo_jax.recipes.train_scorer --base=DIR --workdir=DIR --output=DIR

It learns from videos whose flaws are known by construction (see `scorer_data`): fresh ones, ones carried through
the base model, and the base model's samples against the same samples made worse. Held-out and tuning captions are
never seen. The workdir keeps the carried videos and the checkpoints; interrupted, the same command goes on.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vpo_jax.checkpoints import safetensors_io as io
from vpo_jax.models.video_scorer import VideoScorer, VideoScorerConfig
from vpo_jax.pipeline import load_pipeline
from vpo_jax.recipes import base_videos
from vpo_jax.recipes import scorer_data as data
from vpo_jax.recipes.fit import fit
from vpo_jax.rewards.protocol import DIMENSIONS
from vpo_jax.rewards.shapes.folder import (
    ScorerParts,
    encode_captions,
    make_word_tokenizer,
    read_scorer,
    write_scorer,
)
from vpo_jax.runtime.backend import keep_compiled_programs, keep_freed_memory
from vpo_jax.runtime.cli import Parser, run
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.keys import stream_key
from vpo_jax.runtime.trees import count
from vpo_jax.shapes import world

Tree = Any
Metrics = dict[str, jax.Array]

_MAX_LENGTH = 16
_MARGIN = 0.4  # by which a sample must beat itself made worse at full strength, on the scale of the scores
_SOFTNESS = 0.15  # of the ranking loss, on the same scale
_DIMENSION_WEIGHTS = (2.0, 1.0, 2.0, 1.0, 2.0)  # softness and speed differ least between samples
_EMA = 0.995
_CAPTIONS = 12  # captions asked of each video a step


class Pools(NamedTuple):
    """Videos made once before the training; None without a base model."""

    round_trip: data.Labelled
    denoised: data.Labelled
    samples: jax.Array  # uint8 [N, F, H, W, 3]
    sample_rows: jax.Array


# (parameters, key, pools) -> (loss, metrics); the key draws the whole batch.
Loss = Callable[[Tree, jax.Array, Pools | None], tuple[jax.Array, Metrics]]


class Batch(NamedTuple):
    """Videos a step from each source."""

    fresh: int = 64
    round_trip: int = 0
    denoised: int = 0
    pairs: int = 0


WITH_BASE = Batch(fresh=16, round_trip=8, denoised=16, pairs=28)


class Fitted(NamedTuple):
    """State of the training."""

    params: Tree
    ema: Tree
    optimizer: Tree


def make_tokenizer() -> Any:
    """One token for each word of the world's captions."""
    words = {word for row in world.ALL_ATTRIBUTES for word in world.make_caption(row).split()}
    return make_word_tokenizer(sorted(words), _MAX_LENGTH)


def make_config(tokenizer: Any) -> VideoScorerConfig:
    """The shipped scorer's sizes."""
    return VideoScorerConfig(
        dimensions=DIMENSIONS,
        ranges=(data.RANGE,) * len(DIMENSIONS),
        num_frames=world.NUM_FRAMES,
        image_size=world.SIZE,
        vocab_size=tokenizer.get_vocab_size(),
        max_length=_MAX_LENGTH,
    )


def make_pools(base: str | Path, seed: int, carried: int, samples: int, folder: Path) -> Pools:
    """Videos carried through the base model in `base`, and its samples of training captions."""
    pipeline = load_pipeline(base)
    videos, rows = base_videos.base_samples(pipeline, "train", seed, samples, folder)
    return Pools(
        base_videos.carried_videos(pipeline, "round_trip", seed + 1, carried, folder),
        base_videos.carried_videos(pipeline, "denoised", seed + 2, carried, folder),
        jnp.asarray(videos),
        jnp.asarray(rows),
    )


def draw_videos(key: jax.Array, sizes: Batch, pools: Pools | None) -> tuple[data.Labelled, jax.Array]:
    """The labelled videos of one step, from every source, fresh ones first, and the facts of these; jittable."""
    fresh_key, *pool_keys = jax.random.split(key, 3)
    fresh, facts = data.make_known_videos(fresh_key, sizes.fresh, jnp.asarray(world.caption_indices("train")))
    parts = [fresh]
    if pools is not None:
        parts.append(_draw(pool_keys[0], pools.round_trip, sizes.round_trip))
        parts.append(_draw(pool_keys[1], pools.denoised, sizes.denoised))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts), facts


def _draw(key: jax.Array, pool: data.Labelled, number: int) -> data.Labelled:
    pick_key, disturb_key, soften_key = jax.random.split(key, 3)
    pick = jax.random.randint(pick_key, (number,), 0, len(pool.rows))
    chosen = jax.tree.map(lambda x: x[pick], pool)
    frames = chosen.videos.astype(jnp.float32) / 255.0
    frames = jax.vmap(data.disturb)(jax.random.split(disturb_key, number), frames)
    frames, quality = jax.vmap(data.soften)(jax.random.split(soften_key, number), frames, chosen.blur)
    goodness = chosen.goodness.at[:, data.QUALITY].set(quality)
    return chosen._replace(videos=world.to_uint8(frames), goodness=goodness)


def weighted(error: jax.Array, weights: Sequence[float]) -> tuple[jax.Array, Metrics]:
    """The loss of squared errors [B, 5] with a weight for each dimension, and the part of every dimension."""
    parts = {name: error[:, i].mean() for i, name in enumerate(DIMENSIONS)}
    return (error * jnp.array(weights)).mean(), parts


def ranking(scores: jax.Array, pairs: data.Pairs) -> tuple[jax.Array, Metrics]:
    """The loss of scores [2 B, 5] of B pairs, the better videos first: how far the worse ones are not behind."""
    better, worse = jnp.split(scores, 2)
    lead = jnp.take_along_axis(better - worse, pairs.dimension[:, None], axis=1)[:, 0]
    short = (_MARGIN * pairs.strength - lead) / _SOFTNESS
    value = _SOFTNESS * jax.nn.softplus(short).mean()
    return value, {"ranking": value, "ranked_right": (lead > 0).mean()}


def make_loss(config: VideoScorerConfig, token_ids: np.ndarray, sizes: Batch) -> Loss:
    """The loss of the shipped scorer; token_ids int32 [480, L] are the captions of world.ALL_ATTRIBUTES."""
    scorer = VideoScorer(config)
    ids = jnp.asarray(token_ids)

    def apply(method: str, params: Tree, *inputs: Any) -> Any:
        return scorer.apply({"params": params}, *inputs, method=method)

    def loss(params: Tree, key: jax.Array, pools: Pools | None) -> tuple[jax.Array, Metrics]:
        video_key, ask_key, pair_key = jax.random.split(key, 3)
        labelled, _ = draw_videos(video_key, sizes, pools)
        number = len(labelled.rows)
        pairs = None if pools is None else data.make_pairs(pair_key, sizes.pairs, pools.samples, pools.sample_rows)
        videos = [labelled.videos] if pairs is None else [labelled.videos, pairs.better, pairs.worse]
        seen = apply("see", params, jnp.concatenate(videos))
        scores = apply("to_range", params, apply("judge_quality", params, seen))
        error = jnp.square(scores[:number] - data.labels(labelled.goodness))

        # Many captions for each video cost next to nothing.
        ask_keys = jax.random.split(ask_key, (number, _CAPTIONS))
        ask = jax.vmap(jax.vmap(data.ask, (0, None, None)))
        asked, match = ask(ask_keys, labelled.rows, labelled.freeze)  # [B, captions]
        logits = apply("judge_match", params, jax.tree.map(lambda x: x[:number], seen), ids[asked])
        matched = apply("to_range", params, logits, data.ALIGNMENT)
        alignment_error = jnp.square(matched - data.labels(match)).mean(1)

        value, metrics = weighted(error.at[:, data.ALIGNMENT].set(alignment_error), _DIMENSION_WEIGHTS)
        if pairs is not None:
            rows = jnp.concatenate([pairs.better_rows, pairs.worse_rows])
            logits = apply("judge_match", params, jax.tree.map(lambda x: x[number:], seen), ids[rows][:, None])[:, 0]
            matched = apply("to_range", params, logits, data.ALIGNMENT)
            behind, parts = ranking(scores[number:].at[:, data.ALIGNMENT].set(matched), pairs)
            value, metrics = value + behind, metrics | parts
        return value, {"loss": value, **metrics}

    return loss


def adamw(schedule: optax.Schedule) -> optax.GradientTransformation:
    """The rule that the shipped scorer learns by."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=1e-3))


def optimise(
    loss: Loss,
    start: Callable[[], Tree],
    seed: int,
    steps: int,
    rate: float,
    pools: Pools | None,
    checkpoints: Path,
    seconds: float | None = None,
    rule: Callable[[optax.Schedule], optax.GradientTransformation] = adamw,
) -> Tree:
    """The moving average of the parameters after `steps` updates from those that `start` makes.

    `rule` makes the optimiser of the learning rate, which warms up to `rate` and ends at a hundredth of it.

    Raises:
      TimeoutError: `seconds` ran out; the same call goes on.
    """
    warm = min(100, steps // 20)
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warm, steps, 0.01 * rate)
    optimizer = rule(schedule)

    @jax.jit
    def update(state: Fitted, step: jax.Array, pools: Pools | None) -> tuple[Fitted, Metrics]:
        gradient = jax.grad(loss, has_aux=True)
        grads, metrics = gradient(state.params, stream_key(seed, "data", step), pools)
        updates, moments = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(_EMA, (1.0 + step) / (10.0 + step))
        ema = jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, state.ema, params)
        return Fitted(params, ema, moments), metrics

    @jax.jit
    def init() -> Fitted:
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start())
        return Fitted(params, jax.tree.map(jnp.copy, params), optimizer.init(params))

    state = init()
    print(f"scorer: {count(state.params):,} parameters", flush=True)
    return fit(state, lambda s, step: update(s, step, pools), steps, checkpoints, seconds=seconds).ema


def train(
    seed: int,
    steps: int,
    rate: float,
    pools: Pools | None,
    workdir: Path,
    seconds: float | None = None,
    start: Tree | None = None,
) -> ScorerParts:
    """The scorer after `steps` updates from the parameters `start` (None: fresh ones); the moving average.

    Raises:
      TimeoutError: `seconds` ran out; the same call goes on.
    """
    tokenizer = make_tokenizer()
    config = make_config(tokenizer)
    ids = encode_captions(tokenizer, [world.make_caption(row) for row in world.ALL_ATTRIBUTES])
    loss = make_loss(config, ids, Batch() if pools is None else WITH_BASE)

    def fresh() -> Tree:
        videos = jnp.zeros((1, world.NUM_FRAMES, world.SIZE, world.SIZE, 3), jnp.uint8)
        return start or VideoScorer(config).init(stream_key(seed, "init"), videos, jnp.asarray(ids[:1]))["params"]

    params = optimise(loss, fresh, seed, steps, rate, pools, workdir / "scorer", seconds)
    return ScorerParts(config, params, tokenizer)


def make_parser(name: str, text: str, steps: int, learning_rate: float, carried: int, samples: int) -> Parser:
    """The flags that the recipes of scorers share, with these defaults."""
    parser = Parser(name, text)
    parser.add_argument(
        "--base", type=Path, default=None, help="diffusers folder of the base model (default: fresh videos)"
    )
    parser.add_argument("--workdir", type=Path, required=True, help="carried videos and checkpoints")
    parser.add_argument("--output", type=Path, required=True, help="the scorer's folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--learning_rate", type=float, default=learning_rate)
    parser.add_argument("--carried", type=int, default=carried, help="videos carried through the base model, each way")
    parser.add_argument("--samples", type=int, default=samples, help="samples of the base model")
    parser.add_argument("--seconds", type=float, default=None, help="stop the training after this long, saved")
    return parser


def commands_of(module: str, flags: argparse.Namespace, more: Sequence[str] = ()) -> list[str]:
    """The commands that train the same scorer again, but for its folders; `more` are flags of this recipe alone.

    Raises:
      UserError: `--start` has no recipe.json.
    """
    names = ("seed", "steps", "learning_rate", "carried", "samples", *more)
    command = " ".join([f"python -m {module}", *(f"--{name}={getattr(flags, name)}" for name in names)])
    if flags.start is None:
        return [command]
    earlier: list[str] = io.read_json(flags.start / "recipe.json")["commands"]
    return [*earlier, f"{command} --start=THE_SCORER_ABOVE"]


def open_pools(flags: argparse.Namespace) -> Pools | None:
    """What `make_pools` makes with these flags, None without a base model.

    Raises:
      UserError: there is no step to train, or the output would lie among what the recipe keeps for itself.
    """
    if flags.steps < 1:
        raise UserError(f"--steps: {flags.steps} trains nothing; give at least 1")
    if flags.output.resolve().is_relative_to(flags.workdir.resolve()):
        raise UserError(f"--output: {flags.output} is inside --workdir; choose a folder outside of it")
    if flags.base is None:
        return None
    return make_pools(flags.base, flags.seed, flags.carried, flags.samples, flags.workdir / "pools")


def main(argv: Sequence[str]) -> None:
    """Makes the pools, trains, writes the folder."""
    keep_compiled_programs()
    keep_freed_memory()
    parser = make_parser(
        "vpo_jax.recipes.train_scorer", __doc__ or "", steps=3000, learning_rate=2e-3, carried=4096, samples=1024
    )
    parser.add_argument("--start", type=Path, default=None, help="a scorer to train further")
    flags = parser.parse(argv)
    commands = commands_of("vpo_jax.recipes.train_scorer", flags)
    pools = open_pools(flags)
    start = None if flags.start is None else read_scorer(flags.start).params
    parts = train(flags.seed, flags.steps, flags.learning_rate, pools, flags.workdir, flags.seconds, start)
    write_scorer(flags.output, parts, {"recipe.json": {"commands": commands}})
    print(f"wrote {flags.output}")


if __name__ == "__main__":
    run(main, sys.argv[1:])
