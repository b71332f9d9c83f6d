"""benchmarks/gpu.py and report.py: what is measured is kept, what fails ends alone, and the page says both."""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from vpo_jax.runtime.errors import UserError

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
FAKE = str(Path(__file__).resolve().parent / "fake_benchmark.py")


@pytest.fixture(autouse=True)
def beside_each_other(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def gpu(monkeypatch):
    import gpu

    versions = {"commit": "abc", "jax": "0.11.2", "torch": None}
    machine = {"device": "NVIDIA H100 80GB HBM3", "chip": "h100", "flops": 1e15, "platform": "gpu"}
    monkeypatch.setattr(gpu, "_described", lambda: machine | {"versions": versions})
    return gpu


@pytest.fixture
def fakes(gpu, monkeypatch, tmp_path):
    """Sets what `gpu.main` measures; a function that runs it and reads what it wrote."""

    def run(*every, flags=()):
        found = [gpu.Measurement(name, (FAKE, *command), *rest) for name, command, *rest in every]
        monkeypatch.setattr(gpu, "measurements", lambda size, folder: found)
        gpu.main([f"--results={tmp_path}", *flags])
        file = tmp_path / "nvidia-h100-80gb-hbm3.json"
        return {one["name"]: one for one in json.loads(file.read_text())["results"]} if file.exists() else {}

    return run


def good(tmp_path):
    return ("ok", f"--log={tmp_path / 'log'}")


@pytest.mark.slow
def test_a_measurement_that_fails_is_recorded_and_the_others_run(fakes, tmp_path):
    started = time.monotonic()
    found = fakes(
        ("unet/xla", good(tmp_path), 60),
        ("memory", ("fail",), 60),
        ("killed", ("crash",), 60),
        ("hanging", ("hang", f"--pid={tmp_path / 'pid'}"), 1),
        ("other", good(tmp_path), 60, ("a_package_that_is_not_there",)),
        ("unet/peer", (*good(tmp_path), "--peer=eager"), 60),
    )
    assert time.monotonic() - started < 60
    assert found["unet/xla"]["seconds"] == 0.5 and found["unet/xla"]["share_of_peak"] == 0.1  # 50 TFLOP in 0.5 s
    assert found["unet/xla"]["versions"] == {"commit": "abc", "jax": "0.11.2", "torch": None}
    assert found["memory"]["error"] == "RuntimeError: RESOURCE_EXHAUSTED: out of memory"
    assert found["killed"]["error"] == "ended by SIGKILL"
    assert found["hanging"]["error"] == "stopped after 3 s"
    assert found["other"]["skipped"] == "no a_package_that_is_not_there"
    assert (found["unet/peer"]["tflop"], found["unet/peer"]["share_of_peak"]) == (50.0, 0.1), "the FLOPs of ours"
    child = Path("/proc", (tmp_path / "pid").read_text())
    assert not child.exists() or "Z" in (child / "stat").read_text().rpartition(")")[2].split()[0]  # what it started


def test_what_is_measured_is_not_measured_again_unless_it_is_named(fakes, tmp_path):
    every = (("one", good(tmp_path), 60), ("two", good(tmp_path), 60), ("wrong", ("fail",), 60))

    def runs():
        return (tmp_path / "log").read_text().count("ran")

    first = fakes(*every)
    assert runs() == 2 and fakes(*every) == first and runs() == 2
    fakes(*every, flags=["--again=two"])
    assert runs() == 3
    found = fakes(*every[:2], ("wrong", good(tmp_path), 60), flags=["--again=failed"])
    assert runs() == 4 and "error" in first["wrong"] and found["wrong"]["seconds"] == 0.5
    with pytest.raises(UserError, match=r"^--again: tow: no such result; did you mean two\?"):
        fakes(*every, flags=["--again=tow"])


@pytest.mark.slow
def test_nothing_is_started_that_does_not_fit_into_the_budget(fakes, tmp_path, capsys):
    every = (("long", good(tmp_path), 500), ("short", good(tmp_path), 5))
    assert fakes(*every, flags=["--budget=0"]) == {} and not (tmp_path / "log").exists()
    assert "left: long (500 s); short (5 s). The same command goes on." in capsys.readouterr().out
    assert set(fakes(*every, flags=["--budget=100"])) == {"short"}
    found = fakes(("stuck", ("hang", f"--pid={tmp_path / 'pid'}"), 2), flags=["--budget=4"])
    assert "the end of the budget" in found["stuck"]["skipped"]
    assert fakes(("stuck", good(tmp_path), 2))["stuck"]["seconds"] == 0.5, "it is tried again"


def test_a_stage_that_ends_the_process_does_not_end_those_after_it(fakes, tmp_path):
    found = fakes(("stages", ("stages", f"--died={tmp_path / 'died'}"), 60, (), ("a", "b", "c", "d")))
    assert [name for name, one in found.items() if "seconds" in one] == ["a", "c", "d"]
    assert found["b"]["error"] == "ValueError: the second stage" and "--stages=c,d" in found["c"]["command"]


def test_full_size_measures_what_matters_most_first(gpu):
    names = [name for one in gpu.measurements("full", "folder") for name in one.results]
    assert names[:6] == ["unet/xla", "unet/cudnn", "unet/diffusers", "wan/xla", "wan/cudnn", "wan/diffusers"]
    assert names[6:12] == ["rollout", "decode", "score videoscore", "errors", "update", "step"]
    assert all("compiled" in name for name in names[12:]) and len(set(names)) == len(names)
    assert all((BENCHMARKS / one.command[0]).is_file() for one in gpu.measurements("full", "folder"))


@pytest.mark.slow
def test_full_size_measures_valid_jobs(gpu):
    from vpo_jax.planning.job import make_job
    from vpo_jax.runtime import cli
    from vpo_jax.training.check import check

    jobs = {}
    for one in gpu.measurements("full", "folder"):
        if one.name in ("stages", "step"):
            words, overrides = cli.split_overrides(one.command)
            config = cli.load_config(next(word.partition("=")[2] for word in words if word.startswith("--config=")))
            config.data.prompts, config.model.path, config.reward.scorers = "shapes:train", "modelscope", "videoscore"
            cli.override(config, overrides)
            check(config)
            jobs[one.name] = config
    stages = gpu.measurements("full", "folder")[6].stages
    assert set(stages) <= {program.name for program in make_job(jobs["stages"]).programs}
    step = dict(cli.flatten_config(jobs["step"]))
    differs = {key for key, value in cli.flatten_config(jobs["stages"]) if step[key] != value}
    assert differs == {"train.steps"}, "so that the step finds the stages' programs compiled"


def test_the_floor_of_a_step_is_told_by_phase(monkeypatch):
    import full_size

    seconds = {"rollout": [4.0, 6.0], "score": [1.0, 1.0], "select": [0.0, 0.0], "update": [2.0, 3.0]}
    timed = {"all": seconds, "median": {name: sum(found) / 2 for name, found in seconds.items()}, "videos": 8}
    monkeypatch.setattr(full_size.throughput, "measure", lambda config, repeats: timed | {"first": {"rollout": 90.0}})
    floors = {"encode": 0.5, "rollout": 2.0, "decode": 0.2, "score videoscore": 0.3, "errors": 1.0, "update": 4.0}
    stages = tuple(SimpleNamespace(name=name, floor=floor, flops=floor * 1e12) for name, floor in floors.items())
    monkeypatch.setattr(full_size, "plan_of", lambda config: SimpleNamespace(stages=stages, peak=5.0))
    config = full_size.cli.load_config("configs/vpo.py:tiny")
    config.train.updates_per_step = 4
    found = full_size.steps(config)
    assert found["all_seconds"] == [13.0, 19.0] and found["seconds"] == 16.0 and found["first_step_seconds"] == 90.0
    assert found["phases"]["rollout"] == {"seconds": 5.0, "floor": 2.5, "share_of_floor": 0.5}
    assert found["phases"]["score"]["share_of_floor"] == 0.5 and found["phases"]["update"]["share_of_floor"] == 0.5
    assert (found["tflop"], found["share_of_floor"]) == (8.0, 0.5)


@pytest.mark.slow
def test_small_sizes_run_from_end_to_end(monkeypatch, tmp_path, capsys):
    import gpu

    flags = ["--size=small", "--budget=900", f"--results={tmp_path / 'results'}", f"--folder={tmp_path / 'folder'}"]
    gpu.main(flags)
    (file,) = (tmp_path / "results").iterdir()
    found = json.loads(file.read_text())
    results = {one["name"]: one for one in found["results"]}
    assert (file.name, found["size"]) == ("cpu-small.json", "small")
    assert not [one for one in results.values() if "error" in one]
    for name in ("unet/xla", "wan/xla", "decode", "score shapes", "step"):
        assert results[name]["seconds"] > 0 and results[name]["all_seconds"], name
    assert results["step"]["phases"]["update"]["seconds"] > 0
    peers = [results[name] for name in ("unet/diffusers", "wan/diffusers")]
    assert all(peer.get("seconds", 0) > 0 or peer["skipped"].startswith("no ") for peer in peers)
    assert "skipped" in results["wan/cudnn"]
    before = os.stat(file).st_size
    gpu.main([*flags, "--budget=0"])
    assert os.stat(file).st_size == before and "left" not in capsys.readouterr().out


def made_up(size="full"):
    versions = {"commit": "abc", "jax": "0.11.2", "torch": None}
    call = {"tflop": 38.6, "peak_bytes": 8.5e9, "versions": versions}
    return {
        "device": "NVIDIA H100 80GB HBM3",
        "size": size,
        "results": [
            {"name": "unet/xla", "seconds": 0.1366, "share_of_peak": 0.2857, **call},
            {"name": "unet/cudnn", "error": "RuntimeError: no kernel", "versions": versions},
            {"name": "unet/diffusers", "seconds": 0.194, "share_of_peak": 0.2012, **call, "peak_bytes": 5.7e9},
            {"name": "wan/diffusers", "skipped": "diffusers is not there", "versions": versions},
            {"name": "decode", "seconds": 0.5949, "tflop": 155.4, "versions": versions},
            {
                "name": "step",
                "seconds": 1234.5,
                "first_step_seconds": 200.4,
                "videos_a_step": 8,
                "phases": {
                    "rollout": {"seconds": 6.5, "floor": 2.015, "share_of_floor": 0.31},
                    "select": {"seconds": 0.0125},
                },
                "versions": versions | {"commit": "def"},
            },
        ],
    }


PAGE = """## NVIDIA H100 80GB HBM3

|  | s | TFLOP | share of peak | peak memory, GB | speed beside diffusers |
| --- | --- | --- | --- | --- | --- |
| unet/xla | 0.137 | 38.6 | 29% | 8.5 | 1.42 times |
| unet/diffusers | 0.194 | 38.6 | 20% | 5.7 |  |
| decode | 0.595 | 155 |  |  |  |
| step | 1234 |  |  |  |  |

A step has 8 videos. The first takes 200 s.

| phase of the step | s | floor, s | share of the floor |
| --- | --- | --- | --- |
| rollout | 6.5 | 2.02 | 31% |
| select | 0.0125 |  |  |

Not measured:

- unet/cudnn: RuntimeError: no kernel
- wan/diffusers: diffusers is not there

Measured with commit abc, jax 0.11.2: unet/xla, unet/diffusers, decode.
Measured with commit def, jax 0.11.2: step.
"""


def test_the_page_shows_the_numbers_of_the_results(tmp_path, capsys):
    import report

    flags = [f"--results={tmp_path}", f"--output={tmp_path / 'speed.md'}"]
    (tmp_path / "cpu-small.json").write_text(json.dumps(made_up("small")))
    report.main(flags)
    assert "nothing is written" in capsys.readouterr().out and not (tmp_path / "speed.md").exists()
    (tmp_path / "h100.json").write_text(json.dumps(made_up()))
    report.main(flags)
    page = (tmp_path / "speed.md").read_text()
    assert page.startswith("# Measured speed\n") and page.partition("## ")[2] == PAGE.partition("## ")[2]
    assert "one GPU" in page and "torch.compile" not in page
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(UserError, match=r"^--results: .*x\.json is no file of benchmarks/gpu\.py or"):
        report.main(flags)


def test_a_call_of_wan_computes_no_keys_and_values_of_its_text(tmp_path):
    import denoiser

    output = tmp_path / "found.json"
    small = ["--model=wan", "--small", "--videos=1", "--frames=5", "--size=32", "--repeats=1", f"--output={output}"]
    denoiser.main(small)
    found = json.loads(output.read_text())
    tokens, width, hidden, rows, layers = 2 * 2 * 2, 32, 64, 2, 2
    products = 6 * width**2 + 2 * tokens * width + 2 * 512 * width + 2 * width * hidden  # of a token in a layer
    ends = 2 * 64 * width * tokens + 256 * width + width**2 + 6 * width**2  # patches in and out, the timestep
    assert round(found["tflop"] * 1e12) == 2 * rows * (layers * tokens * products + ends)
    assert found["seconds"] > 0 and found["apart_from_xla"] == 0.0
    for flag, said in (
        ("--frames=6", r"^--frames: 6 is not 4 k \+ 1"),
        ("--size=40", r"^--size: 40x40 .* multiple of 16"),
        ("--size=big", r"^--size: big is no size"),
        ("--peer_alone", r"^--peer_alone: there is no --peer"),
    ):
        with pytest.raises(UserError, match=said):
            denoiser.main([*small, flag])


def test_a_stacks_axis_counts_no_inputs_of_random_weights():
    import jax
    import numpy as np
    from measuring import random_weights

    shape = jax.ShapeDtypeStruct((30, 64, 32), np.float32)
    made = random_weights({"blocks.*": {"kernel": shape}, "conv": {"kernel": shape}})
    assert abs(np.std(made["blocks.*"]["kernel"]) * 64**0.5 - 1) < 0.02
    assert abs(np.std(made["conv"]["kernel"]) * (30 * 64) ** 0.5 - 1) < 0.02
