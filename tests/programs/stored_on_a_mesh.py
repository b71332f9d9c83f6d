"""Places a leaf that is on disk over four devices, of which two each hold the same slices; prints what was read."""

import json

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vpo_jax.runtime.mesh import make_mesh
from vpo_jax.runtime.processes import place
from vpo_jax.runtime.stored import Stored

ARRAY = np.random.default_rng(0).normal(size=(3, 4, 6)).astype(np.float32)
read: list[int] = []


def layer(number, index):
    """Of a stacked leaf."""
    part = ARRAY[number][index]
    read.append(part.size)
    return part


sharding = NamedSharding(make_mesh(2, 2, devices=jax.devices()[:4]), PartitionSpec(None, None, "fsdp"))
found = place({"a": Stored(ARRAY.shape, ARRAY.dtype, layer, stacked=True)}, {"a": sharding})["a"]
shards = {shard.data.shape for shard in found.addressable_shards}
same = bool((np.asarray(found) == ARRAY).all())
print(json.dumps({"same": same, "shards": sorted(shards), "read": sum(read), "size": ARRAY.size}))
