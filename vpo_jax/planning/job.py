"""A config's job as shapes: the real stages with arguments that hold no numbers."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vpo_jax.checkpoints.folders import read_shapes as read_folder_shapes
from vpo_jax.checkpoints.folders import shapes_of_configs
from vpo_jax.diffusion.samplers import make_sampler
from vpo_jax.families.table import family_of_folder, published
from vpo_jax.pipeline import SHIPPED, Pipeline, make_pipeline
from vpo_jax.planning.specs import QUERY_TOKENS, SCORERS, VIDEOREWARD_SETTINGS
from vpo_jax.rewards.combine import dimension_names
from vpo_jax.rewards.loading import load_reward
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.trees import bytes_of
from vpo_jax.training.losses import PairCoefficients
from vpo_jax.training.optimizer import make_optimizer
from vpo_jax.training.pairs import Pairs, steps_kept
from vpo_jax.training.policy import Policy, make_policy
from vpo_jax.training.rollout import frames_to_decode, make_decode, make_rollout
from vpo_jax.training.stages import abstract_pairs
from vpo_jax.training.state import TrainState, init_state
from vpo_jax.training.step import Noised, Predictions, make_errors, make_gradients

Tree = Any


@dataclasses.dataclass(frozen=True)
class Stage:
    """One compiled function of a step.

    Attributes:
      name: as in the metrics, time/NAME.
      build: batch -> (function, arguments); see `arguments`.
      arguments: role of each argument: "rules" (parameters), "batch" (first dimension), "whole".
      batch: what a step gives it, in clips, pairs or prompts.
      microbatch: how many at a time; 0 = all.
      calls: a step.
      weights: bytes of the weights that a pass reads: each pass gathers them where they are cut.
      passes: in a call, backward ones too.
    """

    name: str
    build: Callable[[int], tuple[Callable[..., Any], tuple[Any, ...]]]
    arguments: tuple[str, ...]
    batch: int
    microbatch: int
    calls: int
    weights: int = 0
    passes: int = 1

    @property
    def role(self) -> str:
        """Which of the job's meshes it is computed on: see `runtime.mesh.Meshes`."""
        if self.name == "decode" or self.name.startswith("score"):
            return "score"
        return "rollout" if self.name == "rollout" else "update"


@dataclasses.dataclass(frozen=True)
class Job:
    """A config's shapes.

    Attributes:
      config: resolved.
      pipeline: its `params` are shapes.
      policy: likewise.
      state: the training state's shapes.
      rewards: scorers; their `params` may be shapes.
      stages: in the order of a step.
      size: (frames, height, width) of a video.
      role: of the devices: "all", or only to "train" or to "score" (reward.devices).
    """

    config: Any
    pipeline: Pipeline
    policy: Policy
    state: TrainState
    rewards: Sequence[Any]
    stages: tuple[Stage, ...]
    size: tuple[int, int, int]
    role: str = "all"

    def of(self, role: str) -> "Job":
        """The part of devices that only train or only score."""
        stages = tuple(stage for stage in self.stages if (stage.role == "score") == (role == "score"))
        return dataclasses.replace(self, stages=stages, role=role)

    @property
    def resident(self) -> dict[str, tuple[Tree, str]]:
        """What lies in memory from start to end: name -> (shapes, role of the mesh that it is cut over)."""
        looks = "update" if self.role == "train" else "score"
        autoencoder = {"autoencoder": (self.pipeline.decoder_params, looks)}
        scorers = {"scorers": ([shapes_of(reward.params) for reward in self.rewards], "score")}
        if self.role == "score":
            return autoencoder | scorers
        trained = {
            "frozen denoiser": (self.policy.frozen, "update"),
            "start of the policy": (self.policy.start, "update"),
            "training state": (self.state, "update"),
            "text encoder": (self.pipeline.text_params, "update"),
        }
        return trained | autoencoder | (scorers if self.role == "all" else {})


def choose_stages(job: Job, names: str) -> list[Stage]:
    """The job's stages with these comma-separated names; all where there are none.

    Raises:
      UserError: a name that no stage has, with those of the job.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()] or [stage.name for stage in job.stages]
    if unknown := set(wanted) - {stage.name for stage in job.stages}:
        known = ", ".join(stage.name for stage in job.stages)
        raise UserError(f"--stages: {', '.join(sorted(unknown))}: no such stage; the job has {known}")
    return [stage for stage in job.stages if stage.name in wanted]


def shapes_of(tree: Tree) -> Tree:
    """The tree's shapes and dtypes."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def read_shapes(path: str) -> Pipeline:
    """The pipeline of a diffusers folder, a shipped model, or a published one by name, by its configs alone.

    Raises:
      UserError: neither a folder nor a name, or a config that the models refuse.
    """
    known = published()
    if path in known and not Path(path).exists():
        family, configs = known[path]
        return make_pipeline(shapes_of_configs(family.layout, configs))
    root = Path(SHIPPED.get(path, path))
    if not root.is_dir():
        raise UserError(
            f"model.path: {path}: no such folder; give a diffusers folder (its config files are enough), shapes,"
            f" or one of {', '.join(known)}"
        )
    return make_pipeline(read_folder_shapes(root, family_of_folder(root).layout))


