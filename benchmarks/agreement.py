"""How well a scorer's dimensions rank samples of one prompt, measured by scorers that are not used for training.

    python benchmarks/agreement.py --model=shapes --prompts=shapes:tune --scorers=shapes --held_out=judge

Training pairs are made within a prompt. A dimension that ranks only between prompts is therefore useless, and one with
a negative correlation trains the opposite. Each number is Spearman's rank correlation of a dimension and a measure,
both less their prompt's mean. Set `reward.weights` accordingly.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from rich.console import Console
from rich.table import Table

from vpo_jax.data.prompts import load_prompts
from vpo_jax.evaluation.compare import Sampling, evaluate
from vpo_jax.pipeline import load_pipeline
from vpo_jax.recipes.measure import spearman
from vpo_jax.rewards.loading import load_rewards
from vpo_jax.runtime.backend import keep_compiled_programs, keep_freed_memory
from vpo_jax.runtime.cli import Parser, run
from vpo_jax.runtime.errors import UserError


def within_prompts(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman of a [P, S] and b [P, S] with the mean of each prompt's samples taken away."""
    return spearman(*((x - x.mean(axis=1, keepdims=True)).ravel() for x in (a, b)))


def main(argv: Sequence[str]) -> None:
    """Samples, scores, prints the table."""
    parser = Parser("benchmarks.agreement", (__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="shapes", help="a diffusers folder, or shapes")
    parser.add_argument("--prompts", default="shapes:tune", help="as config.data.prompts")
    parser.add_argument("--scorers", default="shapes", help="as config.reward.scorers")
    parser.add_argument("--held_out", default="judge", help="as config.held_out.scorers")
    parser.add_argument("--samples", type=int, default=4, help="of each prompt, at least 2")
    parser.add_argument("--count", type=int, default=48, help="prompts at most")
    flags = parser.parse(argv)
    if flags.samples < 2:
        raise UserError(f"--samples: {flags.samples} of a prompt cannot be compared; give 2 or more")
    keep_compiled_programs()
    keep_freed_memory()
    scorers, held_out = (load_rewards(names) for names in (flags.scorers, flags.held_out))
    prompts = load_prompts(flags.prompts, "--prompts")[: flags.count]
    sampling = Sampling(samples=flags.samples)
    scores, _ = evaluate(load_pipeline(flags.model), list(prompts), [*scorers, *held_out], sampling)

    rows, columns = ([f"{one.name}/{name}" for one in some for name in one.dimensions] for some in (scorers, held_out))
    table = Table("", *(name.partition("/")[2] for name in columns), title="agreement within a prompt")
    for row in rows:
        table.add_row(row, *(f"{within_prompts(scores[row], scores[column]):+.2f}" for column in columns))
    console = Console(width=160)  # wide enough for whole names
    console.print(f"{flags.model}: {len(prompts)} prompts, {flags.samples} samples of each", highlight=False)
    console.print(table)


if __name__ == "__main__":
    run(main, sys.argv[1:])
