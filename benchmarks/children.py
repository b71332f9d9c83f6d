"""A benchmark as a process that may fail, hang or be killed without harm to the one that started it."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


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
