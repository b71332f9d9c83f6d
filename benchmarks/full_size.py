"""The main job with random weights of the published sizes: seconds of a step's parts, beside their floor, and memory.

    python benchmarks/full_size.py --folder=DIR --config.train.steps=4 [--config=configs/vpo.py:modelscope]
        [--size=small] [--only_steps] [--config.a.b=c] [--output=FILE.json]

Makes DIR/full/base (ModelScope's networks, 3.7 GB in float16) and DIR/full/videoscore (8.3 billion parameters, 16.5 GB
in bfloat16) where they are not there yet, with the shipped tokenizers, and runs the job in DIR/full/run as
`vpo_jax.main` does: load, train, compare, export. The first step compiles and does not count. It learns nothing.
`--only_steps` times the steps alone, each phase by itself, without a run around them.
"""

import json
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import throughput
from measuring import chip_of, peak_bytes, write_random
from safetensors import SafetensorError

from vpo_jax.checkpoints import safetensors_io as io
from vpo_jax.families.text_to_video_sd.layout import COMPONENTS, param_shapes
from vpo_jax.families.text_to_video_sd.published import MODELSCOPE
from vpo_jax.main import run
from vpo_jax.models.idefics2_config import Idefics2Config
from vpo_jax.pipeline import SHIPPED
from vpo_jax.planning.chips import Topology
from vpo_jax.planning.fit import Plan, abstract_meshes, make_plan, measure_programs
from vpo_jax.planning.job import make_job
from vpo_jax.rewards.protocol import DIMENSIONS
from vpo_jax.rewards.query import QUERY_FILE
from vpo_jax.rewards.videoscore import published
from vpo_jax.rewards.videoscore.folder import CLASSES, videoscore_shapes
from vpo_jax.runtime import cli
from vpo_jax.runtime.backend import keep_compiled_programs, keep_freed_memory
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.metrics import read_metrics
from vpo_jax.runtime.workdir import completed_steps
from vpo_jax.training.check import check

SHIPPED_VIDEOSCORE = cli.ROOT / "vpo_jax" / "shapes" / "assets" / "videoscore"
# Phases of a step by the planner's stages; the algorithm's own are its update.
_PHASES = {"encode": "rollout", "rollout": "rollout", "branch": "rollout", "decode": "score", "score": "score"}
INSTRUCTION = "rate the video in frames " * 50  # as many tokens as VideoScore's, in the shipped tokenizer's words


