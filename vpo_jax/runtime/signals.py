"""SIGINT and SIGTERM as a flag that the loop checks between stages."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from vpo_jax.runtime.processes import agree


class Interrupted(Exception):
    """The run stopped because a signal asked for it; what was done is saved. Exit code 128 + signal: 130 or 143."""

    def __init__(self, signum: int, message: str = "") -> None:
        super().__init__(message or f"stopped by {signal.Signals(signum).name}; the same command continues")
        self.exit_code = 128 + signum


class Stop:
    """Whether a signal asked to stop, in this process or in another of the run.

    Attributes:
      signum: of the signal that came, 0 where none did.
    """

    def __init__(self) -> None:
        self.signum = 0

    def asked(self) -> bool:
        """True once SIGINT or SIGTERM came to any process of the run; all of them have to call it, and all agree."""
        self.signum = agree(self.signum)
        return self.signum != 0

    def check(self) -> None:
        """Raises Interrupted when a signal came; all processes have to call it."""
        if self.asked():
            raise Interrupted(self.signum)


@contextlib.contextmanager
def catch_signals() -> Iterator[Stop]:
    """Inside, SIGINT and SIGTERM only set the flag; a second one of the same kind ends the process at once."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(signum: int, frame: FrameType | None) -> None:
        stop.signum = signum
        signal.signal(signum, previous[signal.Signals(signum)])

    previous = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    for signum in previous:
        signal.signal(signum, handle)
    try:
        yield stop
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
