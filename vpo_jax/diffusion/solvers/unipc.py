"""UniPC, a predictor and a corrector in the log SNR (Zhao et al. 2023, arXiv 2302.04867, algorithms 5 to 8)."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vpo_jax.diffusion.config import is_flow
from vpo_jax.diffusion.multistep import Corrector, Sampler, make_coefficients, make_levels
from vpo_jax.diffusion.process import clean_and_noise_weights
from vpo_jax.diffusion.schedules import alphas_cumprod
from vpo_jax.diffusion.timesteps import unipc_flow_timesteps_and_sigmas, unipc_timesteps_and_sigmas
from vpo_jax.runtime.types import Table

Row = npt.NDArray[np.float64]


class _Grid(NamedTuple):
    """The levels of a run, each float64 [S + 1], for the value y that the solver integrates.

    y is x_0 with level `own` = s and `other` = n, or without `predict_x0` eps, with the two swapped. `log_ratio` is
    log(own / other), which grows along a run for x_0 and falls for eps.
    """

    own: Row
    other: Row
    log_ratio: Row
    is_bh1: bool


def make_unipc(fields: Mapping[str, Any], steps: int, first: int = 0) -> Sampler:
    """UniPC of order 1 to 3 on a variance-preserving process or a flow; `fields` are what `resolve` returns.

    No step reads one before `first`. Where the last step ends at sigma 0 it gives x_0, the limit of both solver types
    (diffusers 0.42: NaN for bh1).
    """
    if is_flow(fields):
        timesteps, sigmas = unipc_flow_timesteps_and_sigmas(fields, steps)
        signal, noise = 1 - sigmas, sigmas
    else:
        timesteps, sigmas = unipc_timesteps_and_sigmas(fields, alphas_cumprod(fields), steps)
        # In float32 as in diffusers: lambda is near 10 at high noise, and its last bit shows in a difference of two.
        signal = 1 / np.sqrt(sigmas**2 + 1)
        noise = sigmas * signal
    a, b, c, d = clean_and_noise_weights(fields["prediction_type"], signal[:-1], noise[:-1])
    with np.errstate(divide="ignore"):
        half_log_snr = (np.log(signal) - np.log(noise)).astype(np.float64)
    levels, is_bh1 = (signal.astype(np.float64), noise.astype(np.float64)), fields["solver_type"] == "bh1"
    if fields["predict_x0"]:
        grid = _Grid(*levels, half_log_snr, is_bh1)
    else:
        a, b, grid = c, d, _Grid(*levels[::-1], -half_log_snr, is_bh1)

    size, order = len(timesteps), fields["solver_order"]
    left = size - np.arange(size) if fields["lower_order_final"] else np.full(size, order)
    orders = np.minimum(np.minimum(order, left), np.maximum(np.arange(size) - first, 0) + 1)
    predicted = np.stack([_predict(grid, i, orders[i], order) for i in range(size)])  # [S, 2 + order]
    corrected = np.zeros((size, 3 + order))
    corrected[:, 0] = 1.0
    for i in range(first + 1, size):
        if i - 1 not in fields["disable_corrector"]:
            corrected[i] = _correct(grid, i, orders[i - 1], order)
    coefficients = make_coefficients(
        size,
        clean_of_sample=a,
        clean_of_prediction=b,
        next_of_sample=predicted[:, 0],
        next_of_clean=predicted[:, 1],
        next_of_previous_clean=_columns(predicted[:, 2:]),
        corrector=Corrector(corrected[:, 0], corrected[:, 1], corrected[:, 2], _columns(corrected[:, 3:])),
    )
    return Sampler(fields["_class_name"], timesteps, 1.0, coefficients, None, make_levels(signal[:-1], noise[:-1]))


def _predict(grid: _Grid, i: int, order: int, width: int) -> Row:
    """Coefficients of the step from i to i + 1: of the sample, of y_i, of y_(i-1), ...: [2 + width]."""
    of_sample, of_value, earlier, _ = _step(grid, i, order, False)
    return np.asarray([of_sample, of_value, *earlier, *[0.0] * (width - len(earlier))])


def _correct(grid: _Grid, i: int, order: int, width: int) -> Row:
    """Coefficients of the step from i - 1 to i made again with y_i: of the sample at i, at i - 1, of y_i, ...."""
    of_sample, of_value, earlier, of_arrived = _step(grid, i - 1, order, True)
    return np.asarray([0.0, of_sample, of_arrived, of_value, *earlier, *[0.0] * (width - 1 - len(earlier))])


def _step(grid: _Grid, k: int, order: int, corrects: bool) -> tuple[float, float, list[float], float]:
    """Coefficients of the sample at k, of y_k, of y_(k-1), ... and, for the corrector, of y_(k+1)."""
    h = grid.log_ratio[k + 1] - grid.log_ratio[k]
    growth = np.expm1(-h)
    of_sample, of_value = grid.other[k + 1] / grid.other[k], -grid.own[k + 1] * growth
    nodes = [(grid.log_ratio[k - j] - grid.log_ratio[k]) / h for j in range(1, order)] + [1.0] * corrects
    if not nodes:
        return of_sample, of_value, [], 0.0
    scale = -h if grid.is_bh1 else growth  # B(h) of the paper
    shares = -grid.own[k + 1] * scale * _weights(nodes, -h, scale) / np.asarray(nodes)
    # The weights multiply differences y_j - y_k.
    earlier, arrived = (shares[:-1], shares[-1]) if corrects else (shares, 0.0)
    return of_sample, of_value - shares.sum(), earlier.tolist(), arrived


def _weights(nodes: list[float], h: float, scale: float) -> Row:
    """The weights for which the rule is exact on polynomials of degree up to len(nodes); for one node 1/2, as there."""
    if len(nodes) == 1:
        return np.full(1, 0.5)
    moments, phi = [], np.expm1(h) / h - 1
    for i in range(1, len(nodes) + 1):
        moments.append(phi * math.factorial(i) / scale)
        phi = phi / h - 1 / math.factorial(i + 1)
    return np.linalg.solve(np.vander(nodes, increasing=True).T, np.asarray(moments))


def _columns(table: Row) -> tuple[Table, ...]:
    return tuple(table.T)
