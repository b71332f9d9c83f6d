"""The small Wan that ships with the package: `configs/vpo.py:shapes_wan` tunes it."""

import json

import numpy as np
import pytest

import vpo_jax
from vpo_jax.pipeline import SHIPPED
from vpo_jax.shapes import judge, world

FOLDER = SHIPPED["shapes_wan"]
CAPTIONS = world.captions("held_out")[:8]


@pytest.fixture(scope="module")
def pipe():
    return vpo_jax.load_pipeline("shapes_wan")


def test_it_takes_at_most_8_mebibytes_and_says_how_it_was_made():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 8 * 2**20
    (command,) = json.loads((FOLDER / "recipe.json").read_text())["commands"]
    assert "train_base --family=wan" in command


@pytest.mark.slow
def test_it_follows_captions_that_it_was_not_trained_on(pipe):
    videos = pipe(CAPTIONS, num_inference_steps=8, guidance_scale=2.0)
    assert videos.shape == (8, 9, world.SIZE, world.SIZE, 3)
    right = judge.matches(videos, CAPTIONS)
    for attribute, least in (("background", 8), ("color", 7), ("direction", 7), ("size", 6)):
        assert right[attribute].sum() >= least, attribute


@pytest.mark.slow
def test_diffusers_makes_the_same_videos(pipe):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    latents = np.random.default_rng(5).normal(size=(2, *pipe.latent_shape())).astype(np.float32)
    ours = pipe(CAPTIONS[:2], num_inference_steps=3, latents=latents)
    theirs = diffusers.WanPipeline.from_pretrained(FOLDER)
    theirs.set_progress_bar_config(disable=True)
    sizes = {name: pipe.defaults[name] for name in ("num_frames", "height", "width", "guidance_scale")}
    with torch.no_grad():
        frames = theirs(
            CAPTIONS[:2], num_inference_steps=3, negative_prompt="", output_type="np", **sizes,
            latents=torch.from_numpy(np.ascontiguousarray(latents.transpose(0, 4, 1, 2, 3))),
        ).frames  # fmt: skip
    difference = np.abs(ours.astype(int) - np.round(np.asarray(frames) * 255).astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.005
