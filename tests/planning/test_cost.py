import jax
import jax.numpy as jnp
import pytest

from vpo_jax.families.protocol import Text
from vpo_jax.planning.cost import measure
from vpo_jax.planning.job import read_shapes
from vpo_jax.rewards.loading import abstract_rewards
from vpo_jax.rewards.scoring import score_function
from vpo_jax.runtime import cli


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_a_product_costs_two_flops_a_multiply_add_and_moves_its_operands_and_result():
    cost = measure(lambda a, b: a @ b, array(8, 16), array(16, 4))
    assert cost.flops == 2 * 8 * 16 * 4
    assert cost.traffic == 4 * (8 * 16 + 16 * 4 + 8 * 4)
    assert cost.temporaries == 4 * 8 * 4


def test_a_convolution_costs_its_window():
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert measure(convolve, array(2, 8, 8, 3), array(3, 3, 3, 5)).flops == 2 * 2 * 4 * 4 * 5 * 9 * 3


def test_a_loop_costs_its_body_times_its_length():
    def loop(x, w):
        return jax.lax.scan(lambda carry, _: (jnp.tanh(carry @ w), None), x, None, length=7)[0]

    assert measure(loop, array(8, 8), array(8, 8)).flops == 7 * 2 * 8**3


def test_a_function_that_is_called_twice_costs_twice():
    inner = jax.jit(lambda x, w: jax.nn.silu(x @ w))
    assert measure(lambda x, w: inner(inner(x, w), w), array(8, 8), array(8, 8)).flops == 2 * 2 * 8**3


def test_a_gradient_costs_three_times_its_function_and_a_checkpoint_four():
    def loss(w, x):
        return jnp.sum(jnp.tanh(jnp.tanh(x @ w[0]) @ w[1]))

    shapes = array(2, 8, 8), array(8, 8)
    once = measure(loss, *shapes).flops
    # The first layer's input needs no gradient.
    assert measure(jax.grad(loss), *shapes).flops == pytest.approx(3 * once - once / 2)
    again = measure(jax.grad(jax.checkpoint(loss)), *shapes).flops
    assert 3 * once - once / 2 < again <= 4 * once - once / 2


def test_what_is_computed_element_by_element_takes_no_memory_of_its_own():
    def chain(a, b):
        x = a @ b
        return jnp.sum(jnp.exp(x) * 2 + x)

    assert measure(chain, array(64, 64), array(64, 64)).temporaries == 4 * 64 * 64 + 4


def test_values_that_are_no_longer_needed_leave_memory():
    def chain(x, w):
        for _ in range(10):
            x = x @ w
        return x

    assert measure(chain, array(32, 32), array(32, 32)).temporaries == 2 * 4 * 32 * 32


@pytest.fixture(scope="module")
def modelscope():
    return read_shapes("modelscope")


@pytest.mark.slow
def test_modelscopes_denoiser_costs_what_pytorchs_counter_says(modelscope):
    def denoise(params, latents, timesteps, text):
        return modelscope.family.denoise({"params": params}, latents, timesteps, Text(text))

    inputs = array(1, 16, 32, 32, 4), array(1, dtype=jnp.int32), array(1, 77, 1024)
    cost = measure(denoise, modelscope.trainable, *inputs)
    # PyTorch's FlopCounterMode counts 4.887 for diffusers' class. That repeats text and timestep for every frame and
    # projects them 16 times; here once a video: keys and values of 16 transformers, 12480 channels together, and the
    # embedding for 22 residual blocks, 20160 channels.
    saved = 15 * (2 * 2 * 77 * 1024 * 12480 + 2 * 1280 * 20160) / 1e12
    assert cost.flops / 1e12 == pytest.approx(4.887 - saved, abs=5e-4)


def test_modelscopes_autoencoder_costs_what_pytorchs_counter_says(modelscope):
    cost = measure(modelscope.family.decode, modelscope.decoder_params, array(1, 16, 32, 32, 4))
    assert cost.flops / 1e12 == pytest.approx(9.955, abs=5e-4)


@pytest.mark.slow
def test_videoscore_costs_what_pytorchs_counter_says():
    pytest.importorskip("vpo_jax.rewards.videoscore")
    (reward,) = abstract_rewards("videoscore", cli.load_config("configs/vpo.py").reward)
    tokens = {"input_ids": array(1, 376, dtype=jnp.int32), "mask": array(1, 376, dtype=jnp.bool_)}
    cost = measure(reward.score, reward.params, array(1, 16, 256, 256, 3, dtype=jnp.uint8), tokens)
    assert cost.flops / 1e12 == pytest.approx(35.4, abs=0.05)
    # Where no token stands for an image, a compiler leaves out all that sees.
    images = reward.queries.frame_ids == reward.model.config.image_token_id
    assert images.sum() == reward.model.config.perceiver.resampler_n_latents == 64


@pytest.mark.slow
def test_videoscore_reads_a_prompt_once_for_its_candidates():
    (reward,) = abstract_rewards("videoscore", cli.load_config("configs/vpo.py").reward)
    tokens = {"input_ids": array(2, 376, dtype=jnp.int32), "mask": array(2, 376, dtype=jnp.bool_)}
    videos = array(8, 16, 256, 256, 3, dtype=jnp.uint8)
    for microbatch, expected in ((0, 31.2), (4, 31.2), (1, 35.4)):
        cost = measure(score_function(reward, None, microbatch), reward.params, videos, tokens)
        assert cost.flops / 8e12 == pytest.approx(expected, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("frames", "side", "expected"), [(4, 336, 4.889), (8, 448, 11.549)])
def test_videoreward_costs_what_pytorchs_counter_and_arithmetic_say(frames, side, expected):
    # The language model by the counter; the vision blocks by 2 x weights x tokens and attention within two frames.
    (reward,) = abstract_rewards("videoreward", cli.load_config("configs/vpo.py").reward)
    tokens = {"input_ids": array(1, 868, dtype=jnp.int32), "mask": array(1, 868, dtype=jnp.bool_)}
    cost = measure(reward.score, reward.params, array(1, frames, side, side, 3, dtype=jnp.uint8), tokens)
    assert cost.flops / 1e12 == pytest.approx(expected, rel=2e-3)
