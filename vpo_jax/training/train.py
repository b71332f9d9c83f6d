"""Online preference training of a video diffusion model (OnlineVPO, arXiv 2412.15159).

sample candidates -> score -> select -> update -> maybe refresh the reference -> evaluate, log, save
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from vpo_jax.algorithms.state import TrainState
from vpo_jax.data.prompts import fingerprint
from vpo_jax.pipeline import Pipeline
from vpo_jax.rewards.combine import motion_columns
from vpo_jax.runtime.backend import settled
from vpo_jax.runtime.mesh import Meshes
from vpo_jax.runtime.processes import fetch
from vpo_jax.runtime.signals import Stop
from vpo_jax.runtime.workdir import Workdir
from vpo_jax.training.policy import Policy
from vpo_jax.training.progress import Progress
from vpo_jax.training.record import RunRecord
from vpo_jax.training.reference import make_reference
from vpo_jax.training.run import Run
from vpo_jax.training.setup import make_setup

Tree = Any


class Result(NamedTuple):
    """A finished run; `pipeline` holds the tuned denoiser (the average's weights where there is one)."""

    pipeline: Pipeline
    policy: Policy
    state: TrainState


def train(
    config: Any,
    pipeline: Pipeline,
    rewards: Sequence[Any],
    workdir: Workdir,
    *,
    meshes: Meshes,
    prompts: Sequence[str],
    tuning_prompts: Sequence[str] = (),
    held_out: Sequence[Any] = (),
    initial: Tree | None = None,
    stop: Stop | None = None,
    progress: Progress | None = None,
) -> Result:
    """Trains until `train.steps` steps are done, going on from the workdir's newest checkpoint.

    Args:
      config: see configs/vpo.py.
      pipeline: the model to start from.
      rewards: the training scorers.
      workdir: open and locked.
      meshes: what each part of a step is computed on.
      prompts: what candidates are sampled for.
      tuning_prompts: evaluated every `eval.every` steps; disjoint from those that the result is reported on.
      held_out: scorers at those evaluations. Their mean chooses the best checkpoint: they are used for selection.
      initial: trainable parameters theta0 where a run starts from an adapter.
      stop: a flag that is checked between phases.
      progress: shows the run; None makes one on stderr.

    Raises:
      UserError: sizes that do not fit each other or the mesh, a scorer for evaluation only, other prompts on resume.
      Interrupted: a signal came; the last finished step is saved.
      Alarmed: an alarm was raised and `eval.on_alarm` is "stop".
      NonFinite: a step was not finite; the last finite state is saved apart.
    """
    with jax.set_mesh(meshes.update):
        setup = make_setup(config, pipeline, rewards, meshes, prompts, tuning_prompts, held_out, initial)
        algorithm, frozen, rollouts, evaluator = setup.algorithm, setup.frozen, setup.rollouts, setup.evaluator
        update_reference = make_reference(config.reference.schedule, config.reference.every, config.reference.decay)
        record = RunRecord(fingerprint(prompts))
        run = Run(config, workdir, record, stop or Stop(), rollouts.videos, progress)
        state = run.restore(setup.fresh_state, setup.abstract_state)
        with run:
            if not motion_columns(rewards):
                run.say("no training scorer measures dynamic_degree: the motion gate is off")
            run.begin(evaluator)

            for step in run.steps():
                # Sample: N candidates a prompt from the policy as it is now.
                with run.phase("rollout"):
                    candidates = rollouts.next(state, step)
                run.wait(candidates)

                # Score: the decoded frames, as uint8.
                with run.phase("score"):
                    scores = setup.score(candidates)

                # Select: what the updates learn from, where scores differ enough.
                state, selected = algorithm.select(state, candidates.rollout, scores)
                evaluates = evaluator.due(step + 1)
                measured: dict[str, float] = {}
                if step == 0 or evaluates:
                    state, measured, said = algorithm.calibrate(state, frozen)
                    run.say(said)

                # Update: fresh noise on the same candidates.
                metrics = [selected]
                with run.phase("update"):
                    for index in range(config.train.updates_per_step):
                        state, updated = settled(algorithm.update(state, frozen, index))
                        metrics.append(updated)
                state = state.advanced(candidates.prefetched)

                # Evaluate, then maybe refresh the reference (the curriculum): it copies the evaluated policy.
                evaluation = evaluator.evaluate(state, run.record) if evaluates else None
                state = update_reference(state, step + 1, evaluation and evaluation.gain)
                run.finish(state, metrics, measured, candidates, scores, evaluation)
        return Result(tuned(pipeline, setup.policy, setup.result(run.state)), setup.policy, run.state)


def tuned(pipeline: Pipeline, policy: Policy, trainable: Tree) -> Pipeline:
    """The pipeline with the trained weights in it."""
    return pipeline.with_trainable(policy.merged(pipeline.trainable, fetch(trainable)))
