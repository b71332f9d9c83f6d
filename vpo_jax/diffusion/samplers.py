"""Samplers as tables: DDIM, DPM-Solver++ (2M) and Euler are one linear multistep rule with other coefficients.

Every step of each of them reads

    x_0   = a sample + b prediction, clipped where the config says so
    eps   = c sample + d prediction
    next  = e sample + f x_0 + g (the x_0 of the step before) + h eps + s (fresh Gaussian noise)

so a sampler is a handful of float32 tables [S], computed once in float64 on the host, and the whole loop is one
`lax.scan` that compiles once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from vpo_jax.diffusion.config import resolve
from vpo_jax.diffusion.schedules import alphas_cumprod, signal_scale
from vpo_jax.diffusion.timesteps import ddim_timesteps, dpm_timesteps_and_sigmas, euler_timesteps_and_sigmas
from vpo_jax.runtime.errors import UserError

Table = npt.NDArray[Any]
Denoise = Callable[[jax.Array, jax.Array], jax.Array]


class Coefficients(NamedTuple):
    """The tables of the rule above, each float32 [S]."""

    input_scale: Table  # the denoiser sees input_scale * sample
    clean_of_sample: Table  # a
    clean_of_prediction: Table  # b
    noise_of_sample: Table  # c
    noise_of_prediction: Table  # d
    next_of_sample: Table  # e
    next_of_clean: Table  # f
    next_of_previous_clean: Table  # g
    next_of_noise: Table  # h
    fresh_noise: Table  # s


class SamplerState(NamedTuple):
    """`sample` float32 [B, ...]; `previous_clean`, of the same shape, only for a multistep sampler, else None."""

    sample: jax.Array
    previous_clean: jax.Array | None


@dataclass(frozen=True, eq=False)
class Sampler:
    """A sampler for a fixed number of steps S: host tables and nothing else.

    `timesteps` [S] go to the denoiser in this order (int32; float32 for Euler, whose timesteps may have fractions).
    `initial_sigma` scales unit Gaussian latents at the start. `clip_range` bounds |x_0| (None: no clipping).
    """

    name: str
    timesteps: Table
    initial_sigma: float
    coefficients: Coefficients
    clip_range: float | None

    @property
    def is_multistep(self) -> bool:
        """Whether a step reads the x_0 of the step before."""
        return bool(self.coefficients.next_of_previous_clean.any())

    @property
    def is_stochastic(self) -> bool:
        """Whether steps draw fresh noise and `step` needs a key."""
        return bool(self.coefficients.fresh_noise.any())

    def init(self, latents: jax.Array) -> SamplerState:
        """State before the first step, from unit Gaussian latents [B, ...]."""
        sample = self.initial_sigma * latents.astype(jnp.float32)
        return SamplerState(sample, jnp.zeros_like(sample) if self.is_multistep else None)

    def model_input(self, state: SamplerState, i: int | jax.Array) -> jax.Array:
        """What the denoiser sees at step i, float32 [B, ...]."""
        return jnp.asarray(self.coefficients.input_scale)[i] * state.sample

    def step(
        self, state: SamplerState, i: int | jax.Array, prediction: jax.Array, key: jax.Array | None = None
    ) -> SamplerState:
        """State after step i, given the denoiser's prediction [B, ...].

        `key`, needed only when `is_stochastic`, is one key, or one for each sample [B]: then a sample's noise does not
        depend on the batch that it is in.
        """
        if not self.is_stochastic:
            return self.advance(state, i, prediction, None)
        if key is None:
            raise ValueError("a sampler with eta > 0 needs a key")
        return self.advance(state, i, prediction, _draw(key, i, state.sample))

    def advance(
        self, state: SamplerState, i: int | jax.Array, prediction: jax.Array, noise: jax.Array | None
    ) -> SamplerState:
        """`step` with the fresh noise [B, ...] given."""
        at: Any = jax.tree.map(lambda table: jnp.asarray(table)[i], self.coefficients)
        sample, prediction = state.sample, prediction.astype(jnp.float32)
        clean = at.clean_of_sample * sample + at.clean_of_prediction * prediction
        if self.clip_range is not None:
            clean = jnp.clip(clean, -self.clip_range, self.clip_range)
        following = at.next_of_sample * sample + at.next_of_clean * clean
        if self.coefficients.next_of_noise.any():
            following += at.next_of_noise * (at.noise_of_sample * sample + at.noise_of_prediction * prediction)
        if state.previous_clean is not None:
            following += at.next_of_previous_clean * state.previous_clean
        if noise is not None:
            following += at.fresh_noise * noise
        return SamplerState(following, None if state.previous_clean is None else clean)


def make_sampler(
    config: Mapping[str, Any], num_inference_steps: int, name: str | None = None, eta: float = 0.0
) -> Sampler:
    """The sampler of a scheduler_config.json, or, with `name`, what diffusers' `NAME.from_config(config)` would be.

    `eta` in [0, 1] is DDIM's share of fresh noise (1 is ancestral sampling); the other samplers ignore it, as
    diffusers' pipelines do. Raises UserError, by the field's name, for what is not honoured.
    """
    fields = resolve(config, name)
    total = fields["num_train_timesteps"]
    if not 1 <= num_inference_steps <= total:
        raise UserError(f"num_inference_steps: {num_inference_steps} must be between 1 and {total}, the trained steps")
    if not 0.0 <= eta <= 1.0:
        raise UserError(f"eta: {eta} must be between 0 and 1")
    levels = alphas_cumprod(fields)
    if fields["_class_name"] == "DDIMScheduler":
        return _ddim(fields, levels, num_inference_steps, eta)
    if fields["_class_name"] == "DPMSolverMultistepScheduler":
        return _dpm_solver(fields, levels, num_inference_steps)
    return _euler(fields, levels, num_inference_steps)


def sample(sampler: Sampler, denoise: Denoise, latents: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Clean latents float32 [B, ...] from unit Gaussian ones: the whole loop as one `lax.scan`.

    `denoise(model_input [B, ...], timestep scalar) -> prediction [B, ...]`, guidance included. `key` as in
    `Sampler.step`; the steps fold their index in.
    """

    def body(state: SamplerState, at: tuple[jax.Array, jax.Array]) -> tuple[SamplerState, None]:
        i, timestep = at
        return sampler.step(state, i, denoise(sampler.model_input(state, i), timestep), key), None

    steps = (jnp.arange(len(sampler.timesteps)), jnp.asarray(sampler.timesteps))
    return jax.lax.scan(body, sampler.init(latents), steps)[0].sample


