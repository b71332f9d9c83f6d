"""Diffusion-DPO online (OnlineVPO, arXiv 2412.15159), and its forms that learn from a prompt's whole group."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from vpo_jax.algorithms.descent import Trained, make_descend
from vpo_jax.algorithms.dpo import losses
from vpo_jax.algorithms.dpo.selection import (
    OF_GROUPS,
    Choice,
    Groups,
    abstract_groups,
    drop_older,
    empty_buffer,
    gather,
    group_size,
    make_choose,
    push,
    steps_kept,
)
from vpo_jax.algorithms.dpo.update import Noised, make_draw, make_errors, make_gradients, make_weigh
from vpo_jax.algorithms.protocol import Frozen, Metrics, Rollout, Setting
from vpo_jax.algorithms.rewards import make_combiner
from vpo_jax.algorithms.state import TrainState, infer_state_shardings, init_state
from vpo_jax.rewards.combine import Dimensions, RewardStatistics, dimension_names
from vpo_jax.runtime.keys import stream_key
from vpo_jax.runtime.mesh import batch_sharding, replicated
from vpo_jax.runtime.metrics import standard_error_of
from vpo_jax.runtime.programs import Program, Role
from vpo_jax.runtime.transfers import allowed, put

Tree = Any

# Rounding in u above this is of the size of real preferences.
NOISE_LIMIT = 0.1
NOISE_SCALE = 1e-5
# An update number that no training draw reaches: watched groups meet noise of their own.
_WATCH_DRAW = 2**30
_WATCH_DRAWS = 4


class DPOState(NamedTuple):
    """What DPO keeps from step to step.

    Attributes:
      buffer: groups of the last steps_kept + 1 steps.
      watched: the first step's groups, on which P(e_w rises) is measured.
      precise: bool scalar; True once rounding in u was seen to be too large and errors are taken in float32.
    """

    buffer: Groups
    watched: Groups
    precise: jax.Array


class DPO:
    """Direct preference optimisation; see `algorithms.protocol.Algorithm`.

    Attributes:
      draw, errors, weigh, descend: the programs of an update, see `dpo.update` and `algorithms.descent`.
      errors_float32: `errors` computed in float32; the same object where the run's dtype is float32 already.
      programs: errors and update, for plans.
    """

    keeps_trajectories = False

    def __init__(self, setting: Setting) -> None:
        """Builds every program; raises UserError for weights or labels that do not fit."""
        config = setting.config
        preference, train = config.preference, config.train
        self._seed, self._kept = config.seed, steps_kept(config)
        self._anchored = preference.anchor > 0.0
        self._initial_is_reference = config.reference.schedule == "frozen"  # phi predicts what theta0 does
        size = group_size(preference.pairs, config.rollout.candidates, preference.top_k)
        self._groups = abstract_groups(train.prompts_per_step, size, setting.latents, setting.text)
        shardings = self._state_shardings(setting)
        own = None if shardings is None else shardings.algorithm

        choose = make_choose(preference.pairs, preference.top_k, preference.margin, preference.motion_tolerance)
        select = make_select(config, setting.rewards, choose, preference.pairs in OF_GROUPS)
        self._select = jax.jit(select, out_shardings=shardings and (shardings.statistics, own, shardings.step))

        self._young = jax.jit(lambda buffer, step: drop_older(buffer, step, self._kept).mask)
        microbatch = 2 * train.microbatch  # a pair is two videos
        share = preference.timestep_low, preference.timestep_high
        dropout = preference.caption_dropout
        process = setting.process.with_density(preference.timestep_density)
        self.draw = make_draw(process, config.seed, train.updates_per_step, dropout, share)
        self.errors = make_errors(setting.denoise, microbatch)
        rounds = config.model.dtype != "float32"
        self.errors_float32 = make_errors(setting.denoise_float32, microbatch) if rounds else self.errors
        loss_of = make_loss(preference)
        self._loss_of = loss_of
        # One program each: the many small ones of their operators can block each other (`backend.settled`).
        self._disagreement, self._watch = jax.jit(self._disagree), jax.jit(self._follow)
        self._perturb = jax.jit(lambda tree, step: _perturb(tree, stream_key(config.seed, "noise", step)))
        self._safeguard_mu = preference.winner_safeguard_mu if preference.winner_safeguard else None
        self.weigh = make_weigh(loss_of, preference.winner_penalty, self._safeguard_mu)
        gradients = make_gradients(setting.denoise, microbatch, preference.anchor)
        trained = shardings and (Trained.of(shardings), shardings.step)
        self.descend = make_descend(gradients, setting.optimizer, config.ema.decay, trained)
        self.programs = self._make_programs(setting, gradients, size, microbatch)

    def _state_shardings(self, setting: Setting) -> TrainState | None:
        if setting.mesh is None:
            return None
        dimensions, with_ema = len(dimension_names(setting.rewards)), setting.config.ema.decay > 0.0
        shapes = jax.eval_shape(
            lambda initial: init_state(initial, setting.optimizer, self.init, dimensions, with_ema),
            setting.frozen.initial,
        )
        return infer_state_shardings(shapes, setting.mesh, self.infer_shardings, setting.rules)

    def _make_programs(
        self, setting: Setting, gradients: Callable[..., tuple[Tree, Tree]], size: int, microbatch: int
    ) -> tuple[Program, ...]:
        frozen, train = setting.frozen, setting.config.train
        # Of theta and phi, and of theta0 where an anchor holds the policy to it and phi may leave it.
        predicted = 3 if self._anchored and not self._initial_is_reference else 2

        def noised(videos: int) -> Noised:
            groups = abstract_groups(videos // size, size, setting.latents, setting.text)
            return jax.eval_shape(self.draw, groups, frozen.empty_text, 0, 0)

        def of_errors(videos: int) -> tuple[Tree, ...]:
            return frozen.backbone, frozen.initial, noised(videos)

        def of_update(videos: int) -> tuple[Tree, ...]:
            at = noised(videos)
            groups = abstract_groups(videos // size, size, setting.latents, setting.text)
            error = jax.ShapeDtypeStruct((videos,), jnp.float32)
            residuals = None if self._safeguard_mu is None else at.latents
            weighed, _ = jax.eval_shape(self.weigh, groups, error, error, residuals)
            return frozen.backbone, frozen.initial, at.latents if self._anchored else None, at, weighed

        def update(backbone: Tree, policy: Tree, *inputs: Tree) -> tuple[Tree, Tree]:
            return gradients(backbone, policy, *inputs)

        videos, updates = train.prompts_per_step * (self._kept + 1) * size, train.updates_per_step
        passes = 4 if train.remat else 3
        roles: tuple[Role, ...] = ("parameters", "parameters", "batch")
        return (
            Program("errors", self.errors, of_errors, roles, "update", videos, microbatch=microbatch,
                    microbatch_key="train.microbatch", unit=size, calls=predicted * updates),
            Program("update", jax.jit(update), of_update, (*roles, "batch", "batch"), "update", videos,
                    microbatch=microbatch, microbatch_key="train.microbatch", unit=size, calls=updates, passes=passes,
                    trains=True),
        )  # fmt: skip

    def init(self, initial: Tree) -> DPOState:
        """Empty buffers."""
        del initial
        return DPOState(empty_buffer(self._groups, self._kept), empty_buffer(self._groups, 0), jnp.array(False))

    def infer_shardings(self, shapes: Tree, mesh: Mesh) -> Tree:
        """Groups over data and fsdp."""
        return jax.tree.map(lambda _: batch_sharding(mesh), shapes)._replace(precise=replicated(mesh))

    def sampling_policy(self, state: TrainState) -> Tree:
        """The policy as it is now."""
        return state.policy

    def select(self, state: TrainState, rollout: Rollout, scores: jax.Array) -> tuple[TrainState, Metrics]:
        """The state with this step's groups in its buffer; the first step's are kept for watching too."""
        statistics, own, metrics = self._select(
            state.statistics, state.algorithm, rollout.latents, rollout.text, scores, state.step
        )
        return state._replace(statistics=statistics, algorithm=own), metrics

    def calibrate(self, state: TrainState, frozen: Frozen) -> tuple[TrainState, dict[str, float], str]:
        """Measures rounding in u; where it is too large, errors are computed in float32 from then on."""
        own = state.algorithm
        with allowed():
            noise = self.rounding_noise(state, frozen)
            if noise <= NOISE_LIMIT or self._is_precise(state):
                return state, {"loss/u_noise": noise}, ""
            precise = own.precise | True
        said = f"rounding moves u by {noise:.2g}: errors now in float32"
        return state._replace(algorithm=own._replace(precise=precise)), {"loss/u_noise": noise}, said

    def update(self, state: TrainState, frozen: Frozen, index: int) -> tuple[TrainState, Metrics]:
        """The state after one update with fresh noise on the buffer's groups."""
        errors = self.errors_float32 if self._is_precise(state) else self.errors
        buffer = state.algorithm.buffer
        groups = buffer._replace(mask=self._young(buffer, state.step))
        noised = self.draw(groups, frozen.empty_text, state.step, put(np.int32(index)))
        policy, predictions = errors(frozen.backbone, state.policy, noised)
        reference, of_reference = errors(frozen.backbone, state.reference, noised)
        initial: jax.Array | None = None
        if self._anchored:
            known = self._initial_is_reference
            initial = of_reference if known else errors(frozen.backbone, frozen.initial, noised)[1]
        residuals = None if self._safeguard_mu is None else predictions - noised.target
        weighed, metrics = self.weigh(groups, policy, reference, residuals)
        inputs = (initial, noised, weighed)
        trained, more = self.descend(Trained.of(state), frozen.backbone, inputs, weighed.some, weighed.loss)
        correct, kept = metrics["loss/implicit_accuracy"]
        curriculum = state.curriculum
        curriculum = curriculum._replace(correct=curriculum.correct + correct, pairs=curriculum.pairs + kept)
        return state._replace(**trained._asdict(), curriculum=curriculum), metrics | more

    def _is_precise(self, state: TrainState) -> bool:
        return self.errors_float32 is not self.errors and bool(jax.device_get(state.algorithm.precise))

    def rounding_noise(self, state: TrainState, frozen: Frozen) -> float:
        """Mean over groups of |u - u in float32| for phi = theta + 1e-5 noise: what rounding alone does to u."""
        if self.errors_float32 is self.errors:
            return 0.0
        groups = state.algorithm.buffer
        noised = self.draw(groups, frozen.empty_text, state.step, 0)
        moved = self._perturb(state.policy, state.step)
        errors = [
            [measure(frozen.backbone, tree, noised)[0] for tree in (state.policy, moved)]
            for measure in (self.errors, self.errors_float32)
        ]
        return float(self._disagreement(groups, errors))

    def _disagree(self, groups: Groups, errors: Sequence[Sequence[jax.Array]]) -> jax.Array:
        lower, exact = (self._of(groups, policy - reference).logit for policy, reference in errors)
        return losses.masked_sum(jnp.abs(lower - exact), groups.mask) / losses.denominator(groups.mask)

    def evaluate(self, state: TrainState, frozen: Frozen, result: Tree) -> dict[str, float]:
        """How far the policy has gone, and what has become of the first step's winners under `result`.

        Their errors are means over `_WATCH_DRAWS` draws of noise and timestep; the mean relative change of a prompt's
        winners rings an alarm where it is large (`evaluation.alarms`).
        """
        watched, draws = state.algorithm.watched, []
        for draw in range(_WATCH_DRAWS):
            noised = self.draw(watched, frozen.empty_text, 0, _WATCH_DRAW + draw)
            draws.append([self.errors(frozen.backbone, tree, noised)[0] for tree in (result, frozen.initial)])
        change, rises, spread, count = map(float, jax.device_get(self._watch(watched, draws)))
        changed = "policy/winner_error_change"
        metrics = {
            changed: change,
            "policy/winner_error_rises": rises,
            "policy/watched": count,
            "policy/distance_to_initial": float(_distance(state.policy, frozen.initial)),
            "policy/distance_to_reference": float(_distance(state.policy, state.reference)),
        }
        if count > 1:
            metrics[standard_error_of(changed)] = (spread / (count - 1) / count) ** 0.5
        return metrics

    def _follow(self, watched: Groups, draws: Sequence[Sequence[jax.Array]]) -> tuple[jax.Array, ...]:
        """Of the winners' errors: mean relative change, share that rises, squared spread; and the groups counted."""
        now, before = (sum(errors).reshape(watched.learnt.shape) for errors in zip(*draws, strict=True))
        better, kept = self._of(watched, now - before).better, watched.mask
        risen = jnp.sum(better * ((now > before).astype(jnp.float32) + 0.5 * (now == before)), axis=1)
        start = jnp.sum(better * before, axis=1)
        change = jnp.where(kept > 0, jnp.sum(better * (now - before), axis=1) / jnp.where(kept > 0, start, 1.0), 0.0)
        counted = losses.denominator(kept)
        mean = losses.masked_sum(change, kept) / counted
        spread = losses.masked_sum(jnp.square(change - mean), kept)
        return mean, losses.masked_sum(risen, kept) / counted, spread, kept.sum()

    def _of(self, groups: Groups, change: jax.Array) -> losses.GroupLoss:
        change = change.reshape(groups.learnt.shape)
        return self._loss_of(change, groups.rewards, groups.preferred, groups.learnt)


