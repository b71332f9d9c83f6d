import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.running import run_program
from vpo_jax.models.lora import merge_lora
from vpo_jax.runtime.mesh import make_mesh
from vpo_jax.runtime.processes import place
from vpo_jax.runtime.stored import Stored, put

ARRAY = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
# Of a stacked leaf the first axis is layers; of the other it is one like the rest.
BOTH = pytest.mark.parametrize("stacked", [False, True])


def stored(array=ARRAY, stacked=False, seen=None):
    def layer(number, index):
        part = (array[number] if stacked else array)[index]
        if seen is not None:
            seen.append(part.size)
        return part

    return Stored(array.shape, array.dtype, layer, stacked)


@BOTH
def test_it_reads_what_it_stands_for_into_memory_of_its_own(stacked):
    leaf = stored(stacked=stacked)
    assert (leaf.shape, leaf.ndim, leaf.nbytes) == (ARRAY.shape, 3, ARRAY.nbytes)
    found = np.asarray(leaf)
    np.testing.assert_array_equal(found, ARRAY)
    assert found.flags.c_contiguous and not np.shares_memory(found, ARRAY)
    index = (slice(1, 3), slice(0, 4, 2), slice(None))
    np.testing.assert_array_equal(leaf.read(index), ARRAY[index])


@BOTH
def test_it_is_rounded_to_each_dtype_that_it_was_given_as_arrays_are(stacked):
    # A little more than half way between two numbers of bfloat16: rounded up, but to even once float16 has cut it off.
    array = np.float32(1 + 2.0**-8 + 2.0**-20) * np.ones((2, 3), np.float32)
    twice = stored(array, stacked).astype(np.float16).astype(jnp.bfloat16)
    expected = array.astype(np.float16).astype(jnp.bfloat16)
    assert twice.dtype == jnp.bfloat16 and expected[0, 0] != array.astype(jnp.bfloat16)[0, 0]
    np.testing.assert_array_equal(np.asarray(twice), expected)
    assert np.isinf(np.asarray(stored(np.full((1, 2), 1e6, np.float32), stacked).astype(np.float16))).all()


@pytest.mark.slow
def test_devices_get_their_slices_and_each_is_read_once():
    done = run_program("stored_on_a_mesh.py", devices=4)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"same": True, "shards": [[3, 4, 3]], "read": found["size"], "size": 72}


@BOTH
def test_one_device_gets_it_in_its_dtype_beside_arrays(stacked):
    seen = []
    leaf = stored(stacked=stacked, seen=seen).astype(jnp.bfloat16)
    sharding = NamedSharding(make_mesh(1, 1, devices=jax.devices()[:1]), PartitionSpec())
    numpy = np.arange(4.0, dtype=np.float32)
    for function in (place, put):
        seen.clear()
        found = function({"a": leaf, "b": numpy}, {"a": sharding, "b": sharding})
        assert found["a"].dtype == jnp.bfloat16 and found["a"].sharding == sharding
        np.testing.assert_array_equal(found["a"], ARRAY.astype(jnp.bfloat16))
        np.testing.assert_array_equal(found["b"], numpy)
        assert sum(seen) == ARRAY.size, "once"


@pytest.mark.parametrize(("path", "shape"), [("to_q", (7, 9)), ("blocks.*/to_q", (3, 7, 9)), ("conv", (3, 3, 7, 9))])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_adapters_are_merged_into_kernels_on_disk_as_into_arrays_to_the_bit(path, shape, dtype):
    rng = np.random.default_rng(1)
    kernel = rng.normal(size=shape).astype(dtype)
    window = shape[:-2] if path == "conv" else ()
    stack = shape[:-2] if "*" in path else ()
    adapter = {
        "lora_A": rng.normal(size=(*stack, *window, 7, 2)).astype(np.float32),
        "lora_B": rng.normal(size=(*stack, 2, 9)).astype(np.float32),
    }
    *above, name = path.split("/")

    def tree(leaf):
        return {above[0]: {name: leaf}} if above else {name: leaf}

    def leaf_of(merged):
        (found,) = jax.tree.leaves(merged)
        return found

    expected = leaf_of(merge_lora(tree({"kernel": kernel}), tree(adapter), 0.5))
    found = leaf_of(merge_lora(tree({"kernel": stored(kernel, "*" in path)}), tree(adapter), 0.5))
    assert isinstance(found, Stored) and found.dtype == dtype and not np.array_equal(np.asarray(found), kernel)
    np.testing.assert_array_equal(np.asarray(found), expected)
    index = (*(slice(0, 2) for _ in shape[:-1]), slice(3, 8))
    np.testing.assert_array_equal(found.read(index), expected[index])
