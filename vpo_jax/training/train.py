"""Online preference training of a video diffusion model (OnlineVPO, arXiv 2412.15159).

sample candidates -> score -> pair -> update -> maybe refresh the reference -> log, evaluate, save
"""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from vpo_jax.checkpoints.orbax_store import CheckpointStore
from vpo_jax.data.index import PromptIndex
from vpo_jax.data.prompts import fingerprint
from vpo_jax.evaluation.alarms import Alarm
from vpo_jax.rewards.combine import motion_columns
from vpo_jax.runtime.clock import Stopwatch
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.mesh import Meshes
from vpo_jax.runtime.metrics import MetricsWriter
from vpo_jax.runtime.processes import fetch, is_main, main_first
from vpo_jax.runtime.signals import Stop
from vpo_jax.runtime.workdir import Workdir, write_json
from vpo_jax.training.policy import Policy
from vpo_jax.training.progress import Progress
from vpo_jax.training.reference import make_reference
from vpo_jax.training.stages import Stages
from vpo_jax.training.state import TrainState
from vpo_jax.training.step import NOISE_LIMIT
from vpo_jax.training.watch import Watch, save_samples

Tree = Any
_LOG = logging.getLogger(__name__)


class NonFinite(Exception):
    """A loss, a gradient, or every score of a step was not finite; what made it is under failure/step_N."""


class Alarmed(Exception):
    """An alarm rang and `eval.on_alarm` says to stop; the step is saved."""


class Result(NamedTuple):
    """A finished run; `pipeline` holds the tuned denoiser (the average's weights where there is one)."""

    pipeline: Any
    policy: Policy
    state: TrainState


class Line(NamedTuple):
    """A step whose metrics are still on the device."""

    step: int
    metrics: Sequence[Mapping[str, tuple[Any, Any]]]
    looked: dict[str, float]
    prompts: list[str]
    scores: jax.Array


