"""Wan's transformer gives the same numbers on every mesh, and its rules shard what is large."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from tests.running import run_program
from vpo_jax.checkpoints.keys import init_shapes
from vpo_jax.families.wan.sharding import WAN_PARAMETER_RULES
from vpo_jax.models.wan_transformer import WanTransformer3DModel, WanTransformerConfig
from vpo_jax.runtime.mesh import AXES, infer_shardings
from vpo_jax.runtime.trees import flatten


@pytest.mark.slow
def test_every_mesh_gives_what_one_device_gives():
    done = run_program("wan_meshes_agree.py", devices=8)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("by layers") and len(found) == 7
    for name, mesh in found.items():
        # Sums of float32 in another order, which gives up to 2e-6.
        assert mesh["prediction"] <= 1e-5 and mesh["gradient"] <= 1e-5, (name, mesh)
        assert (mesh["sharded"] > 10) == (name in ("fsdp", "tensor", "together", "context, a kernel of its own")), name


@pytest.mark.parametrize("sizes", [{"fsdp": 4}, {"tensor": 4}, {"fsdp": 2, "tensor": 4}], ids=str)
def test_what_is_large_is_sharded_and_layers_never_are(sizes):
    config = WanTransformerConfig(num_attention_heads=12, ffn_dim=8960, num_layers=30)  # T2V-1.3B
    text = jax.ShapeDtypeStruct((1, 512, 4096), jnp.float32)
    shapes = init_shapes(WanTransformer3DModel(config), jax.ShapeDtypeStruct((1, 1, 2, 2, 16), jnp.float32), 1.0, text)
    mesh = AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    places = flatten(infer_shardings(shapes, mesh, WAN_PARAMETER_RULES))
    held = {path: places[path].shard_shape(leaf.shape) for path, leaf in flatten(shapes).items()}
    whole = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    parts = sum(int(jnp.prod(jnp.array(shape))) for shape in held.values())
    devices = 4 if len(sizes) == 1 else 8
    assert parts < 1.02 * whole / devices
    for path, shape in held.items():
        assert ".*" not in path or shape[0] == 30, path
