import jax.numpy as jnp
import numpy as np
import pytest

from vpo_jax.runtime.batches import in_microbatches, join_batch, split_batch


def test_microbatches_hold_every_mth_row_and_join_again():
    x = jnp.arange(12)
    chunks = split_batch(x, 4)
    np.testing.assert_array_equal(chunks[0], [0, 3, 6, 9])
    np.testing.assert_array_equal(join_batch(chunks), x)


@pytest.mark.parametrize("microbatch", [0, 12, 100])
def test_no_microbatch_and_one_beyond_the_batch_are_the_whole_batch(microbatch):
    x = jnp.arange(12)
    chunks = split_batch(x, microbatch)
    assert chunks.shape == (1, 12)
    np.testing.assert_array_equal(join_batch(chunks), x)


@pytest.mark.parametrize("microbatch", [0, 1, 3, 12])
def test_a_function_of_rows_does_not_depend_on_the_microbatch(microbatch):
    batch = {"a": jnp.arange(12.0), "b": jnp.arange(24.0).reshape(12, 2)}
    result = in_microbatches(lambda part: part["a"][:, None] * part["b"], batch, microbatch)
    np.testing.assert_array_equal(result, batch["a"][:, None] * batch["b"])
