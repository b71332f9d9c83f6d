"""Safetensors files, shards and indices; damaged ones; pickles."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from vpo_jax.checkpoints.safetensors_io import read_file, read_metadata, read_weights, write_file, write_weights
from vpo_jax.runtime.errors import UserError

STATE = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4, dtype=np.float32).astype(jnp.bfloat16),
    "c": np.float16([[1.5]]),
    "empty": np.zeros((0, 2), np.float32),
    "scalar": np.array(7, np.int64),
}


def same(a, b):
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and a[k].tobytes() == b[k].tobytes() for k in a
    )


def test_every_dtype_comes_back_bitwise(tmp_path):
    write_weights(tmp_path, "model", STATE)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert same(read_weights(tmp_path, "model"), STATE)


def test_shards_come_back_as_one(tmp_path):
    write_weights(tmp_path, "model", STATE, max_shard_bytes=20)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names[0] == "model-00001-of-00002.safetensors"
    assert names[-1] == "model.safetensors.index.json"
    assert same(read_weights(tmp_path, "model"), STATE)


@pytest.mark.parametrize("index", ["model.fp16.safetensors.index.json", "model.safetensors.index.fp16.json"])
def test_fp16_variants_are_read_where_the_plain_file_is_absent(tmp_path, index):
    write_weights(tmp_path, "other", {"a": STATE["c"]})
    (tmp_path / "other.safetensors").rename(tmp_path / "model.fp16.safetensors")
    assert same(read_weights(tmp_path, "model"), {"a": STATE["c"]})
    (tmp_path / "model.fp16.safetensors").rename(tmp_path / "shard.safetensors")
    (tmp_path / index).write_text(json.dumps({"weight_map": {"a": "shard.safetensors"}}))
    assert same(read_weights(tmp_path, "model"), {"a": STATE["c"]})
    write_weights(tmp_path, "model", {"a": STATE["a"]})
    assert same(read_weights(tmp_path, "model"), {"a": STATE["a"]})


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_a_file_that_is_cut_short_is_named(tmp_path, kept):
    write_weights(tmp_path, "model", STATE)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"model\.safetensors: damaged or cut short"):
        read_file(file)


def test_an_index_that_names_a_missing_shard_is_an_error(tmp_path):
    write_weights(tmp_path, "model", STATE, max_shard_bytes=20)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"index\.json: names model-00002-of-00002\.safetensors, which is not there"):
        read_weights(tmp_path, "model")


def test_a_file_with_texts_has_the_same_bytes_each_time(tmp_path):
    texts = {"z": 'a "quoted"\n\tline\x1f\x7f\\ / <\u2028>', "ä\u5b57\U0001f534": "ü" * 50, "b": "", "a": "{}"}
    files = [tmp_path / f"{i}.safetensors" for i in range(8)]  # the library's order is another one each time
    for file in files:
        write_file(file, STATE, texts)
    assert len({file.read_bytes() for file in files}) == 1
    assert read_metadata(files[0]) == {"format": "pt", **texts} and same(read_file(files[0]), STATE)


@pytest.mark.parametrize("text", ["{}", "[1]", "{", '{"weight_map": {"a": 3}}'])
def test_an_index_that_is_no_index_is_an_error(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json: "):
        read_weights(tmp_path, "model")


def test_a_pickle_is_refused_with_the_line_that_converts_it(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(UserError, match=rf"python tools/pickle_to_safetensors\.py {tmp_path}$"):
        read_weights(tmp_path, "model")


def test_a_folder_without_weights_says_what_belongs_there(tmp_path):
    with pytest.raises(UserError, match=r"no weights; model\.safetensors belongs there"):
        read_weights(tmp_path, "model")
    with pytest.raises(UserError, match="no such folder"):
        read_weights(tmp_path / "nothing", "model")
