"""Folders of models, scorers and adapters that somebody else made: a load or one line, soon, and nothing outside."""

import json
import os
import resource
import shutil
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from vpo_jax.checkpoints.peft import read_adapter, write_adapter
from vpo_jax.checkpoints.safetensors_io import read_file
from vpo_jax.checkpoints.untrusted import open_folder
from vpo_jax.diffusion.samplers import make_sampler
from vpo_jax.families.table import read_pipeline
from vpo_jax.models.lora import LoRAConfig, init_lora
from vpo_jax.pipeline import load_pipeline
from vpo_jax.rewards.loading import load_reward
from vpo_jax.runtime.errors import UserError

ASSETS = Path(__file__).resolve().parents[2] / "vpo_jax" / "shapes" / "assets"
UNET = "unet/diffusion_pytorch_model.safetensors"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 1501243\n"
SECONDS = 10


@pytest.fixture
def base(tmp_path):
    return Path(shutil.copytree(ASSETS / "base", tmp_path / "m"))


@pytest.fixture
def scorer(tmp_path):
    return Path(shutil.copytree(ASSETS / "scorer", tmp_path / "s"))


def edit(file: Path, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


# Names and links.


@pytest.mark.parametrize("name", ["../outside.safetensors", "ABSOLUTE", "..", "sub/x.safetensors", "..\\x", ""])
def test_an_index_names_shards_of_its_own_folder_only(base, name):
    outside = base.parent / "outside.safetensors"
    (base / UNET).rename(outside)
    name = str(outside) if name == "ABSOLUTE" else name
    index = {"metadata": {}, "weight_map": {"conv_in.weight": name}}
    (base / f"{UNET}.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"names the shard .* which is no file of its folder"):
        load_pipeline(base)


@pytest.mark.parametrize("entry", [UNET, "unet", "model_index.json", "tokenizer/tokenizer.json"])
def test_a_link_that_leaves_the_folder_is_named_with_the_copy_that_loads(base, entry):
    (base.parent / "outside").mkdir()
    target = base.parent / "outside" / Path(entry).name
    (base / entry).rename(target)
    (base / entry).symlink_to(target)
    with pytest.raises(UserError, match=rf"{entry}: leads out of the folder.* cp -rL {base} NEW_FOLDER"):
        load_pipeline(base)
    shutil.copytree(base, base.parent / "copy")  # follows links, as cp -rL
    load_pipeline(base.parent / "copy")


def test_a_dangling_link_and_one_to_itself_are_named(base):
    (base / UNET).unlink()
    (base / UNET).symlink_to("/nowhere/blobs/abc")
    with pytest.raises(UserError, match="a dangling link to /nowhere/blobs/abc; copy the model"):
        load_pipeline(base)
    (base / UNET).unlink()
    (base / UNET).symlink_to(Path(UNET).name)
    with pytest.raises(UserError, match="a dangling link"):
        load_pipeline(base)


def test_links_inside_the_folder_and_a_link_to_the_folder_are_followed(base):
    (base / UNET).rename(base / "unet" / "real.safetensors")
    (base / UNET).symlink_to("real.safetensors")
    (base.parent / "link").symlink_to(base)
    load_pipeline(base.parent / "link")


def hub_cache(base: Path, revisions=("abc",)) -> Path:
    """The folder that the hub's library keeps: blobs, and snapshots of links to them."""
    cache = base.parent / "models--owner--name"
    (cache / "blobs").mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(revisions[0])
    files = [file for file in sorted(base.rglob("*")) if file.is_file()]
    for number, file in enumerate(files):
        shutil.copy(file, cache / "blobs" / str(number))
        for revision in revisions:
            link = cache / "snapshots" / revision / file.relative_to(base)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(cache / "blobs" / str(number), link.parent))
    return cache


def test_a_folder_of_the_hubs_cache_loads_from_its_root_and_from_its_snapshot(base):
    cache = hub_cache(base, ("abc", "old"))
    assert open_folder(cache) == cache / "snapshots" / "abc"
    load_pipeline(cache)
    load_pipeline(cache / "snapshots" / "old")
    (cache / "refs" / "main").unlink()
    with pytest.raises(UserError, match="hub's cache with 2 snapshots; give one of them"):
        load_pipeline(cache)
    shutil.rmtree(cache / "snapshots")
    with pytest.raises(UserError, match="hub's cache with no snapshot; download the model again"):
        load_pipeline(cache)


def test_a_link_of_the_hubs_cache_to_elsewhere_is_refused(base):
    cache = hub_cache(base)
    link = cache / "snapshots" / "abc" / "model_index.json"
    link.unlink()
    link.symlink_to(base / "model_index.json")
    with pytest.raises(UserError, match="leads out of the folder"):
        load_pipeline(cache)


def test_a_tokenizer_config_names_no_file_elsewhere(base):
    shutil.copy(base / "tokenizer" / "tokenizer.json", base.parent / "tokenizer.1.0.json")
    edit(base / "tokenizer" / "tokenizer_config.json", fast_tokenizer_files=["../../tokenizer.1.0.json"])
    with pytest.raises(UserError, match="fast_tokenizer_files names a file elsewhere"):
        load_pipeline(base)


# What tools leave.


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_weights_of_a_compiled_or_distributed_model_load(base, scorer, prefix):
    for file, load in ((base / UNET, load_pipeline), (scorer / "model.safetensors", load_reward)):
        plain = load_file(file)
        save_file({prefix + key: value for key, value in plain.items()}, file)
        load(str(base if load is load_pipeline else scorer))


def test_a_part_that_was_compiled_inside_of_a_model_loads(base):
    tensors = load_file(base / UNET)
    save_file({key.replace("mid_block.", "mid_block._orig_mod."): value for key, value in tensors.items()}, base / UNET)
    load_pipeline(base)


@pytest.mark.parametrize("file", [UNET, "unet/config.json", "model_index.json", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize(("content", "says"), [(LFS, "git-lfs pointer.* lfs pull"), ("<!DOCTYPE html>", "a web page")])
def test_a_file_that_stands_for_another_says_how_to_get_it(base, file, content, says):
    (base / file).write_text(content)
    with pytest.raises(UserError, match=says):
        load_pipeline(base)


@pytest.mark.parametrize("variant", ["fp16", "bf16", "fp32"])
def test_a_variant_of_another_precision_loads(base, variant):
    (base / UNET).rename(base / UNET.replace(".safetensors", f".{variant}.safetensors"))
    load_pipeline(base)


def test_the_line_that_another_variant_is_told_makes_it_load(base):
    (base / UNET).rename(base / UNET.replace(".safetensors", ".non_ema.safetensors"))
    with pytest.raises(UserError, match=r"has the variant diffusion_pytorch_model\.non_ema\.safetensors only") as told:
        load_pipeline(base)
    assert os.system(str(told.value).partition("to load it: ")[2]) == 0
    load_pipeline(base)


# Numbers.

NINE_BLOCKS = {
    "block_out_channels": [32] * 9,
    "down_block_types": ["DownBlock3D"] * 9,
    "up_block_types": ["UpBlock3D"] * 9,
}


@pytest.mark.parametrize(
    ("file", "values", "says"),
    [
        ("unet/config.json", {"block_out_channels": [0, 0]}, "unet.block_out_channels"),
        ("unet/config.json", NINE_BLOCKS, "unet.block_out_channels: needs 1 to 8 entries"),
        ("unet/config.json", {"layers_per_block": 10**9}, "layers_per_block is 1000000000"),
        ("unet/config.json", {"layers_per_block": 16}, "too few for that"),
        ("unet/config.json", {"cross_attention_dim": 2**40}, "unet.cross_attention_dim"),
        ("unet/config.json", {"norm_eps": 0}, "unet.norm_eps"),
        ("unet/config.json", {"norm_eps": float("nan")}, "unet.norm_eps"),
        ("unet/config.json", {"norm_num_groups": 0}, "unet.norm_num_groups"),
        ("unet/config.json", {"attention_head_dim": True}, "unet.attention_head_dim"),
        ("vae/config.json", {"scaling_factor": 0}, "vae.scaling_factor"),
        ("vae/config.json", {"scaling_factor": "a"}, "vae.scaling_factor"),
        ("vae/config.json", {"block_out_channels": "abc"}, "vae.block_out_channels"),
        ("text_encoder/config.json", {"num_hidden_layers": 128}, "too few for that"),
        ("text_encoder/config.json", {"vocab_size": 10**30}, "text_encoder.vocab_size"),
        ("text_encoder/config.json", {"architectures": {"a": 1}}, "architecture"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}, "num_train_timesteps"),
        ("scheduler/scheduler_config.json", {"beta_start": -1.0}, "beta_start"),
        ("scheduler/scheduler_config.json", {"beta_end": float("inf")}, "beta_end"),
        ("scheduler/scheduler_config.json", {"steps_offset": 10**9}, "steps_offset"),
        ("scheduler/scheduler_config.json", {"trained_betas": 5}, "trained_betas"),
        ("scheduler/scheduler_config.json", {"trained_betas": ["a"] * 1000}, "trained_betas"),
        ("vpo_jax.json", {"num_frames": 10**9}, "num_frames must be a whole number"),
        ("vpo_jax.json", {"height": "32"}, "height must be a whole number"),
        ("vpo_jax.json", {"guidance_scale": float("nan")}, "guidance_scale must be a number"),
    ],
    ids=str,
)
def test_a_number_that_no_model_has_is_refused_by_its_name(base, file, values, says):
    edit(base / file, **values)
    began = time.monotonic()
    with pytest.raises(UserError, match=says):
        make_sampler(load_pipeline(base).scheduler_config, 4)
    assert time.monotonic() - began < SECONDS


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"num_frames": 0}, "scorer.num_frames"),
        ({"num_frames": 10**6}, "scorer.num_frames"),
        ({"image_size": 2**20}, "scorer.image_size"),
        ({"image_size": 31}, "scorer.image_size"),
        ({"channels": [0, 48]}, "scorer.channels"),
        ({"channels": 5}, "scorer.channels"),
        ({"dimensions": ["a", "a", "a", "a", "a"]}, "scorer.dimensions"),
        ({"ranges": [[1, 0]] * 5}, "scorer.ranges"),
        ({"ranges": 3}, "scorer.ranges"),
        ({"hidden": 10**400}, "scorer.hidden"),
    ],
    ids=str,
)
def test_a_number_that_no_scorer_has_is_refused_by_its_name(scorer, values, says):
    edit(scorer / "config.json", **values)
    with pytest.raises(UserError, match=says):
        load_reward(str(scorer))


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "tokenizer/tokenizer.json", "vpo_jax.json"])
@pytest.mark.parametrize("text", ["[" * 200_000 + "]" * 200_000, '{"a":' * 200_000, "9" * 10_000, " " * (50 << 20)])
def test_json_that_is_deep_or_large_is_refused(base, file, text):
    (base / file).write_text(text)
    with pytest.raises(UserError, match=r"nested too deep|cannot be read as JSON|is larger than"):
        load_pipeline(base)


