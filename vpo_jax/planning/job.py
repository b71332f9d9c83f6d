"""A config's job as shapes: the programs of a run with arguments that hold no numbers."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from vpo_jax.algorithms.state import TrainState, init_state
from vpo_jax.checkpoints.folders import read_shapes as read_folder_shapes
from vpo_jax.checkpoints.folders import shapes_of_configs
from vpo_jax.families.table import family_of_folder, published
from vpo_jax.models.fused_attention import as_shapes
from vpo_jax.pipeline import SHIPPED, Pipeline, make_pipeline
from vpo_jax.rewards.combine import dimension_names
from vpo_jax.rewards.loading import abstract_rewards
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.programs import Program, abstract
from vpo_jax.training.optimizer import make_optimizer
from vpo_jax.training.policy import Policy, abstract_policy, abstract_text_params
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
        """What lies in memory during the whole run: name -> (shapes, role of the mesh that shards it)."""
        decodes = "update" if self.role == "train" else "score"
        autoencoder = {"autoencoder": (self.pipeline.decoder_params, decodes)}
        scorers = {"scorers": ([abstract(reward.params) for reward in self.rewards], "score")}
        if self.role == "score":
            return autoencoder | scorers
        trained = {
            "frozen backbone": (self.policy.frozen, "update"),
            "initial policy": (self.policy.initial, "update"),
            "training state": (self.state, "update"),
        }
        if not self.config.data.text_cache:  # else it has left the devices
            trained["text encoder"] = (abstract_text_params(self.config, self.pipeline), "update")
        return trained | autoencoder | (scorers if self.role == "all" else {})


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


def make_job(config: Any) -> Job:
    """The job of a config that `check` has passed."""
    pipeline = read_shapes(config.model.path)
    with as_shapes():  # which devices there are here says nothing of those that are planned
        rewards = abstract_rewards(config.reward.scorers, config.reward)
    policy = abstract_policy(config, pipeline)
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
    every_step = programs.all
    if config.data.text_cache:
        every_step = tuple(program for program in every_step if program is not programs.encode)
    return Job(config, pipeline, policy, state, programs.algorithm.infer_shardings, rewards, every_step, size)
