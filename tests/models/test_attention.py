"""The bias of attention, and what cuDNN's kernel asks of it; cuDNN itself runs on NVIDIA GPUs only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpo_jax.models.attention import BACKENDS, attention

# (B, Q, K, H, G, shape of the bias)
CASES = {
    "one for all queries": (2, 5, 7, 3, 3, (1, 1, 1, 7)),
    "one a video and head": (2, 4, 6, 3, 3, (2, 3, 1, 6)),
    "whole": (3, 6, 3, 2, 2, (3, 2, 6, 3)),
    "shared keys": (2, 4, 5, 6, 2, (1, 1, 1, 5)),
    "shared keys, one a head": (2, 3, 5, 6, 2, (2, 6, 1, 5)),
}


def inputs(name, dtype=jnp.float32):
    batch, queries, keys, heads, groups, shape = CASES[name]
    draws = [jax.random.key(i) for i in range(4)]
    query = jax.random.normal(draws[0], (batch, queries, heads, 8))
    key, value = (jax.random.normal(k, (batch, keys, groups, 8)) for k in draws[1:3])
    return *(x.astype(dtype) for x in (query, key, value)), 2 * jax.random.normal(draws[3], shape)


@pytest.fixture
def cudnn_rules(monkeypatch):
    """jax's function in cuDNN's place, refusing what cuDNN's kernel refuses when a gradient is taken."""
    plain = jax.nn.dot_product_attention

    def checked(query, key, value, bias=None, mask=None, *, implementation, **lengths):
        assert implementation == "cudnn"
        assert query.shape[1] % 2 == 0 and key.shape[1] % 2 == 0
        assert bias is None or bias.dtype == query.dtype
        assert all(x is None or x.shape[2:] == (query.shape[1], key.shape[1]) for x in (bias, mask))
        return plain(query, key, value, bias, mask, implementation="xla", **lengths)

    monkeypatch.setattr(jax.nn, "dot_product_attention", checked)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_is_added_to_the_scores(name, backend, cudnn_rules):
    query, key, value, bias = inputs(name)
    every = lambda x: jnp.repeat(x, query.shape[2] // x.shape[2], 2)  # noqa: E731
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, every(key)) / np.sqrt(8) + bias
    expected = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), every(value))
    result = attention(query, key, value, backend=backend, bias=bias)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5)  # float32 sums in another order
    assert np.abs(result - attention(query, key, value)).max() > 0.1


@pytest.mark.parametrize("name", CASES)
def test_a_mask_hides_keys_from_cudnn_too(name, cudnn_rules):
    query, key, value, bias = inputs(name)
    mask = jnp.arange(key.shape[1])[None, None, None] != 1
    for added in (None, bias):
        expected = attention(query, key, value, mask, bias=added)
        np.testing.assert_allclose(attention(query, key, value, mask, "cudnn", added), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_padding_for_cudnn_leaves_the_gradients_as_they_are(with_bias, cudnn_rules):
    arguments = inputs("one for all queries")[: 4 if with_bias else 3]

    def gradients(backend):
        loss = lambda q, k, v, bias=None: jnp.square(attention(q, k, v, None, backend, bias)).sum()  # noqa: E731
        return jax.grad(loss, range(len(arguments)))(*arguments)

    for ours, expected in zip(gradients("cudnn"), gradients("xla"), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_cudnn_takes_a_bias_in_half_precision(cudnn_rules):
    query, key, value, bias = inputs("one for all queries", jnp.bfloat16)
    result = attention(query, key, value, backend="cudnn", bias=bias)
    assert result.dtype == jnp.bfloat16
    exact = attention(*inputs("one for all queries")[:3], bias=bias)
    # bfloat16 keeps 8 bits: 0.4 % an operation, a few of which add up
    assert np.abs(result.astype(jnp.float32) - exact).max() <= 0.03 * np.abs(exact).max()