def read_scorers(names: str, settings: Any) -> list[Any]:
    """Scorers of a comma-separated list; those in `specs.SCORERS` as shapes. `settings` is the config's `reward`."""
    make = {"videoscore": _videoscore, "videoreward": _videoreward}
    return [
        make[name](name, settings) if name in SCORERS and not Path(name).is_dir() else load_reward(name, settings)
        for name in (part.strip() for part in names.split(","))
        if name
    ]


class _Queries:
    """Stands for a tokenizer: how many tokens there are, and nothing of what they say."""

    def __init__(self, length: int, image_ids: Sequence[int] = (), tokens_of_head: int = 0) -> None:
        self.length = length
        self.frame_ids = np.array([0, *image_ids, 0], np.int32)
        self.head_ids = np.zeros(tokens_of_head, np.int32)

    def __call__(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        shape = (len(prompts), self.length)
        return {"input_ids": np.zeros(shape, np.int32), "mask": np.ones(shape, bool)}


def _videoscore(name: str, settings: Any) -> Any:
    from vpo_jax.checkpoints.videoscore import videoscore_shapes
    from vpo_jax.models.idefics2 import Idefics2ForSequenceClassification
    from vpo_jax.models.idefics2_config import Idefics2Config
    from vpo_jax.rewards.frames import FrameSettings
    from vpo_jax.rewards.protocol import DIMENSIONS
    from vpo_jax.rewards.videoscore import VideoScoreOptions, VideoScoreReward

    config = Idefics2Config.from_dict(SCORERS[name])
    params = _in_bfloat16(videoscore_shapes(config, len(DIMENSIONS)))
    model = Idefics2ForSequenceClassification(config, len(DIMENSIONS), jnp.bfloat16)
    # The real id of an image token: where none stands, a compiler leaves out what sees the frames.
    queries: Any = _Queries(QUERY_TOKENS[name], [config.image_token_id] * config.perceiver.resampler_n_latents)
    chosen = {key: settings[name][key] for key in ("frame_choice", "max_frames")}
    return VideoScoreReward(name, model, params, queries, FrameSettings(), VideoScoreOptions(**chosen))


def _videoreward(name: str, settings: Any) -> Any:
    from vpo_jax.checkpoints.videoreward import REWARD_TOKENS, RewardSettings, videoreward_shapes
    from vpo_jax.models.qwen2_vl import Qwen2VLRewardModel
    from vpo_jax.models.qwen2_vl_config import Qwen2VLConfig
    from vpo_jax.rewards.frames import SmartFrameSettings
    from vpo_jax.rewards.videoreward import VideoRewardOptions, VideoRewardReward

    config, trained = Qwen2VLConfig.from_dict(SCORERS[name]), RewardSettings(**VIDEOREWARD_SETTINGS)
    tokens = tuple(range(config.text.vocab_size - len(REWARD_TOKENS), config.text.vocab_size))
    model = Qwen2VLRewardModel(config, tokens, trained.outputs, jnp.bfloat16)
    queries: Any = _Queries(QUERY_TOKENS[name], tokens_of_head=16)
    options = VideoRewardOptions(video_fps=settings[name].video_fps)
    frames = SmartFrameSettings(config.vision.factor, options.min_pixels, trained.max_frame_pixels)
    params = _in_bfloat16(videoreward_shapes(config, trained.outputs))
    return VideoRewardReward(name, model, params, queries, frames, trained, options)


def _in_bfloat16(shapes: Tree) -> Tree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), shapes)


