"""docs/speed.md from what benchmarks/gpu.py and benchmarks/peer.py measured.

    python benchmarks/report.py [--results=DIR] [--output=docs/speed.md]

Reads every JSON file of full-size results in DIR, benchmarks/results. Where there is none it writes nothing.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vpo_jax.runtime import cli
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.files import write_text_atomically
from vpo_jax.runtime.paths import user_path

_HEAD = """# Measured speed

A time is the median of repeated calls after the first, which compiles. The JSON files in `benchmarks/results` hold
every repeat, and the commands.

    python benchmarks/gpu.py
    python benchmarks/peer.py --output=benchmarks/results/peer.json
    python benchmarks/report.py
"""
_ON_A_GPU = """Full sizes with random weights, one GPU. A share is of the data sheet's dense bfloat16 peak; FLOPs are
those of matrix products and convolutions.
"""
_ON_A_CPU = """The embedded job in float32 beside the same work in PyTorch with diffusers: {videos} videos a rollout, an
update of {learnt} by {passes} forward passes. The sides took turns on the same cores, and their latents, losses and
gradients agree. `compiled` is torch.compile.
"""
_MEASURED = ("", "s", "TFLOP", "share of peak", "peak memory, GB", "speed beside diffusers")
_PEERS = ("", "cores", "side", "s", "least, s", "times ours", "speed-up by cores")
_PHASES = ("phase of the step", "s", "floor, s", "share of the floor")


def main(argv: Sequence[str]) -> None:
    """Writes the page."""
    parser = cli.Parser("benchmarks.report", (__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--output", default=str(cli.ROOT / "docs" / "speed.md"))
    flags = parser.parse(argv)
    found = [read(file) for file in sorted(flags.results.glob("*.json"))]
    full = [one for one in found if one["size"] == "full"]
    if not full:
        print(f"{flags.results} has no results of full size: nothing is written; measure with benchmarks/gpu.py")
        return
    gpus = [section(one) for one in full if "results" in one]
    cpus = [peer_section(one) for one in full if "peer" in one]
    page = "\n".join([_HEAD, *([_ON_A_GPU] if gpus else []), *gpus, *cpus])
    try:
        write_text_atomically(user_path(flags.output, "--output"), page)
    except OSError as error:
        raise UserError(f"--output: {flags.output} cannot be written: {error.strerror}") from error
    print(f"{flags.output}: {', '.join(one['device'] for one in full)}")


def read(file: Path) -> dict[str, Any]:
    """The results of a file.

    Raises:
      UserError: it is none of `gpu.py` or `peer.py`.
    """
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--results: {file} cannot be read ({error}); remove it") from error
    if not any({"device", "size", rows} <= set(found) for rows in ("results", "peer")):
        raise UserError(f"--results: {file} is no file of benchmarks/gpu.py or benchmarks/peer.py; remove it")
    return found


def section(machine: Mapping[str, Any]) -> str:
    """A device: its table, the phases of its step, what is not measured, and versions."""
    results = {one["name"]: one for one in machine["results"]}
    measured = {name: one for name, one in results.items() if "seconds" in one}
    lines = [f"## {machine['device']}\n"]
    if measured:
        lines.append(_table(_MEASURED, [_row(name, one, measured) for name, one in measured.items()]))
    if "step" in measured:
        step = measured["step"]
        lines.append(
            f"A step has {step['videos_a_step']} videos. The first takes {step['first_step_seconds']:.0f} s.\n"
        )
        lines.append(_table(_PHASES, [_phase(name, one) for name, one in step["phases"].items()]))
    if rest := [one for one in results.values() if "seconds" not in one]:
        lines.append("Not measured:\n")
        lines.append("".join(f"- {one['name']}: {one.get('error') or one['skipped']}\n" for one in rest))
    lines.append("".join(_versions(measured)))
    return "\n".join(lines)


def peer_section(machine: Mapping[str, Any]) -> str:
    """A CPU: the embedded job beside PyTorch, and versions."""
    rows = machine["peer"]
    found = {(row["stage"], row["cores"], row["side"]): row["seconds"] for row in rows}
    fewest = min(row["cores"] for row in rows)
    shown = []
    for row in sorted(rows, key=lambda row: (row["stage"], row["cores"])):
        stage, cores, side = row["stage"], row["cores"], row["side"]
        ratio = "" if side == "ours" else f"{row['seconds'] / found[stage, cores, 'ours']:.2f}"
        gain = "" if cores == fewest else f"{found[stage, fewest, side] / row['seconds']:.2f}"
        shown.append((stage, str(cores), side, _digits(row["seconds"]), _digits(row["least"]), ratio, gain))
    videos = machine["prompts"] * machine["candidates"]
    learnt = f"{videos} videos" if machine["update"] == "group" else f"{machine['prompts']} pairs"
    lines = [
        f"## {machine['device']}\n",
        _ON_A_CPU.format(videos=videos, learnt=learnt, passes=machine["passes"]),
        _table(_PEERS, shown),
        "".join(_versions({machine["command"]: machine})),
    ]
    return "\n".join(lines)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (heads, ["---"] * len(heads), *rows))


def _row(name: str, found: Mapping[str, Any], measured: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    group, _, how = name.partition("/")
    peer = measured.get(f"{group}/diffusers") if how else None
    memory = found.get("peak_bytes")
    return (
        name,
        _digits(found["seconds"]),
        _digits(found.get("tflop")),
        f"{found['share_of_peak']:.0%}" if "share_of_peak" in found else "",
        f"{memory / 1e9:.1f}" if memory else "",
        f"{peer['seconds'] / found['seconds']:.2f} times" if peer and peer is not found else "",
    )


def _phase(name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    share = found.get("share_of_floor")
    return name, _digits(found["seconds"]), _digits(found.get("floor")), f"{share:.0%}" if share else ""


def _digits(value: float | None) -> str:
    """Three digits, never as a power of ten; "" of nothing."""
    if not value:
        return ""
    text = f"{value:.3g}"
    return f"{value:.0f}" if "e+" in text else text


def _versions(measured: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A line for each set of versions, with the results that were measured with it where there are several."""
    groups: dict[str, list[str]] = {}
    for name, found in measured.items():
        said = ", ".join(f"{what} {value}" for what, value in found["versions"].items() if value)
        groups.setdefault(said, []).append(name)
    for said, names in groups.items():
        yield f"Measured with {said}{': ' + ', '.join(names) if len(groups) > 1 else ''}.\n"


if __name__ == "__main__":
    cli.run(main)
