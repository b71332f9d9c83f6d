"""What a run says at its start and at its end."""

import dataclasses
from pathlib import Path

import jax

from vpo_jax.runtime.mesh import Meshes, make_mesh
from vpo_jax.training.policy import abstract_policy
from vpo_jax.training.summary import describe_end, describe_start, short


def said_at_the_start(config, pipeline, rewards, scorers=(), prompts=("a ball", "b"), held_out=("a red ball",)):
    meshes = Meshes.of(make_mesh(1, devices=jax.devices()[:1]))
    policy = abstract_policy(config, pipeline)
    said = describe_start(
        config, pipeline, policy, rewards, scorers, meshes, prompts, held_out, Path("runs/x/report.html")
    )
    return {line[:16].rstrip(): line[18:] for line in said.splitlines()}


def test_the_start_names_the_model_what_trains_the_prompts_the_scorers_and_the_report(configure, pipeline, toy_reward):
    config = configure(reward__weights="dynamic_degree=3")
    found = said_at_the_start(config, pipeline, [toy_reward()], [toy_reward(name="judge")])
    assert "denoiser" in found["model"] and "4 frames of 4x4, float32" in found["model"]
    assert found["trains"].startswith("LoRA of rank 2, ") and "dpo (best_worst)" in found["trains"]
    assert found["training prompts"] == "2, the first: 'a ball'"  # of 6 tokens, as many as the toy family reads
    assert (
        found["held-out prompts"] == "1, the first: 'a red ball'; 1 have more than 6 tokens and lose their last words"
    )
    assert found["training scorers"] == "toy/visual_quality 0.25, toy/dynamic_degree 0.75"
    assert found["held-out scorers"] == "judge" and found["report"] == "runs/x/report.html"
    assert found["steps"] == "3, each 8 prompts x 4 candidates, 2 updates"


def test_a_long_prompt_is_shown_in_part_and_a_missing_held_out_scorer_is_said(configure, pipeline, toy_reward):
    found = said_at_the_start(configure(lora__rank=0), pipeline, [toy_reward()], prompts=["x" * 200])
    assert found["training prompts"].startswith("1, the first: 'xxx") and "..." in found["training prompts"]
    assert found["training prompts"].endswith("...'; 1 have more than 6 tokens and lose their last words")
    assert found["trains"].startswith("every weight, ") and "held_out.scorers" in found["held-out scorers"]


def test_the_end_says_where_the_time_went_and_whether_the_samples_got_better():
    lines = [
        {"reward/total": 0.5 + 0.01 * i, "time/step": 2.0, "time/rollout": 1.0, "time/score": 0.25, "time/update": 0.5}
        | {"pair/kept": 4.0}
        for i in range(8)
    ]
    reward, time = describe_end(lines, videos=32).splitlines()
    assert reward.startswith("the samples' own reward rose while training")
    assert time == (
        "16 s in 8 steps: rollout 8 s, score 2 s, update 4 s, the rest 2 s; 57,600 videos and 7,200 pairs an hour"
    )


def test_the_end_of_a_run_of_two_steps_has_no_trend():
    assert describe_end([{"reward/total": 0.5, "time/step": 1.0}] * 2, videos=1).count("\n") == 0
    assert describe_end([], videos=1) == ""


def test_numbers_of_parameters_are_short():
    assert [short(n) for n in (7, 1234, 2_040_000, 1_411_000_000)] == ["7", "1.23k", "2.04M", "1.41B"]


def test_the_mesh_of_several_devices_is_said(configure, pipeline, toy_reward):
    class Devices:
        flat = [dataclasses.make_dataclass("Device", ["device_kind"])("chip")] * 4

    class Mesh:
        size, shape, devices = 4, {"data": 2, "fsdp": 2, "context": 1, "tensor": 1}, Devices

    class Score(Mesh):
        shape = {"data": 1, "fsdp": 4, "context": 1, "tensor": 1}  # noqa: RUF012

    config = configure()
    policy = abstract_policy(config, pipeline)
    meshes = Meshes(Mesh, Mesh, Score)
    said = describe_start(config, pipeline, policy, [toy_reward()], (), meshes, ["a"], ["b"], Path("r"))
    assert (
        "devices           4 x chip, data x fsdp x context x tensor: update 2x2x1x1, rollout 2x2x1x1, score 1x4x1x1"
        in said
    )
