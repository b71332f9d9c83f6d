"""Noise processes: how a clean latent, noise and a timestep become a noisy latent, and what a prediction stands for.

With the levels (s, n) of a timestep and the weights (p, q) of a prediction type,

    x_t        = s x_0 + n eps
    prediction = p x_0 + q eps
    det        = s q - n p
    x_0        = (q x_t - n prediction) / det
    eps        = (s prediction - p x_t) / det

so that one formula serves every prediction type; `prediction_weights` is the table of (p, q).
"""

import abc
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from vpo_jax.diffusion.config import DEFAULTS, is_flow, resolve
from vpo_jax.diffusion.schedules import alphas_cumprod, signal_scale
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.types import Array, FloatTable, Key, Table

# Classes that are not sampled with, whose levels follow from the same fields with the same defaults as DDIM's.
_LEVELS_OF_DDIM = (
    "DDPMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "DEISMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
)
DENSITIES = ("logit_normal", "uniform")

Levels = TypeVar("Levels", Array, Table)


class PredictionWeights(NamedTuple, Generic[Levels]):
    """p, q and det = s q - n p; a Python number where the value is the same at every timestep."""

    clean: Levels | int  # p
    noise: Levels | int  # q
    determinant: Levels | int


def prediction_weights(prediction_type: str, signal: Levels, noise: Levels) -> PredictionWeights[Levels]:
    """The weights of a prediction type at the levels (s, n), arrays of one shape.

    v has det = s^2 + n^2, which is 1 as the process preserves variance (`resolve` refuses v with a scaled signal);
    the flow velocity has det = s + n, which is 1 in rectified flow.
    """
    if prediction_type == "epsilon":
        return PredictionWeights(0, 1, signal)
    if prediction_type == "sample":
        return PredictionWeights(1, 0, -noise)
    if prediction_type == "v_prediction":
        return PredictionWeights(-noise, signal, 1)
    if prediction_type == "flow_prediction":
        return PredictionWeights(-1, 1, 1)
    raise ValueError(f"unknown prediction type {prediction_type!r}")


def clean_and_noise_weights(prediction_type: str, signal: Table, noise: Table) -> tuple[Table, Table, Table, Table]:
    """Tables (a, b, c, d) of x_0 = a x_t + b prediction and eps = c x_t + d prediction at the levels (s, n)."""
    p, q, det = prediction_weights(prediction_type, signal, noise)
    zeros = np.zeros_like(signal)  # sums with them are tables, and turn -0 into 0
    a, b, c, d = q / det, -noise / det, -p / det, signal / det
    return a + zeros, b + zeros, c + zeros, d + zeros


