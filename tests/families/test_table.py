"""Families: which one a folder is of, and what a pipeline hands out of its family."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpo_jax import load_pipeline
from vpo_jax.checkpoints.folders import shapes_of_configs
from vpo_jax.families.table import FAMILIES, family_of_folder, known_licence, published
from vpo_jax.pipeline import make_pipeline
from vpo_jax.planning.job import read_shapes
from vpo_jax.runtime.errors import UserError


@pytest.fixture(scope="module")
def pipeline(model_folder):
    return load_pipeline(model_folder)


def test_a_family_stands_under_the_class_of_its_folders():
    for name, family in FAMILIES.items():
        assert family.layout.class_name == name


def test_a_folder_of_a_class_that_no_family_has_is_refused(model_folder, tmp_path):
    assert family_of_folder(model_folder) is FAMILIES["TextToVideoSDPipeline"]
    folder = shutil.copytree(model_folder, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "WeatherPipeline"}))
    for read in (load_pipeline, lambda path: read_shapes(str(path))):
        with pytest.raises(
            UserError, match=r"_class_name is 'WeatherPipeline'; only TextToVideoSDPipeline, WanPipeline can be"
        ):
            read(folder)


def test_what_is_loaded_is_written_and_loaded_again_bitwise(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "again")
    again = load_pipeline(tmp_path / "again")
    assert again.defaults == pipeline.defaults and again.scheduler_config == pipeline.scheduler_config
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, pipeline.params))
    assert again.family == pipeline.family and hash(again.family) == hash(pipeline.family)


def test_with_trainable_is_the_inverse_of_trainable(pipeline):
    nudged = jax.tree.map(lambda x: x + 1.0, pipeline.trainable)
    tuned = pipeline.with_trainable(nudged)
    assert tuned.trainable is nudged
    assert jax.tree.all(jax.tree.map(np.array_equal, tuned.with_trainable(pipeline.trainable).params, pipeline.params))
    before, after = (jax.tree.leaves(p.params) for p in (pipeline, tuned))
    changed = sum(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert changed == len(jax.tree.leaves(pipeline.trainable)), "and nothing else changes"
    assert tuned.text_params is pipeline.text_params and tuned.decoder_params is pipeline.decoder_params


def test_options_reach_the_trainable_modules_and_nothing_else(pipeline):
    family = pipeline.family
    half = family.with_options(dtype=jnp.bfloat16, remat=True, lora_scale=0.5)
    assert half != family and family.with_options() == family
    assert (half.unet.dtype, half.unet.remat, half.unet.lora_scale) == (jnp.bfloat16, True, 0.5)
    assert half.vae == family.vae and half.text_encoder == family.text_encoder


def test_text_has_no_mask_where_the_denoiser_attends_to_padding(pipeline):
    text = pipeline.family.encode_text(pipeline.text_params, pipeline.tokenize(["a", "a red circle"]))
    assert text.mask is None and text.hidden.shape[:2] == (2, pipeline.family.text_length)


@pytest.mark.slow
def test_a_published_checkpoint_has_sizes_and_a_licence_without_weights():
    for name, (family, configs) in published().items():
        model = make_pipeline(shapes_of_configs(family.layout, configs))
        frames, height, width = model.video_size()
        assert 1 <= model.latent_shape()[0] <= frames and height % 8 == width % 8 == 0
        assert known_licence(f"someone/{name}") and not known_licence("someone/else")


def test_tokens_are_counted_before_any_are_cut_off():
    pipeline = load_pipeline("shapes")
    long = "a small red circle moving left on a gray background " * 30
    few, many = pipeline.count_tokens(["a red circle", long])
    ids = pipeline.tokenize(["a red circle"])[0]
    assert few == 5 and len(set(ids[:few].tolist())) == few, "words, and one token before and after them"
    assert many > pipeline.family.text_length == ids.size
