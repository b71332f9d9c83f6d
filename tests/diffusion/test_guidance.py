import jax
import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from vpo_jax.diffusion.guidance import classifier_free, guide, guided, rescale

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

    prediction = guided(predict, text, negative, 3.0)(latents, 2.0)
    assert seen == [(6, [False, True] * 3)]
    towards = latents * 2.0 + text["hidden"][..., None]
    np.testing.assert_allclose(prediction, guide(latents * 2.0, towards, 3.0), rtol=1e-6)
    np.testing.assert_array_equal(guided(predict, text, None, 1.0)(latents, 2.0), towards)
    assert seen[1][0] == 3, "no guidance costs half"
