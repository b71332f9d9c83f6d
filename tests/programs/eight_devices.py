"""Asserts what meshes, rules and moves do on eight devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.mesh import (
    batch_sharding,
    batch_size,
    constrain,
    infer_shardings,
    make_mesh,
    make_meshes,
    replicated,
)
from vpo_jax.runtime.processes import move

assert dict(make_mesh().shape)["data"] == 8
mesh = make_mesh(fsdp=2, tensor=2)
assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "context": 1, "tensor": 2} and batch_size(mesh) == 4
assert make_mesh(data=1).devices.size == 1
with pytest.raises(UserError, match=r"mesh\.data: 8 devices are not a multiple of 3"):
    make_mesh(fsdp=3)


def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


tree = {"unet": {"to_q": {"kernel": leaf(4, 6), "bias": leaf(6)}, "odd": {"kernel": leaf(3, 6)}}, "n": leaf()}
rules = [(r"to_q/kernel$", P("fsdp", "tensor")), (r"kernel$", P(("data", "fsdp"), "tensor"))]
rules += [(r"bias$", P(None, "tensor"))]
specs = jax.tree.map(lambda s: s.spec, infer_shardings(tree, mesh, rules))
assert specs["unet"]["to_q"]["kernel"] == P("fsdp", "tensor"), "the first rule wins"
assert specs["unet"]["odd"]["kernel"] == P(None, "tensor"), "3 rows are not sharded over 4 devices"
assert specs["unet"]["to_q"]["bias"] == P(None), "a dimension that is not there"
assert specs["n"] == P()

axes = {"data": -1, "fsdp": 4, "context": 1, "tensor": 1, "rollout": "context=2", "score": ""}
meshes = make_meshes(axes)
sizes = [tuple(mesh.shape.values()) for mesh in meshes]
assert sizes == [(2, 4, 1, 1), (4, 1, 2, 1), (2, 4, 1, 1)] and meshes.score is meshes.update and not meshes.apart
assert [mesh.devices.flat[i] for mesh in meshes for i in range(8)] == [*meshes.update.devices.flat] * 3
meshes = make_meshes(axes | {"fsdp": 2, "score": "fsdp=2"}, scoring=2)
assert [mesh.size for mesh in meshes] == [6, 6, 2] and meshes.apart and meshes.score.shape["fsdp"] == 2
assert make_meshes(axes | {"rollout": "fsdp=-1"}).rollout.shape["fsdp"] == 8, "-1 is the rest, as in mesh.fsdp"
with pytest.raises(UserError, match=r"mesh\.score: 'data=4' uses 4 of 8 devices; leave data out"):
    make_meshes(axes | {"score": "data=4"})
with pytest.raises(UserError, match=r"mesh\.rollout: 'fsdp=3' needs a multiple of 3 devices and has 8;"):
    make_meshes(axes | {"rollout": "fsdp=3"})

first = jax.device_put(jnp.arange(16.0).reshape(8, 2), jax.NamedSharding(meshes.update, P("fsdp")))
again = move(first, jax.NamedSharding(meshes.rollout, P()))
assert again.sharding.is_fully_replicated and (again == first).all()
same = move(again, replicated(meshes.update))
pointers = [[s.data.unsafe_buffer_pointer() for s in x.addressable_shards] for x in (again, same)]
assert same.sharding.mesh == meshes.update and pointers[0] == pointers[1], "equal shardings are not copied"
jit, programs = jax.jit, []
jax.jit = lambda *args, **more: programs.append(more) or jit(*args, **more)
cut, whole = jax.NamedSharding(meshes.update, P("fsdp")), replicated(meshes.rollout)
moved = move({"a": first, "b": [first + 1, again], "c": first * 2}, {"a": whole, "b": [whole, whole], "c": cut})
jax.jit = jit
assert [len(more["out_shardings"]) for more in programs] == [2], "what travels does so in one program"
assert (moved["a"] == first).all() and (moved["b"][0] == first + 1).all() and moved["b"][0].sharding == whole
assert (moved["b"][1] == first).all() and (moved["c"] == first * 2).all() and moved["c"].sharding == cut

x = jax.device_put(jnp.arange(8.0), batch_sharding(mesh))
with jax.set_mesh(mesh):
    text = jax.jit(lambda x: constrain(x * 2, P(("data", "fsdp")))).lower(x).as_text()
assert "sharding_constraint" in text or "@Sharding" in text, "the constraint lowers"
