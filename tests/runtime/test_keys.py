import jax
import numpy as np
import pytest

from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.keys import seed_key, stream_key


def words(key):
    return jax.random.key_data(key).tolist()


@pytest.mark.parametrize("seed", [0, 5, 2**31, 2**32 - 1])
def test_a_seed_of_32_bits_gives_the_key_of_jax(seed):
    assert words(seed_key(seed)) == words(jax.random.key(seed))
    assert words(stream_key(seed, "eval")) == words(stream_key(jax.numpy.uint32(seed), "eval"))


@pytest.mark.parametrize("seed", [2**32 + 5, 2**63 - 1, 2**64 - 1, np.int64(2**40)])
def test_every_bit_of_a_longer_seed_counts(seed):
    assert words(seed_key(seed)) == [int(seed) >> 32, int(seed) & 0xFFFFFFFF]
    with jax.enable_x64(True):
        if seed < 2**63:
            assert words(jax.random.key(int(seed))) == words(seed_key(seed))
    assert words(stream_key(seed, "rollout")) != words(stream_key(int(seed) & 0xFFFFFFFF, "rollout"))


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "7", True, None])
def test_what_is_no_seed_is_refused_with_the_range(seed):
    with pytest.raises(UserError, match=r"seed: .* is not a whole number from 0 to 2\*\*64 - 1"):
        seed_key(seed)
