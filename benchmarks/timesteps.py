"""Which timesteps teach a preference, and which only shake the policy: the gradient at the start, by timestep.

    python benchmarks/timesteps.py --config=configs/vpo.py [--config.a.b=c] [--batches=6] [--parts=8]

Samples, scores and pairs as a run's first steps do, and takes the preference gradient of each batch of pairs with
timesteps from one part of the schedule at a time. `norm` is what a part puts into an update; `agreement` the mean
cosine between different batches' gradients: near zero, the part is noise. A part with a large norm and no agreement
is better left out, by preference.timestep_low and .timestep_high.
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
from vpo_jax.runtime.mesh import make_mesh
from vpo_jax.training.check import check, check_inputs
from vpo_jax.training.losses import PairCoefficients
from vpo_jax.training.stages import Stages
from vpo_jax.training.step import make_draw, make_gradients


def agreement(gradients: np.ndarray) -> tuple[float, float]:
    """Mean norm of gradients [B, D], and mean cosine between two of them."""
    norms = np.linalg.norm(gradients, axis=1)
    unit = gradients / np.maximum(norms, np.finfo(np.float32).tiny)[:, None]
    return float(norms.mean()), float(
        np.mean([unit[a] @ unit[b] for a, b in itertools.combinations(range(len(unit)), 2)])
    )


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

    mesh = make_mesh(**config.mesh)
    pipeline = load_pipeline(config.model.path)
    rewards = load_rewards(config.reward.scorers, training=True, settings=config.reward)
    check_inputs(config, pipeline, rewards)
    prompts = list(load_prompts(config.data.prompts))
    np.random.default_rng(config.seed).shuffle(prompts)
    edges = np.linspace(0.0, 1.0, flags.parts + 1)
    found: list[list[np.ndarray]] = [[] for _ in range(flags.parts)]
    with jax.set_mesh(mesh):
        stages = Stages(config, pipeline, rewards, mesh)
        state = stages.fresh_state()
        gradient = jax.jit(make_gradients(stages.policy.denoise, config.train.microbatch))
        ones = PairCoefficients(*(jnp.ones(stages.size),) * 2)
        draws = [make_draw(pipeline.schedule, config.seed, 1, 0.0, part) for part in itertools.pairwise(edges)]
        for batch in range(flags.batches):
            chosen = [prompts[(batch * stages.size + i) % len(prompts)] for i in range(stages.size)]
            text = stages.encode(chosen)
            latents = stages.sample(state.policy, text, batch)
            state, _ = stages.pair(state, latents, text, stages.score(latents, chosen))
            for part, draw in enumerate(draws):
                noised = draw(state.buffer, stages.empty_text, state.step, 0)
                tree, _ = gradient(stages.frozen, stages.start, None, noised, ones, state.buffer.mask)
                leaves = [np.asarray(leaf, np.float32).ravel() for leaf in jax.tree.leaves(tree)]
                found[part].append(np.concatenate(leaves))
            state = state._replace(step=state.step + 1)
            print(f"batch {batch + 1} of {flags.batches}", file=sys.stderr, flush=True)

    table = Table("timesteps", "norm", "agreement", title=f"{flags.batches} batches of {stages.size} pairs")
    for (low, high), gradients in zip(itertools.pairwise(edges), found, strict=True):
        norm, cosine = agreement(np.stack(gradients))
        table.add_row(f"{low:.3f} to {high:.3f}", f"{norm:.3g}", f"{cosine:+.3f}")
    Console().print(table)


if __name__ == "__main__":
    cli.run(main)
