"""Runs Wan's transformer on one device and on meshes of eight and prints the differences, as JSON."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from vpo_jax.checkpoints.keys import from_torch, init_shapes, to_torch
from vpo_jax.families.wan.sharding import WAN_PARAMETER_RULES
from vpo_jax.models import attention
from vpo_jax.models.wan_transformer import WanTransformer3DModel, WanTransformerConfig
from vpo_jax.runtime.mesh import batch_sharding, infer_shardings, make_mesh
from vpo_jax.runtime.trees import flatten

CONFIG = WanTransformerConfig(
    num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=48,
    num_layers=2,
)  # fmt: skip
MODEL = WanTransformer3DModel(CONFIG, remat=True, remat_policy="attention")


def make_inputs():
    """(parameters, latents of 2 x 2 x 4 tokens, timesteps, text with zero rows left out), on the host."""
    rng = np.random.default_rng(0)
    sample, text = rng.normal(size=(8, 2, 4, 8, 4)), rng.normal(size=(8, 6, 16))
    text[:, 5] = 0
    inputs = (sample.astype(np.float32), np.linspace(1, 999, 8, dtype=np.float32), text.astype(np.float32))
    shapes = init_shapes(MODEL, *inputs)
    draw = lambda leaf: rng.normal(size=leaf.shape, scale=leaf.shape[-2] ** -0.5 if leaf.ndim > 2 else 0.3)  # noqa: E731
    return jax.tree.map(lambda leaf: draw(leaf).astype(np.float32), shapes), inputs


def run(model, mesh, params, inputs):
    """(prediction, gradient by path, sharded leaves) of the model on the mesh."""
    places = infer_shardings(params, mesh, WAN_PARAMETER_RULES)
    with jax.set_mesh(mesh):
        placed = from_torch(to_torch(params), params, shardings=places)
        inputs = jax.device_put(inputs, batch_sharding(mesh))

        @jax.jit
        def both(params, inputs):
            def loss(params):
                prediction = model.apply({"params": params}, *inputs)
                return jnp.square(prediction).mean(), prediction

            gradient, prediction = jax.grad(loss, has_aux=True)(params)
            return prediction, gradient

        prediction, gradient = jax.device_get(both(placed, inputs))
    return prediction, flatten(gradient), sum(not place.is_fully_replicated for place in jax.tree.leaves(places))


def read_by_layers(params):
    """Whether parameters whose layers lie on different devices are read as they were."""
    mesh = make_mesh(data=4, tensor=2)
    places = infer_shardings(params, mesh, ((r"\*/.*kernel$", PartitionSpec("tensor", None, "data")),))
    placed = from_torch(to_torch(params), params, shardings=places)
    return jax.tree.all(jax.tree.map(np.array_equal, placed, params))


def main():
    """Prints, of each mesh, the largest differences relative to the largest number."""
    params, inputs = make_inputs()
    first, one, _ = run(MODEL, make_mesh(1, devices=jax.devices()[:1]), params, inputs)
    # A backend that the compiler does not look into, as cuDNN's kernel.
    attention.BACKENDS["opaque"] = attention.BACKENDS["xla"]
    opaque = MODEL.clone(attention_backend="opaque")
    four = jax.devices()[:4]
    cases = {
        "data": (MODEL, make_mesh(8)),
        "fsdp": (MODEL, make_mesh(1, 8)),
        "context": (MODEL, make_mesh(1, 1, 8)),
        "tensor": (MODEL, make_mesh(1, 1, 1, 4, devices=four)),
        "together": (MODEL, make_mesh(1, 2, 2, 2)),
        "context, a kernel of its own": (opaque, make_mesh(1, 1, 4, 2)),
        "uneven context": (opaque, make_mesh(1, 1, 3, devices=jax.devices()[:3])),
    }
    found = {"by layers": bool(read_by_layers(params))}
    for name, (model, mesh) in cases.items():
        prediction, many, sharded = run(model, mesh, params, inputs)
        gradient = max(np.abs(many[path] - leaf).max() / np.abs(leaf).max() for path, leaf in one.items())
        difference = np.abs(prediction - first).max() / np.abs(first).max()
        found[name] = {"prediction": float(difference), "gradient": float(gradient), "sharded": sharded}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
