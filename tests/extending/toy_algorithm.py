"""An algorithm in full: the model learns to predict the best candidate of each prompt (RAFT, arXiv 2304.06767)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vpo_jax.algorithms.descent import Trained, make_descend
from vpo_jax.algorithms.protocol import Frozen, Metrics, Rollout, Setting
from vpo_jax.algorithms.rewards import make_combiner
from vpo_jax.algorithms.state import TrainState
from vpo_jax.runtime.keys import stream_key
from vpo_jax.runtime.mesh import batch_sharding
from vpo_jax.runtime.programs import Program, abstract_rows
from vpo_jax.runtime.transfers import put

Tree = Any


class Best(NamedTuple):
    """The algorithm's part of the state: the best candidate of each of P prompts."""

    latents: jax.Array  # float32 [P, f, h, w, C]
    text: Tree  # [P, ...]
    mask: jax.Array  # bool [P], False where no candidate had finite scores


class BestOfN:
    """Reward-ranked fine-tuning; see `vpo_jax.algorithms.protocol.Algorithm`."""

    keeps_trajectories = False

    def __init__(self, setting: Setting) -> None:
        """Builds every program before the first step."""
        config = setting.config
        prompts, updates = config.train.prompts_per_step, config.train.updates_per_step
        mask = jax.ShapeDtypeStruct((), jnp.bool_)
        self._one = Best(setting.latents, setting.text, mask)
        self._prompts = prompts
        self._select = jax.jit(make_select(setting))
        gradients = make_gradients(setting)
        self._descend = make_descend(gradients, setting.optimizer, config.ema.decay)
        number = jax.ShapeDtypeStruct((), jnp.int32)

        def arguments(rows: int) -> tuple[Tree, ...]:
            return setting.frozen.backbone, setting.frozen.initial, abstract_rows(self._one, rows), number, number

        roles = ("parameters", "parameters", "batch", "whole", "whole")
        update = jax.jit(gradients)
        self.programs = (
            Program("update", update, arguments, roles, "update", prompts, calls=updates, passes=3, trains=True),
        )

    def init(self, initial: Tree) -> Best:
        """Nothing to learn from yet."""
        del initial
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract_rows(self._one, self._prompts))

    def infer_shardings(self, shapes: Tree, mesh: Mesh) -> Tree:
        """Prompts over the batch axes."""
        return jax.tree.map(lambda _: batch_sharding(mesh), shapes)

    def sampling_policy(self, state: TrainState) -> Tree:
        """The policy as it is now."""
        return state.policy

    def select(self, state: TrainState, rollout: Rollout, scores: jax.Array) -> tuple[TrainState, Metrics]:
        """The state with the best candidates of this step."""
        statistics, best, metrics = self._select(state.statistics, rollout.latents, rollout.text, scores)
        return state._replace(statistics=statistics, algorithm=best), metrics

    def calibrate(self, state: TrainState, frozen: Frozen) -> tuple[TrainState, dict[str, float], str]:
        """Nothing is measured before an update."""
        return state, {}, ""

    def update(self, state: TrainState, frozen: Frozen, index: int) -> tuple[TrainState, Metrics]:
        """One step towards the best candidates, with fresh noise."""
        best = state.algorithm
        inputs = best, state.step, put(np.int32(index))
        # The gradient is finite only where the loss is, so no loss is given.
        trained, metrics = self._descend(Trained.of(state), frozen.backbone, inputs, jnp.any(best.mask))
        return state._replace(**trained._asdict()), metrics

    def evaluate(self, state: TrainState, frozen: Frozen) -> dict[str, float]:
        """Nothing beside the videos."""
        return {}


def make_select(setting: Setting) -> Any:
    """`select(statistics, latents [P * N, ...], text, scores [P * N, D]) -> (statistics, Best, metrics)`."""
    combine = make_combiner(setting.config, setting.rewards)
    prompts = setting.config.train.prompts_per_step

    def select(statistics: Any, latents: jax.Array, text: Tree, scores: jax.Array) -> tuple[Any, Best, Metrics]:
        statistics, rewards, metrics = combine(statistics, scores.reshape(prompts, -1, scores.shape[-1]))
        best = jnp.argmax(jnp.where(rewards.finite, rewards.reward, -jnp.inf), axis=1)  # [P]
        mask = jnp.any(rewards.finite, axis=1)  # [P]
        grouped = latents.reshape(prompts, -1, *latents.shape[1:])  # [P, N, f, h, w, C]
        chosen = jnp.where(mask[:, None, None, None, None], grouped[jnp.arange(prompts), best], 0.0)
        return statistics, Best(chosen, text, mask), metrics

    return select


def make_gradients(setting: Setting) -> Any:
    """`gradients(backbone, policy, best, step, index) -> (gradient, metrics)` of the denoising loss."""
    process, denoise, seed = setting.process, setting.denoise, setting.config.seed

    def gradients(backbone: Tree, policy: Tree, best: Best, step: jax.Array, index: jax.Array) -> tuple[Tree, Metrics]:
        slots = jnp.arange(len(best.mask))
        keys = jax.vmap(lambda slot: jax.random.split(stream_key(seed, "noise", step, slot, index)))(slots)  # [P, 2]
        timesteps = jax.vmap(process.draw_timesteps)(keys[:, 0])
        noise = jax.vmap(lambda key: jax.random.normal(key, best.latents.shape[1:], jnp.float32))(keys[:, 1])
        noisy = process.add_noise(best.latents, noise, timesteps)
        target = process.target(best.latents, noise, timesteps)

        def loss(policy: Tree) -> tuple[jax.Array, Metrics]:
            prediction = denoise(backbone, policy, noisy, timesteps, best.text)
            errors = jnp.mean(jnp.square(prediction - target), axis=(1, 2, 3, 4))  # [P]
            total, number = jnp.sum(jnp.where(best.mask, errors, 0.0)), jnp.sum(best.mask.astype(jnp.float32))
            return total / jnp.maximum(number, 1.0), {"loss/winner_error": (total, number)}

        return jax.grad(loss, has_aux=True)(policy)

    return gradients
