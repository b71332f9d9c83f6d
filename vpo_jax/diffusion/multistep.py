"""The linear multistep rule that every sampler here is an instance of: tables of coefficients and one loop.

A step reads

    x_0    = a sample + b prediction, clipped where the config says so
    eps    = c sample + d prediction
    sample = k sample + l (the sample of the step before) + m x_0 + sum_j r_j (the x_0 of j steps before)
    next   = e sample + f x_0 + sum_j g_j (the x_0 of j steps before) + h eps + s (fresh Gaussian noise)

where the third line, the corrector, is UniPC's alone. So a sampler is a handful of float32 tables [S], computed once
on the host, and the whole loop is one `lax.scan` that compiles once.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vpo_jax.runtime.types import Array, Key, Table

Denoise = Callable[[Array, Array], Array]


class Corrector(NamedTuple):
    """The tables of the rule's third line, each float32 [S]; a step without correction has k = 1 and zeros."""

    of_sample: Table  # k
    of_previous_sample: Table  # l: after its own correction
    of_clean: Table  # m
    of_previous_clean: tuple[Table, ...]  # r_1, r_2, ...


class Coefficients(NamedTuple):
    """The tables of the rule above, each float32 [S].

    The columns of earlier x_0 are as many here as in the corrector, and at least one; columns of zeros cost nothing.
    """

    input_scale: Table  # the denoiser sees input_scale * sample
    clean_of_sample: Table  # a
    clean_of_prediction: Table  # b
    noise_of_sample: Table  # c
    noise_of_prediction: Table  # d
    next_of_sample: Table  # e
    next_of_clean: Table  # f
    next_of_previous_clean: tuple[Table, ...]  # g_1, g_2, ...
    next_of_noise: Table  # h
    fresh_noise: Table  # s
    corrector: Corrector | None = None


class SamplerState(NamedTuple):
    """What a step reads of the steps before.

    Attributes:
      sample: float32 [B, ...].
      previous_clean: earlier x_0, the latest first, each of the sample's shape; empty but for a multistep sampler.
      previous_sample: the corrected sample of the step before, likewise; None without a corrector.
    """

    sample: Array
    previous_clean: tuple[Array, ...] = ()
    previous_sample: Array | None = None


