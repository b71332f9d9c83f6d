"""Checks finished runs of the embedded job against minimum results.

    for seed in 0 1 2; do
        python -m vpo_jax.main --config=configs/vpo.py --config.seed=$seed --workdir=runs/seed-$seed
    done
    python benchmarks/learning.py runs/seed-0 runs/seed-1 runs/seed-2

Reads whether the reward of the run's own samples rose while it trained. Samples base and tuned of each run again, with
the same noise for both, and measures the videos: win rates from the training scorer and from the held-out
scorer `judge`, and the judge's measures in their own units. Exit code 1 where a minimum is missed.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from ml_collections import ConfigDict

from vpo_jax.evaluation.compare import Sampling, evaluate
from vpo_jax.evaluation.trend import reward_trend
from vpo_jax.evaluation.win_rate import mean_difference, win_rate
from vpo_jax.pipeline import load_pipeline
from vpo_jax.rewards.judge import JudgeReward
from vpo_jax.rewards.loading import load_rewards
from vpo_jax.runtime.backend import copies_on_cores, keep_compiled_programs, keep_freed_memory, share_cores
from vpo_jax.runtime.cli import Parser, run
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.metrics import read_metrics
from vpo_jax.runtime.paths import weights_bytes
from vpo_jax.shapes import judge, world

Scores = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Measures(JudgeReward):
    """The judge's eight measures as they are, in pixels, radians and shares."""

    name: str = "raw"
    dimensions: tuple[str, ...] = judge.MEASURES
    ranges: tuple[tuple[float, float], ...] = ((-1e6, 1e6),) * len(judge.MEASURES)

    def score(self, params: Any, videos: Any, prepared: Any) -> np.ndarray:
        measures = judge.measure(np.asarray(videos), [world.make_caption(row) for row in np.asarray(prepared)])
        return np.stack([measures[name] for name in judge.MEASURES], axis=1)


def measure(workdir: Path, samples: int) -> tuple[Scores, Scores]:
    """ "scorer/dimension" -> [P, S] of a finished run's base and tuned model, on the prompts of its comparison."""
    evaluation = json.loads((workdir / "evaluation.json").read_text(encoding="utf-8"))
    config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    sampling = Sampling(**evaluation["settings"] | {"samples": samples})
    settings = ConfigDict(config["reward"])
    rewards = [*load_rewards(settings.scorers, settings=settings), JudgeReward(), Measures()]
    base, tuned = (
        evaluate(load_pipeline(path), evaluation["prompts"], rewards, sampling)[0]
        for path in (config["model"]["path"], workdir / "export")
    )
    return base, tuned


def bars(base: Scores, tuned: Scores, trained: Sequence[str]) -> list[tuple[str, str, bool]]:
    """(what, value, cleared) for each bar of one run; `trained` are the dimensions of the training scorers."""
    found: list[tuple[str, str, bool]] = []
    summed = [np.sum([scores[name] for name in trained], axis=0) for scores in (base, tuned)]
    reward = win_rate(summed[0], summed[1])
    overall = win_rate(base["judge/overall"], tuned["judge/overall"])
    for name, rate, least in (("scorer's win rate", reward, 0.80), ("judge's win rate", overall, 0.65)):
        cleared = rate.rate >= least and rate.low > 0.55
        found.append(
            (f"{name} >= {least:.2f}, low > 0.55", f"{rate.rate:.3f} [{rate.low:.3f}, {rate.high:.3f}]", cleared)
        )

    mean = {name: [float(np.nanmean(scores[f"raw/{name}"])) for scores in (base, tuned)] for name in judge.MEASURES}
    before, after = (sum(mean[name][i] / judge.CLEAN_MEAN[name] for name in ("flicker", "jitter")) for i in (0, 1))
    parts = ", ".join("{} {:.4f} to {:.4f}".format(name, *mean[name]) for name in ("flicker", "jitter"))
    change = after / before - 1
    found.append(("flicker + jitter in clean units <= -25 %", f"{change:+.1%} ({parts})", change <= -0.25))
    slow, fast = mean["speed"]
    found.append(("speed >= 90 % of base", f"{fast / slow:.1%} ({slow:.3f} to {fast:.3f})", fast >= 0.9 * slow))
    for name in ("color", "shape", "size"):
        gain = mean_difference(base[f"judge/{name}"], tuned[f"judge/{name}"])
        value = f"{gain.rate:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}] clean deviations"
        found.append((f"{name} not worse beyond noise", value, gain.high >= 0))
    return found


def online_bar(workdir: Path) -> tuple[str, str, bool]:
    """Whether the run's own samples got better while it trained: no average and no extrapolation is in them."""
    found = reward_trend(read_metrics(workdir))
    if found is None:
        return "rollouts' reward rises, low > 0", "too few steps", False
    quarters = " ".join(f"{value:.4f}" for value in found.quarters)
    value = f"{found.difference:+.4f} [{found.low:+.4f}, {found.high:+.4f}] (quarters {quarters})"
    return "rollouts' reward rises, low > 0", value, found.low > 0


def main(argv: Sequence[str]) -> None:
    """Prints the bars of each run."""
    parser = Parser("benchmarks.learning", (__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="workdirs of finished runs")
    parser.add_argument("--samples", type=int, default=1, help="of each prompt")
    flags = parser.parse(argv)
    for folder in flags.runs:
        if not (folder / "evaluation.json").is_file():
            raise UserError(f"runs: {folder} is no finished run: it has no evaluation.json; give a run's --workdir")
    keep_compiled_programs()
    keep_freed_memory()
    share_cores(copies_on_cores(weights_bytes(folder / "export" for folder in flags.runs)))
    missed = 0
    for folder in flags.runs:
        base, tuned = measure(folder, flags.samples)
        trained = [name for name in base if name.split("/")[0] not in ("judge", "raw", "frames")]
        prompts, samples = next(iter(base.values())).shape
        print(f"{folder}: {prompts} prompts, {samples} samples of each")
        for what, value, cleared in (online_bar(folder), *bars(base, tuned, trained)):
            print(f"  {'ok    ' if cleared else 'MISSED'} {what:44s} {value}", flush=True)
            missed += not cleared
    if missed:
        raise SystemExit(1)


if __name__ == "__main__":
    run(main, sys.argv[1:])
