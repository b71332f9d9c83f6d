"""Progress of a run for people: one line with the main numbers of a step."""

import math
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar


class Progress:
    """A progress bar on a terminal; elsewhere a line a step, so that a log file stays readable; silent, nothing.

    Attributes:
      total: steps of the whole run.
      completed: steps done, those before a restart included.
    """

    def __init__(
        self, total: int, completed: int = 0, every: int = 1, console: Console | None = None, silent: bool = False
    ) -> None:
        self.total, self.completed, self.every = total, completed, max(1, every)
        self.console = console or Console(stderr=True, quiet=silent)
        self._began, self._from, self._without = time.perf_counter(), completed, 0
        self._bar: Bar | None = None
        if self.console.is_terminal and not silent:
            self._bar = Bar(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task("compiling", total=total, completed=completed)

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, completed: int, metrics: Mapping[str, float]) -> None:
        """Shows a finished step; reads reward/total, pair/*, loss/implicit_accuracy, time/videos_per_second."""
        self.completed = completed
        if metrics.get("pair/kept") == 0.0:
            self._without += 1
            if self._without in (1, 10, 100, 1000):
                self.say(f"step {completed}: {without_pairs(metrics)}")
        line = describe(metrics) + f"  {self._left()} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=completed, description=line)
        elif completed % self.every == 0 or completed == self.total:
            self.say(f"step {completed}/{self.total}  {line}")

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _left(self) -> str:
        done = self.completed - self._from
        seconds = (time.perf_counter() - self._began) / max(1, done) * (self.total - self.completed)
        hours, rest = divmod(int(seconds), 3600)
        return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def without_pairs(metrics: Mapping[str, float]) -> str:
    """The message for a step that kept no pair: how many were dropped by which rule, and the fields that set it."""
    counts = {name.removeprefix("pair/dropped_"): n for name, n in metrics.items() if name.startswith("pair/dropped_")}
    dropped = ", ".join(f"{n:.0f} by {name}" for name, n in counts.items() if n > 0)
    return (
        f"no pair was kept ({dropped or 'none was made'}), so there is nothing new to learn; "
        "preference.margin and preference.motion_tolerance set the limits"
    )


def describe(metrics: Mapping[str, float]) -> str:
    """The main numbers of a step as text; missing and non-finite ones are left out."""
    parts = (
        ("reward", "reward/total", "{:.3f}"),
        ("win margin", "pair/margin", "{:.2f}"),
        ("win accuracy", "loss/implicit_accuracy", "{:.2f}"),
        ("videos/s", "time/videos_per_second", "{:.2f}"),
    )
    return "  ".join(
        f"{label} {form.format(metrics[name])}"
        for label, name, form in parts
        if math.isfinite(metrics.get(name, math.nan))
    )
