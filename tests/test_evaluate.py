"""The command `python -m vpo_jax.evaluate`; models and scorers are stand-ins, files and exit codes are real."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from vpo_jax import evaluate
from vpo_jax.runtime import cli
from vpo_jax.runtime.errors import UserError

SAMPLER = "DPMSolverMultistepScheduler"


class StandInPipeline:
    defaults = {"num_frames": 4, "guidance_scale": 2.0, "num_inference_steps": 3}  # noqa: RUF012

    def __init__(self, path: str) -> None:
        if "missing" in path:
            raise UserError(f"{path}: there is no such folder")
        self.gain = 2 if "tuned" in path else 1
        self.arguments: list[dict[str, Any]] = []

    params: Any = {}  # noqa: RUF012

    def on_mesh(self, mesh: Any) -> "StandInPipeline":
        return self

    def latent_shape(self, num_frames: int, height: int | None, width: int | None) -> tuple[int, ...]:
        return (num_frames, 4, 4, 3)

    def __call__(self, prompts: list[str], latents: Any, **arguments: Any) -> np.ndarray:
        self.arguments.append(arguments)
        return np.clip(100 + 20 * self.gain + 20 * np.asarray(latents), 0, 255).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Brightness:
    name: str
    trains: bool = True
    jittable: bool = False
    dimensions: tuple[str, ...] = ("brightness",)
    params: Any = None

    def frame_indices(self, num_frames: int) -> tuple[int, ...]:
        return tuple(range(num_frames))

    def prepare(self, prompts: list[str]) -> np.ndarray:
        return np.zeros(len(prompts))

    def score(self, params: Any, videos: np.ndarray, prepared: np.ndarray) -> np.ndarray:
        return videos.mean((1, 2, 3, 4))[:, None]


@pytest.fixture
def loaded(monkeypatch):
    pipelines: list[StandInPipeline] = []

    def load(path, place):
        assert place == "disk", "else both models lie in memory"
        pipelines.append(StandInPipeline(path))
        return pipelines[-1]

    monkeypatch.setattr(evaluate, "load_pipeline", load)
    monkeypatch.setattr(
        evaluate, "load_rewards", lambda names, **_: tuple(Brightness(n, n != "judge") for n in names.split(",") if n)
    )
    return pipelines


def run(*argv: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.run(evaluate.main, argv)
    return int(caught.value.code)


def test_the_command_leaves_a_table_a_page_numbers_and_videos(loaded, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("<b>fox</b> 🦊\na 'quoted' \"thing\"\n", encoding="utf-8")
    out = tmp_path / "out"
    assert run("--base=base", "--tuned=tuned", f"--prompts={prompts}", f"--output={out}", "--keep=1") == 0
    document = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert document["prompts"] == ["<b>fox</b> 🦊", "a 'quoted' \"thing\""]
    assert next(row for row in document["rows"] if row["dimension"] == "brightness")["win_rate"] == 1.0
    assert "&lt;b&gt;fox&lt;/b&gt; 🦊" in (out / "report.html").read_text(encoding="utf-8")
    names = ["base_0000.mp4", "base_0000.webp", "side_by_side.webp", "tuned_0000.mp4", "tuned_0000.webp"]
    assert sorted(path.name for path in (out / "videos").iterdir()) == names
    printed = capsys.readouterr().out
    assert "brightness" in printed and "100 % (100 to 100)" in printed and "report.html" in printed


def test_both_models_are_sampled_as_the_base_was_made_for(loaded, tmp_path):
    assert run("--base=base", "--tuned=tuned", f"--output={tmp_path}", "--limit=2", "--num_inference_steps=5") == 0
    expected = {"num_frames": 4, "guidance_scale": 2.0, "num_inference_steps": 5}
    assert [p.arguments for p in loaded] == [[expected], [expected]]


def test_a_run_beside_the_export_says_which_scorer_trained_it(loaded, tmp_path):
    config = {"reward": {"scorers": "a,dir/b"}, "held_out": {"scorers": "c, judge"}, "eval": {"every": 5}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    rewards = [Brightness(name, name != "judge") for name in ("a", "b", "c", "d", "judge")]
    assert evaluate.roles_of(str(tmp_path / "export"), rewards) == {
        "a": "trained",
        "b": "trained",
        "c": "used for selection",
        "d": "held out",
        "judge": "held out",
    }
    assert evaluate.roles_of(str(tmp_path / "elsewhere" / "export"), rewards) == {"judge": "held out"}


def test_roles_hold_for_scorers_of_the_config_and_of_ones_own_under_any_of_their_names(tmp_path):
    config = {
        "reward": {"scorers": "videoscore,mine:sharp,mine:thing", "videoscore": {"path": "/models/VideoScore-v1.1"}},
        "held_out": {"scorers": "classical"},
        "eval": {"every": 5},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    rewards = [Brightness(name, name != "classical") for name in ("VideoScore-v1.1", "sharp", "Thing", "classical")]
    roles = evaluate.roles_of(str(tmp_path / "export"), rewards, "dir/VideoScore-v1.1,mine:sharp,mine:thing,classical")
    assert roles == dict.fromkeys(("VideoScore-v1.1", "sharp", "Thing"), "trained") | {"classical": "held out"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tuned=t", "--output=OUT"], "--base"),
        (["--base=missing", "--tuned=t", "--output=OUT"], "missing: there is no such folder"),
        (["--base=b", "--tuned=t", "--output=OUT", "--prompts=none.txt"], "none.txt"),
        (["--base=b", "--tuned=t", "--output=OUT", "--samples=0"], "--samples: 0"),
        (["--base=b", "--tuned=t", "--output=OUT", "--seed=-1"], "--seed: -1"),
        (["--base=b", "--tuned=t", "--output=OUT", "--scorers=,"], "--scorers"),
        (["--base=b", "--tuned=t", "--output=OUT", "--scorer=a"], "did you mean --scorers"),
        (["--base=b", "--tuned=t", "--output=FILE"], "--output"),
    ],
)
def test_wrong_input_is_one_line_exit_code_2_and_nothing_written(loaded, tmp_path, capsys, argv, message):
    (tmp_path / "file").write_text("kept")
    argv = [word.replace("OUT", str(tmp_path / "out")).replace("FILE", str(tmp_path / "file")) for word in argv]
    assert run(*argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.slow
def test_a_real_model_against_itself_is_level_in_every_dimension(
    model_folder, scorer_folder, strange_prompts, tmp_path
):
    argv = [f"--base={model_folder}", f"--tuned={model_folder}", f"--scorers={scorer_folder}", "--batch=4"]
    argv += [f"--prompts={strange_prompts}", f"--output={tmp_path}", "--num_inference_steps=2", "--sampler=" + SAMPLER]
    assert run(*argv) == 0
    document = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    assert len(document["rows"]) == 6 and all(row["win_rate"] == 0.5 for row in document["rows"])
    assert "<script>" not in (tmp_path / "report.html").read_text(encoding="utf-8")