def _draw(key: jax.Array, i: int | jax.Array, like: jax.Array) -> jax.Array:
    if key.ndim == 0:
        key = jax.vmap(lambda b: jax.random.fold_in(key, b))(jnp.arange(like.shape[0]))
    return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, i), like.shape[1:], jnp.float32))(key)


def _ddim(fields: Mapping[str, Any], levels: Table, steps: int, eta: float) -> Sampler:
    """Song et al. 2020 (arXiv 2010.02502), equations 12 and 16; VideoCrafter2's scale multiplies the signal."""
    timesteps = ddim_timesteps(fields, steps)
    # Always this stride back, whatever the spacing; diffusers does so, and samples depend on it.
    before = timesteps - fields["num_train_timesteps"] // steps
    final = 1.0 if fields["set_alpha_to_one"] else levels[0]
    now = levels[timesteps].astype(np.float64)
    previous = np.where(before >= 0, levels[np.maximum(before, 0)], final).astype(np.float64)
    if fields["prediction_type"] == "epsilon" and (now == 0).any():
        raise UserError(
            "scheduler_config.json: rescale_betas_zero_snr: these steps visit zero terminal SNR, where an epsilon "
            "prediction says nothing of the clean sample; use prediction_type 'v_prediction' or timestep_spacing "
            "'leading'"
        )
    scale = signal_scale(fields).astype(np.float64)
    scale_now, scale_before = scale[timesteps], scale[np.maximum(before, 0)]
    a, b, c, d = _split(fields["prediction_type"], np.sqrt(now) * scale_now, np.sqrt(1 - now))
    fresh = eta * np.sqrt(np.maximum((1 - previous) / (1 - now) * (1 - now / previous), 0.0))
    coefficients = _coefficients(
        steps,
        clean_of_sample=a,
        clean_of_prediction=b,
        noise_of_sample=c,
        noise_of_prediction=d,
        next_of_clean=np.sqrt(previous) * scale_before,
        next_of_noise=np.sqrt(np.maximum(1 - previous - fresh**2, 0.0)),
        fresh_noise=fresh,
    )
    clip_range = float(fields["clip_sample_range"]) if fields["clip_sample"] else None
    return Sampler(fields["_class_name"], timesteps, 1.0, coefficients, clip_range)


