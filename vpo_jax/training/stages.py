"""The stages of a step, built once: every compiled function with the parameters that it reads and their shardings."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vpo_jax.data.text_cache import TextCache, open_text_cache
from vpo_jax.diffusion.samplers import make_sampler
from vpo_jax.families.protocol import Text
from vpo_jax.rewards.combine import dimension_names
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.mesh import BATCH, VIDEO, Meshes, constrain, infer_shardings, replicated
from vpo_jax.runtime.processes import move, place
from vpo_jax.training.check import check_meshes
from vpo_jax.training.optimizer import make_optimizer
from vpo_jax.training.pairs import Pairs, make_pairing, push, steps_kept
from vpo_jax.training.policy import make_policy
from vpo_jax.training.rollout import (
    Scores,
    Weights,
    bring,
    frames_to_decode,
    make_candidate_keys,
    make_decode,
    make_rollout,
)
from vpo_jax.training.state import TrainState, infer_state_shardings, init_state
from vpo_jax.training.step import Metrics, Update

Tree = Any


class Stages:
    """Encode, sample, score, pair and update for one config; `jax.set_mesh(meshes.update)` is the caller's.

    Attributes:
      policy: see `Policy`.
      size: prompts a step.
      clips: prompts x candidates.
      ahead: whether scorers have devices of their own and the next candidates are made while they score.
      num_frames: of a video.
      weights: of the scorers, for others who score.
      abstract_state: the state's shapes, dtypes and shardings: what a checkpoint is restored into.
    """

    def __init__(
        self,
        config: Any,
        pipeline: Any,
        rewards: Sequence[Any],
        meshes: Meshes,
        adapters: Tree | None = None,
    ) -> None:
        mesh, self._meshes, self.ahead = meshes.update, meshes, meshes.apart
        self.size, candidates = config.train.prompts_per_step, config.rollout.candidates
        self.clips, chunk = self.size * candidates, config.rollout.microbatch
        check_meshes(config, meshes)
        for reward in rewards:
            if not reward.trains:
                raise UserError(f"reward.scorers: {reward.name!r} may only judge; name it in held_out.scorers")
        self.num_frames, height, width = pipeline.video_size(
            config.rollout.num_frames, config.rollout.height, config.rollout.width
        )
        for key, cut in (("mesh.context", mesh), ("mesh.rollout", meshes.rollout)):
            if self.num_frames % cut.shape["context"]:
                raise UserError(
                    f"{key}: context {cut.shape['context']} does not divide the {self.num_frames} frames of a video"
                    f" (rollout.num_frames); choose a divisor"
                )
        latent_shape = pipeline.latent_shape(self.num_frames, height, width)

        # Policy, reference and start share one frozen backbone.
        self.policy = make_policy(config, pipeline.family, pipeline.trainable, adapters)
        rules = self._rules = pipeline.family.sharding_rules
        vae, self._look_mesh = pipeline.decoder_params, mesh if self.ahead else meshes.score
        self.frozen, self.start, self._text_params, self._vae_params = (
            place(tree, infer_shardings(tree, at, rules))
            for tree, at in (
                (self.policy.frozen, mesh),
                (self.policy.start, mesh),
                (pipeline.text_params, mesh),
                (vae, self._look_mesh),
            )
        )
        self._vae_params_to_score = self._vae_params
        if self.ahead:
            self._vae_params_to_score = place(vae, infer_shardings(vae, meshes.score, rules))

        # The copies on the host are not needed any more, and every stage below holds the policy.
        self.policy = dataclasses.replace(self.policy, frozen=self.frozen, start=self.start)

        self._tokenize = pipeline.tokenize
        spread = partial(jax.tree.map, lambda x: constrain(x, BATCH))
        self._encode = jax.jit(lambda params, ids: spread(pipeline.family.encode_text(params, ids)))
        self._place = jax.jit(spread)
        self._cache: TextCache | None = None
        self._repeat = jax.jit(lambda text: spread(jax.tree.map(lambda x: jnp.repeat(x, candidates, axis=0), text)))
        plain = [config.rollout.negative_prompt, ""]
        unconditional = jax.device_put(self.encode((plain * self.size)[: max(2, self.size)]), replicated(mesh))
        self._negative, self.empty_text = (jax.tree.map(lambda x, i=i: x[i], unconditional) for i in range(2))

        sampler = make_sampler(
            pipeline.scheduler_config,
            config.rollout.num_inference_steps,
            config.rollout.sampler or None,
            config.rollout.eta,
        )
        self._keys = make_candidate_keys(config.seed, self.size, candidates)
        guidance = config.rollout.guidance_scale, chunk, config.rollout.guidance_rescale
        self._rollout = make_rollout(self.policy.denoise, sampler, latent_shape, *guidance)
        frames = frames_to_decode(rewards, self.num_frames)
        every = tuple(range(self.num_frames))
        self._decode = make_decode(pipeline, frames, chunk)
        self._decode_all = self._decode if frames == every else make_decode(pipeline, every, chunk)
        self.weights = Weights(meshes.score, config.reward.offload)
        self._score = Scores(rewards, self.weights, self.num_frames, frames, chunk)

        self._extrapolates = config.ema.extrapolation != 1.0
        self._result = jax.jit(partial(self.policy.extrapolated, factor=config.ema.extrapolation))
        optimizer = make_optimizer(config.optimizer)
        pairs = abstract_pairs(self.size, latent_shape, self.empty_text)

        def fresh() -> TrainState:
            return init_state(
                self.start,
                optimizer,
                pairs,
                len(dimension_names(rewards)),
                steps_kept(config),
                with_ema=config.ema.decay > 0.0,
                waiting=jax.ShapeDtypeStruct((self.clips, *latent_shape), jnp.float32) if self.ahead else None,
            )

        shapes = jax.eval_shape(fresh)
        shardings = infer_state_shardings(shapes, mesh, rules)
        self.abstract_state: TrainState = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
        )
        self._fresh = jax.jit(fresh, out_shardings=shardings)
        self._pairing = make_pairing(config, rewards, (shardings.statistics, shardings.watched, replicated(mesh)))
        self._push = jax.jit(push, out_shardings=shardings.buffer)
        float32 = self.policy.in_float32()
        self._update = Update(config, self.policy.denoise, float32.denoise, pipeline.process, optimizer, shardings)

    def fresh_state(self) -> TrainState:
        """The state before the first step."""
        return self._fresh()

    def encode(self, prompts: Sequence[str]) -> Text:
        """Of P prompts."""
        if self._cache is not None:
            return self._place(self._cache(prompts))
        return self._encode(self._text_params, self._tokenize(list(prompts)))

    def cache_text(self, folder: str, prompts: Sequence[str]) -> None:
        """Encodes all prompts to a file in `folder`, once; from then on no others, and the encoder leaves the devices.

        Raises:
          UserError: several processes, or the disk refuses.
        """
        if jax.process_count() > 1:
            raise UserError("data.text_cache: made by one process only; leave it empty on several hosts")
        params = self._text_params

        def encode(batch: Sequence[str]) -> Text:
            return self._encode(params, self._tokenize(batch))

        self._cache = open_text_cache(folder, prompts, encode, params, self._tokenize, self.size)
        self._text_params = None

    def sample(self, adapters: Tree, text: Text, step: int) -> jax.Array:
        """Candidates of a step's prompts: clean latents [P * N, F, h, w, C]."""
        return self._sample(adapters, self._repeat(text), self._keys(np.int32(step)))

    def _sample(self, adapters: Tree, text: Text, keys: jax.Array) -> jax.Array:
        update, mesh = self._meshes.update, self._meshes.rollout
        if mesh == update:
            return self._rollout(self.frozen, adapters, text, self._negative, keys)
        # Weights lie as the update wants them, and are gathered once for all steps of the sampler.
        weights = (self.frozen, adapters)
        frozen, adapters = move(weights, infer_shardings(weights, mesh, self._rules))
        negative = move(self._negative, jax.tree.map(lambda _: replicated(mesh), self._negative))
        with jax.set_mesh(mesh):
            text = jax.tree.map(lambda x: bring(x, mesh), text)
            latents = self._rollout(frozen, adapters, text, negative, keys)
        return move(latents, infer_shardings(latents, update, (("", VIDEO),)))

    def generate(self, adapters: Tree, prompts: Sequence[str], keys: jax.Array) -> jax.Array:
        """One video for each of P * N prompts and keys: uint8 [P * N, F, H, W, 3], all frames."""
        latents = self._sample(adapters, self.encode(prompts), keys)
        with jax.set_mesh(self._look_mesh):
            return self._decode_all(self._vae_params, bring(latents, self._look_mesh))

    def score(self, latents: jax.Array, prompts: Sequence[str]) -> jax.Array:
        """Scores [P * N, D] of the candidates of P prompts; only the frames that a scorer reads are decoded."""
        candidates = self.clips // self.size
        with jax.set_mesh(self.weights.mesh):
            videos = self._decode(self._vae_params_to_score, bring(latents, self.weights.mesh))
        scores = self._score(videos, [prompt for prompt in prompts for _ in range(candidates)])
        update = self._meshes.update
        return scores if self._meshes.score == update else jax.device_put(scores, replicated(update))

    def pair(self, state: TrainState, latents: jax.Array, text: Text, scores: jax.Array) -> tuple[TrainState, Metrics]:
        """The state with this step's pairs in its buffer; the first step's are kept for watching too."""
        statistics, pairs, metrics = self._pairing(state.statistics, latents, text, scores, state.step)
        first = {} if int(state.step) else {"watched": pairs}
        buffer = self._push(state.buffer, pairs, state.step)
        return state._replace(statistics=statistics, buffer=buffer, **first), metrics

    def update(self, state: TrainState, update: int, precise: bool) -> tuple[TrainState, Metrics]:
        """The state after one optimizer update."""
        return self._update(state, self.frozen, self.start, self.empty_text, update, precise)

    def result(self, state: TrainState) -> Tree:
        """The adapters that a run which ended now would hand back."""
        return self._result(self.start, state.weights()) if self._extrapolates else state.weights()

    def rounding_noise(self, state: TrainState) -> float:
        """See `Update.rounding_noise`."""
        return self._update.rounding_noise(state, self.frozen, self.empty_text)

    def displacement(self, state: TrainState) -> dict[str, float]:
        """See `Update.displacement`."""
        return self._update.displacement(state, self.frozen, self.start, self.empty_text)


def abstract_pairs(size: int, latent_shape: tuple[int, ...], text: Text) -> Pairs:
    """Shapes and dtypes of a step's pairs; `text` is one prompt's encoding."""

    def array(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((size, *shape), dtype)

    return Pairs(
        winner=array(jnp.float32, *latent_shape),
        loser=array(jnp.float32, *latent_shape),
        text=jax.tree.map(lambda x: array(x.dtype, *x.shape), text),
        mask=array(jnp.bool_),
        winner_reward=array(jnp.float32),
        loser_reward=array(jnp.float32),
        slot=array(jnp.int32),
        step=array(jnp.int32),
    )
