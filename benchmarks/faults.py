"""How often alarms ring: in runs of an embedded job as it is, and in runs that are broken on purpose.

    python benchmarks/faults.py [--config=configs/vpo.py:shapes_wan] [--config.a.b=c] [--faults=healthy,gate]
        [--seeds=0,1,2] [--workdir=runs/faults] [--output=FILE.json]

Every run is a process with a folder of its own in --workdir, and a finished one is not repeated: several commands with
other seeds may share the work, and the last one prints the table of all. `harmed` counts the runs whose result is
worse than the model that they began from: the judge, which trains nothing, prefers the base in more than half of the
pairs, or videos move less than 90 % as much. A fault that harms nothing needs no alarm.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from children import last_line
from rich.console import Console
from rich.table import Table

from vpo_jax.evaluation.alarms import LEAST_MOTION
from vpo_jax.rewards.protocol import DIMENSIONS
from vpo_jax.runtime import cli
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.metrics import read_metrics

# What each fault sets.
FAULTS: Mapping[str, Mapping[str, str]] = {
    "healthy": {},
    "margin": {"preference.margin": "0.0"},
    "gate": {"preference.motion_tolerance": "1000.0"},
    "rate": {"optimizer.learning_rate": "{learning_rate}"},
    "dimension": {"reward.weights": "{dimension}"},
    "still": {"reward.weights": "{dimension}", "preference.motion_tolerance": "1000.0"},
}
_ONLY = "temporal_consistency"  # a still video has the most of it


def main(argv: Sequence[str]) -> None:
    """Runs what is not there yet, and prints the table."""
    words, overrides = cli.split_overrides(argv)
    parser = cli.Parser("benchmarks.faults", (__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", default="configs/vpo.py:shapes_wan")
    parser.add_argument("--faults", default=",".join(FAULTS), help=f"comma-separated, of {', '.join(FAULTS)}")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--workdir", type=Path, default=Path("runs/faults"))
    parser.add_argument("--output", type=Path, help="JSON file to write beside what is printed")
    flags = parser.parse(words)
    faults, seeds = flags.faults.split(","), flags.seeds.split(",")
    if unknown := [name for name in faults if name not in FAULTS]:
        raise UserError(f"--faults: there is no {unknown[0]!r}; choose of {', '.join(FAULTS)}")
    if bad := [seed for seed in seeds if not seed.isdecimal()]:
        raise UserError(f"--seeds: {bad[0]!r} is not a whole number; give some as 0,1,2")
    workdir = flags.workdir.resolve()
    given = [f"--config.{key}={value}" for key, value in overrides]
    for seed in seeds:
        for fault in faults:
            train(flags.config, fault, seed, given, workdir / f"{fault}-{seed}")
    found = {fault: [outcome(folder) for folder in finished(workdir, fault)] for fault in FAULTS}
    found = {fault: runs for fault, runs in found.items() if runs}
    Console(width=120).print(table(found))
    if flags.output:
        flags.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def train(config: str, fault: str, seed: str, given: Sequence[str], folder: Path) -> None:
    """One run, unless it is finished.

    Raises:
      UserError: it failed, with its last words.
    """
    if (folder / "evaluation.json").is_file():
        return
    broken = [f"--config.{key}={value}" for key, value in broken_by(fault, cli.load_config(config))]
    words = [f"--config={config}", *given, *broken, f"--config.seed={seed}", f"--workdir={folder}"]
    print(f"{folder}: python -m vpo_jax.main {' '.join(words)}", flush=True)
    ran = subprocess.run([sys.executable, "-m", "vpo_jax.main", *words], cwd=cli.ROOT, capture_output=True, text=True)
    if ran.returncode:
        raise UserError(f"{folder}: {last_line(ran.stdout + ran.stderr, ran.returncode)}")


def broken_by(fault: str, config: Any) -> list[tuple[str, str]]:
    """What a fault sets in a config, as (key, text) pairs."""
    values = {
        "learning_rate": repr(10 * config.optimizer.learning_rate),
        "dimension": ",".join(f"shapes/{name}={int(name == _ONLY)}" for name in DIMENSIONS),
    }
    return [(key, text.format(**values)) for key, text in FAULTS[fault].items()]


def finished(workdir: Path, fault: str) -> list[Path]:
    """The folders of a fault's finished runs."""
    return sorted(file.parent for file in workdir.glob(f"{fault}-*/evaluation.json"))


def outcome(folder: Path) -> dict[str, Any]:
    """Of one run: the alarms that rang, the judge's win rate, motion beside the base's, whether it did harm."""
    lines = read_metrics(folder)
    rows = {
        f"{row['scorer']}/{row['dimension']}": row
        for row in json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["rows"]
    }
    judge, motion = rows["judge/overall"]["win_rate"], rows["shapes/dynamic_degree"]
    moves = motion["tuned_mean"] / motion["base_mean"]
    alarms = sorted({key.removeprefix("alarm/") for line in lines for key in line if key.startswith("alarm/")})
    return {
        "run": folder.name,
        "alarms": alarms,
        "judge": judge,
        "motion": moves,
        "winners": [line["policy/winner_error_change"] for line in lines if "policy/winner_error_change" in line],
        "harmed": judge < 0.5 or moves < LEAST_MOTION,
    }


def table(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    """A line a fault."""
    shown = Table("fault", "runs", "rang", "harmed", "harmed and rang", "judge", "motion", "alarms")
    for fault, runs in found.items():
        rang, harmed = [run for run in runs if run["alarms"]], [run for run in runs if run["harmed"]]
        both = [run for run in harmed if run["alarms"]]
        names = sorted({name for run in rang for name in run["alarms"]})
        counts = map(str, map(len, (runs, rang, harmed, both)))
        judge, motion = (" ".join(f"{run[key]:.2f}" for run in runs) for key in ("judge", "motion"))
        shown.add_row(fault, *counts, judge, motion, ", ".join(names))
    return shown


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
