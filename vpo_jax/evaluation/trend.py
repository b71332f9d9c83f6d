"""Whether a run's own samples got better while it trained: the last quarter of its steps against the first."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit  # Student's quantile


class Trend(NamedTuple):
    """A metric in the first and the last quarter of a run's steps.

    Attributes:
      quarters: mean of each quarter.
      difference: last less first.
      low, high: 95 % interval of it (Welch); NaN of fewer than two steps in a quarter.
    """

    quarters: tuple[float, float, float, float]
    difference: float
    low: float
    high: float

    @property
    def says(self) -> str:
        """One word for people: rose, fell, or stayed (no difference beyond chance)."""
        return "rose" if self.low > 0.0 else "fell" if self.high < 0.0 else "stayed"


def trend(values: Sequence[float | None]) -> Trend | None:
    """The trend of a metric over a run's steps, oldest first; None of fewer than four finite values.

    Steps without a value are left out before the run is divided.
    """
    seen = np.array([value for value in values if value is not None and math.isfinite(value)], np.float64)
    if len(seen) < 4:
        return None
    parts = np.array_split(seen, 4)
    first, last = parts[0], parts[-1]
    difference = float(last.mean() - first.mean())
    half = _half_width(first, last)
    quarters = tuple(float(part.mean()) for part in parts)
    return Trend(quarters, difference, difference - half, difference + half)  # type: ignore[arg-type]


def reward_trend(lines: Sequence[Mapping[str, float | None]]) -> Trend | None:
    """The trend of reward/total in the lines of metrics.jsonl: the rollouts' own reward."""
    return trend([line.get("reward/total") for line in lines])


def describe_trend(found: Trend) -> str:
    """One sentence on the rollouts' own reward."""
    first, *_, last = found.quarters
    half = (found.high - found.low) / 2
    difference = f"{found.difference:+.4f} +- {half:.4f}"
    change = f"{first:.4f} in the first quarter of the steps, {last:.4f} in the last ({difference})"
    if found.says == "stayed":
        return f"the samples' own reward did not change beyond chance while training: {change}"
    return f"the samples' own reward {found.says} while training: {change}"


def _half_width(first: np.ndarray, last: np.ndarray) -> float:
    """Of Welch's 95 % interval for the difference of two means."""
    if min(len(first), len(last)) < 2:
        return math.nan
    parts = np.array([part.var(ddof=1) / len(part) for part in (first, last)])
    variance = float(parts.sum())
    if variance == 0.0:
        return 0.0
    freedom = variance**2 / float((parts**2 / [len(first) - 1, len(last) - 1]).sum())
    return float(stdtrit(freedom, 0.975)) * math.sqrt(variance)
