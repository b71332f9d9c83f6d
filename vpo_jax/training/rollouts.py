"""Candidate videos from the policy as it is now, a step's at a time.

A video's noise comes from its own key, so the same video comes out of any batch, microbatch or mesh. With a trunk, the
candidates of a prompt begin from one video of it under noise of their own (structured candidates: DenseDPO, arXiv
2506.03517, which begins from real videos).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vpo_jax.algorithms.protocol import Algorithm, Denoise, Frozen, Rollout
from vpo_jax.algorithms.state import TrainState
from vpo_jax.data.index import PromptIndex
from vpo_jax.diffusion.guidance import Guidance, guided
from vpo_jax.diffusion.samplers import Sampler, sample
from vpo_jax.diffusion.trajectory import Trajectory, sample_trajectory
from vpo_jax.rewards.scoring import bring
from vpo_jax.runtime.batches import fit_microbatch, in_microbatches
from vpo_jax.runtime.keys import stream_key
from vpo_jax.runtime.mesh import BATCH, VIDEO, Meshes, Rules, constrain, infer_shardings, replicated
from vpo_jax.runtime.processes import move
from vpo_jax.runtime.transfers import allowed, put
from vpo_jax.training.text import TextEncoding

Tree = Any
# (frozen, trainable, text of B) -> what a denoiser takes in place of the text, computed once for all steps.
ReadText = Callable[[Tree, Tree, Tree], Tree]


def make_candidate_keys(seed: int, prompts: int, candidates: int) -> Callable[[Any], jax.Array]:
    """`keys(step)`: keys [prompts * candidates] of a step's videos, the candidates of a prompt side by side."""

    def keys(step: jax.Array) -> jax.Array:
        slots = jnp.repeat(jnp.arange(prompts), candidates)
        indices = jnp.tile(jnp.arange(candidates), prompts)
        return jax.vmap(lambda slot, index: stream_key(seed, "rollout", step, slot, index))(slots, indices)

    return jax.jit(keys)


def make_trunk_keys(seed: int, prompts: int) -> Callable[[Any], jax.Array]:
    """`keys(step)`: keys [prompts] of the videos that a step's candidates begin from."""
    return jax.jit(lambda step: jax.vmap(lambda slot: stream_key(seed, "trunk", step, slot))(jnp.arange(prompts)))


def make_rollout(
    denoise: Denoise,
    sampler: Sampler,
    latent_shape: tuple[int, ...],
    guidance: Guidance,
    microbatch: int = 0,
    keep_trajectory: bool = False,
    read_text: ReadText = lambda frozen, trainable, text: text,
) -> Callable[[Tree, Tree, Tree, Tree, jax.Array], jax.Array | Trajectory]:
    """`rollout(frozen, trainable, text of B, negative text of one, keys [B]) -> clean latents [B, F, h, w, C]`, jitted.

    Microbatches are what `fit_microbatch` says. With `keep_trajectory` it gives the whole `Trajectory`.
    """

    def of_chunk(
        frozen: Tree, trainable: Tree, negative: Tree, chunk: tuple[Tree, jax.Array]
    ) -> jax.Array | Trajectory:
        text, keys = chunk
        noise, keys = _draw(keys, latent_shape)
        predict = _predictor(denoise, guidance, read_text, frozen, trainable, text, negative)
        if keep_trajectory:
            return sample_trajectory(sampler, predict, noise, keys)
        return constrain(sample(sampler, predict, noise, keys), VIDEO)

    def rollout(frozen: Tree, trainable: Tree, text: Tree, negative: Tree, keys: jax.Array) -> jax.Array | Trajectory:
        size = fit_microbatch(microbatch, len(keys))
        return in_microbatches(lambda chunk: of_chunk(frozen, trainable, negative, chunk), (text, keys), size)

    return jax.jit(rollout)


def make_branches(
    denoise: Denoise,
    sampler: Sampler,
    guidance: Guidance,
    microbatch: int = 0,
    read_text: ReadText = lambda frozen, trainable, text: text,
) -> Callable[[Tree, Tree, Tree, Tree, jax.Array, jax.Array], jax.Array]:
    """`branches(frozen, trainable, text of B, negative text of one, keys [B], trunks) -> clean latents`, jitted.

    `trunks` are clean latents [B, F, h, w, C], each noised by its candidate's key to where `sampler`, which leaves the
    first steps out, begins.
    """

    def of_chunk(frozen: Tree, trainable: Tree, negative: Tree, chunk: tuple[Tree, jax.Array, jax.Array]) -> jax.Array:
        text, keys, trunks = chunk
        noise, keys = _draw(keys, trunks.shape[1:])
        predict = _predictor(denoise, guidance, read_text, frozen, trainable, text, negative)
        return constrain(sample(sampler, predict, sampler.noised(constrain(trunks, VIDEO), noise), keys), VIDEO)

    def branches(
        frozen: Tree, trainable: Tree, text: Tree, negative: Tree, keys: jax.Array, trunks: jax.Array
    ) -> jax.Array:
        chunks, size = (text, keys, trunks), fit_microbatch(microbatch, len(keys))
        return in_microbatches(lambda chunk: of_chunk(frozen, trainable, negative, chunk), chunks, size)

    return jax.jit(branches)


