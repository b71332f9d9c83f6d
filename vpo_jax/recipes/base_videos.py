"""Videos from the embedded base model for training a scorer: labelled ones that it has altered, and its own samples.

Everything is made in chunks that are kept on disk, so that an interrupted recipe makes each of them once.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vpo_jax.families.protocol import Text
from vpo_jax.families.text_to_video_sd.family import TextToVideoSD
from vpo_jax.pipeline import Pipeline
from vpo_jax.recipes.scorer_data import Labelled, equivalent_blur, make_videos
from vpo_jax.shapes import world

Tree = Any
# (params, key, videos uint8, text) -> videos uint8
Carry = Callable[[Tree, jax.Array, jax.Array, Text], jax.Array]

_CHUNK = 64  # videos carried through the base model at a time


def _round_trip(pipeline: Pipeline) -> Carry:
    """(params, key, videos uint8, text) -> what the autoencoder makes of the videos, uint8."""

    def run(params: Tree, _key: jax.Array, videos: jax.Array, _text: Text) -> jax.Array:
        latents = encode_videos(pipeline, pipeline.family.decoder_params(params), videos)
        return world.to_uint8(pipeline.family.decode(pipeline.family.decoder_params(params), latents))

    return run


def _denoised(pipeline: Pipeline, largest: float = 0.4, steps: int = 3) -> Carry:
    """(params, key, videos uint8, text) -> the videos noised to a small time and denoised in a few steps, uint8."""
    process = pipeline.process

    def run(params: Tree, key: jax.Array, videos: jax.Array, text: Text) -> jax.Array:
        time_key, noise_key = jax.random.split(key)
        latents = encode_videos(pipeline, pipeline.family.decoder_params(params), videos)
        start = jax.random.uniform(time_key, (len(videos),), minval=0.05, maxval=largest)
        noise = jax.random.normal(noise_key, latents.shape)

        def times(step: int) -> jax.Array:
            return (start * (1.0 - step / steps) * process.num_train_timesteps).astype(jnp.int32)

        clean = latents
        for step in range(steps):
            now = times(step)
            latents = process.add_noise(clean, noise, now)
            prediction = pipeline.family.denoise({"params": pipeline.family.trainable(params)}, latents, now, text)
            clean, noise = process.to_clean_and_noise(prediction, latents, now)
        return world.to_uint8(pipeline.family.decode(pipeline.family.decoder_params(params), clean))

    return run


def encode_videos(pipeline: Pipeline, params: Tree, videos: jax.Array) -> jax.Array:
    """Scaled latents of uint8 videos [B, F, H, W, 3], the posterior's mean: float32 [B, F, h, w, C]."""
    frames = videos.reshape(-1, *videos.shape[2:]).astype(jnp.float32) / 127.5 - 1.0
    family = pipeline.family
    assert isinstance(family, TextToVideoSD)
    vae = family.vae
    mean, _ = vae.apply({"params": params}, frames, method="encode")
    return (mean * vae.config.scaling_factor).reshape(*videos.shape[:2], *mean.shape[1:])


def carried_videos(pipeline: Pipeline, way: str, seed: int, count: int, folder: Path) -> Labelled:
    """`count` labelled videos that went through the base model; chunks are kept in `folder` and made only once.

    way: "round_trip" (the autoencoder alone) or "denoised". The labels are those of what went in, which has neither
    blur nor grain; the blur is what the video caught on its way, and the visual quality is left to `soften`.
    """
    carry = jax.jit({"round_trip": _round_trip, "denoised": _denoised}[way](pipeline))
    rows = jnp.asarray(world.caption_indices("train"))
    make = jax.jit(lambda key: make_videos(key, _CHUNK, rows, disturbed=False, soft=False))
    encode_text = jax.jit(pipeline.family.encode_text)

    @jax.jit
    @jax.vmap
    def caught(source: jax.Array, video: jax.Array) -> jax.Array:
        return equivalent_blur(source.astype(jnp.float32) / 255.0, video.astype(jnp.float32) / 255.0)

    def chunk(number: int) -> dict[str, np.ndarray]:
        video_key, carry_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), number))
        labelled = make(video_key)
        captions = [world.make_caption(world.ALL_ATTRIBUTES[row]) for row in np.asarray(labelled.rows)]
        text = encode_text(pipeline.text_params, pipeline.tokenize(captions))
        videos = carry(pipeline.params, carry_key, labelled.videos, text)
        return labelled._replace(videos=videos, blur=caught(labelled.videos, videos))._asdict()

    found = _kept(chunk, -(-count // _CHUNK), folder, way)
    return Labelled(*(jnp.asarray(found[name]) for name in Labelled._fields))


def base_samples(pipeline: Pipeline, split: str, seed: int, count: int, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """`count` samples of the base model with its own defaults: videos uint8 [count, ...], rows of the captions."""
    rows = np.resize(world.caption_indices(split), -(-count // _CHUNK) * _CHUNK)
    wanted = ("guidance_scale", "num_inference_steps")
    how = {name: pipeline.defaults[name] for name in wanted if name in pipeline.defaults}

    def chunk(number: int) -> dict[str, np.ndarray]:
        chosen = rows[number * _CHUNK : (number + 1) * _CHUNK]
        captions = [world.make_caption(world.ALL_ATTRIBUTES[row]) for row in chosen]
        videos = pipeline(captions, seed=seed + number, batch_size=_CHUNK, **how)
        return {"videos": videos, "rows": chosen}

    parts = _kept(chunk, len(rows) // _CHUNK, folder, f"samples_{split}")
    return parts["videos"][:count], parts["rows"][:count]


def _kept(make: Callable[[int], dict[str, Any]], chunks: int, folder: Path, name: str) -> dict[str, np.ndarray]:
    """The chunks' arrays one after the other; each chunk is written once and read ever after."""

    def parts() -> Iterator[dict[str, np.ndarray]]:
        for number in range(chunks):
            file = folder / f"{name}_{number:04d}.npz"
            if not file.is_file():
                made: dict[str, Any] = {key: np.asarray(value) for key, value in make(number).items()}
                partial = file.with_suffix(".partial.npz")
                np.savez_compressed(partial, **made)
                partial.rename(file)
                if number % 8 == 0:
                    print(f"{name}: chunk {number + 1} of {chunks}", flush=True)
            with np.load(file) as saved:
                yield dict(saved)

    folder.mkdir(parents=True, exist_ok=True)
    found = list(parts())
    return {key: np.concatenate([part[key] for part in found]) for key in found[0]}
