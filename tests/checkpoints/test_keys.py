"""Parameter paths and layouts against PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from vpo_jax.checkpoints.keys import from_torch, to_torch, torch_key, torch_shape, torch_shapes
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.mesh import infer_shardings, make_mesh


def tree(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "down_blocks.0": {
            "attentions.1": {"to_q": {"kernel": rng.normal(size=(2, 3))}, "to_out.0": {"bias": rng.normal(size=3)}},
            "conv1": {"kernel": rng.normal(size=(3, 3, 2, 5)), "bias": rng.normal(size=5)},
            "temp_convs.0": {"conv1.2": {"kernel": rng.normal(size=(3, 1, 1, 4, 6))}},
            "norm": {"scale": rng.normal(size=4), "bias": rng.normal(size=4)},
        },
        "token_embedding": {"embedding": rng.normal(size=(7, 2))},
        "latents": rng.normal(size=(2, 3)),
    }


TREE = jax.tree.map(lambda x: x.astype(np.float32), tree())


def test_names_and_layouts_are_those_of_torch():
    shapes = {key: array.shape for key, array in to_torch(TREE).items()}
    assert shapes == {
        "down_blocks.0.attentions.1.to_q.weight": (3, 2),
        "down_blocks.0.attentions.1.to_out.0.bias": (3,),
        "down_blocks.0.conv1.weight": (5, 2, 3, 3),
        "down_blocks.0.conv1.bias": (5,),
        "down_blocks.0.temp_convs.0.conv1.2.weight": (6, 4, 3, 1, 1),
        "down_blocks.0.norm.weight": (4,),
        "down_blocks.0.norm.bias": (4,),
        "token_embedding.weight": (7, 2),
        "latents": (2, 3),
    }
    assert torch_key("a.0/b/kernel") == "a.0.b.weight"
    assert torch_shape("a/kernel", (3, 4, 5)) == (5, 4, 3)


def test_there_and_back_is_bitwise_the_same():
    back = from_torch(to_torch(TREE), TREE)
    assert jax.tree.all(jax.tree.map(np.array_equal, TREE, back))
    assert jax.tree.structure(back) == jax.tree.structure(TREE)


def test_what_is_read_owns_its_memory():
    state = to_torch(TREE)
    back = from_torch(state, TREE)
    assert not any(np.shares_memory(leaf, array) for leaf in jax.tree.leaves(back) for array in state.values())


def test_legacy_vae_attention_names_are_understood():
    new = {
        f"mid_block.attentions.0.{name}.{leaf}": np.ones((2, 2) if leaf == "weight" else 2, np.float32) * i
        for i, name in enumerate(("to_q", "to_k", "to_v", "to_out.0"))
        for leaf in ("weight", "bias")
    }
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, array in new.items():
        for modern, legacy in names.items():
            key = key.replace(f".{modern}.", f".{legacy}.")
        old[key] = array
    dense = {"kernel": np.zeros((2, 2)), "bias": np.zeros(2)}
    shapes = {"mid_block": {"attentions.0": dict.fromkeys(names, dense)}}
    assert jax.tree.all(jax.tree.map(np.array_equal, from_torch(new, shapes), from_torch(old, shapes)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("latents"), r"here: 1 missing tensors \(latents\); use the weights"),
        (lambda s: s.update(more=s["latents"]), r"here: 1 tensors that config.json has no place for \(more\)"),
        (lambda s: s.clear(), r"here: 9 missing tensors \(.*, and 4 more\)"),
        (lambda s: s.update(latents=s["latents"].T), r"latents is \[3, 2\], config.json makes it \[2, 3\]"),
        (lambda s: s["latents"].fill(np.nan), r"here: NaN or infinite values in 1 tensors \(latents\)"),
        (lambda s: s["latents"].fill(np.inf), r"here: NaN or infinite values in 1 tensors \(latents\)"),
    ],
)
def test_what_does_not_fit_is_listed(change, message):
    state = {key: array.copy() for key, array in to_torch(TREE).items()}
    change(state)
    with pytest.raises(UserError, match=message):
        from_torch(state, TREE, "here")


def test_large_finite_values_are_not_taken_for_infinite():
    state = to_torch(TREE)
    state["latents"] = np.full((2, 3), 3e38, np.float32)
    assert from_torch(state, TREE)["latents"].max() == np.float32(3e38)


def test_placing_on_devices_gives_the_same_values_in_the_wanted_dtype():
    state = to_torch(TREE)
    mesh = make_mesh()
    places = infer_shardings(TREE, mesh, ((r"kernel$", PartitionSpec("fsdp", "tensor")),))
    placed = from_torch(state, TREE, dtype=jnp.bfloat16, shardings=places)
    for leaf, host in zip(
        jax.tree.leaves(placed), jax.tree.leaves(from_torch(state, TREE, dtype=jnp.bfloat16)), strict=True
    ):
        assert isinstance(leaf, jax.Array) and leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(leaf, host)
    assert jax.tree.map(lambda leaf: leaf.sharding, placed) == places


def test_a_value_that_is_not_finite_is_found_on_the_way_to_the_devices():
    state = {**to_torch(TREE), "latents": np.full((2, 3), np.inf, np.float32)}
    places = infer_shardings(TREE, make_mesh(), ())
    with pytest.raises(UserError, match=r"NaN or infinite values in 1 tensors \(latents\)"):
        from_torch(state, TREE, shardings=places)


def stacked():
    rng = np.random.default_rng(1)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return {
        "blocks.*": {
            "attn1": {"to_q": {"kernel": normal(3, 4, 5), "bias": normal(3, 5)}, "norm_q": {"scale": normal(3, 5)}},
            "conv": {"kernel": normal(3, 3, 3, 2, 6)},
            "scale_shift_table": normal(3, 1, 6, 5),
            "gain": normal(3),
        },
        "proj_out": {"kernel": normal(5, 2)},
    }


STACKED = stacked()


def test_stacked_layers_have_a_tensor_each():
    state = to_torch(STACKED)
    assert {key: array.shape for key, array in state.items()} == torch_shapes(STACKED)
    assert torch_shapes(STACKED) == {
        "proj_out.weight": (2, 5),
        **{
            f"blocks.{i}.{name}": shape
            for i in range(3)
            for name, shape in {
                "attn1.to_q.weight": (5, 4),
                "attn1.to_q.bias": (5,),
                "attn1.norm_q.weight": (5,),
                "conv.weight": (6, 2, 3, 3),
                "scale_shift_table": (1, 6, 5),
                "gain": (),
            }.items()
        },
    }
    kernel = STACKED["blocks.*"]["attn1"]["to_q"]["kernel"]
    for i in range(3):
        np.testing.assert_array_equal(state[f"blocks.{i}.attn1.to_q.weight"], kernel[i].T)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_stacked_layers_come_back_on_the_host_and_on_devices(dtype):
    state = to_torch(STACKED)
    host = from_torch(state, STACKED, dtype=dtype)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b.astype(dtype)), host, STACKED))
    assert not any(np.shares_memory(leaf, array) for leaf in jax.tree.leaves(host) for array in state.values())
    places = infer_shardings(STACKED, make_mesh(), ((r"kernel$", PartitionSpec(None, "fsdp", "tensor")),))
    placed = from_torch(state, STACKED, dtype=dtype, shardings=places)
    jax.tree.map(np.testing.assert_array_equal, placed, host)
    assert jax.tree.map(lambda leaf: leaf.sharding, placed) == places


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.gain"), r"here: 1 missing tensors \(blocks\.1\.gain\); use the weights"),
        (
            lambda s: s.update({"blocks.3.gain": s["blocks.2.gain"]}),
            r"1 tensors that .* no place for \(blocks\.3\.gain\)",
        ),
        (
            lambda s: s.update({"blocks.*.gain": s["blocks.2.gain"]}),
            r"1 tensors that .* no place for \(blocks\.\*\.gain\)",
        ),
        (
            lambda s: s.update({"blocks.2.attn1.to_q.weight": s["blocks.2.attn1.to_q.weight"].T}),
            r"blocks\.2\.attn1\.to_q\.weight is \[4, 5\], config.json makes it \[5, 4\]",
        ),
        (lambda s: s["blocks.1.conv.weight"].fill(np.nan), r"NaN or .* in 1 tensors \(blocks\.1\.conv\.weight\)"),
    ],
)
@pytest.mark.parametrize("on_devices", [False, True])
def test_what_does_not_fit_in_stacked_layers_is_listed_by_its_tensor(change, message, on_devices):
    state = {key: array.copy() for key, array in to_torch(STACKED).items()}
    change(state)
    places = infer_shardings(STACKED, make_mesh(), ()) if on_devices else None
    with pytest.raises(UserError, match=message):
        from_torch(state, STACKED, "here", shardings=places)