@dataclass(frozen=True, eq=False)
class Sampler:
    """A sampler for a fixed number of steps S: host tables and nothing else.

    `timesteps` [S] go to the denoiser in this order (int32; float32 for the Euler samplers, whose timesteps may have
    fractions).
    `initial_sigma` scales the latents at the start: unit Gaussian ones, or, where steps are left out, what `noised`
    gives, and then it is 1. `clip_range` bounds |x_0| (None: no clipping). `levels` are (s, n), float32 [S] each:
    before a step the sample is s x_0 + n eps, on the sampler's own scale.
    """

    name: str
    timesteps: Table
    initial_sigma: float
    coefficients: Coefficients
    clip_range: float | None
    levels: tuple[Table, Table]

    @property
    def history(self) -> int:
        """How many earlier x_0 a step reads."""
        corrector = self.coefficients.corrector
        used = [column.any() for column in self.coefficients.next_of_previous_clean]
        if corrector is not None:
            used = [a or b.any() for a, b in zip(used, corrector.of_previous_clean, strict=True)]
        return max((j + 1 for j, any_of_it in enumerate(used) if any_of_it), default=0)

    @property
    def is_stochastic(self) -> bool:
        """Whether steps draw fresh noise and `step` needs a key."""
        return bool(self.coefficients.fresh_noise.any())

    def since(self, first: int) -> "Sampler":
        """The steps from `first` on; a solver of higher order has to be made to begin there."""
        timesteps, coefficients, levels = jax.tree.map(
            lambda table: table[first:], (self.timesteps, self.coefficients, self.levels)
        )
        return replace(self, timesteps=timesteps, initial_sigma=1.0, coefficients=coefficients, levels=levels)

    def noised(self, clean: Array, noise: Array) -> Array:
        """The sample before the first step that x_0 and eps [B, ...] make; float32."""
        signal, sigma = self.levels
        return signal[0] * clean.astype(jnp.float32) + sigma[0] * noise.astype(jnp.float32)

    def init(self, latents: Array) -> SamplerState:
        """State before the first step, from latents [B, ...] that `initial_sigma` scales."""
        sample = self.initial_sigma * latents.astype(jnp.float32)
        previous_clean = tuple(jnp.zeros_like(sample) for _ in range(self.history))
        return SamplerState(sample, previous_clean, None if self.coefficients.corrector is None else sample)

    def model_input(self, state: SamplerState, i: int | Array) -> Array:
        """What the denoiser sees at step i, float32 [B, ...]."""
        return jnp.asarray(self.coefficients.input_scale)[i] * state.sample

    def step(self, state: SamplerState, i: int | Array, prediction: Array, key: Key | None = None) -> SamplerState:
        """State after step i, given the denoiser's prediction [B, ...].

        `key`, needed only when `is_stochastic`, is one key, or one for each sample [B]: then a sample's noise does not
        depend on the batch that it is in.
        """
        if not self.is_stochastic:
            return self.advance(state, i, prediction, None)
        if key is None:
            raise ValueError("a sampler with eta > 0 needs a key")
        return self.advance(state, i, prediction, _draw(key, i, state.sample))

    def advance(self, state: SamplerState, i: int | Array, prediction: Array, noise: Array | None) -> SamplerState:
        """`step` with the fresh noise [B, ...] given."""
        at: Any = jax.tree.map(lambda table: jnp.asarray(table)[i], self.coefficients)
        sample, prediction = state.sample, prediction.astype(jnp.float32)
        clean = at.clean_of_sample * sample + at.clean_of_prediction * prediction
        if self.clip_range is not None:
            clean = jnp.clip(clean, -self.clip_range, self.clip_range)
        if at.corrector is not None:
            sample = self._correct(at.corrector, state, clean)
        following = at.next_of_sample * sample + at.next_of_clean * clean
        if self.coefficients.next_of_noise.any():
            following += at.next_of_noise * (at.noise_of_sample * sample + at.noise_of_prediction * prediction)
        for j, previous in enumerate(state.previous_clean):
            if self.coefficients.next_of_previous_clean[j].any():
                following += at.next_of_previous_clean[j] * previous
        if noise is not None:
            following += at.fresh_noise * noise
        previous_clean = (clean, *state.previous_clean)[: len(state.previous_clean)]
        return SamplerState(following, previous_clean, None if at.corrector is None else sample)

    def _correct(self, at: Any, state: SamplerState, clean: Array) -> Array:
        """The sample once the prediction at it is known, by the corrector's coefficients of one step."""
        corrected = at.of_sample * state.sample + at.of_previous_sample * state.previous_sample + at.of_clean * clean
        for coefficient, previous in zip(at.of_previous_clean, state.previous_clean, strict=False):
            corrected += coefficient * previous
        return corrected


def sample(sampler: Sampler, denoise: Denoise, latents: Array, key: Key | None = None) -> Array:
    """Clean latents float32 [B, ...] from those of `Sampler.init`: the whole loop as one `lax.scan`.

    `denoise(model_input [B, ...], timestep scalar) -> prediction [B, ...]`, guidance included. `key` as in
    `Sampler.step`; the steps fold their index in.
    """

    def body(state: SamplerState, at: tuple[Array, Array]) -> tuple[SamplerState, None]:
        i, timestep = at
        return sampler.step(state, i, denoise(sampler.model_input(state, i), timestep), key), None

    steps = (jnp.arange(len(sampler.timesteps)), jnp.asarray(sampler.timesteps))
    return jax.lax.scan(body, sampler.init(latents), steps)[0].sample


def _draw(key: Key, i: int | Array, like: Array) -> Array:
    if key.ndim == 0:
        key = jax.vmap(lambda b: jax.random.fold_in(key, b))(jnp.arange(like.shape[0]))
    return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, i), like.shape[1:], jnp.float32))(key)


def make_coefficients(
    steps: int,
    next_of_previous_clean: tuple[Table, ...] | None = None,
    corrector: Corrector | None = None,
    **tables: Table,
) -> Coefficients:
    """Float32 tables [S] of the named columns; the others are zeros, and `input_scale` ones."""
    zeros = np.zeros(steps)
    previous = (zeros,) if next_of_previous_clean is None else next_of_previous_clean
    names = [name for name in Coefficients._fields if name not in ("next_of_previous_clean", "corrector")]
    full: dict[str, Any] = dict.fromkeys(names, zeros) | {"input_scale": np.ones(steps)} | tables
    whole = Coefficients(**full, next_of_previous_clean=previous, corrector=corrector)
    return jax.tree.map(lambda table: np.asarray(table, np.float32), whole)


def make_levels(signal: Table, noise: Table) -> tuple[Table, Table]:
    """`Sampler.levels`, float32 [S] each."""
    return np.asarray(signal, np.float32), np.asarray(noise, np.float32)
