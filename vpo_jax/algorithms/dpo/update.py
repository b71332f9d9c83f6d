"""One optimizer update, as compiled programs whose borders keep the reference out of every gradient.

draw     noise, timestep and caption dropout, once for a prompt's group
errors   a candidate's error and prediction under given parameters: one program, called for theta and for phi, so that
         u = 0 at theta = phi
weigh    the loss, and the constant that each candidate's gradient needs
descend  gradients with those constants, clipping, AdamW, the average (`algorithms.descent`)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vpo_jax.algorithms.dpo import losses
from vpo_jax.algorithms.dpo.selection import Groups
from vpo_jax.algorithms.protocol import Denoise, Metrics
from vpo_jax.diffusion.process import Process
from vpo_jax.runtime.batches import in_microbatches, join_batch, split_batch
from vpo_jax.runtime.keys import stream_key
from vpo_jax.runtime.mesh import VIDEO, constrain

Tree = Any


class Noised(NamedTuple):
    """V = P x K candidates at one draw of noise a prompt; candidates of a prompt stand side by side.

    Attributes:
      latents: x_t, float32 [V, F, h, w, C].
      target: what the denoiser should predict, likewise.
      timesteps: [V].
      text: every leaf [V, ...].
    """

    latents: jax.Array
    target: jax.Array
    timesteps: jax.Array
    text: Tree


def make_draw(
    process: Process,
    seed: int,
    updates_per_step: int,
    caption_dropout: float = 0.0,
    share: tuple[float, float] = (0.0, 1.0),
) -> Callable[[Groups, Tree, Any, Any], Noised]:
    """`draw(groups, empty_text, step, update) -> Noised`, jitted.

    A group's key depends on the step that made it, its slot and how many updates have passed since that step began,
    so neither another batch nor another mesh nor a restart changes it.

    Args:
      process: of the noise.
      seed: of the run.
      updates_per_step: draws that a step makes.
      caption_dropout: share of the draws in which a group has no caption.
      share: from which share of the schedule, 0 clean and 1 noise, to which a group is noised.
    """

    def draw(groups: Groups, empty_text: Tree, step: jax.Array, update: jax.Array) -> Noised:
        size, shape = groups.latents.shape[1], groups.latents.shape[2:]

        def of_group(birth: jax.Array, slot: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            since = (step - birth) * updates_per_step + update
            at_time, at_noise = jax.random.split(stream_key(seed, "noise", birth, slot, since))
            timestep = process.draw_timesteps(at_time, *share)
            noise = jax.random.normal(at_noise, shape, jnp.float32)
            drop = jax.random.bernoulli(stream_key(seed, "dropout", birth, slot, since), caption_dropout)
            return timestep, noise, drop

        timesteps, noise, drop = jax.vmap(of_group)(jnp.maximum(groups.step, 0), groups.slot)
        noise = constrain(noise, VIDEO)
        text = groups.text
        if caption_dropout > 0.0:
            text = jax.tree.map(
                lambda empty, x: jnp.where(drop.reshape(-1, *(1,) * (x.ndim - 1)), empty, x), empty_text, text
            )

        def flat(x: jax.Array) -> jax.Array:  # [P, K, ...] -> [V, ...]
            return x.reshape(-1, *x.shape[2:])

        def of_each(function: Callable[..., jax.Array]) -> jax.Array:
            by_candidate = [function(groups.latents[:, k], noise, timesteps) for k in range(size)]
            return constrain(flat(jnp.stack(by_candidate, axis=1)), VIDEO)

        return Noised(
            latents=of_each(process.add_noise),
            target=of_each(process.target),
            timesteps=jnp.repeat(timesteps, size),
            text=jax.tree.map(lambda x: jnp.repeat(x, size, axis=0), text),
        )

    return jax.jit(draw)


def make_errors(denoise: Denoise, microbatch: int = 0) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """`errors(frozen, trainable, noised) -> (float32 [V], predictions [V, F, h, w, C])`, jitted.

    The one program for theta's and phi's errors. `microbatch` candidates at a time; 0 is all.
    """

    def errors(frozen: Tree, trainable: Tree, noised: Noised) -> tuple[jax.Array, jax.Array]:
        def of_chunk(chunk: Noised) -> tuple[jax.Array, jax.Array]:
            predictions = denoise(frozen, trainable, chunk.latents, chunk.timesteps, chunk.text)
            return losses.squared_error(predictions, chunk.target), predictions

        return in_microbatches(of_chunk, noised, microbatch)

    return jax.jit(errors)


class Weighed(NamedTuple):
    """What a gradient needs of the loss.

    Attributes:
      coefficients: d loss / d error of each candidate, float32 [P, K]; 0 for what is dropped.
      shares: float32 [P, K], each learnt candidate's part in its group, for the anchor; 0 for what is dropped.
      kept: float32 scalar, the groups that count.
      number: the same, but at least 1.
      some: bool scalar, whether any counts.
      loss: float32 scalar.
    """

    coefficients: jax.Array
    shares: jax.Array
    kept: jax.Array
    number: jax.Array
    some: jax.Array
    loss: jax.Array


def make_weigh(
    loss_of: losses.LossFunction, winner_penalty: float = 0.0, safeguard_mu: float | None = None
) -> Callable[..., tuple[Weighed, Metrics]]:
    """`weigh(groups, errors of theta [V], of phi [V], residuals) -> (Weighed, metrics)`, jitted.

    The loss is sum(mask L) / max(1, sum(mask)) over the whole batch. `residuals` are theta's prediction - target,
    [V, ...], read by the winner safeguard alone (`safeguard_mu`; None is off).
    """

    def weigh(
        groups: Groups, policy: jax.Array, reference: jax.Array, residuals: jax.Array | None
    ) -> tuple[Weighed, Metrics]:
        mask, shape = groups.mask, groups.learnt.shape
        policy, reference = policy.reshape(shape), reference.reshape(shape)
        change = policy - reference
        found = loss_of(change, groups.rewards, groups.preferred, groups.learnt)
        penalty, risen = losses.winner_penalty(change, found.better, winner_penalty)
        coefficients = found.coefficients + risen
        kept = jnp.sum(mask.astype(jnp.float32))
        watched = {
            "loss/preference": found.loss,
            "loss/implicit_accuracy": found.accuracy,
            "loss/logit": found.logit,
            "loss/winner_error": jnp.sum(found.better * policy, axis=1),
            "loss/loser_error": jnp.sum(found.worse * policy, axis=1),
            "loss/winner_error_change": jnp.sum(found.better * change, axis=1),
            "loss/loser_error_change": jnp.sum(found.worse * change, axis=1),
        }
        if safeguard_mu is not None:
            assert residuals is not None
            share = losses.safeguard_share(residuals.reshape(*shape, -1), coefficients, safeguard_mu)
            coefficients = jnp.where(coefficients < 0.0, share[:, None] * coefficients, coefficients)
            watched["loss/loser_share"] = share
        learnt = groups.learnt & mask[:, None]
        parts = learnt / jnp.maximum(1.0, jnp.sum(learnt, axis=1, dtype=jnp.float32))[:, None]
        number = losses.denominator(mask)
        weighed = Weighed(
            coefficients=jnp.where(mask[:, None], coefficients, 0.0),
            shares=parts,
            kept=kept,
            number=number,
            some=jnp.any(mask),
            loss=losses.masked_sum(found.loss + penalty, mask) / number,
        )
        return weighed, {name: (losses.masked_sum(value, mask), kept) for name, value in watched.items()}

    return jax.jit(weigh)


def make_gradients(denoise: Denoise, microbatch: int = 0, anchor: float = 0.0) -> Callable[..., tuple[Tree, Metrics]]:
    """`gradients(frozen, trainable, initial, noised, weighed) -> (gradients, metrics)`, not jitted.

    Of sum_i (c_i e_i + anchor share_i (1/D) |prediction_theta - prediction_theta0|^2) / number, summed over
    microbatches. `initial` are the predictions under theta0, for the anchor; None where it is off.

    Args:
      denoise: the policy's.
      microbatch: candidates at a time; 0 is all.
      anchor: weight of the distance to the initial policy's predictions; 0 is off.
    """

    def microbatch_loss(
        trainable: Tree,
        frozen: Tree,
        chunk: tuple[Noised, jax.Array, jax.Array, jax.Array | None],
        number: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        noised, coefficients, shares, initial = chunk
        predictions = denoise(frozen, trainable, noised.latents, noised.timesteps, noised.text)
        error = losses.squared_error(predictions, noised.target)
        # What is dropped may be non-finite, and 0 times infinity is not 0.
        loss = jnp.where(coefficients != 0.0, coefficients * error, 0.0)
        distance = jnp.zeros_like(error)
        if initial is not None:
            distance = losses.squared_error(predictions, initial)
            loss = loss + jnp.where(shares > 0.0, anchor * shares * distance, 0.0)
        return jnp.sum(loss) / number, distance

    def gradients(
        frozen: Tree, trainable: Tree, initial: jax.Array | None, noised: Noised, weighed: Weighed
    ) -> tuple[Tree, Metrics]:
        whole = noised, weighed.coefficients.reshape(-1), weighed.shares.reshape(-1), initial if anchor > 0.0 else None
        chunks = split_batch(whole, microbatch)
        of_chunk = jax.grad(microbatch_loss, has_aux=True)
        if chunks[1].shape[0] == 1:
            total, distances = of_chunk(trainable, frozen, whole, weighed.number)
        else:

            def add(total: Tree, chunk: Tree) -> tuple[Tree, jax.Array]:
                gradient, distances = of_chunk(trainable, frozen, chunk, weighed.number)
                return jax.tree.map(jnp.add, total, gradient), distances

            total, parts = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, trainable), chunks)
            distances = join_batch(parts)
        if anchor == 0.0:
            return total, {}
        # A mean over each group, then over groups.
        distances = jnp.where(weighed.shares > 0.0, weighed.shares * distances.reshape(weighed.shares.shape), 0.0)
        return total, {"loss/anchor": (jnp.sum(jnp.sum(distances, axis=1)), weighed.kept)}

    return gradients
