"""What a run in bfloat16 has on its devices: the backbone and umT5 rounded once, as they are on disk or in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from tests.families.wan import tiny
from vpo_jax.pipeline import load_pipeline
from vpo_jax.planning.job import make_job
from vpo_jax.rewards.loading import load_rewards
from vpo_jax.runtime import cli
from vpo_jax.runtime.mesh import make_meshes
from vpo_jax.runtime.trees import bytes_of, cast_floating, flatten
from vpo_jax.training.setup import make_setup

PROMPTS = ["a small red circle", "a large blurry square moving right"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("wan") / "model"
    tiny.pipeline("a14b").save_pretrained(path)
    return path


def configured(folder, dtype, text_cache=""):
    config = cli.load_config("configs/vpo.py:tiny")
    config.model.path, config.model.dtype, config.data.text_cache = str(folder), dtype, str(text_cache)
    config.rollout.num_frames, config.rollout.height, config.rollout.width = 5, 16, 32
    config.lora.rank = 2
    return config


def set_up(folder, dtype, text_cache="", place="disk"):
    config = configured(folder, dtype, text_cache)
    rewards = load_rewards(config.reward.scorers, training=True, settings=config.reward)
    meshes = make_meshes(config.mesh)
    with jax.set_mesh(meshes.update):
        setup = make_setup(config, load_pipeline(folder, place=place), rewards, meshes, PROMPTS)
        return setup, jax.device_get(setup.encode(PROMPTS).hidden)


def bits(tree):
    return {path: (str(leaf.dtype), np.asarray(leaf).tobytes()) for path, leaf in flatten(tree).items()}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_on_disk_is_placed_as_one_in_memory_to_the_bit(folder, dtype):
    (on_disk, text), (in_memory, same_text) = (set_up(folder, dtype, place=place) for place in ("disk", None))
    assert bits(on_disk.policy.frozen) == bits(in_memory.policy.frozen)
    assert bits(on_disk.policy.initial) == bits(in_memory.policy.initial)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(on_disk.policy.frozen)} == {dtype, "float32"}
    np.testing.assert_array_equal(text, same_text)


@pytest.mark.slow
def test_the_text_encoder_has_bfloat16_weights_and_computes_in_float32(folder, tmp_path):
    pipeline = load_pipeline(folder)
    ids = pipeline.tokenize(PROMPTS)
    encode = jax.jit(pipeline.family.encode_text)
    rounded = cast_floating(cast_floating(pipeline.text_params, jnp.bfloat16), jnp.float32)
    plain, expected = (np.asarray(encode(params, ids).hidden) for params in (pipeline.text_params, rounded))
    found = {dtype: set_up(folder, dtype, tmp_path)[1] for dtype in ("float32", "bfloat16")}
    assert {text.dtype for text in found.values()} == {np.dtype(np.float32)}
    # Sums of float32 in another order where a program has a mesh.
    np.testing.assert_allclose(found["float32"], plain, atol=1e-5)
    np.testing.assert_allclose(found["bfloat16"], expected, atol=1e-5)
    assert np.abs(plain - expected).max() > 1e-3, "else the test shows nothing"
    assert len(list(tmp_path.iterdir())) == 2, "encodings of either precision have a file of their own"


def test_a_plan_counts_the_text_encoder_in_its_precision(folder):
    sizes = {
        dtype: bytes_of(make_job(configured(folder, dtype)).resident["text encoder"][0])
        for dtype in ("float32", "bfloat16")
    }
    assert sizes["float32"] == 2 * sizes["bfloat16"]
