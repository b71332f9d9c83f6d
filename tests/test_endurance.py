"""A long run of the smallest job: it neither grows nor slows down, and saving leaves little behind."""

import gc
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import pytest

from tests.running import ROOT, lines
from vpo_jax.checkpoints.orbax_store import CheckpointStore

STEPS = 2000
PAGE = 4096
# tensorstore's KvStore.Spec.to_json never frees the JSON that it returns (0.1.71 to 0.1.86, 257 bytes a call), Orbax
# calls it for every array, and something of its own stays as well: a save leaves 0.7 kB an array behind, whatever we
# do. Saving at every step therefore grows by more than the bound; saved as a run this long would be, it does not.
SAVE_EVERY = 20


@pytest.mark.long
def test_two_thousand_steps_take_no_more_memory_and_time_at_the_end_than_early_on(finished, job, tmp_path):
    workdir, said = tmp_path / "long", tmp_path / "said"
    flags = [f"--workdir={workdir}", f"--config.train.steps={STEPS}", f"--config.eval.every={STEPS}"]
    flags.append(f"--config.checkpoint.every={SAVE_EVERY}")
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


@pytest.mark.long
def test_a_save_leaves_no_more_behind_than_tensorstore_leaks(tmp_path):
    state = {str(number): jnp.ones((32, 32)) for number in range(100)}
    store = CheckpointStore(tmp_path / "checkpoints")
    sizes = []
    for step in range(600):
        store.save(step, state, {"step": step})
        if step in (199, 599):
            store.wait()
            gc.collect()
            sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * PAGE)
    store.close()
    growth = (sizes[1] - sizes[0]) / 400
    print(f"bytes a save of {len(state)} arrays: {growth:.0f}")
    assert growth < 1000 * len(state)
