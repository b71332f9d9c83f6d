"""A trace of some steps for TensorBoard's profile plugin and xprof, on request."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import jax

from vpo_jax.runtime.errors import UserError

_STEPS = re.compile(r"(\d{1,9})(?::(\d{1,9}))?")


def parse_steps(text: str) -> range:
    """The steps, from 1, of "3:5" (3 and 4), "3" (it alone) or "" (none).

    Raises:
      UserError: anything else; it names profile.steps.
    """
    if not text:
        return range(0)
    match = _STEPS.fullmatch(text)
    if match:
        first = int(match[1])
        last = int(match[2]) if match[2] else first + 1
        if 1 <= first < last:
            return range(first, last)
    raise UserError(f"profile.steps: {text!r} is not FIRST:LAST with 1 <= FIRST < LAST; write 3:5 for steps 3 and 4")


class Profiler:
    """Traces the given steps into a folder, each annotated with its number."""

    def __init__(self, folder: Path, steps: str) -> None:
        """`steps` as `parse_steps` reads it."""
        self._folder, self._steps = folder, parse_steps(steps)
        self._tracing = False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Annotates what is inside as step `number`; starts and ends the trace where it is due."""
        if number in self._steps and not self._tracing:
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield
        if number + 1 not in self._steps:
            self.stop()

    def stop(self) -> None:
        """Writes the trace that is being taken, if one is."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
