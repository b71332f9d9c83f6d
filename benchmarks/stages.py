"""Seconds and memory of the stages of a full-size job on this machine, beside those of `vpo_jax.plan`.

    python benchmarks/stages.py --config=configs/vpo.py:modelscope --config.model.path=modelscope \
        --config.reward.scorers=videoscore [--config.a.b=c] [--stages=rollout,update] [--repeats=3] [--output=FILE.json]

Weights and inputs are random: configs by name download nothing. Each stage gets the inputs of one step; memory is what
the compiler allocates. Prints one line for each stage; one that fails, as for lack of memory, does not end the others.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
from measuring import chip_of, random_weights, repeated, timed

from vpo_jax.planning.chips import CHIPS, Topology
from vpo_jax.planning.fit import abstract_meshes, make_plan, measure_programs
from vpo_jax.planning.job import make_job
from vpo_jax.runtime import cli
from vpo_jax.runtime.backend import keep_compiled_programs
from vpo_jax.runtime.mesh import Rules, batch_sharding, infer_shardings, make_meshes, replicated
from vpo_jax.runtime.programs import Program, choose_programs
from vpo_jax.training.check import check

_NUMBER = 7  # valid as a token, a timestep and a row: every table has more entries


def main(argv: Sequence[str]) -> None:
    """Measures what the flags name."""
    words, overrides = cli.split_overrides(argv)
    parser = cli.Parser("benchmarks.stages", (__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", default="configs/vpo.py:modelscope")
    parser.add_argument("--stages", default="", help="comma-separated; none: every stage")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", default="", help="JSON file to write beside what is printed")
    flags = parser.parse(words)
    config = cli.load_config(flags.config)
    cli.override(config, overrides)
    config.data.prompts = config.data.prompts or "shapes:train"
    check(config)
    keep_compiled_programs()

    whole = make_job(config)
    job = dataclasses.replace(whole, programs=tuple(choose_programs(whole.programs, flags.stages)))
    device = jax.devices()[0]
    kind = chip_of(device) or CHIPS["h100"]  # an unknown device is compared with an H100
    topology = Topology(f"{len(jax.devices())} x {device.device_kind}", kind, len(jax.devices()))
    plan = make_plan(job, measure_programs(job), topology, abstract_meshes(config.mesh, topology.count))
    planned = {stage.name: stage for stage in plan.stages}
    meshes = make_meshes(config.mesh)
    found: dict[str, Any] = {"device": topology.name, "jax": jax.__version__, "floor_of": kind.name}
    rules = job.pipeline.family.sharding_rules
    for stage in job.programs:
        try:
            measured = measure(stage, getattr(meshes, stage.mesh), rules, flags.repeats)
        except jax.errors.JaxRuntimeError as error:  # most often memory: the other stages may fit
            found[stage.name] = {"error": str(error).partition("\n")[0]}
            print(stage.name, json.dumps(found[stage.name]), flush=True)
            cli.write_output(flags.output, found)
            continue
        floor = planned[stage.name].floor / stage.calls
        measured |= {
            "floor": floor,
            "tflop": planned[stage.name].flops / stage.calls / 1e12,
            "bound": planned[stage.name].bound,
            "share_of_floor": floor / measured["seconds"],
            "estimated_temporaries": planned[stage.name].temporaries,
        }
        print(stage.name, json.dumps(measured), flush=True)
        found[stage.name] = measured
        cli.write_output(flags.output, found)


def measure(program: Program, mesh: Any, rules: Rules, repeats: int) -> dict[str, Any]:
    """Of one call: {"seconds": ..., "compile_seconds": ..., "argument_bytes": ..., "temporary_bytes": ...}."""

    def placed(tree: Any, role: str) -> Any:
        if role == "parameters":
            return jax.device_put(random_weights(tree), infer_shardings(tree, mesh, rules))
        rows = batch_sharding(mesh) if role == "batch" else replicated(mesh)
        return jax.tree.map(lambda x: jax.device_put(_fill(x), rows if x.ndim else replicated(mesh)), tree)

    shapes = program.arguments(program.batch)
    with jax.set_mesh(mesh):
        arguments = [placed(tree, role) for tree, role in zip(shapes, program.roles, strict=True)]
        compiled, compiling = timed(lambda: program.function.lower(*arguments).compile())
        memory: Any = compiled.memory_analysis()
        timed(compiled, *arguments)
        seconds = repeated(repeats, compiled, *arguments)
    return {
        "batch": program.batch,
        "microbatch": program.microbatch,
        **seconds,
        "compile_seconds": compiling,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes,
    }


def _fill(shape: Any) -> jax.Array:
    if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0), shape.shape)
    if jnp.issubdtype(shape.dtype, jnp.floating):
        return jax.random.normal(jax.random.key(1), shape.shape, shape.dtype)
    if shape.dtype == jnp.uint8:
        return jax.random.bits(jax.random.key(2), shape.shape, shape.dtype)
    return jnp.full(shape.shape, _NUMBER, shape.dtype)


if __name__ == "__main__":
    cli.run(main)
