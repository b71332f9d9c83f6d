"""The time of a run by phase, summed over restarts."""

import contextlib
import time
from collections.abc import Iterator, Mapping


class Stopwatch:
    """Seconds spent in each named phase, since the run began and since the last lap.

    `state` is JSON and goes into the checkpoint; a new Stopwatch continues from it.
    """

    def __init__(self, state: Mapping[str, float] | None = None) -> None:
        self._totals: dict[str, float] = dict(state or {})
        self._lap: dict[str, float] = {}
        self._lap_began = time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the seconds inside to `name`, also when an exception leaves it."""
        began = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - began
            self._lap[name] = self._lap.get(name, 0.0) + seconds
            self._totals[name] = self._totals.get(name, 0.0) + seconds

    def lap(self) -> dict[str, float]:
        """Seconds of each phase since the last lap, as "time/NAME", and of everything as "time/step"."""
        now = time.perf_counter()
        seconds = {f"time/{name}": value for name, value in self._lap.items()}
        seconds["time/step"] = now - self._lap_began
        self._totals["step"] = self._totals.get("step", 0.0) + seconds["time/step"]
        self._lap, self._lap_began = {}, now
        return seconds

    @property
    def state(self) -> dict[str, float]:
        """Seconds of each phase since the run began; "step" holds the whole of the finished laps."""
        return dict(self._totals)
