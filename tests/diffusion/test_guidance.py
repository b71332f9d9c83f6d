import jax
import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from vpo_jax.diffusion.guidance import Guidance, classifier_free, guide, guided, rescale

torch.set_num_threads(1)


def test_guidance_of_one_is_the_conditional_prediction():
    unconditional, conditional = jax.random.normal(jax.random.key(0), (2, 3, 4))
    np.testing.assert_allclose(classifier_free(unconditional, conditional, 1.0), conditional, atol=1e-6)
    np.testing.assert_array_equal(classifier_free(unconditional, conditional, 0.0), unconditional)


def test_rescale_equals_diffusers():
    led, conditional = (np.array(x) for x in jax.random.normal(jax.random.key(1), (2, 3, 2, 4, 4, 2)))
    theirs = rescale_noise_cfg(torch.from_numpy(led), torch.from_numpy(conditional), 0.7)
    np.testing.assert_allclose(rescale(led, conditional, 0.7), theirs, rtol=1e-5, atol=1e-6)


def test_guidance_without_rescale_is_classifier_free_to_the_bit():
    away, towards = jax.random.normal(jax.random.key(2), (2, 3, 2, 4))
    plain = classifier_free(away, towards, 7.5)
    np.testing.assert_array_equal(guide(away, towards, 7.5, 0.0), plain)
    np.testing.assert_array_equal(guide(away, towards, 7.5, 0.4), rescale(plain, towards, 0.4))


def test_a_guided_denoiser_meets_both_texts_of_a_video_side_by_side_in_one_batch():
    latents = np.asarray(jax.random.normal(jax.random.key(3), (3, 2, 4)))
    text = {"hidden": np.arange(3.0)[:, None] + 1.0, "mask": np.ones((3, 1), bool)}
    negative = {"hidden": np.zeros(1), "mask": np.zeros(1, bool)}
    seen = []

    def predict(x, timestep, text):
        seen.append((x.shape[0], np.asarray(text["mask"])[:, 0].tolist()))
        return x * timestep + text["hidden"][..., None]

    prediction = guided(predict, text, negative, Guidance(3.0))(latents, 2.0)
    assert seen == [(6, [False, True] * 3)]
    towards = latents * 2.0 + text["hidden"][..., None]
    np.testing.assert_allclose(prediction, guide(latents * 2.0, towards, 3.0), rtol=1e-6)
    np.testing.assert_array_equal(guided(predict, text, None, Guidance(1.0))(latents, 2.0), towards)
    assert seen[1][0] == 3, "no guidance costs half"


def test_a_second_scale_holds_below_the_boundary():
    latents = np.ones((2, 3), np.float32)

    def predict(x, timestep, text):
        return text[:, None] * jax.numpy.ones_like(x)

    guidance = Guidance(scale=4.0, boundary=875.0, low_scale=3.0)
    prediction = jax.jit(guided(predict, np.full(2, 2.0, np.float32), np.zeros((), np.float32), guidance))
    # 0 + scale * (2 - 0)
    np.testing.assert_array_equal(prediction(latents, 875.0), np.full((2, 3), 8.0))
    np.testing.assert_array_equal(prediction(latents, 874.0), np.full((2, 3), 6.0))


def test_one_scale_needs_no_boundary():
    assert Guidance(4.0).at(3.0) == 4.0
    assert Guidance(4.0, boundary=875.0, low_scale=4.0).at(3.0) == 4.0


def test_the_text_is_read_once_for_all_steps():
    latents, text, negative = np.ones((2, 3), np.float32), np.full(2, 2.0, np.float32), np.zeros((), np.float32)
    reads = []

    def read_text(text):
        reads.append(text.shape)
        return 3.0 * text

    def predict(x, timestep, text):
        return text[:, None] * jax.numpy.ones_like(x)

    for scale, size, value in ((4.0, (4,), 24.0), (1.0, (2,), 6.0)):
        reads.clear()
        denoise = guided(predict, text, negative, Guidance(scale), read_text)
        for timestep in (900.0, 500.0):
            np.testing.assert_array_equal(denoise(latents, timestep), np.full((2, 3), value))
        assert reads == [size]
