import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpo_jax.families.wan.family import Wan
from vpo_jax.pipeline import Pipeline
from vpo_jax.recipes import base_wan
from vpo_jax.recipes.tokenizer import make_umt5_tokenizer
from vpo_jax.runtime.trees import flatten


@pytest.fixture(scope="module")
def small_wan():
    """Untrained, so that its parameters are as random as those of any other."""
    configs = base_wan.configs_of(base_wan.VAE | {"base_dim": 8, "decoder_base_dim": 8})
    configs["transformer"] = {**configs["transformer"], "num_layers": 1, "ffn_dim": 32}
    family = Wan.from_configs(configs)
    video = jnp.zeros((1, 1, 8, 8, 3))
    vae = jax.jit(lambda: family.vae.init(jax.random.key(1), video)["params"])()
    params = jax.device_get({**base_wan.init(jax.random.key(0), family), "vae": vae})
    return Pipeline(family, params, configs, make_umt5_tokenizer(), base_wan.DEFAULTS)


@pytest.mark.slow
def test_in_half_precision_a_pipeline_has_what_a_run_has_on_its_devices(small_wan):
    half = small_wan.as_sampled(jnp.bfloat16)
    dtypes = {path: leaf.dtype for path, leaf in flatten(half.params).items()}
    kept = [path for path, dtype in dtypes.items() if dtype == jnp.float32]
    assert all(path.startswith("vae/") or "scale_shift_table" in path or "time_embedder" in path or "norm2" in path
               for path in kept), kept  # fmt: skip
    assert {path.split("/")[0] for path in set(dtypes) - set(kept)} == {"transformer", "text_encoder"}
    same = small_wan.as_sampled(jnp.float32)
    assert same.params is small_wan.params and same.family == small_wan.family
    assert small_wan.as_sampled(jnp.float32, "cudnn").family.transformer.attention_backend == "cudnn"
    settings = {"num_inference_steps": 2, "guidance_scale": 2.0}
    videos = [model("a small red circle", **settings).astype(int) for model in (small_wan, half)]
    assert 0 < np.abs(videos[0] - videos[1]).max() <= 16  # of 255 levels; bfloat16 has 8 bits
