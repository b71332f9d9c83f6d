"""Stands for a benchmark in the tests of benchmarks/gpu.py: it ends as its first flag says."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

how, *rest = sys.argv[1:]
flags = dict(flag.removeprefix("--").split("=", 1) for flag in rest)
output = Path(flags["output"])
if how == "fail":
    print("error: first\nRuntimeError: RESOURCE_EXHAUSTED: out of memory", file=sys.stderr)
    sys.exit("For simplicity, frames are removed.")
if how == "crash":
    signal.raise_signal(signal.SIGKILL)
if how == "hang":  # with a process of its own, as a peer
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(flags["pid"]).write_text(str(child.pid))
    time.sleep(600)
if how == "stages":  # dies in the second of those that it is asked for, the first time
    names = flags["stages"].split(",")
    died = Path(flags["died"])
    output.write_text(json.dumps({name: {"seconds": 2.0} for name in (names if died.exists() else names[:1])}))
    if not died.exists():
        died.touch()
        sys.exit("ValueError: the second stage")
    sys.exit()
with Path(flags["log"]).open("a") as log:
    log.write("ran\n")
flops = {} if "peer" in flags else {"tflop": 50.0}
output.write_text(json.dumps({"seconds": 0.5, "all_seconds": [0.5], "peak_bytes": 3, **flops}))