@dataclass(frozen=True, eq=False)
class Process(abc.ABC):
    """What training needs to know of a scheduler_config.json.

    `prediction_type` says what the denoiser is trained to predict: "epsilon", "sample", "v_prediction" or
    "flow_prediction".
    """

    prediction_type: str

    @property
    @abc.abstractmethod
    def num_train_timesteps(self) -> int:
        """T: timesteps lie in [0, T]."""

    @abc.abstractmethod
    def levels(self, timesteps: Array) -> tuple[Array, Array]:
        """(s, n) float32 at timesteps of any shape."""

    @abc.abstractmethod
    def draw_timesteps(self, key: Key, low: float = 0.0, high: float = 1.0) -> Array:
        """One training timestep, a scalar, from the shares [low, high] of the schedule; 0 is clean and 1 is noise."""

    def with_density(self, density: str) -> "Process":
        """The same process with training timesteps of another density; one that draws them uniformly is as it was."""
        return self

    def add_noise(self, clean: Array, noise: Array, timesteps: Array) -> Array:
        """x_t from x_0 [B, ...], eps [B, ...] and timesteps [B]."""
        signal, sigma = self._levels(timesteps, clean.ndim)
        return signal * clean + sigma * noise

    def target(self, clean: Array, noise: Array, timesteps: Array) -> Array:
        """What the denoiser should predict at x_t: p x_0 + q eps [B, ...]."""
        weights = prediction_weights(self.prediction_type, *self._levels(timesteps, clean.ndim))
        return _combine(weights.noise, noise, weights.clean, clean)

    def to_clean_and_noise(self, prediction: Array, noisy: Array, timesteps: Array) -> tuple[Array, Array]:
        """(x_0, eps) that a prediction at x_t stands for, each [B, ...].

        Not finite where the process makes the question meaningless: x_0 of an epsilon prediction at zero terminal SNR.
        """
        signal, sigma = self._levels(timesteps, noisy.ndim)
        weights = prediction_weights(self.prediction_type, signal, sigma)
        # A weight of 0 leaves one term of the prediction: the prediction is the other one.
        clean, noise = prediction, prediction
        if not _is(weights.noise, 0):
            clean = _divide(_combine(weights.noise, noisy, -sigma, prediction), weights.determinant)
        if not _is(weights.clean, 0):
            noise = _divide(_combine(signal, prediction, -weights.clean, noisy), weights.determinant)
        return clean, noise

    def _levels(self, timesteps: Array, ndim: int) -> tuple[Array, Array]:
        """(s, n) at timesteps [B], of `ndim` axes."""
        shape = (-1,) + (1,) * (ndim - 1)
        signal, sigma = self.levels(timesteps)
        return signal.reshape(shape), sigma.reshape(shape)


@dataclass(frozen=True, eq=False)
class VariancePreserving(Process):
    """x_t = sqrt(abar_t) s_t x_0 + sqrt(1 - abar_t) eps at whole timesteps, drawn uniformly in training.

    `alphas_cumprod` is abar, float32 [T]. `signal_scale` is s_t, float32 [T]: ones but in VideoCrafter2's scaled
    schedule, which weakens the signal at high noise.
    """

    alphas_cumprod: FloatTable
    signal_scale: FloatTable

    @property
    def num_train_timesteps(self) -> int:
        """T: timesteps are 0 to T - 1."""
        return len(self.alphas_cumprod)

    @property
    def signal(self) -> FloatTable:
        """sqrt(abar_t) s_t, float32 [T]."""
        return np.sqrt(self.alphas_cumprod) * self.signal_scale

    @property
    def noise(self) -> FloatTable:
        """sqrt(1 - abar_t), float32 [T]."""
        return np.sqrt(1.0 - self.alphas_cumprod)

    def levels(self, timesteps: Array) -> tuple[Array, Array]:
        """(s, n) float32 at whole timesteps of any shape."""
        return jnp.asarray(self.signal)[timesteps], jnp.asarray(self.noise)[timesteps]

    def draw_timesteps(self, key: Key, low: float = 0.0, high: float = 1.0) -> Array:
        """int32 scalar, uniform over the whole timesteps in [low T, high T), which hold at least one."""
        number = self.num_train_timesteps
        first = min(round(low * number), number - 1)
        return jax.random.randint(key, (), first, max(round(high * number), first + 1))