def make_loss(preference: Any) -> losses.LossFunction:
    """The loss of preference.pairs."""
    if preference.pairs == "group":
        return losses.make_group_loss(preference.beta)
    if preference.pairs == "listwise":
        return losses.make_listwise_loss(preference.beta, preference.label_temperature)
    return losses.make_pairwise_loss(preference.beta, preference.label_temperature)


def make_select(
    config: Any,
    rewards: Sequence[Dimensions],
    choose: Callable[[jax.Array, jax.Array, jax.Array | None], Choice],
    of_groups: bool,
) -> Callable[..., tuple[RewardStatistics, DPOState, Metrics]]:
    """`select(statistics, own, latents, text, scores, step) -> (statistics, own, metrics)`, not jitted.

    Takes latents [P * N, F, h, w, C], candidates side by side, text [P, ...], scores [P * N, D] and the number of
    completed steps. `of_groups`: what is kept and dropped is counted in groups and not in pairs.
    """
    combine = make_combiner(config, rewards)

    def select(
        statistics: RewardStatistics,
        own: DPOState,
        latents: jax.Array,
        text: Tree,
        scores: jax.Array,
        step: jax.Array,
    ) -> tuple[RewardStatistics, DPOState, Metrics]:
        prompts = own.watched.mask.shape[0]
        statistics, found, metrics = combine(statistics, scores.reshape(prompts, -1, scores.shape[-1]))
        choice = choose(found.reward, found.finite, found.motion)
        groups = gather(choice, latents.reshape(*found.reward.shape, *latents.shape[1:]), text, step)
        watched = jax.tree.map(lambda new, old: jnp.where(step == 0, new, old), groups, own.watched)

        one = jnp.ones((), jnp.float32)
        pairs = jnp.sum(choice.preferred, dtype=jnp.float32)

        def mean_gap(values: jax.Array) -> tuple[jax.Array, jax.Array]:  # [P, K]
            gap = values[:, :, None] - values[:, None, :]
            return jnp.sum(jnp.where(choice.preferred, gap, 0.0)), pairs

        metrics["pair/kept"] = (jnp.sum(choice.mask, dtype=jnp.float32) if of_groups else pairs, one)
        metrics["pair/margin"] = mean_gap(choice.rewards)
        for reason, count in choice.dropped.items():
            metrics[f"pair/dropped_{reason}"] = (count.astype(jnp.float32), one)
        if found.motion is not None:
            metrics["pair/motion"] = mean_gap(jnp.take_along_axis(found.motion, choice.chosen, axis=1))
        return statistics, own._replace(watched=watched, buffer=push(own.buffer, groups, step)), metrics

    return select


@jax.jit
def _perturb(tree: Tree, key: jax.Array) -> Tree:
    leaves, structure = jax.tree.flatten(tree)
    moved = [
        leaf + NOISE_SCALE * jax.random.normal(jax.random.fold_in(key, i), leaf.shape, leaf.dtype)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, moved)


@jax.jit
def _distance(a: Tree, b: Tree) -> jax.Array:
    return optax.global_norm(jax.tree.map(jnp.subtract, a, b))