def _draw(keys: jax.Array, latent_shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Unit Gaussian latents [B, ...] of the videos' keys [B], and the keys [B] of their samplers."""
    split = jax.vmap(jax.random.split)(keys)  # [B, 2]
    noise = jax.vmap(lambda key: jax.random.normal(key, latent_shape, jnp.float32))(split[:, 0])
    return constrain(noise, VIDEO), split[:, 1]


def _predictor(
    denoise: Denoise,
    guidance: Guidance,
    read_text: ReadText,
    frozen: Tree,
    trainable: Tree,
    text: Tree,
    negative: Tree,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """(latents [B, ...], timestep) -> guided prediction of these parameters for these texts [B]."""

    def predict(latents: jax.Array, timestep: jax.Array, text: Tree) -> jax.Array:
        return denoise(frozen, trainable, latents, jnp.full(latents.shape[0], timestep), text)

    return guided(predict, text, negative, guidance, lambda text: read_text(frozen, trainable, text))


class Candidates(NamedTuple):
    """A step's candidates, and what they were made for.

    Attributes:
      prompts: P of them.
      rollout: N candidates of each.
      prefetched: the next step's clean latents where they are sampled in advance, else {}.
    """

    prompts: list[str]
    rollout: Rollout
    prefetched: Tree


class Rollouts:
    """Samples a step's candidates from the current policy.

    Attributes:
      videos: a step, P x N.
    """

    def __init__(
        self,
        config: Any,
        rollout: Callable[..., jax.Array | Trajectory],
        branches: Callable[..., jax.Array] | None,
        algorithm: Algorithm,
        frozen: Frozen,
        negative: Tree,
        encode: TextEncoding,
        prompts: Sequence[str],
        meshes: Meshes,
        rules: Rules,
    ) -> None:
        """`branches` is None where candidates are independent.

        `frozen` and `negative`, the encoding that guidance leads away from, lie on `meshes.update`.
        """
        size, candidates = config.train.prompts_per_step, config.rollout.candidates
        self.videos = size * candidates
        self._rollout, self._branches = rollout, branches
        self._algorithm, self._frozen, self._encode = algorithm, frozen, encode
        self._negative, self._prompts, self._meshes, self._rules = negative, prompts, meshes, rules
        self._index = PromptIndex(len(prompts), size, config.seed, config.data.shuffle)
        self._keys = make_candidate_keys(config.seed, size, candidates)
        self._trunk_keys = make_trunk_keys(config.seed, size)
        self._repeat = jax.jit(
            lambda tree, spec: jax.tree.map(lambda x: constrain(jnp.repeat(x, candidates, axis=0), spec), tree),
            static_argnames="spec",
        )

    def next(self, state: TrainState, step: int) -> Candidates:
        """The candidates of step `step`; returns before they are computed.

        Where scorers have devices of their own, the next step's are sampled too, with the same policy, while this
        step's are scored.
        """
        prompts = self._chosen(step)
        text = self._encode(prompts)
        policy = self._algorithm.sampling_policy(state)
        if not self._meshes.apart:
            return Candidates(prompts, self._rolled(text, self._sample(policy, text, step)), {})
        found = state.prefetched if step > 0 else self._sample(policy, text, step)
        following = self._sample(policy, self._encode(self._chosen(step + 1)), step + 1)
        return Candidates(prompts, self._rolled(text, found), following)

    def sample(self, trainable: Tree, text: Tree, keys: jax.Array) -> jax.Array | Trajectory:
        """Clean latents [B, F, h, w, C] of B encodings and keys [B], on the mesh of the updates."""

        def independent(weights: tuple[Tree, Tree], text: Tree, negative: Tree) -> jax.Array | Trajectory:
            return self._rollout(*weights, text, negative, keys)

        return self._on_mesh(independent, trainable, text)

    def _on_mesh(
        self, make: Callable[[tuple[Tree, Tree], Tree, Tree], jax.Array | Trajectory], trainable: Tree, text: Tree
    ) -> jax.Array | Trajectory:
        """`make(weights, text, negative)`, computed on the mesh of the rollouts, on the mesh of the updates."""
        update, mesh = self._meshes.update, self._meshes.rollout
        if mesh == update:
            return make((self._frozen.backbone, trainable), text, self._negative)
        # Weights have the update's sharding, and are resharded once for all steps of the sampler.
        weights = (self._frozen.backbone, trainable)
        weights = move(weights, infer_shardings(weights, mesh, self._rules))
        negative = move(self._negative, jax.tree.map(lambda _: replicated(mesh), self._negative))
        with jax.set_mesh(mesh):
            found = make(weights, jax.tree.map(lambda x: bring(x, mesh), text), negative)
        spec = BATCH if isinstance(found, Trajectory) else VIDEO
        return move(found, infer_shardings(found, update, (("", spec),)))

    def _chosen(self, step: int) -> list[str]:
        with allowed():  # an epoch's permutation
            indices = self._index(step)
        return [self._prompts[i] for i in indices]

    def _sample(self, policy: Tree, text: Tree, step: int) -> jax.Array | Trajectory:
        branches, keys = self._branches, self._keys(put(np.int32(step)))
        if branches is None:
            return self.sample(policy, self._repeat(text, BATCH), keys)
        trunk_keys = self._trunk_keys(put(np.int32(step)))

        def from_trunks(weights: tuple[Tree, Tree], text: Tree, negative: Tree) -> jax.Array:
            trunks = self._repeat(self._rollout(*weights, text, negative, trunk_keys), VIDEO)
            return branches(*weights, self._repeat(text, BATCH), negative, keys, trunks)

        return self._on_mesh(from_trunks, policy, text)

    @staticmethod
    def _rolled(text: Tree, found: jax.Array | Trajectory) -> Rollout:
        if isinstance(found, Trajectory):
            return Rollout(text, _last(found.latents), found)
        return Rollout(text, found)


@jax.jit
def _last(path: jax.Array) -> jax.Array:
    return path[:, -1]
