"""Every compiled function of a step, once: training calls them, plans and benchmarks read them."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vpo_jax.algorithms.protocol import Algorithm, Frozen, Setting
from vpo_jax.algorithms.table import ALGORITHMS
from vpo_jax.diffusion.config import with_shift
from vpo_jax.diffusion.process import make_process
from vpo_jax.diffusion.samplers import Sampler, make_sampler
from vpo_jax.diffusion.trajectory import check_stochastic
from vpo_jax.pipeline import Pipeline
from vpo_jax.rewards.scoring import frames_to_decode, score_function
from vpo_jax.runtime.batches import fit_microbatch, in_microbatches
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.mesh import BATCH, constrain
from vpo_jax.runtime.programs import Program, Role, abstract, abstract_rows
from vpo_jax.training.optimizer import make_optimizer
from vpo_jax.training.policy import Policy, abstract_text_params
from vpo_jax.training.rollouts import make_branches, make_rollout

Tree = Any


class Programs(NamedTuple):
    """A step's compiled functions, in their order, and the algorithm that owns the last of them.

    Attributes:
      encode: (text encoder's parameters, ids [P, L]) -> encodings of P prompts.
      rollout: see `training.rollouts.make_rollout`: the candidates, or with a trunk the video that they begin from.
      branch: see `training.rollouts.make_branches`: the candidates from that video; None without a trunk.
      decode: (autoencoder's parameters, latents [B, F, h, w, C]) -> uint8 [B, f, H, W, 3], what scorers read.
      scores: of each compiled scorer: (parameters, videos [P * N, f, H, W, 3], prepared prompts) -> [P * N, D].
      algorithm: see `algorithms.protocol`; its programs follow.
      num_frames, height, width: of a video.
      frames: those that are decoded, ascending.
      latents: shape and dtype of one video's latents.
    """

    encode: Program
    rollout: Program
    branch: Program | None
    decode: Program
    scores: tuple[Program, ...]
    algorithm: Algorithm
    num_frames: int
    height: int
    width: int
    frames: tuple[int, ...]
    latents: jax.ShapeDtypeStruct

    @property
    def all(self) -> tuple[Program, ...]:
        """Every program, in the order of a step."""
        branch = () if self.branch is None else (self.branch,)
        return (self.encode, self.rollout, *branch, self.decode, *self.scores, *self.algorithm.programs)

    @property
    def candidates(self) -> Program:
        """The one whose result is a step's candidates."""
        return self.branch or self.rollout


def make_programs(
    config: Any, pipeline: Pipeline, policy: Policy, rewards: Sequence[Any], mesh: Any = None
) -> Programs:
    """The programs of a config; nothing is compiled until it is called or lowered.

    Args:
      config: checked.
      pipeline: its parameters may be shapes.
      policy: likewise.
      rewards: the training scorers; their parameters may be shapes.
      mesh: of the updates, for the shardings of their results; None where nothing runs.

    Raises:
      UserError: sizes that the model cannot make, a scorer for evaluation only, a sampler without log-probabilities
        where the algorithm wants them, a trunk that leaves candidates nothing to share or nothing to differ in.
    """
    for reward in rewards:
        if not reward.trains:
            raise UserError(f"reward.scorers: {reward.name!r} is for evaluation only; name it in held_out.scorers")
    rollout, size = config.rollout, config.train.prompts_per_step
    num_frames, height, width = pipeline.video_size(rollout.num_frames, rollout.height, rollout.width)
    latents = jax.ShapeDtypeStruct(pipeline.latent_shape(num_frames, height, width), jnp.float32)
    videos, micro = size * rollout.candidates, rollout.microbatch
    encode = _encode_program(config, pipeline, size)
    text = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), jax.eval_shape(encode.function, *encode.arguments(1))
    )
    scheduler = with_shift(pipeline.scheduler_config, rollout.shift, "rollout.shift")
    settings = rollout.num_inference_steps, rollout.sampler or None, rollout.eta
    sampler = make_sampler(scheduler, *settings)
    process = pipeline.family.process if not rollout.shift else make_process(scheduler)
    algorithm = ALGORITHMS[config.algorithm.name].make(
        Setting(
            config=config,
            denoise=policy.denoise,
            denoise_float32=policy.in_float32().denoise,
            process=process,
            sampler=sampler,
            optimizer=make_optimizer(config.optimizer),
            rewards=rewards,
            latents=latents,
            text=text,
            frozen=Frozen(abstract(policy.frozen), abstract(policy.initial), text),
            rules=pipeline.family.sharding_rules,
            mesh=mesh,
        )
    )
    if algorithm.keeps_trajectories:
        check_stochastic(sampler)
    guidance = pipeline.guidance(rollout.guidance_scale, rollout.guidance_scale_2, rollout.guidance_rescale)
    rolled = make_rollout(
        policy.denoise, sampler, latents.shape, guidance, micro, algorithm.keeps_trajectories, policy.read_text
    )

    def of_rollout(batch: int) -> tuple[Tree, ...]:
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
        return abstract(policy.frozen), abstract(policy.initial), abstract_rows(text, batch), text, keys

    branch, sampled = None, videos
    roles: tuple[Role, ...] = ("parameters", "parameters", "batch", "whole", "batch")
    if rollout.trunk_level > 0.0:
        if algorithm.keeps_trajectories:
            raise UserError(
                f"rollout.trunk_level: {config.algorithm.name} keeps every denoising step of its candidates, which a"
                " trunk leaves out in part; set it to 0.0"
            )
        first = first_step(sampler, rollout.trunk_level, process.num_train_timesteps)
        later = make_sampler(scheduler, *settings, first)
        branches = make_branches(policy.denoise, later, guidance, micro, policy.read_text)
        sampled = size
        branch = Program("branch", branches, lambda batch: (*of_rollout(batch), abstract_rows(latents, batch)),
                         (*roles, "batch"), "rollout", videos, microbatch=micro, microbatch_key="rollout.microbatch",
                         passes=len(later.timesteps))  # fmt: skip

    frames = frames_to_decode(rewards, num_frames)
    seen = {frame: place for place, frame in enumerate(frames)}

    def score_program(reward: Any) -> Program:
        places = tuple(seen[i] for i in reward.frame_indices(num_frames))

        def of_score(batch: int) -> tuple[Tree, ...]:
            shown = jax.ShapeDtypeStruct((batch, len(frames), height, width, 3), jnp.uint8)
            prompts = ["a prompt"] * (batch // math.gcd(batch, rollout.candidates))
            return abstract(reward.params), shown, abstract(reward.prepare(prompts))

        return Program(f"score {reward.name}", score_function(reward, places, micro), of_score,
                       ("parameters", "batch", "whole"), "score", videos, microbatch=micro,
                       microbatch_key="rollout.microbatch", shared=rollout.candidates)  # fmt: skip

    return Programs(
        encode=encode,
        rollout=Program("rollout", rolled, of_rollout, roles, "rollout", sampled,
                        microbatch=micro and fit_microbatch(micro, sampled), microbatch_key="rollout.microbatch",
                        passes=rollout.num_inference_steps),
        branch=branch,
        decode=decode_program(pipeline, frames, latents, videos, micro),
        scores=tuple(score_program(reward) for reward in rewards if reward.jittable),
        algorithm=algorithm,
        num_frames=num_frames,
        height=height,
        width=width,
        frames=frames,
        latents=latents,
    )  # fmt: skip


def first_step(sampler: Sampler, level: float, total: int) -> int:
    """The first step of candidates that begin from a trunk: its timestep is at most `level`, in (0, 1], times `total`.

    Raises:
      UserError: there is no such step, or it is the sampler's first one.
    """
    timesteps = sampler.timesteps
    first = int((timesteps > level * total + 1e-3).sum())  # float32 rounds timesteps that have fractions
    if first == len(timesteps):
        raise UserError(
            f"rollout.trunk_level: {level:g} leaves candidates no step: the last of {first} is at"
            f" {timesteps[-1] / total:g} of the schedule; give more, or raise rollout.num_inference_steps"
        )
    if first == 0:
        raise UserError(
            f"rollout.trunk_level: at {level:g} candidates take every step, the first at {timesteps[0] / total:g} of"
            " the schedule, and share next to nothing; give less than that, or 0.0 for independent ones"
        )
    return first


def _encode_program(config: Any, pipeline: Pipeline, prompts: int) -> Program:
    params = abstract_text_params(config, pipeline)

    def encode(params: Tree, ids: jax.Array) -> Tree:
        return jax.tree.map(lambda x: constrain(x, BATCH), pipeline.family.encode_text(params, ids))

    def arguments(batch: int) -> tuple[Tree, ...]:
        ids = jax.ShapeDtypeStruct((batch, pipeline.family.text_length), jnp.int32)
        return params, ids

    return Program("encode", jax.jit(encode), arguments, ("parameters", "batch"), "update", prompts)


def decode_program(
    pipeline: Pipeline, frames: Sequence[int], latents: jax.ShapeDtypeStruct, videos: int, microbatch: int
) -> Program:
    """Latents to videos uint8: only these frames, in this order."""
    indices = tuple(frames)

    def of_chunk(params: Tree, chunk: jax.Array) -> jax.Array:
        return constrain(pipeline.to_uint8(pipeline.family.decode(params, chunk, indices)), BATCH)

    def decode(params: Tree, batch: jax.Array) -> jax.Array:
        return in_microbatches(lambda chunk: of_chunk(params, chunk), batch, microbatch)

    def arguments(batch: int) -> tuple[Tree, ...]:
        return abstract(pipeline.decoder_params), abstract_rows(latents, batch)

    roles: tuple[Role, ...] = ("parameters", "batch")
    return Program("decode", jax.jit(decode), arguments, roles, "score", videos, microbatch=microbatch,
                   microbatch_key="rollout.microbatch")  # fmt: skip
