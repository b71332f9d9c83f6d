import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.running import ends, free_port, joining, start_program
from vpo_jax.data.text_cache import _checksums, open_text_cache
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


def test_a_disk_that_refuses_in_the_middle_leaves_nothing_behind(tmp_path, monkeypatch):
    appended = []

    def append(file, rows):
        appended.append(len(rows))
        if len(appended) == 2:
            raise UserError("data.text_cache: the disk is full")

    monkeypatch.setattr("vpo_jax.data.text_cache._append", append)
    with pytest.raises(UserError, match="the disk is full"):
        opened(tmp_path / "text")
    assert appended == [3, 1] and not list((tmp_path / "text").iterdir())


def test_checksums_see_every_bit_and_its_place():
    rng = np.random.default_rng(0)
    leaf = rng.normal(size=(3, 5, 4)).astype(np.float32)
    swapped, flipped = leaf.copy(), leaf.copy()
    swapped[0, 0, 0], swapped[2, 4, 3] = leaf[2, 4, 3], leaf[0, 0, 0]
    flipped.view(np.uint32)[1, 2, 3] ^= 1
    others = [
        leaf, swapped, flipped, -leaf, leaf[::-1], leaf.transpose(1, 0, 2), np.float32(0.0), np.float32(-0.0),
        leaf.astype(jnp.bfloat16), leaf > 0, (leaf > 0).astype(np.int8), np.zeros(0, np.float32), np.zeros(1, np.int32),
    ]  # fmt: skip
    sums = np.asarray(_checksums(tuple(jnp.asarray(x) for x in others)))
    assert sums.shape == (13, 2) and sums.dtype == np.uint32
    # Booleans and their numbers have the same bits, and zeros none; the digest has shapes and dtypes beside the sums.
    assert [i for i in range(13) if (sums[:i] == sums[i]).all(axis=1).any()] == [10, 11, 12]
    assert _checksums(()).shape == (0, 2)


def run_together(processes, devices, folder, *more):
    port = free_port()
    started = [
        start_program("text_cache_of_processes.py", folder, *more, devices=devices, **joining(port, number, processes))
        for number in range(processes)
    ]
    return ends(started)


def said_by(ended):
    assert [code for code, _, _ in ended] == [0] * len(ended), ended
    return [json.loads(stdout.splitlines()[-1]) for _, stdout, _ in ended]


@pytest.mark.slow
def test_several_processes_fill_one_file_that_does_not_depend_on_their_number(tmp_path):
    (alone,) = said_by(run_together(1, 4, tmp_path / "one"))
    assert alone["freed"] and len(alone["files"]) == 1
    for processes, devices in ((2, 2), (4, 1)):
        for said in said_by(run_together(processes, devices, tmp_path / str(processes))):
            assert said == alone
    # It is there: only the shape of an encoding is asked for, and one call is the program's own.
    for said in said_by(run_together(2, 2, tmp_path / "one")):
        assert said == alone | {"calls": 2}


@pytest.mark.slow
def test_folders_that_the_processes_do_not_share_are_refused_before_the_work(tmp_path):
    for code, _, stderr in run_together(2, 1, tmp_path / "of {}", 0.5):
        assert code == 2 and "data.text_cache" in stderr and "not the same folder in all processes" in stderr
    assert not list((tmp_path / "of 0").iterdir())


@pytest.mark.slow
def test_all_processes_stop_where_the_main_one_cannot_write(tmp_path):
    (tmp_path / "text").write_text("a file")
    first, second = run_together(2, 1, tmp_path / "text")
    assert first[0] == second[0] == 2
    assert "cannot be written" in first[2] and "the main process stopped" in second[2]