def main(argv: Sequence[str]) -> None:
    """Runs the job that the flags name, and prints what it took."""
    words, overrides = cli.split_overrides(argv)
    parser = cli.Parser("benchmarks.full_size", (__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="of the weights and the run; 25 GB")
    parser.add_argument("--config", default="configs/vpo.py:modelscope")
    parser.add_argument("--size", choices=("full", "small"), default="full", help="small: the shipped models' sizes")
    parser.add_argument("--only_steps", action="store_true", help="no comparison, no export, nothing saved")
    parser.add_argument("--output", default="", help="JSON file to write beside what is printed")
    flags = parser.parse(words)
    folder = flags.folder / flags.size
    config = cli.load_config(flags.config)
    config.model.path = str(folder / "base")
    config.data.prompts, config.data.held_out = "shapes:train", "shapes:held_out"
    config.reward.scorers, config.reward.videoscore.path = "videoscore", str(folder / "videoscore")
    cli.override(config, overrides)
    check(config)  # before gigabytes are written
    began = time.perf_counter()
    try:
        make_base(folder / "base", flags.size)
        make_videoscore(folder / "videoscore", flags.size)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--folder: {folder} cannot be written ({error}); free space or choose another") from error
    written = time.perf_counter() - began

    keep_freed_memory()
    if flags.only_steps:
        keep_compiled_programs()
        result = {"written_seconds": written, **steps(config)}
        print(json.dumps(result, indent=2))
        cli.write_output(flags.output, result)
        return
    began = time.perf_counter()
    workdir = folder / "run"
    run(config, workdir)
    if completed_steps(workdir, config.to_dict()) != config.train.steps:
        return
    result = {"written_seconds": written, "run_seconds": time.perf_counter() - began, **summary(config, workdir)}
    print(json.dumps(result, indent=2))
    cli.write_output(flags.output, result)


def summary(config: Any, workdir: Path) -> dict[str, Any]:
    """Of a finished run: medians of the steps after the first, the floor of a step, the most memory of a device."""
    devices = jax.devices()
    lines = read_metrics(workdir)
    steady = lines[1:] or lines
    times = {name: statistics.median(line[name] for line in steady) for name in lines[0] if name.startswith("time/")}
    found = {
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "jax": jax.__version__,
        "steps": len(lines),
        "videos_a_step": config.train.prompts_per_step * config.rollout.candidates,
        "first_step_seconds": lines[0]["time/step"],
        **times,
        "peak_bytes": (devices[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }
    if plan := plan_of(config):
        floors = {f"floor/{stage.name}": stage.floor for stage in plan.stages}
        found |= floors | {"planned_peak_bytes": plan.peak, "share_of_floor": sum(floors.values()) / times["time/step"]}
    return found


def steps(config: Any) -> dict[str, Any]:
    """Of the steps after the first: {"seconds": ..., "phases": {"rollout": {"seconds": ..., "floor": ...}}, ...}.

    A floor is the planner's: FLOPs over the device's published peak, or bytes over its bandwidth where this is longer.
    """
    timed = throughput.measure(config, max(1, config.train.steps - 1))
    calls = {name: config.train.updates_per_step if name == "update" else 1 for name in timed["all"]}
    all_seconds = [
        sum(calls[name] * seconds for name, seconds in zip(timed["all"], step, strict=True))
        for step in zip(*timed["all"].values(), strict=True)
    ]
    phases = {name: {"seconds": timed["median"][name] * times} for name, times in calls.items()}
    found = {
        "seconds": statistics.median(all_seconds),
        "all_seconds": all_seconds,
        "first_step_seconds": sum(timed["first"].values()),
        "videos_a_step": timed["videos"],
        "peak_bytes": peak_bytes(),
        "phases": phases,
    }
    if plan := plan_of(config):
        for stage in plan.stages:
            phase = phases[_PHASES.get(stage.name.partition(" ")[0], "update")]
            phase["floor"] = phase.get("floor", 0.0) + stage.floor
        for phase in phases.values():
            if "floor" in phase:
                phase["share_of_floor"] = phase["floor"] / phase["seconds"]
        flops, floor = (sum(getattr(stage, name) for stage in plan.stages) for name in ("flops", "floor"))
        found |= {"tflop": flops / 1e12, "share_of_floor": floor / found["seconds"], "planned_peak_bytes": plan.peak}
    return found


def plan_of(config: Any) -> Plan | None:
    """The job's plan on this machine's devices; None where the planner does not know them."""
    devices = jax.devices()
    chip = chip_of(devices[0])
    if chip is None:
        return None
    job = make_job(config)
    topology = Topology(f"{len(devices)} x {devices[0].device_kind}", chip, len(devices))
    return make_plan(job, measure_programs(job), topology, abstract_meshes(config.mesh, len(devices)))


def make_base(folder: Path, size: str) -> None:
    """A diffusers folder of ModelScope's networks (small: of the shipped model's), all random."""
    if folder.is_dir():
        return
    shipped = Path(SHIPPED["shapes"])
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(shipped, partial, ignore=shutil.ignore_patterns("*.safetensors", "vpo_jax.json", "recipe.json"))
    words = partial / "tokenizer" / "tokenizer_config.json"
    if size == "full":
        words.write_text(json.dumps(io.read_json(words) | {"model_max_length": 77}))
        scheduler = {"_diffusers_version": "0.42.1", **MODELSCOPE["scheduler"]}
        (partial / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    for name, component in COMPONENTS.items():
        config = io.read_json(shipped / name / "config.json")
        if size == "full":
            config = {"_class_name": config.get("_class_name"), **MODELSCOPE[name]}
            (partial / name / "config.json").write_text(json.dumps(config))
        write_random(partial / name, component.stem, param_shapes(name, config), "float16")
    partial.rename(folder)


def make_videoscore(folder: Path, size: str) -> None:
    """A VideoScore's folder, all random, with the shipped miniature's tokenizer."""
    if folder.is_dir():
        return
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(SHIPPED_VIDEOSCORE, partial, ignore=shutil.ignore_patterns("*.safetensors"))
    config = io.read_json(partial / "config.json")
    if size == "full":
        config = {**published.CONFIG, "architectures": list(CLASSES), "image_token_id": config["image_token_id"]}
        (partial / "config.json").write_text(json.dumps(config))
        processor = {"size": {"shortest_edge": 378, "longest_edge": 980}, "do_image_splitting": False}
        (partial / "preprocessor_config.json").write_text(json.dumps(processor))
        (partial / QUERY_FILE).write_text(INSTRUCTION + "{text_prompt}")
    shapes = videoscore_shapes(Idefics2Config.from_dict(config), len(DIMENSIONS))
    write_random(partial, io.TRANSFORMERS_STEM, shapes, "bfloat16")
    partial.rename(folder)


if __name__ == "__main__":
    cli.run(main)
