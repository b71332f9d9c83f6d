"""What training asks of a preference learning algorithm; each is a folder beside this file."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import optax
from jax.sharding import Mesh

from vpo_jax.algorithms.state import TrainState
from vpo_jax.diffusion.process import Process
from vpo_jax.diffusion.samplers import Sampler
from vpo_jax.diffusion.trajectory import Trajectory
from vpo_jax.rewards.combine import Dimensions
from vpo_jax.runtime.fields import Field, Values
from vpo_jax.runtime.mesh import Rules
from vpo_jax.runtime.programs import Program

Tree = Any
Metrics = dict[str, tuple[jax.Array, jax.Array]]  # name -> (sum, count), still on the devices
# (frozen, trainable, latents [B, F, h, w, C], timesteps [B], text of B) -> prediction float32 [B, F, h, w, C].
Denoise = Callable[[Tree, Tree, jax.Array, jax.Array, Tree], jax.Array]


class Frozen(NamedTuple):
    """What no update changes, on the devices.

    Attributes:
      backbone: parameters under the adapters; {} for full fine-tuning.
      initial: the trainable parameters of the initial policy, theta0.
      empty_text: encoding of the empty prompt, without a batch dimension.
    """

    backbone: Tree
    initial: Tree
    empty_text: Tree


class Rollout(NamedTuple):
    """A step's candidates. Rows of P prompts; candidates of a prompt stand side by side.

    Attributes:
      text: encodings, every leaf [P, ...].
      latents: clean, float32 [P * N, F, h, w, C].
      trajectory: every denoising step with its log-probability where the algorithm keeps trajectories, else None.
    """

    text: Tree
    latents: jax.Array
    trajectory: Trajectory | None = None


class Setting(NamedTuple):
    """What an algorithm is made from.

    Attributes:
      config: the run's.
      denoise: the policy's prediction in the run's dtype.
      denoise_float32: the same, computed in float32.
      process: of the noise.
      sampler: of the rollouts.
      optimizer: of the trainable parameters.
      rewards: the training scorers.
      latents: shape and dtype of one video's latents.
      text: of one prompt's encoding.
      frozen: shapes of `Frozen`.
      rules: how parameters are sharded.
      mesh: what updates are computed on; None where nothing runs, as in a plan.
    """

    config: Any
    denoise: Denoise
    denoise_float32: Denoise
    process: Process
    sampler: Sampler
    optimizer: optax.GradientTransformation
    rewards: Sequence[Dimensions]
    latents: jax.ShapeDtypeStruct
    text: Tree
    frozen: Frozen
    rules: Rules
    mesh: Mesh | None = None


class Algorithm(Protocol):
    """A preference learning algorithm: what it keeps, how it chooses what to learn from, and how it learns.

    Attributes:
      keeps_trajectories: whether rollouts have to keep every denoising step.
      programs: its compiled functions, for plans and benchmarks.
    """

    keeps_trajectories: bool
    programs: tuple[Program, ...]

    def init(self, initial: Tree) -> Tree:
        """Its own part of the state before the first step, `TrainState.algorithm`; also traced for shapes alone."""
        ...

    def infer_shardings(self, shapes: Tree, mesh: Mesh) -> Tree:
        """Shardings of that part, from its shapes."""
        ...

    def sampling_policy(self, state: TrainState) -> Tree:
        """The trainable parameters that rollouts sample with: the policy, or an older one."""
        ...

    def select(self, state: TrainState, rollout: Rollout, scores: jax.Array) -> tuple[TrainState, Metrics]:
        """The state with what the step's updates will learn from; scores are float32 [P * N, D]."""
        ...

    def calibrate(self, state: TrainState, frozen: Frozen) -> tuple[TrainState, dict[str, float], str]:
        """What is measured before the first update and at evaluations, and a line for people, which may be ""."""
        ...

    def update(self, state: TrainState, frozen: Frozen, index: int) -> tuple[TrainState, Metrics]:
        """The state after the step's update number `index`."""
        ...

    def evaluate(self, state: TrainState, frozen: Frozen, result: Tree) -> dict[str, float]:
        """What is measured at evaluations beside videos; `result` is what the run would return if it ended now."""
        ...


class Entry(NamedTuple):
    """An algorithm in the table.

    Attributes:
      make: builds it.
      fields: of its config section, by their full key; configs/vpo.py gives their defaults.
      check: raises UserError where values of a config do not go together for it.
    """

    make: Callable[[Setting], Algorithm]
    fields: Mapping[str, Field] = {}
    check: Callable[[Values], None] = lambda values: None
