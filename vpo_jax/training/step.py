"""One optimizer update, as four compiled programs whose borders keep the reference out of every gradient.

draw     noise, timestep and caption dropout, once for a pair
errors   e_w, e_l and what was predicted under given adapters: one program, called for theta and for phi, so that
         u = 0 at theta = phi
weigh    u, the loss, and the two constants that a pair's gradient needs
descend  gradients with those constants, clipping, AdamW, the average
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vpo_jax.diffusion.process import Process
from vpo_jax.runtime.batches import in_microbatches, split_batch
from vpo_jax.runtime.keys import stream_key
from vpo_jax.runtime.mesh import VIDEO, constrain
from vpo_jax.runtime.trees import select
from vpo_jax.training import losses
from vpo_jax.training.losses import PairCoefficients, PairErrors
from vpo_jax.training.pairs import Pairs, drop_older, steps_kept
from vpo_jax.training.state import TrainState

Tree = Any
Metrics = dict[str, tuple[jax.Array, jax.Array]]  # (sum, count)
Denoise = Callable[[Tree, Tree, jax.Array, jax.Array, jax.Array], jax.Array]

# Rounding in u above this is of the size of real preferences.
NOISE_LIMIT = 0.1
NOISE_SCALE = 1e-5
# An update number that no training draw reaches: watched pairs meet noise of their own.
_WATCH_DRAW = 2**30


class Noised(NamedTuple):
    """A batch of pairs at one draw of noise.

    Attributes:
      winner: x_t of the winners, float32 [P, F, h, w, C].
      loser: likewise, with the same noise and timestep.
      winner_target: what the denoiser should predict, likewise.
      loser_target: likewise.
      timesteps: [P], as the process draws them.
      text: [P, L, D].
    """

    winner: jax.Array
    loser: jax.Array
    winner_target: jax.Array
    loser_target: jax.Array
    timesteps: jax.Array
    text: jax.Array


class Predictions(NamedTuple):
    """What a denoiser predicts for winners and losers, [P, F, h, w, C] each."""

    winner: jax.Array
    loser: jax.Array


def make_draw(
    schedule: Process,
    seed: int,
    updates_per_step: int,
    caption_dropout: float = 0.0,
    timesteps: tuple[float, float] = (0.0, 1.0),
) -> Callable:
    """`draw(pairs, empty_text [L, D], step, update) -> Noised`, jitted.

    A pair's key depends on the step that made it, its slot and how many updates have passed since that step began,
    so neither another batch nor another mesh nor a restart changes it.

    Args:
      schedule: of the noise.
      seed: of the run.
      updates_per_step: draws that a step makes.
      caption_dropout: share of the draws in which a pair has no caption.
      timesteps: from which share of the schedule, 0 clean and 1 noise, to which a pair is noised.
    """
    low, high = timesteps

    def draw(pairs: Pairs, empty_text: jax.Array, step: jax.Array, update: jax.Array) -> Noised:
        shape = pairs.winner.shape[1:]

        def of_pair(birth: jax.Array, slot: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            since = (step - birth) * updates_per_step + update
            at_time, at_noise = jax.random.split(stream_key(seed, "noise", birth, slot, since))
            timestep = schedule.draw_timesteps(at_time, low, high)
            noise = jax.random.normal(at_noise, shape, jnp.float32)
            drop = jax.random.bernoulli(stream_key(seed, "dropout", birth, slot, since), caption_dropout)
            return timestep, noise, drop

        timesteps, noise, drop = jax.vmap(of_pair)(jnp.maximum(pairs.step, 0), pairs.slot)
        noise = constrain(noise, VIDEO)
        text = jnp.where(drop[:, None, None], empty_text, pairs.text) if caption_dropout > 0.0 else pairs.text
        return Noised(
            winner=schedule.add_noise(pairs.winner, noise, timesteps),
            loser=schedule.add_noise(pairs.loser, noise, timesteps),
            winner_target=schedule.target(pairs.winner, noise, timesteps),
            loser_target=schedule.target(pairs.loser, noise, timesteps),
            timesteps=timesteps,
            text=text,
        )

    return jax.jit(draw)


def predict_pairs(denoise: Denoise, frozen: Tree, adapters: Tree, noised: Noised) -> Predictions:
    """Predictions for winners and losers in one forward pass.

    Winner and loser of a pair stand side by side, so that a device that holds the pair holds both.
    """
    both = jnp.stack([noised.winner, noised.loser], axis=1)
    latents = constrain(both.reshape(-1, *both.shape[2:]), VIDEO)
    prediction = denoise(frozen, adapters, latents, jnp.repeat(noised.timesteps, 2), jnp.repeat(noised.text, 2, axis=0))
    prediction = prediction.reshape(both.shape)
    return Predictions(prediction[:, 0], prediction[:, 1])


def pair_errors(predictions: Predictions, noised: Noised) -> PairErrors:
    """e_w and e_l in float32, [P] each."""
    return PairErrors(
        losses.squared_error(predictions.winner, noised.winner_target),
        losses.squared_error(predictions.loser, noised.loser_target),
    )


def make_errors(denoise: Denoise, microbatch: int = 0) -> Callable[..., tuple[PairErrors, Predictions]]:
    """`errors(frozen, adapters, noised) -> (PairErrors, Predictions)`: the one program for theta's and phi's errors."""

    def errors(frozen: Tree, adapters: Tree, noised: Noised) -> tuple[PairErrors, Predictions]:
        def of_chunk(chunk: Noised) -> tuple[PairErrors, Predictions]:
            predictions = predict_pairs(denoise, frozen, adapters, chunk)
            return pair_errors(predictions, chunk), predictions

        return in_microbatches(of_chunk, noised, microbatch)

    return jax.jit(errors)


def make_weigh(beta: float, label_temperature: float = 0.0, winner_penalty: float = 0.0) -> Callable:
    """`weigh(pairs, policy errors, reference errors) -> (coefficients, loss, metrics)`, jitted."""

    def weigh(pairs: Pairs, policy: PairErrors, reference: PairErrors) -> tuple[PairCoefficients, jax.Array, Metrics]:
        mask = pairs.mask
        label = losses.preference_label(pairs.winner_reward, pairs.loser_reward, label_temperature)
        logit = losses.preference_logit(policy, reference, beta)
        loss = losses.preference_loss(logit, label)
        penalised = loss + winner_penalty * jnp.maximum(0.0, policy.winner - reference.winner)
        watched = {
            "loss/preference": loss,
            "loss/implicit_accuracy": losses.implicit_accuracy(logit),
            "loss/logit": logit,
            "loss/winner_error": policy.winner,
            "loss/loser_error": policy.loser,
            "loss/winner_error_change": policy.winner - reference.winner,
            "loss/loser_error_change": policy.loser - reference.loser,
        }
        kept = jnp.sum(mask.astype(jnp.float32))
        metrics = {name: (losses.masked_sum(value, mask), kept) for name, value in watched.items()}
        coefficients = losses.pair_coefficients(policy, reference, label, beta, winner_penalty)
        return coefficients, losses.masked_sum(penalised, mask) / losses.denominator(mask), metrics

    return jax.jit(weigh)


def make_gradients(
    denoise: Denoise, microbatch: int = 0, safeguard_mu: float | None = None, anchor: float = 0.0
) -> Callable:
    """`gradients(frozen, adapters, first, noised, coefficients, mask) -> (gradients, metrics)`, not jitted.

    `first` are the predictions under theta0, for the anchor; None where it is off.

    The loss is sum(mask L) / max(1, sum(mask)) over the whole batch, summed here over microbatches.

    Args:
      denoise: the policy's.
      microbatch: pairs at a time.
      safeguard_mu: of the winner safeguard; None is off.
      anchor: weight of (1/D) |prediction_theta - prediction_theta0|^2, the mean of winner and loser; 0 is off.
    """

    def microbatch_loss(
        adapters: Tree,
        frozen: Tree,
        chunk: tuple[Noised, PairCoefficients, jax.Array, Predictions | None],
        number: jax.Array,
    ) -> tuple[jax.Array, Metrics]:
        noised, coefficients, mask, first = chunk
        predictions = predict_pairs(denoise, frozen, adapters, noised)
        errors = pair_errors(predictions, noised)
        kept = jnp.sum(mask.astype(jnp.float32))
        metrics = {}
        share: jax.Array | float = 1.0
        if safeguard_mu is not None:
            share = losses.safeguard_share(
                predictions.winner, noised.winner_target, predictions.loser, noised.loser_target, safeguard_mu
            )
            metrics["loss/loser_share"] = (losses.masked_sum(share, mask), kept)
        loss = losses.weighted_errors(errors, coefficients, share)
        if first is not None:
            distance = 0.5 * (
                losses.squared_error(predictions.winner, first.winner)
                + losses.squared_error(predictions.loser, first.loser)
            )
            loss = loss + anchor * distance
            metrics["loss/anchor"] = (losses.masked_sum(distance, mask), kept)
        return losses.masked_sum(loss, mask) / number, metrics

    def gradients(
        frozen: Tree,
        adapters: Tree,
        first: Predictions | None,
        noised: Noised,
        coefficients: PairCoefficients,
        mask: jax.Array,
    ) -> tuple[Tree, Metrics]:
        number = losses.denominator(mask)
        whole = noised, coefficients, mask, first if anchor > 0.0 else None
        chunks = split_batch(whole, microbatch)
        of_chunk = jax.grad(microbatch_loss, has_aux=True)
        if chunks[2].shape[0] == 1:
            return of_chunk(adapters, frozen, whole, number)

        def add(total: Tree, chunk: Tree) -> tuple[Tree, Metrics]:
            gradient, metrics = of_chunk(adapters, frozen, chunk, number)
            return jax.tree.map(jnp.add, total, gradient), metrics

        total, metrics = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, adapters), chunks)
        return total, jax.tree.map(jnp.sum, metrics)

    return gradients


class Trained(NamedTuple):
    """The part of the state that an update changes."""

    policy: Tree
    ema: Tree
    optimizer: optax.OptState
    finite: jax.Array


def make_descend(
    gradients: Callable,
    optimizer: optax.GradientTransformation,
    ema_decay: float = 0.0,
    out_shardings: Any = None,
) -> Callable:
    """`descend(trained, frozen, first, noised, coefficients, mask, loss) -> (trained, metrics)`, jitted.

    The old state is kept bitwise where the loss, the gradient or the step is not finite, and where no pair is left:
    Adam would move on a zero gradient. `trained`'s buffers are given away.
    """

    def descend(
        trained: Trained,
        frozen: Tree,
        first: Predictions | None,
        noised: Noised,
        coefficients: PairCoefficients,
        mask: jax.Array,
        loss: jax.Array,
    ) -> tuple[Trained, Metrics]:
        gradient, metrics = gradients(frozen, trained.policy, first, noised, coefficients, mask)
        norm = optax.global_norm(gradient)
        change, moments = optimizer.update(gradient, trained.optimizer, trained.policy)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(optax.global_norm(change))
        some = jnp.any(mask)
        applied = trained.finite & finite & some
        policy = optax.apply_updates(trained.policy, change)
        ema = trained.ema  # {} where it is off
        if ema_decay > 0.0:
            ema = jax.tree.map(lambda a, p: ema_decay * a + (1.0 - ema_decay) * p, ema, policy)
        policy, ema, moments = select(applied, (policy, ema, moments), (trained.policy, trained.ema, trained.optimizer))
        one = jnp.ones((), jnp.float32)
        metrics |= {
            "loss/gradient_norm": (norm, one),
            "loss/applied": (applied.astype(jnp.float32), one),
            "loss/non_finite": ((some & ~finite).astype(jnp.float32), one),
        }
        return Trained(policy, ema, moments, trained.finite & (finite | ~some)), metrics

    return jax.jit(descend, donate_argnums=0, out_shardings=out_shardings)


class Update:
    """An update of the state: the four programs in their order; built once, called for every update.

    Attributes:
      draw: see `make_draw`.
      errors: see `make_errors`.
      errors_float32: the same computed in float32; `errors` itself where that is float32 already.
      weigh: see `make_weigh`.
      descend: see `make_descend`.
    """

    def __init__(
        self,
        config: Any,
        denoise: Denoise,
        denoise_float32: Denoise,
        schedule: Process,
        optimizer: optax.GradientTransformation,
        shardings: TrainState | None = None,
    ) -> None:
        preference = config.preference
        microbatch = config.train.microbatch
        self.beta = preference.beta
        self.seed = config.seed
        self.anchored = preference.anchor > 0.0
        self.start_is_reference = config.reference.schedule == "frozen"  # phi predicts what theta0 does
        self.steps_kept = steps_kept(config)
        timesteps = preference.timestep_low, preference.timestep_high
        updates, dropout = config.train.updates_per_step, preference.caption_dropout
        self.draw = make_draw(schedule, config.seed, updates, dropout, timesteps)
        self.errors = make_errors(denoise, microbatch)
        rounds = config.model.dtype != "float32"
        self.errors_float32 = make_errors(denoise_float32, microbatch) if rounds else self.errors
        self.weigh = make_weigh(preference.beta, preference.label_temperature, preference.winner_penalty)
        mu = preference.winner_safeguard_mu if preference.winner_safeguard else None
        gradients = make_gradients(denoise, microbatch, mu, preference.anchor)
        out = None if shardings is None else (_trained(shardings), shardings.step)
        self.descend = make_descend(gradients, optimizer, config.ema.decay, out)
        self._perturb = jax.jit(_perturb)

    def __call__(
        self, state: TrainState, frozen: Tree, start: Tree, empty_text: jax.Array, update: int, precise: bool = False
    ) -> tuple[TrainState, Metrics]:
        """The state after one update with fresh noise on the buffer's pairs, and metrics as (sum, count)."""
        errors = self.errors_float32 if precise else self.errors
        pairs = drop_older(state.buffer, state.step, self.steps_kept)
        noised = self.draw(pairs, empty_text, state.step, update)
        policy, _ = errors(frozen, state.policy, noised)
        reference, of_reference = errors(frozen, state.reference, noised)
        first: Predictions | None = None
        if self.anchored:
            first = of_reference if self.start_is_reference else errors(frozen, start, noised)[1]
        coefficients, loss, metrics = self.weigh(pairs, policy, reference)
        trained, more = self.descend(_trained(state), frozen, first, noised, coefficients, pairs.mask, loss)
        correct, kept = metrics["loss/implicit_accuracy"]
        curriculum = state.curriculum
        curriculum = curriculum._replace(correct=curriculum.correct + correct, pairs=curriculum.pairs + kept)
        return state._replace(**trained._asdict(), curriculum=curriculum), metrics | more

    def rounding_noise(self, state: TrainState, frozen: Tree, empty_text: jax.Array) -> float:
        """Mean over pairs of |u - u in float32| for phi = theta + 1e-5 noise: what rounding alone does to u."""
        if self.errors_float32 is self.errors:
            return 0.0
        noised = self.draw(state.buffer, empty_text, state.step, 0)
        moved = self._perturb(state.policy, stream_key(self.seed, "noise", state.step))
        logits = [
            losses.preference_logit(
                errors(frozen, state.policy, noised)[0], errors(frozen, moved, noised)[0], self.beta
            )
            for errors in (self.errors, self.errors_float32)
        ]
        difference = jnp.abs(logits[0] - logits[1])
        return float(losses.masked_sum(difference, state.buffer.mask) / losses.denominator(state.buffer.mask))

    def displacement(self, state: TrainState, frozen: Tree, start: Tree, empty_text: jax.Array) -> dict[str, float]:
        """How far the policy has gone, and P(e_w rises): the share of watched pairs whose e_w is above theta0's.

        Preference training can make winners less likely along with losers; above 0.6 it does (`evaluation.alarms`).
        """
        noised = self.draw(state.watched, empty_text, 0, _WATCH_DRAW)
        mask = state.watched.mask
        now, before = (self.errors(frozen, adapters, noised)[0].winner for adapters in (state.policy, start))
        risen = (now > before).astype(jnp.float32) + 0.5 * (now == before)
        return {
            "policy/winner_error_rises": float(losses.masked_sum(risen, mask) / losses.denominator(mask)),
            "policy/watched_pairs": float(mask.sum()),
            "policy/distance_to_start": float(_distance(state.policy, start)),
            "policy/distance_to_reference": float(_distance(state.policy, state.reference)),
        }


def _trained(state: TrainState) -> Trained:
    return Trained(state.policy, state.ema, state.optimizer, state.finite)


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
