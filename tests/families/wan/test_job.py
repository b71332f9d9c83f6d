"""The whole job on a small Wan model: trained, killed and resumed, exported, and loaded by diffusers as printed."""

import signal

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import vpo_jax
from tests.families.wan import tiny
from tests.running import lines, start, wait_for_step, without_time
from vpo_jax import convert, main
from vpo_jax.evaluation.compare import compare
from vpo_jax.runtime import cli

PROMPTS = ["a small red circle moving left on a gray background"]
HEIGHT, WIDTH, FRAMES = 16, 32, 5


def job(folder, *more):
    return [
        "--config=configs/vpo.py:tiny", f"--config.model.path={folder}", f"--config.rollout.num_frames={FRAMES}",
        f"--config.rollout.height={HEIGHT}", f"--config.rollout.width={WIDTH}", "--config.preference.pairs=group",
        "--config.rollout.candidates=3", "--config.preference.margin=0.0", "--config.preference.motion_tolerance=100.0",
        "--config.lora.rank=2", "--config.lora.alpha=6.0", "--config.optimizer.learning_rate=1e-2",
        "--config.rollout.shift=5.0",
        "--config.held_out.scorers=", "--config.eval.every=0", "--config.eval.prompts=2", "--config.checkpoint.every=1",
        *more,
    ]  # fmt: skip


def weights(workdir):
    return [
        (workdir / "export" / name / "diffusion_pytorch_model.safetensors").read_bytes()
        for name in ("transformer", "transformer_2")
    ]


def run(folder, workdir, *more):
    config = cli.load_config("configs/vpo.py:tiny")
    cli.override(config, cli.split_overrides(job(folder, *more))[1])
    return main.run(config, workdir)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("wan") / "model"
    tiny.pipeline("a14b").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("job") / "run"
    run(folder, workdir)
    return workdir


@pytest.mark.slow
def test_policy_and_reference_agree_to_the_bit_at_first_in_bfloat16(folder, tmp_path, monkeypatch):
    compared = []

    def watch(base, tuned, *more, **named):
        compared.extend((base, tuned))
        return compare(base, tuned, *more, **named)

    monkeypatch.setattr(main, "compare", watch)
    run(folder, tmp_path / "run", "--config.model.dtype=bfloat16", "--config.train.steps=1",
        f"--config.data.text_cache={tmp_path / 'text'}")  # fmt: skip
    (line,) = lines(tmp_path / "run")
    assert line["loss/logit"] == 0.0 and line["loss/winner_error_change"] == 0.0 == line["loss/loser_error_change"]
    assert line["loss/gradient_norm"] > 0.0 and line["loss/applied"] == 1.0
    assert [model.family.transformer.dtype for model in compared] == [jnp.bfloat16] * 2


@pytest.mark.slow
def test_killed_and_resumed_it_ends_where_an_uninterrupted_run_ends(folder, finished, tmp_path):
    process = start(job(folder), tmp_path / "run")
    wait_for_step(process, tmp_path / "run", 1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(folder, tmp_path / "run")
    assert [without_time(line) for line in lines(tmp_path / "run")] == [without_time(line) for line in lines(finished)]
    assert weights(tmp_path / "run") == weights(finished)


def videos_of(pipe):
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "num_frames": FRAMES, "height": HEIGHT, "width": WIDTH}
    latents = np.random.default_rng(1).normal(size=(1, 4, 2, HEIGHT // 8, WIDTH // 8)).astype(np.float32)
    pipe.set_progress_bar_config(disable=True)
    with tiny.torch.no_grad():
        found = pipe(PROMPTS, latents=tiny.torch.from_numpy(latents), output_type="np", **settings).frames
    return np.round(np.asarray(found) * 255).astype(int)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["diffusers", "original"])
def test_the_printed_lines_load_adapters_that_make_the_exports_video(finished, folder, tmp_path, form, capsys):
    convert.main([f"--workdir={finished}", f"--output={tmp_path / 'lora'}", "--lora_only", f"--lora_format={form}"])
    shown = capsys.readouterr().out
    scope = {}
    exec("\n".join(line.strip() for line in shown.splitlines() if line.startswith("    ")), scope)
    adapted = videos_of(scope["pipe"])
    merged = videos_of(tiny.WanPipeline.from_pretrained(finished / "export"))
    plain = videos_of(tiny.WanPipeline.from_pretrained(folder))
    assert np.abs(adapted - merged).max() <= 1
    assert np.abs(plain - merged).max() > 1, "training changed something"


@pytest.mark.slow
def test_the_export_makes_the_same_video_here_and_there(finished):
    latents = np.random.default_rng(1).normal(size=(1, 4, 2, HEIGHT // 8, WIDTH // 8)).astype(np.float32)
    ours = vpo_jax.load_pipeline(finished / "export")(
        PROMPTS, FRAMES, HEIGHT, WIDTH, 2, 3.0, latents=latents.transpose(0, 2, 3, 4, 1)
    )
    theirs = videos_of(tiny.WanPipeline.from_pretrained(finished / "export"))
    difference = np.abs(ours.astype(int) - theirs)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.005