def header(**tensors) -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


SPEC = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        (2**62).to_bytes(8, "little") + b"{}",
        (17 << 20).to_bytes(8, "little") + b"{" + b" " * (17 << 20),
        header(a=SPEC) + bytes(4),
        header(a={**SPEC, "data_offsets": [0, 2**60]}) + bytes(8),
        header(a={**SPEC, "data_offsets": [8, 0]}) + bytes(8),
        header(a={**SPEC, "shape": [2**40, 2**40]}) + bytes(8),
        header(a={**SPEC, "shape": [-2]}) + bytes(8),
        header(a=SPEC, b=SPEC) + bytes(8),  # both own the same bytes
        header(a={**SPEC, "shape": [0, 2**62], "data_offsets": [0, 0]}),
        header(a={**SPEC, "shape": [1] * 70 + [2]}) + bytes(8),
        header(a={**SPEC, "dtype": "F8_E4M3", "data_offsets": [0, 2]}) + bytes(2),
        header(a=[1]),
    ],
    ids=range(14),
)
def test_a_header_that_lies_is_refused(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.safetensors"):
        read_file(tmp_path / "a.safetensors")


# Anything.

WATCHED: list[str] = []


def _note(event: str, arguments: tuple) -> None:
    if event == "open" and WATCHED and isinstance(arguments[0], str):
        WATCHED.append(os.path.realpath(arguments[0]))


sys.addaudithook(_note)

SCALARS = st.sampled_from(
    [None, True, False, 0, -1, 1, 3, 2**20 + 1, 2**31, 2**63, 10**400, 0.0, -0.5, 1e-320, 1e308, float("nan"),
     float("inf"), "", "a", "..", "../outside", "/etc/passwd", "\0", "x" * 5000, [], {}, [[]], [0], ["a"], {"a": {}}]
)  # fmt: skip
FOLDERS = {"base": "model_index.json", "scorer": "config.json", "videoscore": "config.json"}


@st.composite
def mutations(draw):
    """(folder, what to do to a copy of it)."""
    name = draw(st.sampled_from(sorted(FOLDERS)))
    files = sorted(str(file.relative_to(ASSETS / name)) for file in (ASSETS / name).rglob("*") if file.is_file())
    files = [file for file in files if file.endswith((".json", ".safetensors"))]
    file = draw(st.sampled_from(files))
    kinds = ["bytes", "cut", "lfs", "gone"] + (["value"] * 6 if file.endswith(".json") else ["header"] * 4 + ["index"])
    return name, file, draw(st.sampled_from(kinds)), draw(st.integers(0, 2**32)), draw(SCALARS)


def places(value, path=()):
    """Every place in a JSON value, up to some thousands."""
    found = [path] if path else []
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        if len(found) < 3000:
            found += places(child, (*path, key))
    return found


def replaced(value, seed, new):
    every = places(value)
    if not every:
        return new
    *parents, last = every[seed % len(every)]
    node = value
    for key in parents:
        node = node[key]
    if seed % 7 == 0 and isinstance(node, dict):
        del node[last]
    else:
        node[last] = new
    return value


def mutate(file: Path, kind: str, seed: int, new) -> None:
    data = file.read_bytes()
    if kind == "value":
        file.write_text(json.dumps(replaced(json.loads(data), seed, new)))
    elif kind == "header":
        size = int.from_bytes(data[:8], "little")
        text = json.dumps(replaced(json.loads(data[8 : 8 + size]), seed, new)).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    elif kind == "index":
        file.unlink()
        index = {"weight_map": {"a": new if isinstance(new, str) else "../outside.safetensors"}}
        file.with_name(f"{file.name}.index.json").write_text(json.dumps(index if seed % 2 else {"weight_map": new}))
    elif kind == "bytes":
        changed = np.frombuffer(data, np.uint8).copy()
        rng = np.random.default_rng(seed)
        changed[rng.integers(0, min(len(changed), 4096), 8)] = rng.integers(0, 256, 8)
        file.write_bytes(changed.tobytes())
    elif kind == "cut":
        file.write_bytes(data[: seed % (len(data) + 1)])
    elif kind == "lfs":
        file.write_text(LFS)
    else:
        file.unlink()


def load(folder: Path, name: str) -> None:
    if name == "base":
        pipeline = load_pipeline(folder)
        pipeline.video_size()
        make_sampler(pipeline.scheduler_config, 4)
        pipeline.tokenize(["a red circle"])
    else:
        reward = load_reward(str(folder))
        reward.frame_indices(8)
        reward.prepare(["a red circle"])


def check_mutation(mutation, folder: Path) -> None:
    name, file, kind, seed, new = mutation
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ASSETS / name, folder / "m")
    save_file({"a": np.zeros(1, np.float32)}, folder / "outside.safetensors")
    (folder / "outside").mkdir()
    mutate(folder / "m" / file, kind, seed, new)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    WATCHED.append("")
    try:
        load(folder / "m", name)
    except UserError as error:
        said = " ".join(str(error).split())
        assert said and len(said) < 1600
    finally:
        opened = WATCHED[1:]
        WATCHED.clear()
    assert time.monotonic() - began < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB
    assert not [path for path in opened if path.startswith((f"{folder}/outside", "/etc/passwd"))]


