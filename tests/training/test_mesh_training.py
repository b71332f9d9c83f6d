"""One device and eight, sharded along any axis, give the same videos, scores, pairs and gradients."""

import json

import pytest

from tests.running import run_program


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["lora", "full", "group", "trunk", "denoiser", "wan", pytest.param("axis", marks=pytest.mark.long)]
)
def test_one_device_and_eight_give_the_same_videos_scores_pairs_and_gradients(kind):
    done = run_program("meshes_agree.py", kind, devices=8, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    small = ("chunks", "context")
    assert all(run["spread"] == (4 if name in small else 8) for name, run in found.items()), found
    assert all((run["sharded"] > 0) == (kind == "full") for run in found.values()), found  # adapters stay whole
    for name, difference in found.items():
        # float32 rounding through three sampler steps: sums are split differently between devices.
        assert difference["latents"] < 2e-5, (name, difference)
        assert difference["levels"] <= 1 and difference["changed"] < 0.005, (name, difference)
        assert difference["scores"] < 1e-4, (name, difference)
        assert difference["pairs"] and difference["chosen"] < 2e-5, (name, difference)
        # Relative to the gradient's norm, before clipping and Adam.
        assert difference["gradient"] < 1e-4, (name, difference)
        assert difference["loss"] == pytest.approx(0.6931471805599453, abs=1e-7), (name, difference)
