"""A config's job as shapes: the programs of a run with arguments that hold no numbers."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vpo_jax.algorithms.state import TrainState, init_state
from vpo_jax.checkpoints import safetensors_io as io
from vpo_jax.checkpoints.folders import COMPONENTS, DEFAULTS_FILE, PipelineParts, param_shapes
from vpo_jax.pipeline import SHIPPED, Pipeline, make_pipeline
from vpo_jax.planning.specs import MODELS, QUERY_TOKENS, SCORERS, VIDEOREWARD_SETTINGS
from vpo_jax.rewards.combine import dimension_names
from vpo_jax.rewards.loading import load_reward
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.programs import Program, abstract
from vpo_jax.training.optimizer import make_optimizer
from vpo_jax.training.policy import Policy, make_policy
from vpo_jax.training.programs import make_programs

Tree = Any


@dataclasses.dataclass(frozen=True)
class Job:
    """A config's shapes.

    Attributes:
      config: resolved.
      pipeline: its `params` are shapes.
      policy: likewise.
      state: the training state's shapes.
      infer_algorithm: shardings of the algorithm's part of it; see `algorithms.protocol`.
      rewards: scorers; their `params` may be shapes.
      programs: in the order of a step.
      size: (frames, height, width) of a video.
      role: of the devices: "all", or only to "train" or to "score" (reward.devices).
    """

    config: Any
    pipeline: Pipeline
    policy: Policy
    state: TrainState
    infer_algorithm: Callable[[Tree, Any], Tree]
    rewards: Sequence[Any]
    programs: tuple[Program, ...]
    size: tuple[int, int, int]
    role: str = "all"

    def of(self, role: str) -> "Job":
        """The part of devices that only train or only score."""
        programs = tuple(program for program in self.programs if (program.mesh == "score") == (role == "score"))
        return dataclasses.replace(self, programs=programs, role=role)

    @property
    def resident(self) -> dict[str, tuple[Tree, str]]:
        """What lies in memory from start to end: name -> (shapes, role of the mesh that it is cut over)."""
        looks = "update" if self.role == "train" else "score"
        autoencoder = {"autoencoder": (self.pipeline.params["vae"], looks)}
        scorers = {"scorers": ([abstract(reward.params) for reward in self.rewards], "score")}
        if self.role == "score":
            return autoencoder | scorers
        trained = {
            "frozen backbone": (self.policy.frozen, "update"),
            "initial policy": (self.policy.initial, "update"),
            "training state": (self.state, "update"),
            "text encoder": (self.pipeline.params["text_encoder"], "update"),
        }
        return trained | autoencoder | (scorers if self.role == "all" else {})


def read_shapes(path: str) -> Pipeline:
    """The pipeline of a diffusers folder, a shipped model, or a name in `specs.MODELS`, by its configs alone.

    Raises:
      UserError: neither a folder nor a name, or a config that the models refuse.
    """
    if path in MODELS and not Path(path).exists():
        configs, defaults = MODELS[path], {}
    else:
        root = Path(SHIPPED.get(path, path))
        if not root.is_dir():
            raise UserError(
                f"model.path: {path}: no such folder; give a diffusers folder (its config files are enough), shapes,"
                f" or one of {', '.join(MODELS)}"
            )
        configs = {name: io.read_json(root / name / "config.json") for name in COMPONENTS}
        configs["scheduler"] = io.read_json(root / "scheduler" / "scheduler_config.json")
        defaults = io.read_json(root / DEFAULTS_FILE) if (root / DEFAULTS_FILE).is_file() else {}
    params = {name: param_shapes(name, configs[name]) for name in COMPONENTS}
    return make_pipeline(PipelineParts(configs, params, None, defaults))


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
    policy = _policy(config, pipeline)
    programs = make_programs(config, pipeline, policy, rewards)
    state = jax.eval_shape(
        lambda initial: init_state(
            initial,
            make_optimizer(config.optimizer),
            programs.algorithm.init,
            len(dimension_names(rewards)),
            with_ema=config.ema.decay > 0.0,
        ),
        policy.initial,
    )
    size = programs.num_frames, programs.height, programs.width
    return Job(config, pipeline, policy, state, programs.algorithm.infer_shardings, rewards, programs.all, size)


def _policy(config: Any, pipeline: Pipeline) -> Policy:
    made: list[Policy] = []

    def trees(params: Tree) -> tuple[Tree, Tree]:
        made.append(make_policy(config, pipeline.family, params))
        return made[0].frozen, made[0].initial

    frozen, initial = jax.eval_shape(trees, pipeline.trainable)
    return dataclasses.replace(made[0], frozen=frozen, initial=initial)
