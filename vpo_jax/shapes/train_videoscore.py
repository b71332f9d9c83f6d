"""Trains a small VideoScore of the embedded world: the paper's scorer, an Idefics2 with a head of five, in miniature.

    python -m vpo_jax.shapes.train_videoscore --base=DIR --workdir=DIR --output=DIR

It learns from what the shipped scorer learns from (see `train_scorer`), and its folder is like a real VideoScore's:

    WEIGHTS=videoscore/temporal_consistency=5,videoscore/visual_quality=2,videoscore/text_to_video_alignment=2
    WEIGHTS=$WEIGHTS,videoscore/dynamic_degree=0.25,videoscore/factual_consistency=0
    python -m vpo_jax.main --config=configs/vpo.py --config.reward.scorers=videoscore \\
        --config.reward.videoscore.path=DIR --config.reward.weights=$WEIGHTS

The workdir keeps the carried clips and the checkpoints; interrupted, the same command goes on.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import AddedToken, Tokenizer

from vpo_jax.checkpoints.scorers import make_word_tokenizer
from vpo_jax.checkpoints.videoscore import VideoScoreParts, write_videoscore
from vpo_jax.models.idefics2 import Idefics2ForSequenceClassification
from vpo_jax.models.idefics2_config import Idefics2Config, PerceiverConfig, TextConfig, VisionConfig
from vpo_jax.rewards.frames import FrameSettings, prepare_frames
from vpo_jax.rewards.protocol import DIMENSIONS
from vpo_jax.rewards.query import FAKE_TOKEN, FIELD, IMAGE_TOKEN, QueryEncoder
from vpo_jax.runtime.cli import run
from vpo_jax.runtime.keys import stream_key
from vpo_jax.runtime.trees import flatten, unflatten
from vpo_jax.shapes import scorer_data as data
from vpo_jax.shapes import world
from vpo_jax.shapes.train_scorer import (
    Batch,
    Loss,
    Metrics,
    Pools,
    draw_clips,
    make_parser,
    open_pools,
    optimise,
    ranking,
    weighted,
)

Tree = Any

QUERY = f"rate the video of {FIELD} in frames "
_CAPTION_TOKENS = 16
_MIDDLE = 2.5  # of the scores' scale, where the head starts
_GAIN = 3**0.5  # PyTorch's initial matrices lose two thirds of the variance
_LATENTS, _LATENT_STD = "model/connector/perceiver_resampler/latents", 0.02
ALONE = Batch(fresh=48)
WITH_BASE = Batch(fresh=12, round_trip=6, denoised=12, pairs=14)


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
            num_hidden_layers=4,
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
    """The loss of a VideoScore asked by `queries`: all five scores are read of one caption for each clip."""
    model = Idefics2ForSequenceClassification(config, len(DIMENSIONS))
    settings = FrameSettings.from_dict(PROCESSOR)
    asked_of_all = queries([world.make_caption(row) for row in world.ALL_ATTRIBUTES])
    text, text_mask = jnp.asarray(asked_of_all["input_ids"]), jnp.asarray(asked_of_all["mask"])
    frame_ids = jnp.asarray(np.tile(queries.frame_ids, world.NUM_FRAMES))

    def judge(params: Tree, videos: jax.Array, rows: jax.Array) -> jax.Array:
        """Scores [B, 5] of videos uint8 [B, F, H, W, 3] asked for the captions `rows` int32 [B]."""
        ids = jnp.broadcast_to(frame_ids, (len(rows), len(frame_ids)))
        ids = jnp.concatenate([text[rows], ids], axis=1)
        mask = jnp.concatenate([text_mask[rows], jnp.ones((len(rows), len(frame_ids)), bool)], axis=1)
        return jnp.asarray(model.apply({"params": params}, ids, mask, prepare_frames(settings, videos)))

    def loss(params: Tree, key: jax.Array, pools: Pools | None) -> tuple[jax.Array, Metrics]:
        clip_key, ask_key, pair_key = jax.random.split(key, 3)
        clips = draw_clips(clip_key, sizes, pools)
        number = len(clips.rows)
        rows, match = jax.vmap(data.ask)(jax.random.split(ask_key, number), clips.rows, clips.freeze)
        truth = data.labels(clips.goodness.at[:, data.ALIGNMENT].set(match))
        if pools is None:
            value, metrics = weighted(jnp.square(judge(params, clips.videos, rows) - truth))
            return value, {"loss": value, **metrics}
        pairs = data.make_pairs(pair_key, sizes.pairs, pools.samples, pools.sample_rows)
        videos = jnp.concatenate([clips.videos, pairs.better, pairs.worse])
        scores = judge(params, videos, jnp.concatenate([rows, pairs.better_rows, pairs.worse_rows]))
        value, metrics = weighted(jnp.square(scores[:number] - truth))
        behind, parts = ranking(scores[number:], pairs)
        return value + behind, {"loss": value + behind, **metrics, **parts}

    return loss


def make_start(config: Idefics2Config, seed: int) -> Callable[[], Tree]:
    """() -> fresh parameters, through which a clip's differences reach the head.

    The resampler's latents differ, or they would never part, but are small beside what they see; matrices keep the
    variance of what they multiply.
    """

    def start() -> Tree:
        tokens, side = config.perceiver.resampler_n_latents, config.vision.patch_size
        ids, pixels = jnp.zeros((1, tokens), jnp.int32), jnp.zeros((1, 1, side, side, 3))
        model = Idefics2ForSequenceClassification(config, len(DIMENSIONS))
        params = model.init(stream_key(seed, "init"), ids, jnp.ones(ids.shape, bool), pixels)["params"]
        fresh = {path: x * _GAIN if path.endswith("kernel") else x for path, x in flatten(params).items()}
        fresh["score/bias"] = jnp.full_like(fresh["score/bias"], _MIDDLE)
        key = stream_key(seed, "init", 1)
        fresh[_LATENTS] = _LATENT_STD * jax.random.normal(key, fresh[_LATENTS].shape)
        return unflatten(fresh)

    return start


def train(
    seed: int, steps: int, rate: float, pools: Pools | None, workdir: Path, seconds: float | None = None
) -> VideoScoreParts:
    """The scorer after `steps` updates; the moving average.

    Raises:
      TimeoutError: `seconds` ran out; the same call goes on.
    """
    tokenizer = make_tokenizer()
    config = make_config(tokenizer)
    queries = QueryEncoder(
        tokenizer, QUERY, config.image_token_id, config.perceiver.resampler_n_latents, _CAPTION_TOKENS
    )
    loss = make_loss(config, queries, ALONE if pools is None else WITH_BASE)
    params = optimise(loss, make_start(config, seed), seed, steps, rate, pools, workdir / "videoscore", seconds)
    return VideoScoreParts(config, params, tokenizer, PROCESSOR, QUERY)


def main(argv: Sequence[str]) -> None:
    """Makes the pools, trains, writes the folder."""
    parser = make_parser(
        "vpo_jax.shapes.train_videoscore", __doc__ or "", steps=6000, learning_rate=1e-3, carried=1280, samples=768
    )
    flags = parser.parse(argv)
    pools = open_pools(flags)
    parts = train(flags.seed, flags.steps, flags.learning_rate, pools, flags.workdir, flags.seconds)
    write_videoscore(flags.output, parts)
    print(f"wrote {flags.output}")


if __name__ == "__main__":
    run(main, sys.argv[1:])
