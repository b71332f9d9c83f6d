"""A long run of the smallest job: it neither grows nor slows down."""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.running import ROOT, lines

STEPS = 2000
PAGE = 4096


@pytest.mark.long
def test_two_thousand_steps_take_no_more_memory_and_time_at_the_end_than_early_on(finished, job, tmp_path):
    workdir, said = tmp_path / "long", tmp_path / "said"
    flags = [f"--workdir={workdir}", f"--config.train.steps={STEPS}", f"--config.eval.every={STEPS}"]
    memory: list[tuple[int, int]] = []  # steps done, bytes
    with said.open("w") as out:
        command = [sys.executable, "-m", "vpo_jax.main", *job, *flags]
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        while process.poll() is None:
            metrics = workdir / "metrics.jsonl"
            done = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            resident = Path(f"/proc/{process.pid}/statm").read_text().split()
            if 0 < done < STEPS and len(resident) > 1:
                memory.append((done, int(resident[1]) * PAGE))
            time.sleep(0.5)
    assert process.returncode == 0, said.read_text()[-2000:]
    steps = lines(workdir)
    assert len(steps) == STEPS

    quarter = STEPS // 4
    seconds = [step["time/step"] for step in steps]
    quarters = [statistics.median(seconds[low : low + quarter]) for low in range(0, STEPS, quarter)]
    print("median seconds a step, by quarters:", [f"{value:.4f}" for value in quarters])
    assert quarters[3] < 1.15 * quarters[1], quarters

    sizes = [max(size for done, size in memory if low <= done < low + quarter) for low in range(0, STEPS, quarter)]
    print("most memory, MB, by quarters:", [f"{size / 1e6:.1f}" for size in sizes])
    assert sizes[3] < 1.02 * sizes[1], sizes
