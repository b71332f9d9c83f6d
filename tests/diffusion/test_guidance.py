import jax
import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from vpo_jax.diffusion.guidance import classifier_free, guide, rescale

torch.set_num_threads(1)


def test_guidance_of_one_is_the_conditional_prediction():
    unconditional, conditional = jax.random.normal(jax.random.key(0), (2, 3, 4))
    np.testing.assert_allclose(classifier_free(unconditional, conditional, 1.0), conditional, atol=1e-6)
    np.testing.assert_array_equal(classifier_free(unconditional, conditional, 0.0), unconditional)


def test_rescale_equals_diffusers():
    guided, conditional = (np.array(x) for x in jax.random.normal(jax.random.key(1), (2, 3, 2, 4, 4, 2)))
    theirs = rescale_noise_cfg(torch.from_numpy(guided), torch.from_numpy(conditional), 0.7)
    np.testing.assert_allclose(rescale(guided, conditional, 0.7), theirs, rtol=1e-5, atol=1e-6)


def test_guidance_without_rescale_is_classifier_free_to_the_bit():
    away, towards = jax.random.normal(jax.random.key(2), (2, 3, 2, 4))
    guided = classifier_free(away, towards, 7.5)
    np.testing.assert_array_equal(guide(away, towards, 7.5, 0.0), guided)
    np.testing.assert_array_equal(guide(away, towards, 7.5, 0.4), rescale(guided, towards, 0.4))
