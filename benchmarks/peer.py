"""Seconds of the embedded job's rollout and update on a CPU, beside the same work in PyTorch with diffusers.

    python benchmarks/peer.py [--update=group|pairs] [--peer=eager,compiled] [--cores=1,2] [--repeats=5]
        [--passes=3|2] [--small] [--output=benchmarks/results/peer.json]

The rollout is 64 videos of five guided steps, without encoding and decoding. The update learns from all 64, or with
--update=pairs from eight pairs, through adapters on every layer: forward passes of the policy and of the reference, a
third with the gradient, AdamW, the average. PyTorch could leave out the first one: --passes=2. Each side is a process
that may use no other cores. They take turns, so that only one works at a time, and each repeat asks all of them; the
next number of cores follows with processes of its own. Two calls that compile come before. Weights, noise and texts are
the same, and so must be the latents, the loss and the gradients, or nothing is reported. `benchmarks/report.py` makes
docs/speed.md of the output.

Memory: about 5 GB for each side. Run it on a machine that does nothing else.
"""

import contextlib
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from children import Worker
from measuring import versions
from peer_sides import PRESETS, Case, config_of
from rich.console import Console
from rich.table import Table

from vpo_jax.runtime import cli
from vpo_jax.runtime.errors import UserError

HERE = Path(__file__).resolve().parent
STAGES = ("rollout", "update")
PEERS = ("eager", "compiled")
# Most that float32 rounding may make of the difference, as a share of the scale. It grows over the denoising steps in
# latents, and over positions in gradients. A mean error is right to 1e-7, and beta = 1000 multiplies it in the loss.
LIMITS = {"latents": 1e-4, "loss": 1e-4, "norm": 1e-4, "gradient": 1e-3}

Result = dict[str, Any]


def main(argv: Sequence[str], console: Console | None = None) -> None:
    """Measures what the flags name."""
    parser = cli.Parser("benchmarks.peer", (__doc__ or "").partition("\n")[0])
    parser.add_argument("--update", choices=tuple(PRESETS), default="group")
    parser.add_argument("--peer", default="eager,compiled", help="comma-separated; compiled is torch.compile")
    parser.add_argument("--cores", default="1,2", help="comma-separated numbers")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--passes", type=int, choices=(3, 2), default=3, help="forward passes of PyTorch's update")
    parser.add_argument("--small", action="store_true", help="a few videos, to try the command")
    parser.add_argument("--output", default="", help="JSON file to write beside what is printed")
    flags = parser.parse(argv)
    peers, cores = _peers(flags.peer), _cores(flags.cores)
    if flags.repeats < 1:
        raise UserError(f"--repeats: {flags.repeats} is too few; give 1 or more")
    with tempfile.TemporaryDirectory() as folder:
        sides = ("ours", *peers)
        case = Case("ours", cores[0], flags.update, flags.passes, flags.small, folder)
        cases = [[case._replace(side=side, cores=count) for side in sides] for count in cores]
        rows = [row for together in cases for row in measure(together, case, flags.repeats)]
        apart = {one.name: difference(case, one) for together in cases for one in together if one != case}
    config = config_of(case)
    result = {
        "device": _processor(),
        "size": "small" if flags.small else "full",
        "update": flags.update,
        "passes": flags.passes,
        "prompts": config.train.prompts_per_step,
        "candidates": config.rollout.candidates,
        "apart": apart,
        "peer": rows,
        "command": " ".join(["python benchmarks/peer.py", *argv]),
        "versions": versions(),
    }
    console = console or Console(width=120)
    for table in (times(rows), gains(rows), differences(apart)):
        console.print(table)
    cli.write_output(flags.output, result)


def _peers(names: str) -> list[str]:
    found = [name.strip() for name in names.split(",") if name.strip()]
    for name in found:
        if name not in PEERS:
            raise UserError(f"--peer: {name} is none{cli.nearest(name, PEERS)}; choose of {', '.join(PEERS)}")
    return found


def _cores(counts: str) -> list[int]:
    there = len(os.sched_getaffinity(0))
    try:
        found = [int(count) for count in counts.split(",")]
    except ValueError as error:
        raise UserError(f"--cores: {counts} are no numbers; give them as 1,2") from error
    for count in found:
        if not 1 <= count <= there:
            raise UserError(f"--cores: {count} is not possible, this process may use {there}; give 1 to {there}")
    return found


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "CPU"


