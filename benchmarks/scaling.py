"""Bytes that chips exchange in a step as their number grows, by compilation, and the efficiency of weak scaling.

    python benchmarks/scaling.py --config=configs/vpo.py:modelscope --config.model.path=modelscope \\
        --config.reward.scorers=videoscore [--slices=v5e:2x4,v5e:4x4,...] [--stages=update]

The prompts a chip are the same on every slice: the config's on the first one. The named stages are compiled for each
slice (libtpu: pip install -r requirements-tpu.txt). Efficiency is the first slice's time of a step over this one's. A
step's time is the calculated floor of its stages plus the time of the compiled collectives at the chip's published
bandwidth, without overlap.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

from vpo_jax.planning.chips import Topology, parse_topology
from vpo_jax.planning.compiled import compile_program, missing, topology_meshes
from vpo_jax.planning.fit import Lines, measure_programs
from vpo_jax.planning.job import Job, make_job
from vpo_jax.runtime import cli
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.programs import choose_programs
from vpo_jax.training.check import check, check_meshes

SLICES = "v5e:2x4,v5e:4x4,v5e:4x8,v5e:8x8,v5e:8x16,v5e:16x16"


def wire_bytes(collectives: Mapping[str, float], count: int) -> float:
    """Bytes that a chip sends on a ring of `count` chips for collectives with results of these bytes."""
    share = (count - 1) / count
    factors = {"all-reduce": 2 * share, "reduce-scatter": count - 1, "collective-permute": 1.0}
    return sum(size * factors.get(kind, share) for kind, size in collectives.items())


def step_seconds(job: Job, lines: Lines, topology: Topology, sent: Mapping[str, float]) -> float:
    """Floor of a step: each stage's arithmetic or memory, and `sent` (stage -> bytes a chip a call) on top."""
    total = 0.0
    for stage in job.programs:
        chunks = stage.calls * stage.batch / (stage.microbatch or stage.batch)
        cost = lines.on(stage.name, {}).at((stage.microbatch or stage.batch) / topology.count)
        total += chunks * max(cost.flops / topology.chip.flops, cost.traffic / topology.chip.bandwidth)
        total += stage.calls * sent.get(stage.name, 0.0) / topology.interconnect
    return total


def main(argv: Sequence[str], console: Console | None = None) -> None:
    """Prints a line for each slice."""
    words, overrides = cli.split_overrides(argv)
    parser = cli.Parser("benchmarks.scaling", (__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", default="configs/vpo.py:modelscope")
    parser.add_argument("--slices", default=SLICES, help="comma-separated, smallest first (default: %(default)s)")
    parser.add_argument("--stages", default="update", help="comma-separated, compiled (default: %(default)s)")
    parser.add_argument("--output", default="", help="JSON file to write beside what is printed")
    flags = parser.parse(words)
    topologies = [parse_topology(name) for name in flags.slices.split(",")]
    for topology in topologies:
        if why := missing(topology):
            raise UserError(f"--slices: {topology.name}: {why}")

    rows: list[dict[str, Any]] = []
    for topology in topologies:
        times = topology.count / topologies[0].count
        config = cli.load_config(flags.config)
        cli.override(config, overrides)
        config.data.prompts = config.data.prompts or "shapes:train"
        for section, field in (("train", "prompts_per_step"), ("rollout", "microbatch"), ("train", "microbatch")):
            config[section][field] = int(config[section][field] * times)
        check(config)
        job = make_job(config)
        chosen = choose_programs(job.programs, flags.stages)
        meshes = topology_meshes(topology, config.mesh)
        if meshes is None:
            raise UserError(f"--slices: libtpu counts the devices of {topology.name} in another way")
        check_meshes(config, meshes)
        rules = job.pipeline.family.sharding_rules
        compiled = {stage.name: compile_program(stage, meshes, rules) for stage in chosen}
        sent = {name: wire_bytes(found.collectives, topology.count) for name, found in compiled.items()}
        seconds = step_seconds(job, measure_programs(job), topology, sent)
        rows.append({
            "slice": topology.name,
            "chips": topology.count,
            "collectives": {name: dict(found.collectives) for name, found in compiled.items()},
            "sent": sum(stage.calls * sent[stage.name] for stage in chosen),
            "seconds": seconds,
            "efficiency": rows[0]["seconds"] / seconds if rows else 1.0,
            "compiled_in": sum(found.seconds for found in compiled.values()),
        })  # fmt: skip
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    (console or Console()).print(table_of(rows))
    cli.write_output(flags.output, rows)


def table_of(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A line for each slice."""
    table = Table("slice", "chips", "results of collectives a call, MB", "sent a step a chip, MB", "step's floor, s",
                  "efficiency")  # fmt: skip
    for row in rows:
        kinds = "; ".join(
            f"{stage} " + (", ".join(f"{kind} {size / 1e6:,.1f}" for kind, size in found.items()) or "none")
            for stage, found in row["collectives"].items()
        )
        sent, seconds = f"{row['sent'] / 1e6:,.1f}", f"{row['seconds']:.4f}"
        table.add_row(row["slice"], str(row["chips"]), kinds, sent, seconds, f"{row['efficiency']:.2%}")
    return table


if __name__ == "__main__":
    cli.run(main)