def make_job(config: Any) -> Job:
    """The job of a config that `check` has passed."""
    pipeline = read_shapes(config.model.path)
    rewards = read_scorers(config.reward.scorers, config.reward)
    rollout, train, preference = config.rollout, config.train, config.preference
    size = pipeline.video_size(rollout.num_frames, rollout.height, rollout.width)
    latent_shape = pipeline.latent_shape(*size)
    policy = _policy(config, pipeline)
    denoise = policy.denoise
    length = pipeline.family.text_length
    text = jax.eval_shape(
        lambda p: pipeline.family.encode_text(p, jnp.zeros((1, length), jnp.int32)), pipeline.text_params
    )
    prompts, updates = train.prompts_per_step, train.updates_per_step
    clips, pairs = prompts * rollout.candidates, prompts * (steps_kept(config) + 1)
    frames = frames_to_decode(rewards, size[0])
    sampler = make_sampler(pipeline.scheduler_config, rollout.num_inference_steps, rollout.sampler or None, rollout.eta)

    def array(*shape: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    def text_of(batch: int) -> Any:
        return jax.tree.map(lambda x: array(batch, *x.shape[1:], dtype=x.dtype), text)

    text_of_one = jax.tree.map(lambda x: array(*x.shape[1:], dtype=x.dtype), text)

    def encode(batch: int) -> tuple:
        return pipeline.family.encode_text, (pipeline.text_params, array(batch, length, dtype=jnp.int32))

    def sample(batch: int) -> tuple:
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
        micro = rollout.microbatch if rollout.microbatch < batch else 0
        made = make_rollout(denoise, sampler, latent_shape, rollout.guidance_scale, micro)
        return made, (policy.frozen, policy.start, text_of(batch), text_of_one, keys)

    def decode(batch: int) -> tuple:
        micro = rollout.microbatch if rollout.microbatch < batch else 0
        return make_decode(pipeline, frames, micro), (pipeline.decoder_params, array(batch, *latent_shape))

    def score(reward: Any) -> Callable[[int], tuple]:
        seen = len(reward.frame_indices(size[0]))

        def build(batch: int) -> tuple:
            videos = array(batch, seen, *size[1:], 3, dtype=jnp.uint8)
            prepared = shapes_of(reward.prepare(["a prompt"] * batch))
            return reward.score, (shapes_of(reward.params), videos, prepared)

        return build

    def noised(batch: int) -> Noised:
        video = array(batch, *latent_shape)
        return Noised(video, video, video, video, array(batch, dtype=jnp.int32), text_of(batch))

    def errors(batch: int) -> tuple:
        micro = train.microbatch if train.microbatch < batch else 0
        return make_errors(denoise, micro), (policy.frozen, policy.start, noised(batch))

    def update(batch: int) -> tuple:
        micro = train.microbatch if train.microbatch < batch else 0
        mu = preference.winner_safeguard_mu if preference.winner_safeguard else None
        made = make_gradients(denoise, micro, mu, preference.anchor)
        one = array(batch)
        fields = len(PairCoefficients._fields)
        seen = noised(batch)
        first = Predictions(seen.winner, seen.loser)
        rest = (seen, PairCoefficients(*(one,) * fields), array(batch, dtype=jnp.bool_))
        return made, (policy.frozen, policy.start, first, *rest)

    of_pairs = ("rules", "rules", "batch")
    passes = 4 if train.remat else 3
    # Of theta and phi, and of theta0 where an anchor holds the policy to it and phi may leave it.
    adapters = 3 if preference.anchor > 0.0 and config.reference.schedule != "frozen" else 2
    text_weights, vae_weights = bytes_of(pipeline.text_params), bytes_of(pipeline.decoder_params)
    weights = bytes_of(policy.frozen) + bytes_of(policy.start)
    stages = [
        Stage("encode", encode, ("rules", "batch"), prompts, 0, 1, text_weights),
        Stage("rollout", sample, ("rules", "rules", "batch", "whole", "batch"), clips, rollout.microbatch, 1,
              weights, passes=rollout.num_inference_steps),
        Stage("decode", decode, ("rules", "batch"), clips, rollout.microbatch, 1, vae_weights),
        *(
            Stage(f"score {reward.name}", score(reward), ("rules", "batch", "batch"), clips, rollout.microbatch, 1,
                  bytes_of(shapes_of(reward.params)))
            for reward in rewards
            if reward.jittable
        ),
        Stage("errors", errors, of_pairs, pairs, train.microbatch, adapters * updates, weights),
        Stage("update", update, ("rules", "rules", "batch", "batch", "batch", "batch"), pairs, train.microbatch,
              updates, weights, passes),
    ]  # fmt: skip
    one_pair: Pairs = abstract_pairs(prompts, latent_shape, text_of_one)
    state = jax.eval_shape(
        lambda start: init_state(
            start,
            make_optimizer(config.optimizer),
            one_pair,
            len(dimension_names(rewards)),
            steps_kept(config),
            with_ema=config.ema.decay > 0.0,
        ),
        policy.start,
    )
    return Job(config, pipeline, policy, state, rewards, tuple(stages), size)


def _policy(config: Any, pipeline: Pipeline) -> Policy:
    made: list[Policy] = []

    def trees(params: Tree) -> tuple[Tree, Tree]:
        made.append(make_policy(config, pipeline.family, params))
        return made[0].frozen, made[0].start

    frozen, start = jax.eval_shape(trees, pipeline.trainable)
    return dataclasses.replace(made[0], frozen=frozen, start=start)
