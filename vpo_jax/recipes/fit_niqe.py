"""Fits NIQE's two clean models: photograph-like textures, and clean videos of the shapes world.

    python -m vpo_jax.recipes.fit_niqe --output=vpo_jax/rewards/classical/assets/niqe.json

Takes a minute or two on one CPU core, and always writes the same numbers to the last few bits.
"""

import json
import sys
from collections.abc import Sequence

import jax
import numpy as np

from vpo_jax.recipes import textures
from vpo_jax.rewards.classical.niqe import PATCH, fit_pristine, normalised_luma, patch_features, to_patches
from vpo_jax.rewards.classical.reward import LUMA
from vpo_jax.runtime.cli import Parser, run
from vpo_jax.runtime.files import write_text_atomically
from vpo_jax.shapes import world

IMAGES, SIZE = 64, 128
LEAST_SHARPNESS = 0.75  # of an image's sharpest patch: blurred and empty ones are no example (the published value)
_SENSOR_NOISE = 1.0  # shades; a camera's own


def texture_features(images: int = IMAGES, size: int = SIZE) -> np.ndarray:
    """Features [N, 36] of the sharp patches of textures, each seen at two places between the pixels."""
    features, sharpness = jax.jit(patch_features), jax.jit(_sharpness)
    kept = []
    for seed in range(images):
        rng = np.random.default_rng((seed, 1))
        image = textures.dead_leaves(seed, size + 32)
        video = textures.moving_video(image, size, 2, rng.uniform(0, 8), rng.uniform(0, 2 * np.pi))
        noisy = np.clip(np.round(video + rng.normal(0, _SENSOR_NOISE, video.shape)), 0, 255)
        for frame in noisy.astype(np.float32) @ LUMA:
            sharp = np.asarray(sharpness(frame[None]))
            kept.append(np.asarray(features(frame[None]))[sharp > LEAST_SHARPNESS * sharp.max()])
    return np.concatenate(kept)


def world_features(batch: int = 48) -> np.ndarray:
    """Features [N, 36] of clean videos, one of each training caption."""
    videos = world.render_videos(jax.random.key(1), world.caption_indices("train"), 0.0)
    luma = np.asarray(world.to_uint8(videos.frames)).astype(np.float32) @ LUMA
    features = jax.jit(patch_features)
    luma = luma.reshape(-1, batch, *luma.shape[2:])
    return np.concatenate([np.asarray(features(part)) for part in luma])


def _sharpness(luma: jax.Array) -> jax.Array:
    return to_patches(normalised_luma(luma)[1], PATCH).mean((1, 2))


def main(argv: Sequence[str]) -> None:
    """Writes the file that the flags name."""
    parser = Parser("vpo_jax.recipes.fit_niqe", (__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", required=True, help="a .json file")
    flags = parser.parse(argv)
    models = []
    for name, features in (("textures", texture_features()), ("shapes world", world_features())):
        mean, whiten = fit_pristine(features)
        numbers = {
            part: [float(f"{x:.6g}") for x in array.ravel()] for part, array in (("mean", mean), ("whiten", whiten))
        }
        models.append({"clean": name, "patches": len(features)} | numbers)
        print(f"{name}: {len(features)} patches", file=sys.stderr)
    command = "python -m vpo_jax.recipes.fit_niqe --output=vpo_jax/rewards/classical/assets/niqe.json"
    text = json.dumps({"command": command, "models": models}, separators=(",", ":"))
    write_text_atomically(flags.output, text + "\n")


if __name__ == "__main__":
    run(main)