def measure(cases: Sequence[Case], ours: Case, repeats: int) -> list[Result]:
    """Of each stage of each case: its median, least and all seconds, and those of the first call.

    Args:
      cases: that take turns.
      ours: what is right; it has been measured, or is the first of the cases.
      repeats: calls that are timed.

    Raises:
      UserError: a process has ended, or computes something else than ours.
    """
    first: dict[tuple[Case, str], float] = {}
    seconds: dict[tuple[Case, str], list[float]] = {}
    place = sorted(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        workers: dict[Case, Worker] = {}

        def ask(case: Case, stage: str) -> float:
            try:
                found = workers[case].ask({"stage": stage})
            except RuntimeError as error:
                raise UserError(f"--peer: the process of {case.name} failed: {error}") from error
            if found["cores"] != case.cores:
                raise UserError(f"--cores: {case.name} is now on {found['cores']}; another program has changed it")
            return float(found["seconds"])

        for case in cases:
            command = [str(HERE / "peer_sides.py"), json.dumps(case._asdict())]
            log = Path(case.folder, f"{case.name}.log")
            workers[case] = stack.enter_context(Worker(command, place[: case.cores], log))
            for stage in STAGES:
                first[case, stage] = ask(case, stage)
                ask(case, stage)  # what the second call may compile anew
            difference(ours, case)
            print(f"{case.name} is ready", file=sys.stderr, flush=True)
        for _ in range(repeats):
            for stage in STAGES:
                for case in cases:
                    seconds.setdefault((case, stage), []).append(ask(case, stage))
    return [
        {
            "stage": stage,
            "side": case.side,
            "cores": case.cores,
            "seconds": statistics.median(found),
            "least": min(found),
            "all_seconds": found,
            "first_seconds": first[case, stage],
        }
        for (case, stage), found in seconds.items()
    ]


def difference(ours: Case, case: Case) -> dict[str, float]:
    """How far what a case computed is from ours: max |difference| as a share of ours' scale, its max |value|.

    "gradient" is that of the adapter that differs most from its own scale.

    Raises:
      UserError: something differs by more than `LIMITS`.
    """
    found = dict.fromkeys(LIMITS, 0.0)
    for stage in STAGES:
        wanted, other = (np.load(Path(ours.folder, f"{one.name}-{stage}.npz")) for one in (ours, case))
        if set(wanted) != set(other):
            raise UserError(f"--peer: {case.name} has other arrays in its {stage}; this is an error of the benchmark")
        for key in wanted:
            name = key.partition("/")[0]
            scale = max(float(np.abs(wanted[key]).max()), 1e-30)
            # Unlike `max`, keeps what is not a number.
            found[name] = float(np.maximum(found[name], np.abs(wanted[key] - other[key]).max() / scale))
    for name, limit in LIMITS.items():
        if not found[name] <= limit:
            raise UserError(
                f"--peer: {name} of {case.name} is {found[name]:.1e} of its scale from ours, above {limit:.0e};"
                " the two do not do the same work, and their times are not comparable"
            )
    return found


def _by_place(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int, str], float]:
    return {(row["stage"], row["cores"], row["side"]): row["seconds"] for row in rows}


def times(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Medians, and how many times ours a peer takes."""
    sides = list(dict.fromkeys(row["side"] for row in rows))
    ratios = [f"{side} / ours" for side in sides[1:]]
    table = Table("", "cores", *(f"{side}, s" for side in sides), *ratios, title="median seconds")
    found = _by_place(rows)
    for stage, cores in dict.fromkeys((row["stage"], row["cores"]) for row in rows):
        seconds = [found[stage, cores, side] for side in sides]
        shown = [f"{one:.3f}" for one in seconds] + [f"{one / seconds[0]:.2f}" for one in seconds[1:]]
        table.add_row(stage, str(cores), *shown)
    return table


def gains(rows: Sequence[Mapping[str, Any]]) -> Table:
    """How many times faster more cores are than the fewest; the least seconds, and those of the first call."""
    table = Table("", "side", "cores", "speed-up", "least, s", "first call, s", title="cores")
    found = _by_place(rows)
    fewest = min(row["cores"] for row in rows)
    for row in sorted(rows, key=lambda row: row["stage"]):
        gain = found[row["stage"], fewest, row["side"]] / row["seconds"]
        least, first = f"{row['least']:.3f}", f"{row['first_seconds']:.1f}"
        table.add_row(row["stage"], row["side"], str(row["cores"]), f"{gain:.2f}", least, first)
    return table


def differences(apart: Mapping[str, Mapping[str, float]]) -> Table:
    """What `difference` found."""
    table = Table("", *LIMITS, title="max |difference| from ours, of the scale")
    for name, found in apart.items():
        table.add_row(name, *(f"{found[key]:.1e}" for key in LIMITS))
    return table


if __name__ == "__main__":
    cli.run(main)
