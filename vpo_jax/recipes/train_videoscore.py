"""Trains a small VideoScore of the embedded world: the paper's scorer, an Idefics2 with a head of five, in miniature.

    python -m vpo_jax.recipes.train_videoscore --base=DIR --workdir=DIR --output=DIR

It learns from what the shipped scorer learns from (see `train_scorer`). A real VideoScore starts from a model that has
seen the world; this one learns first what the frames of rendered videos show, which is known because it was drawn.
Its folder is like a real VideoScore's; docs/scorers.md has the command that trains the embedded job with it.

The workdir keeps the carried videos and the checkpoints; interrupted, the same command goes on.
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from tokenizers import AddedToken, Tokenizer

from vpo_jax.models.idefics2 import Idefics2ForSequenceClassification
from vpo_jax.models.idefics2_config import Idefics2Config, PerceiverConfig, TextConfig, VisionConfig
from vpo_jax.recipes import scorer_data as data
from vpo_jax.recipes.train_scorer import (
    Batch,
    Loss,
    Metrics,
    Pools,
    commands_of,
    draw_videos,
    make_parser,
    open_pools,
    optimise,
    ranking,
    weighted,
)
from vpo_jax.rewards.frames import prepare_frames
from vpo_jax.rewards.protocol import DIMENSIONS
from vpo_jax.rewards.query import FIELD
from vpo_jax.rewards.shapes.folder import make_word_tokenizer
from vpo_jax.rewards.videoscore.folder import VideoScoreParts, read_videoscore, write_videoscore
from vpo_jax.rewards.videoscore.frames import FrameSettings
from vpo_jax.rewards.videoscore.query import FAKE_TOKEN, IMAGE_TOKEN, QueryEncoder
from vpo_jax.runtime.backend import keep_compiled_programs, keep_freed_memory
from vpo_jax.runtime.cli import run
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.keys import stream_key
from vpo_jax.runtime.trees import flatten, unflatten
from vpo_jax.shapes import world

Tree = Any

QUERY = f"rate the video of {FIELD} in frames "
_CAPTION_TOKENS = 16
_MIDDLE = 2.5  # of the scores' scale, where the head starts
_GAIN = 3**0.5  # PyTorch's initial matrices lose two thirds of the variance
_APART = 25.0  # times transformers' 0.02: words and places that look alike are not told apart for a thousand steps
_LATENTS, _LATENT_STD = "model/connector/perceiver_resampler/latents", 0.02
_EYES = ("scorer/model/vision_model/", "scorer/model/connector/")
_PATCHES = "model/vision_model/embeddings/patch_embedding"
_WHITENING_VIDEOS, _WHITENING_FLOOR = 64, 1e-4
_EARLY, _LESSONS = 0.25, 0.5
_SEEING_VIDEOS, _SEEING_FRAMES = 64, 2  # a step; frames of one video are alike
_MATRICES = 20.0  # times the learning rate of everything else
_SEEING_RATE = 0.1  # of the learning rate, for what has learnt to see: at all of it places blur again
ALONE = Batch(fresh=48)
WITH_BASE = Batch(fresh=20, round_trip=6, denoised=10, pairs=18)
_DIMENSION_WEIGHTS = (2.0, 3.0, 1.0, 1.5, 1.0)  # unsteadiness is the hardest to see: it lies between frames
_SPOILS = (data.FLICKER, data.JITTER, *data.EVERY_SPOIL)  # for the same reason


def make_tokenizer() -> Tokenizer:
    """One token for each word of the query and of the world's captions, and Idefics2's two for images."""
    words = {word for row in world.ALL_ATTRIBUTES for word in world.make_caption(row).split()}
    tokenizer = make_word_tokenizer(sorted(words | set(QUERY.replace(FIELD, "").split())), _CAPTION_TOKENS)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in (FAKE_TOKEN, IMAGE_TOKEN)]
    )
    return tokenizer


def make_config(tokenizer: Tokenizer) -> Idefics2Config:
    """The miniature's sizes: some five thousand times fewer parameters than the real one."""
    return Idefics2Config(
        vision=VisionConfig(
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=world.SIZE,
            patch_size=8,
        ),
        perceiver=PerceiverConfig(
            hidden_size=128,
            rms_norm_eps=1e-5,
            resampler_n_latents=4,
            resampler_depth=2,
            resampler_n_heads=4,
            resampler_head_dim=32,
            num_key_value_heads=2,
        ),
        text=TextConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
        ),
        image_token_id=tokenizer.get_vocab()[IMAGE_TOKEN],
    )


# Frames are seen as they are.
PROCESSOR = {"size": {"shortest_edge": world.SIZE, "longest_edge": 980}, "do_image_splitting": False}


