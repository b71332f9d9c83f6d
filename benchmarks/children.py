"""Processes of benchmarks: one that may fail, hang or be killed without harm, and one that works when it is asked."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self


def run(command: Sequence[str], limit: float) -> tuple[dict[str, Any], str, bool]:
    """Runs a Python file with its flags and --output=FILE.json, on one GPU, for at most `limit` seconds.

    Returns:
      What it wrote so far, the line that says why it wrote no more ("" where it ended well), whether time was up.
    """
    with tempfile.TemporaryDirectory() as folder:
        output, log = Path(folder, "found.json"), Path(folder, "log")
        # Filtered tracebacks end with a line about the filter.
        environment = {"CUDA_VISIBLE_DEVICES": "0", **os.environ, "JAX_TRACEBACK_FILTERING": "off"}
        words = [sys.executable, *command, f"--output={output}"]
        with log.open("w") as said:
            process = subprocess.Popen(words, stdout=said, stderr=said, env=environment, process_group=0)
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:  # what it has started too
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        found = json.loads(output.read_text()) if output.is_file() else {}
        if code is None:
            return found, f"stopped after {limit:.0f} s", True
        return found, last_line(log.read_text(errors="replace"), code) if code else "", False


def last_line(log: str, code: int) -> str:
    """The last line of what a process printed that says what went wrong."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    said = [line for line in lines if re.match(r"([\w.]*(Error|Exception|Interrupt|Exit)|error)\b", line)]
    if code < 0 and not said:
        return f"ended by {signal.Signals(-code).name}"
    return (said or lines or [f"exit code {code}"])[-1][:300]


class Worker:
    """A process on chosen cores that does one thing at a time, when it is asked; it runs `serve`.

    A pool of threads that counts the cores which its process may use counts these.
    """

    def __init__(self, command: Sequence[str], cores: Iterable[int], log: Path) -> None:
        """Starts a Python file with its flags; what it prints goes to `log`."""
        self._log = log
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cores)  # a process starts with its parent's
        try:
            with log.open("w") as said:
                self._process = subprocess.Popen(
                    [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True
                )
        finally:
            os.sched_setaffinity(0, allowed)

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request.

        Raises:
          RuntimeError: the process has ended; its last words.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        answer = ""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        if not answer:
            code = self._process.wait()
            raise RuntimeError(last_line(self._log.read_text(errors="replace"), code))
        found: dict[str, Any] = json.loads(answer)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()


def serve(make: Callable[[], Callable[..., dict[str, Any]]]) -> None:
    """Answers requests, a line of JSON each, by `make()(**request)` until there are no more.

    Whatever else is printed, from `make` on, goes to stderr.
    """
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        answer = make()
        for line in sys.stdin:
            print(json.dumps(answer(**json.loads(line))), file=answers, flush=True)
