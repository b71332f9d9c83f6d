import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpo_jax.data.text_cache import open_text_cache
from vpo_jax.families.protocol import Text
from vpo_jax.runtime.errors import UserError

PARAMS = {"embedding": np.random.default_rng(0).normal(size=(128, 4)).astype(np.float32)}
PROMPTS = ["a red circle", "a blue square", "a red circle", "", "moving left"]


def tokenize(prompts):
    return np.array([[ord(c) for c in prompt[:5].ljust(5)] for prompt in prompts], np.int32)


class Encoder:
    def __init__(self, params=PARAMS, dtype=jnp.float32):
        self.params, self.calls = params, []
        self._run = jax.jit(lambda params, ids: params["embedding"][ids].astype(dtype))

    def __call__(self, prompts):
        self.calls.append(len(prompts))
        return self._run(self.params, tokenize(prompts))


def opened(folder, prompts=PROMPTS, encoder=None):
    encoder = encoder or Encoder()
    return open_text_cache(folder, prompts, encoder, encoder.params, tokenize, 3), encoder


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_cache_holds_what_the_encoder_says_to_the_bit(tmp_path, dtype):
    encoder = Encoder(dtype=dtype)
    cache, _ = opened(tmp_path / "text", encoder=encoder)
    found = cache(["", "a red circle", ""])
    assert found.dtype == dtype and "a blue square" in cache and "a green square" not in cache
    np.testing.assert_array_equal(found, encoder(["", "a red circle", ""]))
    assert set(encoder.calls) == {3}, "one program serves all"


def test_a_second_run_encodes_nothing_and_another_model_or_list_has_a_file_of_its_own(tmp_path):
    opened(tmp_path)
    _, encoder = opened(tmp_path)
    assert len(encoder.calls) == 1, "only its shape was asked for"
    assert len(list(tmp_path.iterdir())) == 1
    opened(tmp_path, PROMPTS[:2])
    changed = Encoder({"embedding": PARAMS["embedding"] + 1})
    cache, _ = opened(tmp_path, encoder=changed)
    np.testing.assert_array_equal(cache([""]), changed([""]))
    assert len(list(tmp_path.iterdir())) == 3


def test_a_file_that_was_cut_short_is_made_again(tmp_path):
    opened(tmp_path)
    file = next(tmp_path.iterdir())
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    opened(tmp_path)
    assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "text").write_text("a file")
    with pytest.raises(UserError, match=r"data\.text_cache"):
        opened(tmp_path / "text")


def test_an_encoding_may_be_a_tree_with_a_mask(tmp_path):
    def encode(prompts):
        ids = tokenize(prompts)
        return Text(jnp.asarray(PARAMS["embedding"][ids], jnp.bfloat16), jnp.asarray(ids != ord(" ")))

    cache = open_text_cache(tmp_path, PROMPTS, encode, PARAMS, tokenize, 3)
    found, expected = cache(["moving left", ""]), encode(["moving left", ""])
    assert isinstance(found, Text) and found.mask.dtype == bool and not found.mask[1].any()
    jax.tree.map(np.testing.assert_array_equal, found, expected)