def make_loss(config: Idefics2Config, queries: QueryEncoder, sizes: Batch) -> Loss:
    """The loss of {"scorer", "lessons"}: all five scores are read of one caption for each video, and the lessons.

    The lessons beside the scores are what frames show (read of the perceiver's tokens), what changed since the frame
    before, which attributes the caption names, which the video has, and which of them agree (of the decoder, behind
    each frame, where it also has to give the scores that it would give so far). Only what lies side by side is
    compared: without the two lessons of attributes, colours and shapes stay at chance. The heads that answer are
    dropped after the training.
    """
    model = Idefics2ForSequenceClassification(config, len(DIMENSIONS))
    settings = FrameSettings.from_dict(PROCESSOR)
    asked_of_all = queries([world.make_caption(row) for row in world.ALL_ATTRIBUTES])
    text, text_mask = jnp.asarray(asked_of_all["input_ids"]), jnp.asarray(asked_of_all["mask"])
    frame_ids = jnp.asarray(np.tile(queries.frame_ids, world.NUM_FRAMES))
    attributes = jnp.asarray(world.ALL_ATTRIBUTES)

    def read(
        module: Idefics2ForSequenceClassification, ids: jax.Array, mask: jax.Array, pixels: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        images = module.see(pixels.reshape(-1, *pixels.shape[2:]))
        images = images.reshape(*pixels.shape[:2], *images.shape[1:])
        hidden, _ = module.model.read(ids, mask, images)
        behind = hidden[:, text.shape[1] :].reshape(*pixels.shape[:2], -1, hidden.shape[-1])[:, :, -1]
        return images.reshape(*images.shape[:2], -1), behind, module.score(behind)

    def apply(params: Tree, videos: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of videos uint8 [B, F, H, W, 3] asked for the captions `rows` int32 [B], each [B, F, ...].

        The tokens of each frame, the decoder's state behind it, and the scores read there.
        """
        ids = jnp.broadcast_to(frame_ids, (len(rows), len(frame_ids)))
        ids = jnp.concatenate([text[rows], ids], axis=1)
        mask = jnp.concatenate([text_mask[rows], jnp.ones((len(rows), len(frame_ids)), bool)], axis=1)
        found: Any = model.apply({"params": params}, ids, mask, prepare_frames(settings, videos), method=read)
        seen, behind, scores = found
        return seen, behind, scores

    def loss(params: Tree, key: jax.Array, pools: Pools | None) -> tuple[jax.Array, Metrics]:
        video_key, ask_key, pair_key = jax.random.split(key, 3)
        labelled, facts = draw_videos(video_key, sizes, pools)
        number = len(labelled.rows)
        asked, match = jax.vmap(data.ask)(jax.random.split(ask_key, number), labelled.rows, labelled.freeze)
        truth = data.labels(labelled.goodness.at[:, data.ALIGNMENT].set(match))
        videos, rows = labelled.videos, asked
        if pools is not None:
            pairs = data.make_pairs(pair_key, sizes.pairs, pools.samples, pools.sample_rows, _SPOILS)
            videos = jnp.concatenate([videos, pairs.better, pairs.worse])
            rows = jnp.concatenate([rows, pairs.better_rows, pairs.worse_rows])
        seen, behind, scores = apply(params["scorer"], videos, rows)
        value, metrics = weighted(jnp.square(scores[:number, -1] - truth), _DIMENSION_WEIGHTS)
        metrics = {"loss": value, **metrics}
        if pools is not None:
            short, parts = ranking(scores[number:, -1], pairs)
            metrics |= {"loss": value + short, **parts}

        heads = params["lessons"]
        early, _ = weighted(jnp.square(scores[:number, 2:-1].mean(1) - truth), _DIMENSION_WEIGHTS)
        shown = jnp.square(_answer(heads["shown"], seen[: len(facts)]) - facts).mean()
        first = jnp.diff(facts, axis=1)
        second = jnp.diff(first, axis=1)
        changed = _answer(heads["changed"], behind[: len(facts), 1:])
        changes = jnp.square(changed[..., : len(data.SHOWN)] - 2.0 * first).mean()
        changes += jnp.square(changed[:, 1:, len(data.SHOWN) :] - 2.0 * second).mean()
        named = _naming(_answer(heads["named"], behind[:number]), attributes[asked])
        drawn = _naming(_answer(heads["drawn"], behind[:number]), attributes[labelled.rows])
        right = (attributes[asked] == attributes[labelled.rows]).astype(jnp.float32)
        logits = _answer(heads["right"], behind[:number, 2:])
        matches = optax.sigmoid_binary_cross_entropy(logits, right[:, None]).mean()
        lessons = {"shown": shown, "changed": changes, "named": named, "drawn": drawn, "right": matches}
        return metrics["loss"] + _EARLY * early + _LESSONS * sum(lessons.values()), metrics | lessons

    return loss


def _naming(logits: jax.Array, attributes: jax.Array) -> jax.Array:
    """Cross-entropy of attributes int32 [B, 5] by logits [B, F, the values of all], a mean of the attributes."""
    parts = jnp.split(logits, np.cumsum([len(values) for values in world.VALUES])[:-1], axis=-1)
    truth = jnp.broadcast_to(attributes[:, None], (*logits.shape[:2], attributes.shape[1]))
    found = [
        optax.softmax_cross_entropy_with_integer_labels(part, truth[..., i]).mean() for i, part in enumerate(parts)
    ]
    return jnp.stack(found).mean()


def _answer(head: Tree, x: jax.Array) -> jax.Array:
    return x @ head["kernel"] + head["bias"]


def _make_head(inputs: int, outputs: int) -> Tree:
    return {"kernel": jnp.zeros((inputs, outputs)), "bias": jnp.zeros(outputs)}


def make_seeing_loss(config: Idefics2Config, videos: int = _SEEING_VIDEOS) -> Loss:
    """The loss of {"scorer", "lessons"} of what frames of fresh videos show and how these differ, and nothing else."""
    model = Idefics2ForSequenceClassification(config, len(DIMENSIONS))
    settings = FrameSettings.from_dict(PROCESSOR)

    def loss(params: Tree, key: jax.Array, pools: Pools | None) -> tuple[jax.Array, Metrics]:
        video_key, frame_key = jax.random.split(key)
        fresh, facts = data.make_known_videos(video_key, videos, jnp.asarray(world.caption_indices("train")))
        chosen = jax.random.choice(frame_key, world.NUM_FRAMES, (_SEEING_FRAMES,), replace=False)
        facts = facts[:, chosen]
        pixels = prepare_frames(settings, fresh.videos[:, chosen])
        frames = pixels.reshape(-1, *pixels.shape[2:])
        images = jnp.asarray(model.apply({"params": params["scorer"]}, frames, method="see"))
        error = _answer(params["lessons"]["shown"], images.reshape(*facts.shape[:2], -1)) - facts
        shown, differ = jnp.square(error), jnp.square(jnp.diff(error, axis=1))
        metrics = {"differ": differ.mean(), **dict(zip(data.SHOWN, shown.mean((0, 1)), strict=True))}
        return shown.mean() + differ.mean(), metrics

    return loss


def muon(schedule: optax.Schedule) -> optax.GradientTransformation:
    """The rule that the miniature learns by: Muon for matrices, Adam at a lower rate for everything else."""
    return optax.contrib.muon(
        lambda step: _MATRICES * schedule(step), weight_decay=1e-3, adam_b2=0.99, adam_learning_rate=schedule
    )


def muon_that_sees(schedule: optax.Schedule) -> optax.GradientTransformation:
    """`muon`, slower in the vision tower and the connector."""

    def eyes(updates: Tree) -> Tree:
        return unflatten({path: path.startswith(_EYES) for path in flatten(updates)})

    return optax.chain(muon(schedule), optax.masked(optax.scale(_SEEING_RATE), eyes))


def make_start(config: Idefics2Config, seed: int) -> Callable[[], Tree]:
    """() -> fresh parameters, through which a video's differences reach the head.

    The resampler's latents differ, or they would never part, but are small beside what they see; matrices keep the
    variance of what they multiply; patches are whitened (as in arXiv 2404.00498), so that grain and edges are no
    smaller than colours.
    """

    def start() -> Tree:
        tokens, side = config.perceiver.resampler_n_latents, config.vision.patch_size
        ids, pixels = jnp.zeros((1, tokens), jnp.int32), jnp.zeros((1, 1, side, side, 3))
        model = Idefics2ForSequenceClassification(config, len(DIMENSIONS))
        params = jax.jit(model.init)(stream_key(seed, "init"), ids, jnp.ones(ids.shape, bool), pixels)["params"]
        gains = {"kernel": _GAIN, "embedding": _APART}
        fresh = {path: x * gains.get(path.rpartition("/")[2], 1.0) for path, x in flatten(params).items()}
        fresh["score/bias"] = jnp.full_like(fresh["score/bias"], _MIDDLE)
        latent_key, video_key = stream_key(seed, "init", 1), stream_key(seed, "init", 2)
        fresh[_LATENTS] = _LATENT_STD * jax.random.normal(latent_key, fresh[_LATENTS].shape)
        rows = jnp.asarray(world.caption_indices("train"))
        labelled = jax.jit(lambda key: data.make_videos(key, _WHITENING_VIDEOS, rows))(video_key)
        frames = prepare_frames(FrameSettings.from_dict(PROCESSOR), labelled.videos)
        kernel, bias = whiten(frames.reshape(-1, *frames.shape[2:]), side, config.vision.hidden_size)
        fresh[f"{_PATCHES}/kernel"], fresh[f"{_PATCHES}/bias"] = kernel, bias
        return {"scorer": unflatten(fresh), "lessons": make_heads(config)}

    return start


def make_heads(config: Idefics2Config) -> Tree:
    """Heads for the lessons that answer nothing yet."""
    width, shown, words = config.text.hidden_size, len(data.SHOWN), sum(len(values) for values in world.VALUES)
    return {
        "shown": _make_head(config.perceiver.resampler_n_latents * width, shown),
        "changed": _make_head(width, 2 * shown),
        "named": _make_head(width, words),
        "drawn": _make_head(width, words),
        "right": _make_head(width, len(world.VALUES)),
    }


def whiten(frames: jax.Array, side: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Kernel [side, side, 3, width] and bias that give the principal parts of patches of [N, H, W, 3] unit variance."""
    number, height, across, channels = frames.shape
    patches = frames.reshape(number, height // side, side, across // side, side, channels).swapaxes(2, 3)
    patches = patches.reshape(-1, side * side * channels)
    mean = patches.mean(0)
    variances, directions = jnp.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))  # ascending
    kept = min(width, len(variances))
    kernel = directions[:, -kept:] / jnp.sqrt(jnp.maximum(variances[-kept:], 0.0) + _WHITENING_FLOOR)
    kernel = jnp.pad(kernel, ((0, 0), (0, width - kept)))
    return kernel.reshape(side, side, channels, width), -mean @ kernel


def train(
    seed: int,
    steps: int,
    rate: float,
    pools: Pools | None,
    workdir: Path,
    seconds: float | None = None,
    seeing_steps: int = 0,
    start: Tree | None = None,
) -> VideoScoreParts:
    """The scorer after `seeing_steps` updates of what frames show and `steps` of all; the moving average.

    It begins with the parameters `start`, None: fresh ones.

    Raises:
      TimeoutError: `seconds` ran out; the same call goes on.
    """
    tokenizer = make_tokenizer()
    config = make_config(tokenizer)
    queries = QueryEncoder(
        tokenizer, QUERY, config.image_token_id, config.perceiver.resampler_n_latents, _CAPTION_TOKENS
    )
    began = time.monotonic()
    params = None if start is None else {"scorer": start, "lessons": make_heads(config)}

    def begin() -> Tree:
        return params or make_start(config, seed)()

    if seeing_steps:
        seeing = make_seeing_loss(config)
        params = optimise(seeing, begin, seed, seeing_steps, rate, None, workdir / "seeing", seconds, muon)
    loss = make_loss(config, queries, ALONE if pools is None else WITH_BASE)
    left = None if seconds is None else seconds - (time.monotonic() - began)
    rule = muon if params is None else muon_that_sees
    params = optimise(loss, begin, seed, steps, rate, pools, workdir / "videoscore", left, rule)
    return VideoScoreParts(config, params["scorer"], tokenizer, PROCESSOR, QUERY)


def read_miniature(folder: Path) -> Tree:
    """Parameters of a folder that this recipe wrote.

    Raises:
      UserError: it is broken, or a VideoScore of other sizes.
    """
    parts = read_videoscore(folder, len(DIMENSIONS))
    if parts.config != make_config(make_tokenizer()):
        raise UserError(f"--start: {folder} is a VideoScore of other sizes; give a folder that this recipe wrote")
    return parts.params


def main(argv: Sequence[str]) -> None:
    """Makes the pools, trains, writes the folder."""
    keep_compiled_programs()
    keep_freed_memory()
    parser = make_parser(
        "vpo_jax.recipes.train_videoscore", __doc__ or "", steps=3500, learning_rate=1e-3, carried=1280, samples=768
    )
    parser.add_argument("--seeing_steps", type=int, help="before, on what frames show alone: 3000; 0 with --start")
    parser.add_argument("--start", type=Path, default=None, help="a miniature to train further")
    flags = parser.parse(argv)
    if flags.seeing_steps is None:
        flags.seeing_steps = 3000 if flags.start is None else 0
    if flags.seeing_steps < 0:
        raise UserError(f"--seeing_steps: {flags.seeing_steps} is negative; give 0 or more")
    start = None if flags.start is None else read_miniature(flags.start)
    commands = commands_of("vpo_jax.recipes.train_videoscore", flags, ["seeing_steps"])
    pools = open_pools(flags)
    seconds, seeing = flags.seconds, flags.seeing_steps
    parts = train(flags.seed, flags.steps, flags.learning_rate, pools, flags.workdir, seconds, seeing, start)
    write_videoscore(flags.output, parts, {"recipe.json": {"commands": commands}}, jnp.float16)
    print(f"wrote {flags.output}")


if __name__ == "__main__":
    run(main, sys.argv[1:])
