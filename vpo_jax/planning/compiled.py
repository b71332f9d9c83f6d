"""Ahead-of-time compilation for TPUs that are not attached: libtpu compiles on any x86 host."""

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from packaging.requirements import Requirement

from vpo_jax.planning.chips import Topology
from vpo_jax.runtime.mesh import Meshes, Rules, batch_sharding, infer_shardings, make_meshes, replicated
from vpo_jax.runtime.programs import Program

# Settings that libtpu reads from the machine; any worker of any slice is valid.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-16",
    "TPU_WORKER_ID": "0",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is used, so several plans may run at once
}
_WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}
_COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\(")
# The results of these, started, hold their operands first; an all-reduce's do not.
_OPERANDS_TOO = ("all-gather", "collective-permute")


class Compiled(NamedTuple):
    """The compiler's numbers for a program, per chip.

    Attributes:
      arguments, temporaries, outputs: bytes.
      flops: by the compiler's count; a loop's body counts once.
      collectives: kind -> bytes of the results; a loop's body counts once.
      seconds: that compiling took.
    """

    arguments: int
    temporaries: int
    outputs: int
    flops: float
    collectives: Mapping[str, int]
    seconds: float


def missing(topology: Topology) -> str:
    """Why nothing can be compiled for the topology; "" where it can."""
    if not topology.is_tpu:
        return "there is no compiler for GPUs that are not attached"
    if importlib.util.find_spec("libtpu") is None:
        return "libtpu is not installed (pip install -r requirements-tpu.txt)"
    return ""


def mismatch() -> str:
    """A warning where libtpu is not the version that this JAX requires, and may not read its programs; else ""."""
    asked = [Requirement(text) for text in importlib.metadata.requires("jax") or () if text.startswith("libtpu")]
    try:
        found = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:  # installed without pip
        return ""
    if any(found not in requirement.specifier for requirement in asked):
        return f"libtpu {found} is not the one that JAX asks for ({asked[0].specifier}): pip install 'jax[tpu]'"
    return ""


def topology_meshes(topology: Topology, axes: Mapping[str, Any]) -> Meshes | None:
    """A config's meshes on a described slice; None where libtpu counts its devices in another way."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    sides = [int(side) for side in topology.name.partition(":")[2].split("x")]
    # A host of its four chips, unless the slice is smaller.
    host: Any = {"chips_per_host_bounds": [min(sides[0], 2), min(sides[1], 2), 1]} if min(sides[:2]) < 2 else {}
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **host)
    if len(described.devices) != topology.count:
        return None
    return make_meshes(axes, devices=described.devices)


def compile_program(program: Program, meshes: Meshes, rules: Rules) -> Compiled:
    """Compiles a program at its full batch with the shardings that a run gives it."""
    mesh = getattr(meshes, program.mesh)

    def placed(tree: Any, role: str) -> Any:
        if role == "parameters":
            shardings = infer_shardings(tree, mesh, rules)
        else:
            rows = batch_sharding(mesh) if role == "batch" else replicated(mesh)
            shardings = jax.tree.map(lambda x: rows if x.ndim else replicated(mesh), tree)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)

    arguments = [placed(tree, role) for tree, role in zip(program.arguments(program.batch), program.roles, strict=True)]
    began = time.perf_counter()
    with jax.set_mesh(mesh), _no_cache():
        compiled = program.function.lower(*arguments).compile()
    memory: Any = compiled.memory_analysis()
    costs: Any = compiled.cost_analysis() or {}
    return Compiled(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes,
        float(costs.get("flops", 0.0)),
        collectives_of(compiled.as_text() or ""),
        time.perf_counter() - began,
    )


@contextlib.contextmanager
def _no_cache() -> Any:
    # An executable for a described topology cannot be read back from the cache.
    config: Any = jax.config
    before = config.jax_enable_compilation_cache
    config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        config.update("jax_enable_compilation_cache", before)


def collectives_of(text: str) -> dict[str, int]:
    """Bytes of the results of every collective in a program's HLO text, by kind."""
    total: dict[str, int] = {}
    for shapes, kind, started in _COLLECTIVE.findall(text):
        sizes = [
            _WIDTHS.get(dtype, 4) * int(np.prod([int(n) for n in dims.split(",") if n], dtype=np.int64))
            for dtype, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes)
        ]
        if started and kind == "collective-permute":
            sizes = sizes[:2]  # two counters follow
        if started and kind in _OPERANDS_TOO:
            sizes = sizes[len(sizes) // 2 :]
        # The compiler joins small ones: every array of the tuple is sent.
        if sizes:
            total[kind] = total.get(kind, 0) + sum(sizes)
    return total
