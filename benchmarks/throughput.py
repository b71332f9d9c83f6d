"""Seconds of a rollout, of its scores and of an update, and videos a second, of any config on this machine.

    python benchmarks/throughput.py --config=configs/vpo.py [--config.a.b=c] [--repeats=5] [--output=FILE.json]

Prints the medians and the seconds of the first call, which compiles (or reads the compilation cache).
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax

from vpo_jax.data.prompts import load_prompts
from vpo_jax.pipeline import load_pipeline
from vpo_jax.rewards.loading import load_rewards
from vpo_jax.runtime import cli
from vpo_jax.runtime.backend import keep_compiled_programs, keep_freed_memory, share_cores
from vpo_jax.runtime.mesh import make_meshes
from vpo_jax.training.check import check, check_inputs, cpu_devices
from vpo_jax.training.setup import make_setup


def main(argv: Sequence[str]) -> None:
    """Measures what the flags name."""
    words, overrides = cli.split_overrides(argv)
    parser = cli.Parser("benchmarks.throughput", (__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", default="configs/vpo.py")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", default="", help="JSON file to write beside what is printed")
    flags = parser.parse(words)
    config = cli.load_config(flags.config)
    cli.override(config, overrides)
    check(config)
    keep_compiled_programs()
    keep_freed_memory()
    share_cores(cpu_devices(config))
    result = measure(config, flags.repeats)
    print(json.dumps(result, indent=2))
    cli.write_output(flags.output, result)


def measure(config: Any, repeats: int) -> dict[str, Any]:
    """Seconds of each stage: {"first": {...}, "median": {...}, "videos_per_second": ..., ...}."""
    meshes = make_meshes(config.mesh)
    pipeline = load_pipeline(config.model.path)
    rewards = load_rewards(config.reward.scorers, training=True, settings=config.reward)
    check_inputs(config, pipeline, rewards, (), meshes)
    prompts = load_prompts(config.data.prompts)
    seconds: dict[str, list[float]] = {"rollout": [], "score": [], "select": [], "update": []}

    def timed(stage: str, call: Callable[..., Any], *arguments: Any) -> Any:
        began = time.perf_counter()
        value = call(*arguments)
        jax.block_until_ready(jax.tree.leaves(value))
        seconds[stage].append(time.perf_counter() - began)
        return value

    with jax.set_mesh(meshes.update):
        setup = make_setup(config, pipeline, rewards, meshes, prompts)
        state, algorithm = setup.fresh_state(), setup.algorithm
        for step in range(repeats + 1):
            candidates = timed("rollout", setup.rollouts.next, state, step)
            scores = timed("score", setup.score, candidates)
            state, _ = timed("select", algorithm.select, state, candidates.rollout, scores)
            state, _ = timed("update", algorithm.update, state, setup.frozen, step)
            state = state._replace(step=state.step + 1)
    videos = setup.rollouts.videos
    median = {stage: statistics.median(values[1:]) for stage, values in seconds.items()}
    device = jax.devices()[0]
    return {
        "device": f"{len(jax.devices())} x {device.device_kind}",
        "jax": jax.__version__,
        "videos": videos,
        "prompts": config.train.prompts_per_step,
        "all": {stage: values[1:] for stage, values in seconds.items()},
        "first": {stage: values[0] for stage, values in seconds.items()},
        "median": median,
        "videos_per_second": videos / (median["rollout"] + median["score"]),
        "step": sum(median.values()) + (config.train.updates_per_step - 1) * median["update"],
    }


if __name__ == "__main__":
    cli.run(main)