@dataclass(frozen=True, eq=False)
class RectifiedFlow(Process):
    """x_t = (1 - sigma) x_0 + sigma eps with sigma = timestep / T (Liu et al. 2022, arXiv 2209.03003).

    Training draws u in (0, 1) and shifts it towards noise: sigma = shift u / (1 + (shift - 1) u) (Esser et al. 2024,
    arXiv 2403.03206, equation 23); a sampler's steps are evenly spaced in u. `density` is that of u: "logit_normal"
    (logit(u) is Gaussian of `mean` and standard deviation `std`; equation 19) or "uniform".

    Raises:
      UserError: an unknown density, or a number out of range.
    """

    prediction_type: str = "flow_prediction"
    steps: int = 1000
    shift: float = 1.0
    density: str = "logit_normal"
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        """Checks the fields."""
        if self.density not in DENSITIES:
            raise UserError(f"density: {self.density!r} is unknown; choose one of {', '.join(DENSITIES)}")
        if not self.shift > 0.0:
            raise UserError(f"shift: {self.shift} must be above 0")
        if not self.std > 0.0:
            raise UserError(f"std: {self.std} must be above 0")

    @property
    def num_train_timesteps(self) -> int:
        """T: timesteps are real numbers in [0, T]."""
        return self.steps

    def levels(self, timesteps: Array) -> tuple[Array, Array]:
        """(1 - sigma, sigma) float32 at real timesteps of any shape."""
        sigma = jnp.asarray(timesteps, jnp.float32) / self.steps
        return 1.0 - sigma, sigma

    def draw_timesteps(self, key: Key, low: float = 0.0, high: float = 1.0) -> Array:
        """float32 scalar in [0, T], not rounded: T sigma with u drawn from its density restricted to [low, high].

        The restriction is exact: one uniform number goes through the quantile function between the quantiles of
        `low` and `high`.
        """
        uniform = jax.random.uniform(key, (), jnp.float32)
        share = _between(low, high, uniform) if self.density == "uniform" else self._logit_normal(uniform, low, high)
        share = jnp.clip(share, low, high)
        return self.steps * (self.shift * share / (1.0 + (self.shift - 1.0) * share))

    def with_density(self, density: str) -> "RectifiedFlow":
        """The same process with u drawn from another of `DENSITIES`."""
        return replace(self, density=density)

    def _logit_normal(self, uniform: Array, low: float, high: float) -> Array:
        """u in [low, high], by the quantile function, from a uniform number in [0, 1)."""
        first, last = ((_logit(share) - self.mean) / self.std for share in (low, high))
        # Above the median the quantile is taken of the mirror image: float32 resolves tails near 0, not near 1.
        mirrored = first > 0.0
        if mirrored:
            first, last = -last, -first
        normal = jax.scipy.special.ndtri(_between(_normal_cdf(first), _normal_cdf(last), uniform))
        return jax.nn.sigmoid(self.mean + self.std * (-normal if mirrored else normal))


def make_process(config: Mapping[str, Any], name: str | None = None) -> Process:
    """The noise process of a scheduler_config.json, read as its own class or as the class `name` reads it.

    A flow config gives a `RectifiedFlow` with its shift and a logit-normal density; take another density by
    `dataclasses.replace`.

    Raises:
      UserError: a class that is not known here, or a value that is not honoured, by the field's name.
    """
    own = config.get("_class_name")
    if name is None and own not in DEFAULTS:
        if own not in _LEVELS_OF_DDIM:
            raise UserError(
                f"scheduler_config.json: _class_name: {own!r}: the noise levels of this class are not supported; "
                f"write the file for one of {', '.join(DEFAULTS)}"
            )
        name = "DDIMScheduler"
    fields = resolve(config, name)
    if is_flow(fields):
        shift = fields["flow_shift"] if "flow_shift" in fields else fields["shift"]
        return RectifiedFlow(steps=fields["num_train_timesteps"], shift=float(shift))
    return VariancePreserving(fields["prediction_type"], alphas_cumprod(fields), signal_scale(fields))


def _combine(a: Array | int, x: Array, b: Array | int, y: Array) -> Array:
    """a x + b y, where a weight that is the Python number 0, 1 or -1 costs no product."""
    if _is(a, 0):
        return y if _is(b, 1) else b * y
    first = x if _is(a, 1) else a * x
    if _is(b, 0):
        return first
    if _is(b, 1):
        return first + y
    return first - y if _is(b, -1) else first + b * y


def _divide(x: Array, by: Array | int) -> Array:
    return x if _is(by, 1) else x / by


def _is(weight: Array | int, number: int) -> bool:
    return isinstance(weight, int) and weight == number


def _between(low: float, high: float, share: Array) -> Array:
    return low + (high - low) * share


def _normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2.0))


def _logit(share: float) -> float:
    if share <= 0.0:
        return -math.inf
    return math.inf if share >= 1.0 else math.log(share / (1.0 - share))