@pytest.mark.slow
@given(mutation=mutations())
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_folder_that_was_tampered_with_loads_or_is_refused_in_words(mutation, tmp_path):
    check_mutation(mutation, tmp_path / "f")


@pytest.mark.long
@given(mutation=mutations())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_300_folders_that_were_tampered_with_load_or_are_refused_in_words(mutation, tmp_path):
    check_mutation(mutation, tmp_path / "f")


LORA = LoRAConfig(2, 4.0)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """(folder, its own tree) of adapters of the shipped model."""
    folder = tmp_path_factory.mktemp("adapter") / "a"
    adapters = init_lora(jax.random.key(0), load_pipeline(ASSETS / "base").params["unet"], LORA)
    write_adapter(folder, adapters, LORA, "base")
    return folder, adapters


@given(
    file=st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]),
    kind=st.sampled_from(["value", "value", "value", "header", "header", "bytes", "cut", "lfs", "gone"]),
    seed=st.integers(0, 2**32),
    new=SCALARS,
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_adapter_that_was_tampered_with_is_read_or_refused_in_words(file, kind, seed, new, adapter, tmp_path):
    folder = tmp_path / "f"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(adapter[0], folder)
    if kind == "header":
        file = "adapter_model.safetensors"
    elif kind == "value":
        file = "adapter_config.json"
    mutate(folder / file, kind, seed, new)
    try:
        read_adapter(folder, adapter[1], LORA)
    except UserError as error:
        assert len(str(error)) < 1600


def test_the_shipped_folders_load(tmp_path):
    for name in FOLDERS:
        shutil.copytree(ASSETS / name, tmp_path / name)
        load(tmp_path / name, name)
    read_pipeline(tmp_path / "base")
