"""The recipe of the small Wan base, from its command to a folder that loads; a few steps, which learn nothing."""

import json

import numpy as np
import pytest

import vpo_jax
from vpo_jax.recipes import base_wan, train_base
from vpo_jax.runtime.errors import UserError


@pytest.mark.slow
def test_the_wan_recipe_writes_a_folder_that_loads_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(base_wan, "_POOL", 256)
    monkeypatch.setattr(base_wan, "_MEASURED", 8)
    monkeypatch.setattr(base_wan, "VAE", base_wan.VAE | {"base_dim": 8, "decoder_base_dim": 8})
    monkeypatch.setattr(base_wan, "TRANSFORMER", base_wan.TRANSFORMER | {"num_layers": 2, "ffn_dim": 32})
    words = ["--family=wan", f"--workdir={tmp_path / 'work'}", "--vae_steps=2", "--decoder_steps=1", "--steps=2",
             "--batch=4"]  # fmt: skip
    with pytest.raises(TimeoutError, match="the same command goes on"):
        train_base.main([*words, f"--output={tmp_path / 'base'}", "--seconds=0"])
    while not (tmp_path / "base").exists():
        try:
            train_base.main([*words, f"--output={tmp_path / 'base'}", "--seconds=0"])
        except TimeoutError:
            continue
    train_base.main([*words[:1], f"--workdir={tmp_path / 'again'}", *words[2:], f"--output={tmp_path / 'whole'}"])
    interrupted, whole = (vpo_jax.load_pipeline(tmp_path / name) for name in ("base", "whole"))
    videos = [pipe(["a small red circle moving left on a gray background"], None, None, None, 2) for pipe in
              (interrupted, whole)]  # fmt: skip
    assert videos[0].shape == (1, 9, 32, 32, 3)
    np.testing.assert_array_equal(*videos)
    assert interrupted.configs["vae"]["latents_std"] != base_wan.VAE["latents_std"]
    recipe = json.loads((tmp_path / "base" / "recipe.json").read_text())
    assert "--family=wan" in recipe["commands"][0]


def test_what_another_family_is_trained_with_is_refused_before_anything_is_trained(tmp_path):
    words = ["--family=wan", "--lessons=3", f"--workdir={tmp_path / 'work'}", f"--output={tmp_path / 'base'}"]
    with pytest.raises(UserError, match="--lessons: a base of the family wan"):
        train_base.main(words)
    words = ["--family=text_to_video_sd", "--decoder_steps=3", *words[2:]]
    with pytest.raises(UserError, match="--decoder_steps: a base of the family text_to_video_sd"):
        train_base.main(words)
    assert not list(tmp_path.iterdir())
