"""What a plan says of Wan against its published sizes."""

import jax
import jax.numpy as jnp
import pytest

from vpo_jax.planning.cost import measure
from vpo_jax.planning.job import make_job, read_shapes
from vpo_jax.runtime.cli import load_config

# TFLOP of a forward pass of the transformer and of decoding, 2 for a multiplication and addition: counted in torch.
COUNTED = [
    ("wan2.1-1.3b", (81, 480, 832), 283.0, 275.4),
    ("wan2.1-1.3b", (33, 480, 832), 72.9, 112.8),
    ("wan2.1-1.3b", (33, 240, 416), 11.5, 28.1),
    ("wan2.1-14b", (33, 480, 832), 505.0, 112.8),
    ("wan2.2-5b", (33, 480, 832), 36.3, 244.0),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size", "forward", "decode"), COUNTED)
def test_flops_are_those_counted_in_torch(name, size, forward, decode):
    pipeline = read_shapes(name)
    family = pipeline.family
    latents = jax.ShapeDtypeStruct((1, *pipeline.latent_shape(*size)), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, family.text_length), jnp.int32)
    text = jax.eval_shape(family.encode_text, pipeline.text_params, ids)
    times = jax.ShapeDtypeStruct((1,), jnp.float32)
    found = measure(family.denoise, {"params": pipeline.trainable}, latents, times, text)
    assert found.flops / 1e12 == pytest.approx(forward, rel=0.01)
    assert measure(family.decode, pipeline.decoder_params, latents).flops / 1e12 == pytest.approx(decode, rel=0.01)


def test_the_text_encoder_is_not_in_memory_where_a_cache_frees_it():
    config = load_config("configs/vpo.py:wan")
    config.model.path, config.data.prompts, config.reward.scorers = "wan2.1-1.3b", "shapes:train", "shapes"
    cached = make_job(config)
    assert "text encoder" not in cached.resident
    config.data.text_cache = ""
    kept = make_job(config)
    assert "text encoder" in kept.resident
    assert {p.name for p in kept.programs} - {p.name for p in cached.programs} == {"encode"}
