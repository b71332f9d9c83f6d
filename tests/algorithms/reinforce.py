"""REINFORCE with the prompt's mean as its baseline: an algorithm that learns from trajectories, in one file.

A video's denoising steps are its actions. With advantage A of a video and log-probability p_i of its step i, an update
descends -mean(A p_i). It needs rollout.sampler=DDIMScheduler, rollout.eta=1.0 and rollout.guidance_scale=1.0.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vpo_jax.algorithms.descent import Trained, make_descend
from vpo_jax.algorithms.protocol import Frozen, Metrics, Rollout, Setting
from vpo_jax.algorithms.rewards import make_combiner
from vpo_jax.algorithms.state import TrainState
from vpo_jax.diffusion.samplers import SamplerState
from vpo_jax.diffusion.trajectory import log_probability
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.mesh import batch_sharding

Tree = Any


class Memory(NamedTuple):
    """What the algorithm keeps of a step; V = P x N videos, S denoising steps.

    Attributes:
      latents: of every denoising step, float32 [V, S + 1, F, h, w, C].
      text: encodings, every leaf [V, ...].
      advantages: reward less the prompt's mean, float32 [V]; 0 for a video that is not finite.
    """

    latents: jax.Array
    text: Tree
    advantages: jax.Array


class Reinforce:
    """See `algorithms.protocol.Algorithm`."""

    keeps_trajectories = True
    programs = ()

    def __init__(self, setting: Setting) -> None:
        """Raises UserError where rollouts are guided: their steps are not the policy's own."""
        config = setting.config
        if config.rollout.guidance_scale > 1.0:
            raise UserError("rollout.guidance_scale: reinforce learns from unguided steps; set it to 1.0")
        self._setting = setting
        self._videos = config.train.prompts_per_step * config.rollout.candidates
        self._combine = make_combiner(config, setting.rewards)
        self._remember = jax.jit(self._make_memory)
        self._descend = make_descend(self._gradients, setting.optimizer, config.ema.decay)

    def init(self, initial: Tree) -> Memory:
        """Zeros."""
        setting, videos = self._setting, self._videos
        path = (videos, len(setting.sampler.timesteps) + 1, *setting.latents.shape)
        text = jax.tree.map(lambda x: jnp.zeros((videos, *x.shape), x.dtype), setting.text)
        return Memory(jnp.zeros(path, jnp.float32), text, jnp.zeros(videos, jnp.float32))

    def infer_shardings(self, shapes: Tree, mesh: Any) -> Tree:
        """Videos over data and fsdp."""
        return jax.tree.map(lambda _: batch_sharding(mesh), shapes)

    def sampling_policy(self, state: TrainState) -> Tree:
        """The policy as it is now."""
        return state.policy

    def select(self, state: TrainState, rollout: Rollout, scores: jax.Array) -> tuple[TrainState, Metrics]:
        """Every video, by its advantage."""
        statistics, memory, metrics = self._remember(state.statistics, rollout, scores)
        return state._replace(statistics=statistics, algorithm=memory), metrics

    def _make_memory(self, statistics: Tree, rollout: Rollout, scores: jax.Array) -> tuple[Tree, Memory, Metrics]:
        prompts = len(jax.tree.leaves(rollout.text)[0])
        statistics, found, metrics = self._combine(statistics, scores.reshape(prompts, -1, scores.shape[-1]))
        number = jnp.maximum(1, jnp.sum(found.finite, axis=1, keepdims=True))
        baseline = jnp.sum(jnp.where(found.finite, found.reward, 0.0), axis=1, keepdims=True) / number
        advantages = jnp.where(found.finite, found.reward - baseline, 0.0)
        candidates = advantages.shape[1]
        text = jax.tree.map(lambda x: jnp.repeat(x, candidates, axis=0), rollout.text)
        assert rollout.trajectory is not None
        return statistics, Memory(rollout.trajectory.latents, text, advantages.reshape(-1)), metrics

    def calibrate(self, state: TrainState, frozen: Frozen) -> tuple[TrainState, dict[str, float], str]:
        """Nothing to measure."""
        return state, {}, ""

    def update(self, state: TrainState, frozen: Frozen, index: int) -> tuple[TrainState, Metrics]:
        """One step of gradient descent on the step's videos."""
        memory = state.algorithm
        trained, metrics = self._descend(Trained.of(state), frozen.backbone, (memory,), jnp.any(memory.advantages))
        return state._replace(**trained._asdict()), metrics

    def _gradients(self, backbone: Tree, policy: Tree, memory: Memory) -> tuple[Tree, Metrics]:
        denoise, sampler = self._setting.denoise, self._setting.sampler

        def loss(policy: Tree) -> jax.Array:
            total = jnp.zeros(())
            for i, timestep in enumerate(sampler.timesteps):
                before, after = memory.latents[:, i], memory.latents[:, i + 1]
                seen = sampler.model_input(SamplerState(before), i)
                prediction = denoise(backbone, policy, seen, jnp.full(len(before), timestep), memory.text)
                found = log_probability(sampler, i, before, prediction, after)
                total -= jnp.mean(memory.advantages * found)
            return total

        value, gradient = jax.value_and_grad(loss)(policy)
        return gradient, {"loss/policy_gradient": (value, jnp.ones(()))}

    def evaluate(self, state: TrainState, frozen: Frozen, result: Tree) -> dict[str, float]:
        """Nothing beside the videos."""
        return {}
