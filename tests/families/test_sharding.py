"""One rule for kernels of every rank gives each parameter the sharding that rules by layer name would."""

import re

import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from vpo_jax.families.table import FAMILIES
from vpo_jax.planning.job import read_shapes
from vpo_jax.rewards.loading import abstract_rewards
from vpo_jax.runtime import cli
from vpo_jax.runtime.mesh import AXES, PARAMETER_RULES, infer_shardings
from vpo_jax.runtime.trees import flatten

# What each layer's kernel should get, by its name: the window of a convolution is never sharded.
BY_NAME = (
    (r"temp_convs.*kernel$", P(None, None, None, "fsdp", "tensor")),
    (r"visual/patch_embed/proj/kernel$", P(None, None, None, "fsdp", "tensor")),
    (r"(conv1|conv2|conv_in|conv_out|conv_shortcut|conv)/kernel$", P(None, None, "fsdp", "tensor")),
    (r"(patch_embedding|frames/\w+)/kernel$", P(None, None, "fsdp", "tensor")),
    (r"context/kernel$", P(None, "fsdp", "tensor")),
    (r"(kernel|embedding)$", P("fsdp", "tensor")),
)


def mesh_of(**sizes):
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def by_name(path, shape, mesh):
    spec = next((spec for pattern, spec in BY_NAME if re.search(pattern, path)), P())
    return tuple(
        axis if axis is None or size % mesh.shape[axis] == 0 else None
        for size, axis in zip(shape, (*spec, *(None,) * (len(shape) - len(spec))), strict=True)
    )


def trees():
    reward = cli.load_config("configs/vpo.py").reward
    yield from ((name, read_shapes(name).params) for name in ("modelscope", "shapes"))
    for name in ("videoscore", "videoreward", "shapes"):
        yield f"scorer {name}", abstract_rewards(name, reward)[0].params


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"fsdp": 2, "tensor": 2}, {"fsdp": 4}, {"fsdp": 8, "tensor": 3}], ids=str)
def test_every_parameter_of_the_real_models_is_sharded_as_its_name_says(sizes):
    mesh, sharded = mesh_of(**sizes), 0
    for name, tree in trees():
        found = flatten(infer_shardings(tree, mesh, PARAMETER_RULES))
        for path, leaf in flatten(tree).items():
            spec = found[path].spec
            whole = (*spec, *(None,) * (len(leaf.shape) - len(spec)))
            assert whole == by_name(path, leaf.shape, mesh), f"{name}: {path} {leaf.shape}"
            sharded += any(whole)
    assert sharded > 1000


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_adapters_are_replicated(family):
    (spec,) = {spec for pattern, spec in family.sharding_rules if re.search(pattern, "a/lora_A")} or {P()}
    assert spec == P()
