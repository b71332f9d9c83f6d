import json
import shutil

import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.fingerprint import contents_of, expand_paths, fingerprint


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "config.json").write_text("{}")
    tensors = {f"layer.{i}": np.full((64, 64), i, np.float32) for i in range(20)}
    save_file(tensors, folder / "unet" / "w.safetensors")
    return folder


def test_a_copy_has_the_same_fingerprint_whatever_lies_beside_the_model(model, tmp_path):
    shutil.copytree(model, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("a card")
    (tmp_path / "copy" / ".cache").mkdir()
    (tmp_path / "copy" / ".cache" / "x.json").write_text("{}")
    assert fingerprint(tmp_path / "copy") == fingerprint(model)


def test_one_tensor_a_config_or_a_new_shard_changes_it(model):
    found = {fingerprint(model)}
    file = model / "unet" / "w.safetensors"
    tensors = {f"layer.{i}": np.full((64, 64), i, np.float32) for i in range(20)}
    save_file({**tensors, "layer.7": tensors["layer.7"] + 1}, file)
    found.add(fingerprint(model))
    (model / "unet" / "config.json").write_text('{"a": 1}')
    found.add(fingerprint(model))
    shutil.copy(file, model / "unet" / "w2.safetensors")
    found.add(fingerprint(model))
    assert len(found) == 4


@pytest.mark.parametrize("header", [b"[]", b"{", b'{"a": {"data_offsets": [1e400, 2]}}', b'{"a": 1}'])
def test_a_broken_header_has_a_fingerprint_too(tmp_path, header):
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (tmp_path / "short.safetensors").write_bytes(b"\xff" * 12)
    assert len(fingerprint(tmp_path)) == 32


def test_a_file_that_is_gone_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        fingerprint(tmp_path / "none.txt")


def config_with(**values):
    config = {
        "model": {"path": "shapes"},
        "lora": {"path": ""},
        "data": {"prompts": "shapes:train", "held_out": "", "text_cache": ""},
        "reward": {"scorers": "shapes", "videoscore": {"path": "", "query_prompt": "", "max_frames": 16}},
        "held_out": {"scorers": "judge"},
    }
    for key, value in values.items():
        section, _, name = key.partition("_")
        config[section][name] = value
    return ConfigDict(config)


def test_names_have_no_content_and_folders_and_files_do(model, tmp_path):
    assert contents_of(config_with().to_dict()) == {}
    prompts = tmp_path / "p.txt"
    prompts.write_text("a\n")
    config = config_with(model_path=str(model), data_prompts=str(prompts))
    config.held_out.scorers = f"judge,{model}"
    config.reward.videoscore.path = str(model)
    found = contents_of(config.to_dict())
    one = fingerprint(model)
    assert found == {
        "model.path": one,
        "data.prompts": fingerprint(prompts),
        "reward.videoscore.path": one,
        "held_out.scorers": f"judge,{one}",
    }
    json.dumps(found)


def test_every_path_of_a_config_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = config_with(model_path="~/m", lora_path="~/l", data_prompts="~/p.txt", data_text_cache="~/c")
    config.reward.scorers = "shapes, ~/s"
    config.reward.videoscore.query_prompt = "~/q.txt"
    expand_paths(config)
    assert (config.model.path, config.lora.path) == (f"{tmp_path}/m", f"{tmp_path}/l")
    assert (config.data.prompts, config.data.text_cache) == (f"{tmp_path}/p.txt", f"{tmp_path}/c")
    assert config.reward.scorers == f"shapes,{tmp_path}/s" and config.data.held_out == ""
    assert config.reward.videoscore.query_prompt == f"{tmp_path}/q.txt"
