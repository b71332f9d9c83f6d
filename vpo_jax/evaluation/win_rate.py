"""How often the tuned model's video scores higher than the base model's for the same prompt and seed."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
Each = Callable[[np.ndarray], np.ndarray]


class WinRate(NamedTuple):
    """A share in [0, 1] with the ends of its 95 % interval, from this many prompts; NaN from none."""

    rate: float
    low: float
    high: float
    prompts: int


def win_rate(base: npt.ArrayLike, tuned: npt.ArrayLike, seed: int = 0) -> WinRate:
    """Win rate of `tuned` over `base`: ties count one half.

    Scores are [P], or [P, S] for S samples a prompt, which are averaged within their prompt first. The interval is a
    percentile bootstrap over prompts, not over samples, since samples of one prompt are not independent. A
    comparison with a score that is not finite is left out.
    """
    return _summarise(_differences(base, tuned), np.sign, seed, _as_share)


def win_share(base: npt.ArrayLike, tuned: npt.ArrayLike) -> float:
    """`win_rate(base, tuned).rate` alone, without the resampling that its interval needs; NaN of no finite pair."""
    shares = _per_prompt(_differences(base, tuned), np.sign, _as_share)
    return float(shares.mean()) if len(shares) else np.nan


def mean_difference(base: npt.ArrayLike, tuned: npt.ArrayLike, seed: int = 0) -> WinRate:
    """Mean of tuned - base in the score's own units, with the same interval as `win_rate`."""
    return _summarise(_differences(base, tuned), np.asarray, seed, lambda mean: mean)


def _differences(base: npt.ArrayLike, tuned: npt.ArrayLike) -> np.ndarray:
    base, tuned = np.asarray(base, np.float64), np.asarray(tuned, np.float64)
    if base.shape != tuned.shape or base.ndim not in (1, 2):
        raise ValueError(f"scores of base {base.shape} and tuned {tuned.shape} must both be [P] or [P, S]")
    with np.errstate(invalid="ignore"):
        difference = tuned - base
    finite = np.isfinite(base) & np.isfinite(tuned)
    return np.where(finite, difference, np.nan).reshape(len(base), -1)


def _as_share(signs: np.ndarray) -> np.ndarray:
    """Means of signs in [-1, 1] as shares of wins in [0, 1], where a tie is one half."""
    return (signs + 1) / 2


def _per_prompt(differences: np.ndarray, of_each: Each, scale: Each) -> np.ndarray:
    """Means over the finite samples of each prompt that has one: [P, S] -> [at most P]."""
    usable = np.isfinite(differences)
    kept = usable.any(axis=1)
    values = np.where(usable, of_each(np.where(usable, differences, 0.0)), 0.0)
    return scale(values[kept].sum(axis=1) / usable[kept].sum(axis=1))


def _summarise(differences: np.ndarray, of_each: Each, seed: int, scale: Each) -> WinRate:
    per_prompt = _per_prompt(differences, of_each, scale)
    if not len(per_prompt):
        return WinRate(np.nan, np.nan, np.nan, 0)
    resampled = np.random.default_rng(seed).choice(per_prompt, (RESAMPLES, len(per_prompt))).mean(axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return WinRate(float(per_prompt.mean()), float(low), float(high), len(per_prompt))