def train(
    config: Any,
    pipeline: Any,
    rewards: Sequence[Any],
    workdir: Workdir,
    *,
    meshes: Meshes,
    prompts: Sequence[str],
    tuning_prompts: Sequence[str] = (),
    held_out: Sequence[Any] = (),
    adapters: Tree | None = None,
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
      prompts: what candidates are made for.
      tuning_prompts: for the looks at `eval.every`; other prompts than those that the result is reported on.
      held_out: judges at those looks. Their mean chooses the best checkpoint: they steer.
      adapters: theta0 where a run starts from an adapter.
      stop: a flag that is looked at between stages.
      progress: where a person sees the run; None makes one on stderr.

    Raises:
      UserError: sizes that do not fit each other or the mesh, a scorer that may only judge, other prompts on resume.
      Interrupted: a signal came; the last finished step is saved.
      Alarmed: an alarm rang and `eval.on_alarm` is "stop".
      NonFinite: a step was not finite; the last finite state is saved apart.
    """
    with jax.set_mesh(meshes.update):
        # ==== Stages, each compiled once ==========================================================================
        stop = stop or Stop()
        stages = Stages(config, pipeline, rewards, meshes, adapters)
        if config.data.text_cache:
            stages.cache_text(config.data.text_cache, [*prompts, *tuning_prompts])
        index = PromptIndex(len(prompts), stages.size, config.seed, config.data.shuffle)
        follow = make_reference(config.reference.schedule, config.reference.every, config.reference.decay)
        looks = config.eval.every > 0 and len(tuning_prompts) > 0
        watch = Watch(
            tuning_prompts[: config.eval.prompts], rewards, held_out, stages.weights, stages.generate,
            stages.clips, stages.num_frames, config.eval.seed, config.log.samples, config.rollout.microbatch,
        )  # fmt: skip

        # ==== State: fresh, or the newest checkpoint ==============================================================
        store = CheckpointStore(workdir.checkpoints, config.checkpoint.keep)
        meta: dict[str, Any] = {"prompts": fingerprint(prompts), "clock": {}}
        meta |= {"base": None, "looks": [], "held_out": None}
        if store.latest() is None:
            state, kept = stages.fresh_state(), -1
        else:
            kept, state, restored = store.restore(None, stages.abstract_state)
            if restored["prompts"] != meta["prompts"]:
                raise UserError("data.prompts: not the prompts that this run began with; choose another --workdir")
            meta = restored
        began, precise = int(state.step), bool(state.precise)
        writer = MetricsWriter(workdir.path, config.log.tensorboard, silent=not is_main())
        writer.cut(kept)
        clock = Stopwatch(meta["clock"])

        def finish(line: Line) -> None:
            """Fetches a step's metrics, one step late, so that the device has the next rollout to work on."""
            values = mean_of(line.metrics) | line.looked
            values |= (times := clock.lap()) | {"time/videos_per_second": stages.clips / times["time/step"]}
            writer.write(line.step, values)
            bar.update(line.step, values)
            if values["loss/non_finite"] > 0.0 or values["reward/all_non_finite"] > 0.0:
                save_failure(config, workdir, state, meta, line, values)

        def save(metric: float | None = None) -> None:
            store.save(int(state.step), state, meta | {"clock": clock.state}, metric)

        with (
            contextlib.closing(store),
            contextlib.closing(writer),
            progress or Progress(config.train.steps, began, config.log.every, silent=not is_main()) as bar,
        ):
            if began:
                bar.say(f"continuing from step {began}")
            if not motion_columns(rewards):
                bar.say("no training scorer measures dynamic_degree: the motion gate is off")
            if looks and meta["base"] is None:
                base = watch.look(stages.start)
                before = {name: values.tolist() for name, values in base.scores.items()}
                meta |= {"base": before, "looks": [watch.compare(before, base)]}
                save_samples(workdir.samples, writer, 0, base.videos)
            line: Line | None = None

            for step in range(began, config.train.steps):
                if stop.asked():
                    break
                # ==== Sample: N candidates a prompt from the policy as it is now ==================================
                chosen = [prompts[i] for i in index(step)]
                text = stages.encode(chosen)
                made = stages.ahead and step > 0
                latents = state.waiting if made else stages.sample(state.policy, text, step)
                waiting = state.waiting
                if stages.ahead:  # the next step's too, with the same policy, while this step's are scored
                    following = stages.encode([prompts[i] for i in index(step + 1)])
                    waiting = stages.sample(state.policy, following, step + 1)
                if line is not None:
                    with clock.phase("update"):
                        finish(line)
                    line = None
                with clock.phase("rollout"):
                    jax.block_until_ready(latents)
                if stop.asked():
                    break

                # ==== Score: frames as people will see them =======================================================
                with clock.phase("score"):
                    scores = jax.block_until_ready(stages.score(latents, chosen))
                if stop.asked():
                    break

                # ==== Pair: the best against the worst, where the difference is real ==============================
                state, paired = stages.pair(state, latents, text, scores)
                metrics, looked = [paired], {}
                look = looks and due(step + 1, config.eval.every, config.train.steps)
                if step == 0 or look:
                    looked["loss/u_noise"] = stages.rounding_noise(state)
                    if looked["loss/u_noise"] > NOISE_LIMIT and not precise:
                        bar.say(f"rounding moves u by {looked['loss/u_noise']:.2g}: errors now in float32")
                        precise = True
                        state = state._replace(precise=state.precise | True)

                # ==== Update: fresh noise on the same pairs =======================================================
                with clock.phase("update"):  # the calls; on an accelerator most of it passes in `finish`
                    for update in range(config.train.updates_per_step):
                        state, updated = stages.update(state, update, precise)
                        metrics.append(updated)
                state = state._replace(step=state.step + 1, waiting=waiting)

                # ==== Reference: the curriculum ===================================================================
                reference, curriculum = follow(
                    state.policy, state.reference, state.curriculum, step + 1, meta.pop("held_out", None)
                )
                state = state._replace(reference=reference, curriculum=curriculum)

                # ==== Log, evaluate, save =========================================================================
                metric: float | None = None
                alarms: Sequence[Alarm] = ()
                if look:
                    seen = watch.look(stages.result(state))
                    looked |= watch.compare(meta["base"], seen) | stages.displacement(state)
                    meta["held_out"] = metric = watch.held_out_gain(meta["base"], seen)
                    meta["looks"] = [*meta["looks"], looked]
                    alarms = watch.alarms(meta["looks"])
                    looked |= {f"alarm/{alarm.name}": 1.0 for alarm in alarms}
                    for alarm in alarms:
                        bar.say(f"alarm at step {step + 1}: {alarm.message}")
                    save_samples(workdir.samples, writer, step + 1, seen.videos)
                line = Line(step + 1, metrics, looked, chosen, scores)
                stopping = bool(alarms) and config.eval.on_alarm == "stop"
                if stopping or due(step + 1, config.checkpoint.every, config.train.steps):
                    with clock.phase("update"):
                        finish(line)  # before the checkpoint, which never lacks a line that it has passed
                    line = None
                    save(metric)
                if stopping:
                    raise Alarmed(f"step {step + 1}: {alarms[0].message}; eval.on_alarm=warn goes on from here")

            if line is not None:
                finish(line)
            if stop.asked():
                save()
        stop.check()
        return Result(tuned(pipeline, stages.policy, stages.result(state)), stages.policy, state)


def due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens after `step` steps."""
    return step == last or (every > 0 and step % every == 0)


def mean_of(metrics: Sequence[Mapping[str, tuple[Any, Any]]]) -> dict[str, float]:
    """Means by name of the (sum, count) pairs of a step and its updates; NaN where nothing was counted."""
    totals: dict[str, np.ndarray] = {}
    for part in jax.device_get(list(metrics)):
        for name, pair in part.items():
            totals[name] = totals.get(name, np.zeros(2)) + np.asarray(pair, np.float64)
    return {name: float(total / count) if count else float("nan") for name, (total, count) in totals.items()}


def tuned(pipeline: Any, policy: Policy, adapters: Any) -> Any:
    """The pipeline with the trained weights in it."""
    return pipeline.with_trainable(policy.merged(pipeline.trainable, fetch(adapters)))


def save_failure(
    config: Any, workdir: Workdir, state: TrainState, meta: Mapping[str, Any], line: Line, values: Mapping[str, float]
) -> None:
    """Leaves the last finite state and what met it under failure/step_N, and raises NonFinite."""
    folder = workdir.failure / f"step_{line.step}"
    main_first(lambda: folder.mkdir(parents=True, exist_ok=True))
    store = CheckpointStore(folder / "checkpoints", keep=1)
    store.save(int(state.step), state, dict(meta))
    store.close()
    report = {
        "step": line.step,
        "seed": config.seed,
        "keys": "stream_key(seed, stream, step - 1, slot, candidate or update)",
        "prompts": line.prompts,
        "scores": [[float(s) if np.isfinite(s) else str(s) for s in row] for row in fetch(line.scores)],
        "metrics": {name: value if np.isfinite(value) else str(value) for name, value in values.items()},
    }
    main_first(lambda: write_json(folder / "step.json", report))
    what = "every score" if values["reward/all_non_finite"] else "the loss or its gradient"
    raise NonFinite(f"step {line.step}: {what} was not finite; the last finite state and its inputs are in {folder}")