def _dpm_solver(fields: Mapping[str, Any], levels: Table, steps: int) -> Sampler:
    """DPM-Solver++ of first or second order, multistep (Lu et al. 2022, arXiv 2211.01095, algorithm 2)."""
    timesteps, sigmas = dpm_timesteps_and_sigmas(fields, levels, steps)
    steps = len(timesteps)
    # In float32 as in diffusers: lambda is near 10 at high noise, and its last bit shows in a difference of two.
    signal = 1 / np.sqrt(sigmas**2 + 1)
    noise = sigmas * signal
    now, following = slice(0, steps), slice(1, steps + 1)
    a, b, _, _ = _split(fields["prediction_type"], signal[now], noise[now])
    # The last step may end at sigma 0, lambda infinite: its terms are masked below.
    with np.errstate(divide="ignore", invalid="ignore"):
        h = np.diff(np.log(signal) - np.log(noise))  # the step in lambda = log(signal / noise)
        decay = np.exp(-h) - 1
        ratio = np.concatenate([np.ones(1, np.float32), h[:-1] / h[1:]])  # the step before over this one
        slope = -0.5 * decay if fields["solver_type"] == "midpoint" else decay / h + 1
        correction = signal[following] * slope / ratio
    correction = np.where(_second_order(fields, steps), correction, 0)
    coefficients = _coefficients(
        steps,
        clean_of_sample=a,
        clean_of_prediction=b,
        next_of_sample=noise[following] / noise[now],
        next_of_clean=-signal[following] * decay + correction,
        next_of_previous_clean=-correction,
    )
    return Sampler(fields["_class_name"], timesteps, 1.0, coefficients, None)


def _second_order(fields: Mapping[str, Any], steps: int) -> npt.NDArray[np.bool_]:
    second = np.full(steps, fields["solver_order"] == 2)
    second[0] = False
    short = fields["lower_order_final"] and steps < 15
    if fields["euler_at_final"] or short or fields["final_sigmas_type"] == "zero":
        second[-1] = False
    return second


def _euler(fields: Mapping[str, Any], levels: Table, steps: int) -> Sampler:
    """Euler's method on the probability flow ODE in sigma (Karras et al. 2022, arXiv 2206.00364, algorithm 2)."""
    timesteps, sigmas32 = euler_timesteps_and_sigmas(fields, levels, steps)
    steps = len(timesteps)
    sigmas = sigmas32.astype(np.float64)
    scale = 1 / np.sqrt(sigmas[:steps] ** 2 + 1)
    # Samples are kept as x_0 + sigma eps here: the variance-preserving rule with its sample scaled.
    a, b, _, _ = _split(fields["prediction_type"], scale, sigmas[:steps] * scale)
    remaining = sigmas[1:] / sigmas[:steps]
    coefficients = _coefficients(
        steps,
        input_scale=scale,
        clean_of_sample=a * scale,
        clean_of_prediction=b,
        next_of_sample=remaining,
        next_of_clean=1 - remaining,
    )
    largest = float(sigmas.max())
    initial = (largest**2 + 1) ** 0.5 if fields["timestep_spacing"] == "leading" else largest
    return Sampler(fields["_class_name"], timesteps, initial, coefficients, None)


def _split(prediction_type: str, signal: Table, noise: Table) -> tuple[Table, Table, Table, Table]:
    """(a, b, c, d) of x_0 = a x_t + b prediction, eps = c x_t + d prediction, at x_t = signal x_0 + noise eps."""
    zeros, ones = np.zeros_like(signal), np.ones_like(signal)
    if prediction_type == "epsilon":
        return 1 / signal, -noise / signal, zeros, ones
    if prediction_type == "sample":
        return zeros, ones, 1 / noise, -signal / noise
    return signal, -noise, noise, signal


def _coefficients(steps: int, **tables: Table) -> Coefficients:
    full = {name: np.zeros(steps) for name in Coefficients._fields} | {"input_scale": np.ones(steps)} | tables
    return Coefficients(**{name: table.astype(np.float32) for name, table in full.items()})
