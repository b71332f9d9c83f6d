"""The recipes' optimizer on trees whose layers lie in one leaf."""

import jax.numpy as jnp
import numpy as np
import optax

from vpo_jax.recipes.fit import make_muon


def first_updates(gradients):
    optimizer = make_muon(optax.constant_schedule(0.1))
    updates, _ = optimizer.update(gradients, optimizer.init(gradients), gradients)
    return updates


def test_a_stack_of_kernels_moves_as_its_layers_do_by_themselves():
    gradients = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5)) / 100, jnp.float32)  # below the clipping
    stacked = first_updates({"blocks.*": {"to_q": {"kernel": gradients}}})["blocks.*"]["to_q"]["kernel"]
    for layer, found in zip(gradients, stacked, strict=True):
        alone = first_updates({"to_q": {"kernel": layer}})["to_q"]["kernel"]
        np.testing.assert_allclose(found, alone, rtol=1e-5, atol=1e-7)
        # The five Newton-Schulz steps bring singular values to 0.7 to 1.2, whatever they were.
        values = np.linalg.svd(np.asarray(found), compute_uv=False)
        assert values.max() / values.min() < 1.2 / 0.7
    given = np.linalg.svd(np.asarray(gradients[0]), compute_uv=False)
    assert given.max() / given.min() > 4


def test_what_is_no_kernel_moves_by_adam_at_a_tenth_of_the_rate():
    gradients = {"norm": {"scale": jnp.full((2, 3), 0.01)}, "embedding": jnp.full((4, 3), -0.02)}
    adam = optax.nadam(0.01, b2=0.99)
    expected, _ = adam.update(gradients, adam.init(gradients))
    found = first_updates(gradients)
    np.testing.assert_allclose(found["norm"]["scale"], expected["norm"]["scale"], rtol=1e-5)
    np.testing.assert_allclose(found["embedding"], expected["embedding"], rtol=1e-5)
