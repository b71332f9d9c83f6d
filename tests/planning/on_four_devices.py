"""One block of Wan compiled for meshes of four devices: prints what XLA and the planner say, for `test_layout.py`."""

import json
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from vpo_jax.families.wan.published import PUBLISHED
from vpo_jax.families.wan.sharding import WAN_PARAMETER_RULES
from vpo_jax.models.wan_transformer import WanTransformer3DModel, WanTransformerConfig
from vpo_jax.planning.compiled import collectives_of
from vpo_jax.planning.cost import trace
from vpo_jax.planning.layout import Sizes, of_spec
from vpo_jax.runtime.mesh import BATCH, abstract_mesh, infer_shardings, make_mesh

SMALL = {"num_layers": 1, "num_attention_heads": 4, "attention_head_dim": 32, "ffn_dim": 512, "text_dim": 64}


def main() -> None:
    """For each mesh of the argument, a JSON list of sizes by axis: FLOPs, bytes and collectives of a gradient."""
    config = WanTransformerConfig.from_dict({**PUBLISHED["wan2.1-1.3b"]["transformer"], **SMALL})
    model = WanTransformer3DModel(config, remat=True, text_length=16)
    rows = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 4, 32, 32, 16), (1,), (1, 16, 64))]
    params = jax.eval_shape(model.init, jax.random.key(0), *rows)["params"]

    def gradient(params, *inputs):
        return jax.grad(lambda tree: jnp.sum(model.apply({"params": tree}, *inputs) ** 2))(params)

    shardings = jax.tree.leaves(infer_shardings(params, abstract_mesh(), WAN_PARAMETER_RULES))
    layouts = [of_spec(s.spec, x.shape, 1) for s, x in zip(shardings, jax.tree.leaves(params), strict=True)]
    layouts += [of_spec(BATCH, x.shape, 1) for x in rows]
    profile = trace(gradient, (params, *rows), layouts)
    found = []
    for sizes in json.loads(sys.argv[1]):
        mesh = make_mesh(1, **sizes)
        own = infer_shardings(params, mesh, WAN_PARAMETER_RULES)
        placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, own)
        batch = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, BATCH)) for x in rows]
        with jax.set_mesh(mesh):
            compiled = jax.jit(gradient, out_shardings=own).lower(placed, *batch).compile()
        memory = compiled.memory_analysis()
        found.append({
            "estimated": profile.on(Sizes(sizes))._asdict(),
            "flops": compiled.cost_analysis()["flops"],
            "bytes": memory.temp_size_in_bytes + memory.output_size_in_bytes,
            "collectives": collectives_of(compiled.as_text()),
        })  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
