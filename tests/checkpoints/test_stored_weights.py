"""Weights that stay on disk: the same numbers as in memory, without the memory."""

import dataclasses
import gc
import os
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpo_jax.checkpoints import safetensors_io as io
from vpo_jax.checkpoints.folders import write_pipeline
from vpo_jax.checkpoints.keys import from_torch, to_torch
from vpo_jax.families.table import read_pipeline
from vpo_jax.pipeline import load_pipeline
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.stored import Stored
from vpo_jax.runtime.trees import cast_floating, flatten, unflatten

SIZES = {"conv/kernel": (3, 3, 2, 4), "blocks.*/norm/scale": (3, 5), "blocks.*/a/kernel": (3, 5, 6)}
SHAPES = unflatten({path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in SIZES.items()})
FLOATS = {"float32": np.float32, "float16": np.float16, "bfloat16": jnp.bfloat16}


def nothing():
    return None


def same(found, expected):
    """Equal bit by bit, in names, shapes and dtypes."""
    found, expected = flatten(found), flatten(expected)
    assert list(found) == list(expected)
    for path in found:
        a, b = np.asarray(found[path]), np.asarray(expected[path])
        assert (a.shape, a.dtype) == (b.shape, b.dtype), path
        assert a.tobytes() == b.tobytes(), path


@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
@pytest.mark.parametrize("on_disk", list(FLOATS))
def test_a_leaf_has_the_bits_that_an_array_in_memory_has(on_disk, wanted):
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(FLOATS[on_disk]), SHAPES)
    state = to_torch(params)
    kept = ("norm",)
    expected = from_torch(state, SHAPES, dtype=FLOATS[wanted], float32_parameters=kept)
    found = from_torch(state, SHAPES, dtype=FLOATS[wanted], float32_parameters=kept, stored=nothing)
    assert all(isinstance(leaf, Stored) for leaf in jax.tree.leaves(found))
    same(found, expected)
    # As a run casts them: float32 first, then the dtype that it computes in.
    wide = from_torch(state, SHAPES), from_torch(state, SHAPES, stored=nothing)
    same(*(cast_floating(tree, FLOATS[wanted], kept) for tree in wide))
    same(cast_floating(wide[1], FLOATS[wanted], kept), expected)
    same(to_torch(found), to_torch(expected))


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, np.float32), (np.inf, jnp.bfloat16), (1e6, np.float16)])
def test_what_is_not_finite_is_refused_when_it_is_opened(value, dtype):
    state = to_torch(jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), SHAPES))
    state["blocks.1.norm.weight"][2] = value
    with pytest.raises(UserError, match=r"1 tensors \(blocks.1.norm.weight\)"):
        from_torch(state, SHAPES, dtype=dtype, stored=nothing)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(FLOATS))
def test_a_folder_on_disk_is_written_as_one_in_memory_byte_for_byte(written, tmp_path, dtype):
    for name, place in (("memory", None), ("disk", "disk")):
        parts = read_pipeline(written, place=place)
        write_pipeline(tmp_path / name, parts, dict.fromkeys(parts.params, dtype), max_shard_bytes=5000)
    files = sorted(p.relative_to(tmp_path / "memory") for p in (tmp_path / "memory").rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "disk") for p in (tmp_path / "disk").rglob("*") if p.is_file())
    assert any("-of-" in file.name for file in files)
    for file in files:
        assert (tmp_path / "memory" / file).read_bytes() == (tmp_path / "disk" / file).read_bytes(), file


def test_values_that_do_not_fit_are_not_written_from_disk_either(parts, tmp_path):
    params = {**parts.params, "vae": jax.tree.map(lambda leaf: leaf * np.float32(1e6), parts.params["vae"])}
    write_pipeline(tmp_path / "large", dataclasses.replace(parts, params=params))
    read = read_pipeline(tmp_path / "large", place="disk")
    with pytest.raises(UserError, match=r"vae.*too large for float16; nothing was written"):
        write_pipeline(tmp_path / "out", read, {"vae": "float16"})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["touched", "shorter"])
def test_a_file_that_is_written_to_meanwhile_is_named(broken, change):
    params = read_pipeline(broken, place="disk").params
    file = broken / "vae" / "diffusion_pytorch_model.safetensors"
    if change == "shorter":
        os.truncate(file, 100)
    else:
        os.utime(file, ns=(1, 1))
    with pytest.raises(UserError, match=rf"{file.name}: was written to after"):
        np.asarray(jax.tree.leaves(params["vae"])[0])
    np.asarray(jax.tree.leaves(params["unet"])[0])


@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_a_file_that_is_replaced_or_removed_meanwhile_is_read_as_it_was(written, broken, change):
    params = read_pipeline(broken, place="disk").params
    file = broken / "vae" / "diffusion_pytorch_model.safetensors"
    file.rename(broken / "old")
    if change == "replaced":
        file.write_bytes(b"another")
    same(params["vae"], read_pipeline(written).params["vae"])


@pytest.mark.slow
def test_a_pipeline_on_disk_samples_once_it_is_on_a_mesh(model_folder):
    from vpo_jax.runtime.mesh import make_mesh

    mesh = make_mesh(1, 1, devices=jax.devices()[:1])
    settings = {"num_inference_steps": 1, "num_frames": 2, "guidance_scale": 2.0}
    on_disk, in_memory = (
        load_pipeline(model_folder, place=place).on_mesh(mesh)("a circle", **settings) for place in ("disk", None)
    )
    np.testing.assert_array_equal(on_disk, in_memory)


def allocated(work):
    """Most bytes at a time that Python and NumPy allocate in `work()` beyond what they had before."""
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        result = work()
        return tracemalloc.get_traced_memory()[1] - before, result
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_loading_and_writing_take_memory_for_one_tensor_and_one_shard(tmp_path):
    layers, side, shard = 24, 256, 600_000
    shapes = unflatten({"blocks.*/a/kernel": jax.ShapeDtypeStruct((layers, side, side), jnp.float32)})
    tensor = 4 * side**2  # float32
    tree = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, jnp.bfloat16), shapes)
    io.write_weights(tmp_path, "model", to_torch(tree), shard)
    assert len(list(tmp_path.glob("*.safetensors"))) > 4
    state = io.read_weights(tmp_path, "model")
    del tree

    def load(**options):
        return from_torch(state, shapes, **options)

    slack = 100_000  # headers, names, Python's own objects
    in_memory, _ = allocated(load)
    loading, params = allocated(lambda: load(stored=nothing))
    assert in_memory > layers * tensor, "else this measures nothing"
    assert loading < 2 * tensor + slack
    (tmp_path / "out").mkdir()
    writing, _ = allocated(lambda: io.write_weights(tmp_path / "out", "model", to_torch(params), shard))
    assert writing < 2 * shard + 2 * tensor + slack < layers * tensor / 2
