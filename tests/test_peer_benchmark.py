"""benchmarks/peer.py: both sides do the same work, what does not agree is refused, and the page shows the times."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from vpo_jax.runtime.errors import UserError

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def beside_each_other(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def cases(tmp_path):
    """Ours and a peer that agree, as far as files go."""
    from peer_sides import Case, write_arrays

    rng = np.random.default_rng(0)
    update = {"loss": 0.8, "norm": 3.0, "gradient/a.lora_A": rng.normal(size=9), "gradient/b.lora_B": np.zeros(3)}
    found = [Case(side, 1, "group", 3, True, str(tmp_path)) for side in ("ours", "eager")]
    for case in found:
        write_arrays(tmp_path / f"{case.name}-rollout.npz", {"latents": np.tile(np.arange(6.0), (2, 1))})
        write_arrays(tmp_path / f"{case.name}-update.npz", update)
    return found


def test_equal_arrays_agree(cases):
    import peer

    assert peer.difference(*cases) == dict.fromkeys(peer.LIMITS, 0.0)


@pytest.mark.parametrize(
    ("stage", "key", "change", "said"),
    [
        ("rollout", "latents", 0.02, r"latents of eager-1 is 4\.0e-03"),
        ("rollout", "latents", np.nan, "latents of eager-1 is nan"),
        ("update", "loss", 2e-4, "loss"),
        ("update", "norm", 0.01, "norm"),
        ("update", "gradient/a.lora_A", 0.02, "gradient"),
        ("update", "gradient/b.lora_B", 1e-9, "gradient"),
    ],
)
def test_what_does_not_agree_is_refused(cases, tmp_path, stage, key, change, said):
    import peer
    from peer_sides import write_arrays

    file = tmp_path / f"{cases[1].name}-{stage}.npz"
    arrays = dict(np.load(file))
    arrays[key] = arrays[key] + change
    write_arrays(file, arrays)
    with pytest.raises(UserError, match=rf"^--peer: {said}.*do not do the same work"):
        peer.difference(*cases)


def test_an_adapter_that_is_missing_is_refused(cases, tmp_path):
    import peer
    from peer_sides import write_arrays

    file = tmp_path / f"{cases[1].name}-update.npz"
    write_arrays(file, {key: x for key, x in np.load(file).items() if "lora_B" not in key})
    with pytest.raises(UserError, match="other arrays"):
        peer.difference(*cases)


def test_wrong_flags_are_named(monkeypatch):
    import peer

    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3})
    for flags, said in (
        (["--peer=eagre"], r"^--peer: eagre is none; did you mean eager\?"),
        (["--cores=1,3"], "^--cores: 3 is not possible, this process may use 2"),
        (["--cores=all"], "^--cores: all are no numbers"),
        (["--repeats=0"], "^--repeats: 0 is too few"),
    ):
        with pytest.raises(UserError, match=said):
            peer.main(flags)


def row(stage, cores, side, seconds):
    return {"stage": stage, "side": side, "cores": cores, "seconds": seconds, "least": 0.9 * seconds,
            "all_seconds": [seconds], "first_seconds": 60.0}  # fmt: skip


ROWS = [
    row(stage, cores, side, seconds / cores**0.5)
    for cores in (1, 4)
    for side, seconds in (("ours", 2.0), ("eager", 5.0))
    for stage in ("rollout", "update")
]


def test_tables_show_ratios_and_what_cores_bring():
    import peer

    first = [[*column.cells] for column in peer.times(ROWS).columns]
    assert first[0] == ["rollout", "update"] * 2 and first[1] == ["1", "1", "4", "4"]
    assert first[2] == ["2.000", "2.000", "1.000", "1.000"] and first[4] == ["2.50"] * 4
    second = [[*column.cells] for column in peer.gains(ROWS).columns]
    assert second[3] == ["1.00", "1.00", "2.00", "2.00"] * 2


PAGE = """## A processor

The embedded job in float32 beside the same work in PyTorch with diffusers: 64 videos a rollout, an
update of 64 videos by 3 forward passes. The sides took turns on the same cores, and their latents, losses and
gradients agree. `compiled` is torch.compile.

|  | cores | side | s | least, s | times ours | speed-up by cores |
| --- | --- | --- | --- | --- | --- | --- |
| rollout | 1 | ours | 2 | 1.8 |  |  |
| rollout | 1 | eager | 5 | 4.5 | 2.50 |  |
| rollout | 4 | ours | 1 | 0.9 |  | 2.00 |
| rollout | 4 | eager | 2.5 | 2.25 | 2.50 | 2.00 |
"""


def test_the_page_shows_the_times(tmp_path):
    import report

    found = {"device": "A processor", "size": "full", "update": "group", "passes": 3, "prompts": 8, "candidates": 8,
             "apart": {}, "peer": ROWS, "command": "peer.py", "versions": {"jax": "0.11.2", "cuda": None}}  # fmt: skip
    (tmp_path / "peer.json").write_text(json.dumps(found))
    report.main([f"--results={tmp_path}", f"--output={tmp_path / 'speed.md'}"])
    page = (tmp_path / "speed.md").read_text()
    assert PAGE in page and page.endswith("\nMeasured with jax 0.11.2.\n") and "one GPU" not in page


@pytest.mark.slow
@pytest.mark.parametrize(("update", "passes"), [("group", 3), pytest.param("pairs", 2, marks=pytest.mark.long)])
def test_both_sides_do_the_same_work(tmp_path, update, passes):
    import peer

    pytest.importorskip("diffusers")
    output = tmp_path / "peer.json"
    flags = ["--small", "--peer=eager", "--cores=1", "--repeats=1", f"--update={update}", f"--passes={passes}"]
    peer.main([*flags, f"--output={output}"])
    found = json.loads(output.read_text())
    assert (found["size"], found["update"], found["passes"], found["prompts"]) == ("small", update, passes, 2)
    assert [(one["side"], one["stage"]) for one in found["peer"]] == [
        (side, stage) for stage in ("rollout", "update") for side in ("ours", "eager")
    ]
    assert all(one["seconds"] > 0 and len(one["all_seconds"]) == 1 for one in found["peer"])
    assert all(0.0 < found["apart"]["eager-1"][name] < limit for name, limit in peer.LIMITS.items())


def test_a_worker_answers_on_its_cores_and_tells_its_last_words(tmp_path):
    from children import Worker

    core = max(os.sched_getaffinity(0))
    fake = str(Path(__file__).resolve().parent / "fake_worker.py")
    allowed = os.sched_getaffinity(0)
    with Worker([fake], [core], tmp_path / "log") as worker:
        assert os.sched_getaffinity(0) == allowed
        assert worker.ask({"number": 3}) == {"twice": 6, "cores": [core]}
        assert worker.ask({"number": 4})["twice"] == 8
        with pytest.raises(RuntimeError, match=r"^ValueError: no number"):
            worker.ask({"number": None})
    assert "printed" in (tmp_path / "log").read_text()
