"""Diffusers folders: what is read, what is written, and what every kind of damage is called."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from vpo_jax.checkpoints.folders import write_pipeline
from vpo_jax.families.table import read_pipeline
from vpo_jax.runtime.errors import UserError

UNET = "unet/diffusion_pytorch_model.safetensors"


def equal(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(jax.tree.map(np.array_equal, a, b))


def rewrite(file: Path, change) -> None:
    """Change the tensors of a safetensors file."""
    state = dict(load_file(file))
    change(state)
    save_file(state, file, metadata={"format": "pt"})


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


# ---- what comes back


def test_load_save_load_is_bitwise_the_same(written, parts, tmp_path):
    first = read_pipeline(written)
    assert equal(first.params, parts.params)
    assert first.defaults == parts.defaults
    write_pipeline(tmp_path / "again", first)
    assert files_of(tmp_path / "again") == files_of(written)


def test_shards_hold_the_same_weights(written, parts, tmp_path):
    write_pipeline(tmp_path / "sharded", parts, max_shard_bytes=100_000)
    assert len(list((tmp_path / "sharded" / "unet").glob("*-of-*.safetensors"))) > 1
    assert equal(read_pipeline(tmp_path / "sharded").params, parts.params)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_written_rounded_and_read_into_float32(parts, tmp_path, dtype):
    write_pipeline(tmp_path / "half", parts, {"unet": dtype, "vae": dtype})
    read = read_pipeline(tmp_path / "half").params
    rounded = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)).astype(np.float32), parts.params)
    assert equal(read["unet"], rounded["unet"])
    assert equal(read["vae"], rounded["vae"])
    assert equal(read["text_encoder"], parts.params["text_encoder"])
    assert equal(read_pipeline(tmp_path / "half", dtype).params["unet"], read["unet"])
    assert (tmp_path / "half" / UNET).stat().st_size < 0.6 * sum(x.nbytes for x in jax.tree.leaves(read["unet"]))


def test_the_tokenizer_reads_any_prompt(written):
    tokenizer = read_pipeline(written).tokenizer
    prompts = ["", "a 'quoted' <b>prompt</b>", "émigré 🙂", "word " * 500]
    ids = tokenizer(prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True).input_ids
    assert np.array(ids).shape == (4, 16)
    assert np.array(ids).max() <= 513


def test_a_tokenizer_without_a_length_takes_the_text_encoders(broken, edit_json):
    edit_json(broken / "tokenizer/tokenizer_config.json", model_max_length=None)
    assert read_pipeline(broken).tokenizer.model_max_length == 16


# ---- diffusers reads it


def test_diffusers_loads_what_is_written(parts, tmp_path):
    torch = pytest.importorskip("torch")
    from diffusers import TextToVideoSDPipeline

    write_pipeline(tmp_path / "model", parts, max_shard_bytes=100_000)
    pipe = TextToVideoSDPipeline.from_pretrained(tmp_path / "model")
    assert pipe.text_encoder.dtype == torch.float32  # though the config that was read says float16
    assert pipe.scheduler.config.steps_offset == 1
    kernel = parts.params["unet"]["down_blocks.0"]["resnets.0"]["conv1"]["kernel"]
    np.testing.assert_array_equal(
        pipe.unet.down_blocks[0].resnets[0].conv1.weight.detach(), kernel.transpose(3, 2, 0, 1)
    )
    pipe.save_pretrained(tmp_path / "theirs")
    assert equal(read_pipeline(tmp_path / "theirs").params, parts.params)


# ---- writing never leaves half a folder, and never takes what is not its own


def test_a_pipeline_is_replaced_whole(written, parts, tmp_path):
    target = Path(shutil.copytree(written, tmp_path / "model"))
    write_pipeline(target, replace(parts, defaults={}))
    assert not (target / "vpo_jax.json").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["README.md", "train.py"])
def test_a_folder_with_other_files_is_not_touched(parts, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"holds {name}, which no pipeline has"):
        write_pipeline(tmp_path, parts)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_a_file_in_the_way_is_an_error(parts, tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(UserError, match="a file is in the way"):
        write_pipeline(tmp_path / "model", parts)


def test_a_disk_that_refuses_leaves_the_old_folder_as_it_was(written, parts, tmp_path, monkeypatch):
    target = Path(shutil.copytree(written, tmp_path / "model"))

    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: No space left on device")

    monkeypatch.setattr("vpo_jax.checkpoints.safetensors_io.save_file", full)
    with pytest.raises(UserError, match=r"cannot be written .*No space left on device"):
        write_pipeline(target, parts)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    assert files_of(target) == files_of(written)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission_is_an_error(parts, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written"):
        write_pipeline(tmp_path / "model", parts)


@pytest.mark.parametrize(("value", "dtype"), [(1e5, "float16"), (np.nan, "float32")])
def test_values_that_do_not_fit_are_not_written(parts, tmp_path, value, dtype):
    params = jax.tree.map(np.copy, parts.params)
    params["vae"]["quant_conv"]["bias"][0] = value
    with pytest.raises(UserError, match=rf"vae\.quant_conv\.bias: .* {dtype}"):
        write_pipeline(tmp_path / "model", replace(parts, params=params), {"vae": dtype})
    assert not list(tmp_path.iterdir())


# ---- what damage is called


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="nothing/at/all: no such folder"):
        read_pipeline(tmp_path / "nothing/at/all")


def test_a_hub_id_without_a_network_says_so(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^someone/some-model: no such folder, and the hub gave no such model") as e:
        read_pipeline("someone/some-model")
    assert "\n" not in str(e.value)


def test_a_hub_model_is_downloaded_without_pickles_and_with_fp16_only_where_nothing_else_is(written, monkeypatch):
    import huggingface_hub

    calls = []

    def snapshot_download(name, allow_patterns, ignore_patterns=()):
        calls.append(ignore_patterns)
        assert not any(pattern.endswith((".bin", "*")) for pattern in allow_patterns)
        return str(written if len(calls) > 1 else written.parent)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert read_pipeline("someone/some-model").defaults["num_frames"] == 3
    assert [bool(ignored) for ignored in calls] == [True, False]


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="a file; give the diffusers folder"):
        read_pipeline(tmp_path / "x.safetensors")
    (tmp_path / "x.ckpt").write_bytes(b"")
    with pytest.raises(UserError, match=r"tools/pickle_to_safetensors\.py .*x\.ckpt$"):
        read_pipeline(tmp_path / "x.ckpt")


def test_a_folder_that_is_no_pipeline_is_named(broken, refusal):
    (broken / "model_index.json").unlink()
    assert "not a diffusers pipeline (no model_index.json)" in refusal()


def test_another_pipeline_class_is_named(broken, refusal, edit_json):
    edit_json(broken / "model_index.json", _class_name="StableDiffusionPipeline")
    assert "_class_name is 'StableDiffusionPipeline'; only TextToVideoSDPipeline" in refusal()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer"])
def test_another_class_of_a_part_is_named(broken, refusal, edit_json, part):
    edit_json(broken / "model_index.json", **{part: ["diffusers", "Other"]})
    assert f"{part} is 'Other'; only" in refusal()


def test_a_part_too_many_is_named(broken, refusal, edit_json):
    edit_json(broken / "model_index.json", image_encoder=["transformers", "CLIPVisionModel"])
    assert "image_encoder is a part that" in refusal()


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("unet", "_class_name", "UNet2DConditionModel"),
        ("vae", "_class_name", "AutoencoderTiny"),
        ("text_encoder", "architectures", ["T5EncoderModel"]),
    ],
)
def test_another_architecture_is_named(broken, refusal, edit_json, part, field, value):
    edit_json(broken / part / "config.json", **{field: value})
    assert f"{part}/config.json: the architecture is" in refusal()


def test_a_field_that_no_class_reads_is_named(broken, refusal, edit_json):
    edit_json(broken / "vae/config.json", temporal_layers=3)
    assert refusal().startswith("vae.temporal_layers: ")


@pytest.mark.parametrize(
    "file", ["unet/config.json", "scheduler/scheduler_config.json", "text_encoder/model.safetensors"]
)
def test_a_missing_file_is_named(broken, refusal, file):
    (broken / file).unlink()
    assert Path(file).name in refusal()


@pytest.mark.parametrize("file", ["model_index.json", "vae/config.json", "vpo_jax.json", "tokenizer/tokenizer.json"])
def test_a_broken_json_is_named(broken, refusal, file):
    (broken / file).write_text("{ not json")
    assert f"{file}: cannot be read as JSON" in refusal()


def test_a_missing_part_is_named(broken, refusal):
    shutil.rmtree(broken / "vae")
    assert "vae/config.json: no such file" in refusal()


def test_truncated_weights_are_named(broken, refusal):
    (broken / UNET).write_bytes((broken / UNET).read_bytes()[:-100])
    assert f"{UNET}: damaged or cut short" in refusal()


def test_missing_and_extra_tensors_are_listed(broken, refusal):
    def change(state):
        state["conv_inn.weight"] = state.pop("conv_in.weight")

    rewrite(broken / UNET, change)
    message = refusal()
    assert "1 missing tensors (conv_in.weight)" in message
    assert "1 tensors that config.json has no place for (conv_inn.weight)" in message


def test_wrong_shapes_are_listed(broken, refusal, edit_json):
    edit_json(broken / "unet/config.json", cross_attention_dim=20)
    message = refusal()
    assert "wrong shape" in message
    assert "to_k.weight is [16, 12], config.json makes it [16, 20]" in message


def test_nan_weights_are_named(broken, refusal):
    rewrite(broken / UNET, lambda state: state.update({"conv_in.bias": np.full(8, np.nan, np.float32)}))
    assert "NaN or infinite values in 1 tensors (conv_in.bias)" in refusal()


def test_pickled_weights_are_refused_with_the_line_that_converts_them(broken, refusal):
    (broken / UNET).unlink()
    (broken / "unet/diffusion_pytorch_model.bin").write_bytes(b"never opened")
    assert refusal().endswith(f"python tools/pickle_to_safetensors.py {broken / 'unet'}")


def test_a_missing_tokenizer_is_named(broken, refusal):
    (broken / "tokenizer/tokenizer.json").unlink()
    assert "tokenizer: no tokenizer; tokenizer.json, or vocab.json and merges.txt" in refusal()


def test_a_tokenizer_of_another_model_is_named(broken, refusal, edit_json):
    def change(state):
        key = next(k for k in state if k.endswith("token_embedding.weight"))
        state[key] = state[key][:500]

    rewrite(broken / "text_encoder/model.safetensors", change)
    edit_json(broken / "text_encoder/config.json", vocab_size=500)
    assert "514 tokens, but text_encoder.vocab_size is 500" in refusal()


def test_old_tokenizer_files_are_read(broken):
    value = json.loads((broken / "tokenizer/tokenizer.json").read_text())
    (broken / "tokenizer/tokenizer.json").unlink()
    (broken / "tokenizer/vocab.json").write_text(json.dumps(value["model"]["vocab"]))
    (broken / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    tokenizer = read_pipeline(broken).tokenizer
    assert tokenizer("a Red").input_ids == [512, 320, *tokenizer("red").input_ids[1:]]
