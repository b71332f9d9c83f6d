"""Where a person's own reward comes from, and how its mistakes become errors that name it."""

import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from vpo_jax.runtime.errors import UserError

T = TypeVar("T")


class Origin(NamedTuple):
    """Where a reward comes from: "module:attribute", and the field that names it."""

    source: str
    field: str

    def wrong(self, words: str) -> UserError:
        """A UserError with this message about the reward."""
        return UserError(f"{self.field}: {self.source} {words}")

    def told(self, call: Callable[[], T]) -> T:
        """`call()`; what it raises becomes a UserError with its kind, its words and the line of the person's module."""
        try:
            return call()
        except UserError:
            raise
        except Exception as error:
            raise self.wrong(f"raised {described(error, self.source)}; correct it") from error

    def in_time(self, seconds: float, videos: int, call: Callable[[], T]) -> T:
        """`call()` in a thread that does not keep the process alive; 0 seconds: here, and without a limit.

        Raises:
          UserError: it has not returned in time. It keeps running, and its result is dropped.
        """
        if not seconds:
            return call()
        answers: list[T] = []
        failures: list[BaseException] = []

        def work() -> None:
            try:
                answers.append(call())
            except BaseException as error:  # noqa: BLE001 (raised again in the thread that waits)
                failures.append(error)

        thread = threading.Thread(target=work, name="reward", daemon=True)
        thread.start()
        thread.join(seconds)
        if not answers and not failures:
            raise UserError(
                f"reward.timeout: {self.source} has not answered for {videos} videos in {seconds:g} s; correct it, or "
                "give it more time with --config.reward.timeout=SECONDS (0 = no limit); a run continues from its last "
                "checkpoint by the same command"
            )
        if failures and isinstance(failures[0], SystemExit):
            raise self.wrong("called sys.exit; let it raise or return") from failures[0]
        if failures:
            raise failures[0]
        return answers[0]


def described(error: BaseException, source: str) -> str:
    """The error's kind and words, and the last line of the person's own module that it came through."""
    frames = list(traceback.extract_tb(error.__traceback__))
    stem = source.partition(":")[0].rpartition(".")[2]
    frames = [frame for frame in frames if Path(frame.filename).stem == stem] or frames[-1:]
    place = f" in {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""
    words = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}{place}" + (f" ({words})" if words else "")
