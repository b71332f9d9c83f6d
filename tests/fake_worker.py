"""Stands for a side of benchmarks/peer.py in its tests: a process that doubles numbers."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from children import serve


def answer(number):
    print("printed")
    if number is None:
        raise ValueError("no number")
    return {"twice": 2 * number, "cores": sorted(os.sched_getaffinity(0))}


serve(lambda: answer)
