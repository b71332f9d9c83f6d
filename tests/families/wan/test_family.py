"""What Wan's family refuses, its sizes, and its text."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vpo_jax
from vpo_jax.checkpoints.folders import shapes_of_configs
from vpo_jax.families.wan.family import Wan
from vpo_jax.families.wan.published import PUBLISHED
from vpo_jax.pipeline import make_pipeline
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.trees import count


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("torch")
    from tests.families.wan import tiny

    path = tmp_path_factory.mktemp("wan") / "a14b"
    tiny.pipeline("a14b").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pipe(folder):
    return vpo_jax.load_pipeline(folder)


def changed(name, part, **fields):
    configs = copy.deepcopy(PUBLISHED[name])
    configs[part] |= fields
    return configs


@pytest.mark.parametrize(
    ("name", "millions"),
    [("wan2.1-1.3b", 1419.0), ("wan2.1-14b", 14288.5), ("wan2.2-a14b", 2 * 14288.5), ("wan2.2-5b", 4999.8)],
)
def test_published_configs_have_the_published_parameters(name, millions):
    pipeline = make_pipeline(shapes_of_configs(Wan.layout, PUBLISHED[name]))
    assert round(count(pipeline.trainable) / 1e6, 1) == millions
    assert round(count(pipeline.text_params) / 1e6) == 5681
    assert pipeline.family.text_length == 512
    assert (pipeline.family.boundary == 875.0) == (name == "wan2.2-a14b")


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((82, 480, 832), r"num_frames: 82 is not 4 k \+ 1; the nearest are 81 and 85"),
        ((81, 720, 1281), r"width: 1281 .* 16, .* the nearest: 1280 and 1296"),
        ((81, 7, 832), r"height: 7 .* the nearest: 16"),
        ((-3, 480, 832), r"num_frames: -3"),
    ],
)
def test_sizes_that_diffusers_would_lower_are_refused_with_the_nearest(size, message):
    family = Wan.from_configs(PUBLISHED["wan2.1-1.3b"])
    with pytest.raises(UserError, match=message):
        family.video_size(*size)


def test_sizes_of_the_published_models():
    small, five = (Wan.from_configs(PUBLISHED[name]) for name in ("wan2.1-1.3b", "wan2.2-5b"))
    assert small.video_size() == (81, 480, 832)
    assert small.latent_shape(*small.video_size()) == (21, 60, 104, 16)
    assert five.latent_shape(*five.video_size(121, 704, 1280)) == (31, 44, 80, 48)
    with pytest.raises(UserError, match=r"height: 720 .* 32, .* 704 and 736"):
        five.video_size(121, 720, 1280)


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        ("scheduler", {"use_flow_sigmas": False}, r"flow"),
        ("scheduler", {"_class_name": "DDIMScheduler", "prediction_type": "epsilon"}, r"rectified flow"),
        ("model_index", {"boundary_ratio": None}, r"boundary_ratio is None.*0\.875"),
        ("vae", {"latents_mean": [0.0] * 4}, r"vae\.latents_mean"),
        ("transformer", {"in_channels": 36}, r"transformer\.in_channels: 36, but vae\.z_dim is 16"),
        ("text_encoder", {"d_model": 2048}, r"text_dim"),
        ("text_encoder", {"n_positions": 1}, r"n_positions"),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(part, fields, message):
    with pytest.raises(UserError, match=message):
        _ = Wan.from_configs(changed("wan2.2-a14b", part, **fields)).process


def test_float16_is_refused_since_umt5_overflows(folder):
    with pytest.raises(UserError, match=r"float16.*bfloat16"):
        vpo_jax.load_pipeline(folder, dtype="float16")


@pytest.mark.parametrize("loaded", [True, False], ids=["loaded in bfloat16", "cast by a run"])
def test_half_precision_leaves_in_float32_what_diffusers_does(folder, pipe, loaded):
    """`from_pretrained(torch_dtype=torch.bfloat16)` is the reference; `.to(torch.bfloat16)` would round all."""
    import torch
    from diffusers import WanTransformer3DModel

    from vpo_jax.checkpoints.keys import torch_tensors
    from vpo_jax.runtime.cli import load_config
    from vpo_jax.runtime.trees import flatten
    from vpo_jax.training.policy import make_policy

    theirs = WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=torch.bfloat16).state_dict()
    if loaded:
        ours = vpo_jax.load_pipeline(folder, dtype="bfloat16").params["transformer"]
    else:
        config = load_config("configs/vpo.py:wan")
        ours = make_policy(config, pipe.family, pipe.trainable).frozen["transformer"]
    kinds = {key: leaf.dtype for path, leaf in flatten(ours).items() for key in torch_tensors(path, leaf.shape)}
    assert kinds.keys() == theirs.keys() and {str(kind) for kind in kinds.values()} == {"float32", "bfloat16"}
    assert {key: f"torch.{kind}" for key, kind in kinds.items()} == {key: str(x.dtype) for key, x in theirs.items()}


def test_an_expert_that_is_gone_is_named(folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "transformer_2")
    with pytest.raises(UserError, match="transformer_2"):
        vpo_jax.load_pipeline(tmp_path / "model")


def test_a_second_expert_that_is_null_is_one_expert(folder, tmp_path):
    """diffusers' conversion script writes boundary_ratio for models of one expert too."""
    import shutil

    shutil.copytree(folder, tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    index["transformer_2"] = [None, None]
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
    one = vpo_jax.load_pipeline(tmp_path / "model")
    assert one.family.transformer_2 is None and one.family.boundary is None
    assert "patch_embedding" in one.trainable


def test_a_prompts_rows_after_its_end_are_zeros_and_change_nothing(pipe):
    ids = pipe.tokenize(["a small red circle", ""])
    assert ids.shape == (2, 512) and ids.dtype == np.int32
    text = jax.jit(pipe.family.encode_text)(pipe.text_params, ids)
    counts = pipe.count_tokens(["a small red circle", ""])
    assert counts[1] == 1  # </s> alone
    for row, live in zip(np.asarray(text.hidden), counts, strict=True):
        assert np.abs(row[:live]).min(-1).max() > 0.0 and not row[live:].any()


@pytest.mark.slow
def test_fewer_rows_of_text_make_the_same_video(pipe):
    import dataclasses

    short = dataclasses.replace(pipe, family=dataclasses.replace(pipe.family, text_length=16))
    prompts = ["a small red circle", "a large green square moving left on gray"]
    few, many = (p(prompts, 5, 16, 32, 2, 4.0, negative_prompt="blurry", batch_size=2) for p in (short, pipe))
    assert short.tokenize(prompts).shape == (2, 16) and not short.tokenize(["a " * 40])[:, -1].any()
    difference = np.abs(few.astype(int) - many.astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.005


@pytest.mark.slow
def test_each_expert_denoises_its_own_timesteps(pipe):
    family, variables = pipe.family, {"params": pipe.trainable}
    latents = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 4, 4, 4)), jnp.float32)
    text = family.encode_text(pipe.text_params, pipe.tokenize(["a"] * 3))
    denoise = jax.jit(family.denoise)
    mixed = denoise(variables, latents, jnp.array([900.0, 874.0, 875.0]), text)
    high = denoise(variables, latents, jnp.array([900.0, 900.0, 875.0]), text)
    low = denoise(variables, latents, jnp.full(3, 874.0), text)
    np.testing.assert_allclose(mixed[0], high[0], atol=1e-5)
    np.testing.assert_allclose(mixed[1], low[1], atol=1e-5)
    np.testing.assert_allclose(mixed[2], high[2], atol=1e-5)
    assert np.abs(np.asarray(mixed[2] - low[2])).max() > 0.1
    # The gradient of an expert comes from its own rows alone.
    of = jax.jit(jax.grad(lambda p, t: family.denoise({"params": p}, latents, t, text).sum()))
    gradient = of(pipe.trainable, jnp.array([900.0, 880.0, 875.0]))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient["transformer_2"]))
    assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient["transformer"]))


@pytest.mark.slow
def test_only_what_is_asked_for_is_decoded(pipe):
    latents = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 2, 4, 4)), jnp.float32)
    decode = pipe.family.decode
    whole = decode(pipe.decoder_params, latents)
    assert whole.shape == (1, 9, 16, 32, 3)
    spoilt = latents.at[:, 2].set(jnp.nan)
    some = decode(pipe.decoder_params, spoilt, (0, 3, 4))
    np.testing.assert_allclose(some, whole[:, jnp.array([0, 3, 4])], atol=1e-5)
