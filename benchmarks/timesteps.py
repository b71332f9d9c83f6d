"""Which timesteps teach a preference, and which only shake the policy: the gradient at the start, by timestep.

    python benchmarks/timesteps.py --config=configs/vpo.py [--config.a.b=c] [--batches=6] [--parts=8]

Samples, scores and pairs as a run's first steps do, and takes the preference gradient of each batch of pairs twice,
with timesteps from one part of the schedule at a time. `norm` is what a part puts into an update; `other pairs` the
mean cosine between the gradients of two batches, `same pairs` that between two draws for one batch. A part with a large
norm on whose direction other pairs do not agree is noise: leave it out, by preference.timestep_low and .timestep_high.
Where the same pairs agree far more than others do, more draws for them teach little: sample more, update less.
"""

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from vpo_jax.data.prompts import load_prompts
from vpo_jax.pipeline import load_pipeline
from vpo_jax.rewards.loading import load_rewards
from vpo_jax.runtime import cli
from vpo_jax.runtime.backend import keep_compiled_programs, keep_freed_memory
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.mesh import make_meshes
from vpo_jax.training.check import check, check_inputs
from vpo_jax.training.losses import PairCoefficients
from vpo_jax.training.stages import Stages
from vpo_jax.training.step import make_draw, make_gradients

DRAWS = 2  # of noise and timestep for a batch and a part


def agreement(gradients: np.ndarray) -> tuple[float, float, float]:
    """Mean norm of gradients [B, R, D], and mean cosine of two draws of a batch and of two batches."""
    norms = np.linalg.norm(gradients, axis=2, keepdims=True)
    unit = gradients / np.maximum(norms, np.finfo(np.float32).tiny)
    cosines = np.einsum("ard,bsd->abrs", unit, unit)
    batches, draws = unit.shape[:2]
    same = cosines[np.eye(batches, dtype=bool)][:, ~np.eye(draws, dtype=bool)]
    other = cosines[~np.eye(batches, dtype=bool)]
    return float(norms.mean()), float(same.mean()), float(other.mean())


def main(argv: Sequence[str]) -> None:
    """Prints a line for each part of the schedule."""
    words, overrides = cli.split_overrides(argv)
    parser = cli.Parser("benchmarks.timesteps", (__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", default="configs/vpo.py")
    parser.add_argument("--batches", type=int, default=6, help="of pairs, at least 2")
    parser.add_argument("--parts", type=int, default=8, help="of the schedule")
    flags = parser.parse(words)
    for name, least in (("batches", 2), ("parts", 1)):
        if getattr(flags, name) < least:
            raise UserError(f"--{name}: {getattr(flags, name)} is too few; give {least} or more")
    config = cli.load_config(flags.config)
    cli.override(config, overrides)
    check(config)
    keep_compiled_programs()
    keep_freed_memory()

    meshes = make_meshes(config.mesh)
    pipeline = load_pipeline(config.model.path)
    rewards = load_rewards(config.reward.scorers, training=True, settings=config.reward)
    check_inputs(config, pipeline, rewards)
    prompts = list(load_prompts(config.data.prompts))
    np.random.default_rng(config.seed).shuffle(prompts)
    edges = np.linspace(0.0, 1.0, flags.parts + 1)
    found: list[list[list[np.ndarray]]] = [[] for _ in range(flags.parts)]
    with jax.set_mesh(meshes.update):
        stages = Stages(config, pipeline, rewards, meshes)
        state = stages.fresh_state()
        gradient = jax.jit(make_gradients(stages.policy.denoise, config.train.microbatch))
        ones = PairCoefficients(*(jnp.ones(stages.size),) * 2)
        draws = [make_draw(pipeline.process, config.seed, DRAWS, 0.0, part) for part in itertools.pairwise(edges)]
        for batch in range(flags.batches):
            chosen = [prompts[(batch * stages.size + i) % len(prompts)] for i in range(stages.size)]
            text = stages.encode(chosen)
            latents = stages.sample(state.policy, text, batch)
            state, _ = stages.pair(state, latents, text, stages.score(latents, chosen))
            for part, draw in enumerate(draws):
                found[part].append([])
                for again in range(DRAWS):
                    noised = draw(state.buffer, stages.empty_text, state.step, again)
                    tree, _ = gradient(stages.frozen, stages.start, None, noised, ones, state.buffer.mask)
                    leaves = [np.asarray(leaf, np.float32).ravel() for leaf in jax.tree.leaves(tree)]
                    found[part][-1].append(np.concatenate(leaves))
            state = state._replace(step=state.step + 1)
            print(f"batch {batch + 1} of {flags.batches}", file=sys.stderr, flush=True)

    title = f"{flags.batches} batches of {stages.size} pairs"
    table = Table("timesteps", "norm", "same pairs", "other pairs", title=title)
    for (low, high), gradients in zip(itertools.pairwise(edges), found, strict=True):
        norm, same, other = agreement(np.array(gradients))
        table.add_row(f"{low:.3f} to {high:.3f}", f"{norm:.3g}", f"{same:+.3f}", f"{other:+.3f}")
    Console().print(table)


if __name__ == "__main__":
    cli.run(main)
