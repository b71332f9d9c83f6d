"""Plans a job before it runs: whether it fits, the least cost of a step, and the smallest mesh that holds it.

python -m vpo_jax.plan --config=configs/vpo.py [--config.a.b=c] [--topology=v5e:4x4 | gpu:8xh100] [--price=1.2]
"""

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from vpo_jax.models.attention import check_attention
from vpo_jax.models.fused_attention import as_shapes
from vpo_jax.planning.chips import CHIPS, TPUS, Topology, parse_topology
from vpo_jax.planning.compiled import compile_program, mismatch, missing, topology_meshes
from vpo_jax.planning.fit import Plan, abstract_meshes, make_plan, make_split_plan, measure_programs
from vpo_jax.planning.job import make_job
from vpo_jax.planning.propose import propose
from vpo_jax.planning.show import (
    compiled_table,
    describe_job,
    plan_as_json,
    plan_tables,
    proposals_text,
    result_text,
)
from vpo_jax.runtime import cli
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.fingerprint import expand_paths
from vpo_jax.runtime.paths import check_output_file
from vpo_jax.runtime.programs import choose_programs
from vpo_jax.training.check import check, check_context, check_meshes
from vpo_jax.training.policy import DTYPES

CONFIG = "configs/vpo.py"


def main(argv: Sequence[str], console: Console | None = None) -> None:
    """Prints the plan that the flags ask for."""
    console = console or Console()
    words, overrides = cli.split_overrides(argv)
    parser = cli.Parser("vpo_jax.plan", (__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", default=CONFIG, help="FILE.py or FILE.py:PRESET (default: %(default)s)")
    parser.add_argument("--topology", default="", help="v5e:4x4, v5p:4x4x4, gpu:8xh100, ...; none: every kind of chip")
    parser.add_argument("--price", type=float, default=0.0, help="of one device for one hour, in any currency")
    parser.add_argument(
        "--utilisation", type=float, default=0.4, help="share of the floor's speed that a run reaches (default: 0.4)"
    )
    parser.add_argument("--analytic", action="store_true", help="formulas only, also where libtpu could compile")
    parser.add_argument("--stages", default="", help="comma-separated, compiled; none: every stage")
    parser.add_argument("--output", default="", help="also write the plan here, as JSON")
    flags = parser.parse(words)
    if flags.output:
        flags.output = check_output_file(flags.output, "--output")
    if not 0 < flags.utilisation <= 1:
        raise UserError(f"--utilisation: {flags.utilisation} is not above 0 and at most 1")
    if not 0 <= flags.price < float("inf"):
        raise UserError(f"--price: {flags.price} is not a price")
    topology = parse_topology(flags.topology) if flags.topology else None
    config = cli.load_config(flags.config)
    cli.override(config, overrides)
    config.data.prompts = config.data.prompts or "shapes:train"  # the cost does not depend on their words
    check(config)
    fused = [key for key, value in cli.flatten_config(config) if key.endswith(".attention") and value == "cudnn"]
    if topology and topology.is_tpu and fused:
        raise UserError(
            f"{fused[0]}: cudnn is a kernel of NVIDIA's GPUs, and {topology.name} has none; set --config.{fused[0]}=xla"
        )
    with as_shapes():  # of the devices that are planned
        check_attention("model.attention", config.model.attention, DTYPES[config.model.dtype])
    expand_paths(config)
    apart = config.reward.devices
    if apart and topology is None:
        raise UserError(f"--topology: name one, of which reward.devices={apart} score; or plan with reward.devices=0")
    if topology and apart >= topology.count:
        most = topology.count - 1
        raise UserError(
            f"reward.devices: {apart} of {topology.count} devices leave none to train on; give at most {most}"
        )
    meshes = abstract_meshes(config.mesh, topology.count - apart, apart) if topology else None
    job = make_job(config)
    if topology and meshes:
        try:
            check_meshes(config, meshes)
            check_context(meshes, job.pipeline.family.context_length(*job.size))
        except UserError:
            if not apart:  # what would be right is said before what is wrong
                best = propose(job, measure_programs(job), topology.chip, [topology.count])
                console.print(_best_text(best, topology, flags), soft_wrap=True, highlight=False)
            raise
    chosen = choose_programs(job.programs, flags.stages)
    console.print(describe_job(job), soft_wrap=True, highlight=False)
    lines = measure_programs(job)
    written: dict[str, Any] = {}
    if topology is None or meshes is None:
        tried = {name: chip for name, chip in CHIPS.items() if not (fused and name in TPUS)}
        proposals = {name: propose(job, lines, chip) for name, chip in tried.items()}
        console.print(proposals_text(proposals, flags.price, flags.utilisation), soft_wrap=True, highlight=False)
        if fused:
            console.print(
                f"  not TPUs: {fused[0]}=cudnn is a kernel of NVIDIA's GPUs; plan them with xla", highlight=False
            )
        written["proposals"] = {name: plan_as_json(plan) for name, plan in proposals.items()}
    elif apart:
        train, score, both = make_split_plan(job, lines, topology, meshes)
        for part in (*plan_tables(train), *plan_tables(score), result_text(both, flags.price, flags.utilisation)):
            console.print(part, soft_wrap=True, highlight=False)
        console.print("not compiled: scorers have devices of their own", highlight=False)
        written |= {"plan": plan_as_json(train), "scoring": plan_as_json(score), "seconds": both.seconds}
    else:
        plan = make_plan(job, lines, topology, meshes)
        for part in (*plan_tables(plan), result_text(plan, flags.price, flags.utilisation)):
            console.print(part, soft_wrap=True, highlight=False)
        written["plan"] = plan_as_json(plan)
        best = propose(job, lines, topology.chip, [topology.count])
        smallest = best if best and best.fits and topology.count == 1 else propose(job, lines, topology.chip)
        for proposed in (
            _best_text(best, topology, flags),
            proposals_text({topology.chip.name: smallest}, flags.price, flags.utilisation),
        ):
            console.print(proposed, soft_wrap=True, highlight=False)
        written |= {"best": plan_as_json(best), "smallest": plan_as_json(smallest)}
        why = "--analytic" if flags.analytic else missing(topology)
        described = None if why else topology_meshes(topology, config.mesh)
        if described is None:
            console.print(f"not compiled: {why or 'libtpu counts its devices in another way'}", highlight=False)
        else:
            if warning := mismatch():
                print(f"warning: {warning}", file=sys.stderr)
            compiled = {}
            for program in chosen:
                print(f"compiling {program.name}: ", end="", file=sys.stderr, flush=True)
                rules = job.pipeline.family.sharding_rules
                found = compiled[program.name] = compile_program(program, described, rules)
                print(f"{found.seconds:.0f} s, temporaries {found.temporaries / 1e9:.3g} GB", file=sys.stderr)
            console.print(compiled_table(compiled, plan))
            written["compiled"] = {name: result._asdict() for name, result in compiled.items()}
    cli.write_output(flags.output, written)


def _best_text(best: Plan | None, topology: Topology, flags: Any) -> str:
    title = f"fastest mesh of {topology.name} that holds the job"
    return proposals_text({topology.name: best}, flags.price, flags.utilisation, title)


if __name__ == "__main__":
    cli.run(main)
