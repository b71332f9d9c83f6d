"""Which timesteps and candidates are useful: gradients at the initial policy, and how much they agree.

    python benchmarks/timesteps.py --config=configs/vpo.py [--config.a.b=c] [--batches=6] [--parts=8]
    python benchmarks/timesteps.py --config=configs/vpo.py --pairs=best_worst,top_k,all,group --parts=0 --batches=12

Samples, scores and selects as a run's first steps do, and takes the gradient of each batch at several draws of noise
and timestep, from one part of the schedule at a time (`--parts=0`: from preference.timestep_low to .timestep_high),
for each form of preference.pairs that `--pairs` names. `norm` is the size of a part's gradient; `other batches`
is the mean cosine between the gradients of two batches, and `same batch` that between two draws for one batch. A part
with a large norm and a small cosine between batches is noise: leave it out with preference.timestep_low and
.timestep_high. Where `same batch` is far above `other batches`, more updates on one batch add little: sample more and
update less.
"""

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from vpo_jax.algorithms.dpo.algorithm import DPO
from vpo_jax.algorithms.dpo.selection import PAIRS
from vpo_jax.algorithms.dpo.update import make_draw, make_gradients
from vpo_jax.data.prompts import load_prompts
from vpo_jax.pipeline import load_pipeline
from vpo_jax.rewards.loading import load_rewards
from vpo_jax.runtime import cli
from vpo_jax.runtime.backend import keep_compiled_programs, keep_freed_memory
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.mesh import make_meshes
from vpo_jax.training.check import check, check_inputs
from vpo_jax.training.setup import Setup, make_setup

DRAWS = 2  # of noise and timestep for a batch and a part


def agreement(gradients: np.ndarray) -> tuple[float, float, float, float]:
    """Of gradients [B, R, D]: mean norm, mean cosine of two draws of a batch, of two batches, and its standard error.

    The error is that of a mean over batches, left out one at a time (jackknife).
    """
    norms = np.linalg.norm(gradients, axis=2, keepdims=True)
    unit = gradients / np.maximum(norms, np.finfo(np.float32).tiny)
    cosines = np.einsum("ard,bsd->abrs", unit, unit)
    batches, draws = unit.shape[:2]
    same = cosines[np.eye(batches, dtype=bool)][:, ~np.eye(draws, dtype=bool)]
    between = cosines.mean(axis=(2, 3))
    other = between[~np.eye(batches, dtype=bool)].mean()
    error = float("nan")
    if batches > 2:
        kept = [np.delete(np.delete(between, i, 0), i, 1) for i in range(batches)]
        means = np.array([part[~np.eye(batches - 1, dtype=bool)].mean() for part in kept])
        error = float(np.sqrt((batches - 1) / batches * np.sum((means - means.mean()) ** 2)))
    return float(norms.mean()), float(same.mean()) if draws > 1 else float("nan"), float(other), error


def gradients_of(
    config: Any, setup: Setup, process: Any, batches: Sequence[Any], parts: Sequence[tuple[float, float]]
) -> list[np.ndarray]:
    """[B, R, D] for each part of the schedule: gradients of batches of (candidates, scores) at the initial policy."""
    algorithm = setup.algorithm
    assert isinstance(algorithm, DPO)
    gradient = jax.jit(make_gradients(setup.policy.denoise, 2 * config.train.microbatch))
    draws = [make_draw(process, config.seed, DRAWS, 0.0, part) for part in parts]
    found: list[list[list[np.ndarray]]] = [[] for _ in parts]
    frozen, state = setup.frozen, setup.fresh_state()
    for candidates, scores in batches:
        state, _ = algorithm.select(state, candidates.rollout, scores)
        groups = state.algorithm.buffer
        for place, draw in enumerate(draws):
            found[place].append([])
            for again in range(DRAWS):
                noised = draw(groups, frozen.empty_text, state.step, again)
                error, _ = algorithm.errors(frozen.backbone, frozen.initial, noised)
                weighed, _ = algorithm.weigh(groups, error, error, None)
                tree, _ = gradient(frozen.backbone, frozen.initial, None, noised, weighed)
                leaves = [np.asarray(leaf, np.float32).ravel() for leaf in jax.tree.leaves(tree)]
                found[place][-1].append(np.concatenate(leaves))
        state = state._replace(step=state.step + 1)
    return [np.array(part) for part in found]


def main(argv: Sequence[str]) -> None:
    """Prints a line for each form of pairs and each part of the schedule."""
    words, overrides = cli.split_overrides(argv)
    parser = cli.Parser("benchmarks.timesteps", (__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", default="configs/vpo.py")
    parser.add_argument("--batches", type=int, default=6, help="of a step's prompts, at least 2")
    parser.add_argument("--parts", type=int, default=8, help="of the schedule; 0: the config's own part")
    parser.add_argument("--pairs", default="", help=f"comma-separated, of {', '.join(PAIRS)}; none: the config's")
    parser.add_argument("--output", default="", help="JSON file to write beside what is printed")
    flags = parser.parse(words)
    for name, least in (("batches", 2), ("parts", 0)):
        if getattr(flags, name) < least:
            raise UserError(f"--{name}: {getattr(flags, name)} is too few; give {least} or more")
    config = cli.load_config(flags.config)
    cli.override(config, overrides)
    forms = [name.strip() for name in flags.pairs.split(",") if name.strip()] or [config.preference.pairs]
    for form in forms:
        config.preference.pairs = form
        check(config)
    keep_compiled_programs()
    keep_freed_memory()

    meshes = make_meshes(config.mesh)
    pipeline = load_pipeline(config.model.path)
    rewards = load_rewards(config.reward.scorers, training=True, settings=config.reward)
    check_inputs(config, pipeline, rewards, (), meshes)
    prompts = load_prompts(config.data.prompts)
    parts = list(itertools.pairwise(np.linspace(0.0, 1.0, flags.parts + 1).tolist()))
    parts = parts or [(config.preference.timestep_low, config.preference.timestep_high)]
    size = f"{config.train.prompts_per_step} prompts x {config.rollout.candidates} candidates"
    title = f"{flags.batches} batches of {size}"
    table = Table("pairs", "timesteps", "norm", "same batch", "other batches", "error", title=title)
    rows = []
    with jax.set_mesh(meshes.update):
        setup = make_setup(config, pipeline, rewards, meshes, prompts)
        state, batches = setup.fresh_state(), []
        for batch in range(flags.batches):
            candidates = setup.rollouts.next(state, batch)
            batches.append((candidates, setup.score(candidates)))
            print(f"sampled batch {batch + 1} of {flags.batches}", file=sys.stderr, flush=True)
        for form in forms:
            config.preference.pairs = form
            setup = make_setup(config, pipeline, rewards, meshes, prompts)
            found = gradients_of(config, setup, pipeline.process, batches, parts)
            for (low, high), gradients in zip(parts, found, strict=True):
                norm, same, other, error = agreement(gradients)
                rows.append({"pairs": form, "low": low, "high": high, "norm": norm, "same": same, "other": other,
                             "error": error})  # fmt: skip
                at = f"{low:.3f} to {high:.3f}"
                table.add_row(form, at, f"{norm:.3g}", f"{same:+.3f}", f"{other:+.3f}", f"{error:.3f}")
    Console().print(table)
    cli.write_output(flags.output, rows)


if __name__ == "__main__":
    cli.run(main)
