"""The whole job: load, train online, compare with the initial model, export.

python -m vpo_jax.main --config=configs/vpo.py[:PRESET] [--config.a.b=c] [--workdir=DIR]
"""

import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from vpo_jax.convert import model_card
from vpo_jax.data.prompts import load_prompts, set_apart
from vpo_jax.evaluation.compare import Comparison, Sampling, compare, table, write_json
from vpo_jax.evaluation.videos import write_videos
from vpo_jax.families.protocol import Family
from vpo_jax.families.table import check_target_of_any
from vpo_jax.pipeline import DTYPES, load_pipeline
from vpo_jax.report.card import write_card
from vpo_jax.report.page import write_report
from vpo_jax.rewards.loading import load_rewards
from vpo_jax.runtime import cli
from vpo_jax.runtime.backend import (
    keep_compiled_programs,
    keep_freed_memory,
    share_cores,
    unused_accelerator,
)
from vpo_jax.runtime.buckets import local_folder
from vpo_jax.runtime.fingerprint import contents_of, expand_paths
from vpo_jax.runtime.mesh import make_meshes
from vpo_jax.runtime.metrics import read_metrics
from vpo_jax.runtime.paths import check_output_folder
from vpo_jax.runtime.processes import is_main, join_processes, main_first
from vpo_jax.runtime.signals import Stop, catch_signals
from vpo_jax.runtime.workdir import Workdir, completed_steps, open_workdir
from vpo_jax.training.check import check, check_inputs, check_meshes, cpu_devices
from vpo_jax.training.policy import read_initial
from vpo_jax.training.run import Alarmed, NonFinite
from vpo_jax.training.summary import describe_end, describe_start
from vpo_jax.training.train import train

CONFIG = "configs/vpo.py"


class DoesNotFit(Exception):
    """The devices are too small for the closing comparison; the run is exported and not complete."""


def main(argv: Sequence[str]) -> None:
    """Runs the job that the flags name."""
    words, overrides = cli.split_overrides(argv)
    parser = cli.Parser("vpo_jax.main", (__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", default=CONFIG, help="FILE.py or FILE.py:PRESET (default: %(default)s)")
    parser.add_argument(
        "--workdir", default="", help="where everything goes, a directory or gs://BUCKET/FOLDER (default: runs/NAME)"
    )
    if "--help" in words or "-h" in words:
        given = [word.partition("=")[2] for word in words if word.startswith("--config=")]
        parser.epilog = "fields of the config:\n" + cli.describe_config(cli.load_config(given[-1] if given else CONFIG))
    flags = parser.parse(words)
    config = cli.load_config(flags.config)
    cli.override(config, overrides)
    keep_freed_memory()
    file, _, preset = flags.config.partition(":")
    run(config, flags.workdir or Path("runs", "-".join(filter(None, (Path(file).stem, preset)))))


def run(config: Any, workdir: str | Path, console: Console | None = None) -> Comparison | None:
    """Trains what `config` describes in `workdir`, or goes on there; None when it is complete already.

    Raises UserError for wrong input, before anything is written; Interrupted after saving.
    """
    keep_compiled_programs()
    check(config)
    join_processes()
    # Where scorers have their own devices, programs run beside each other; several processes share the cores already.
    if not (config.reward.devices or jax.distributed.is_initialized()):
        share_cores(cpu_devices(config))
    console = console or Console(quiet=not is_main())
    workdir = local_folder(workdir)
    expand_paths(config)
    contents = contents_of(config.to_dict())
    if completed_steps(workdir, config.to_dict(), contents) == config.train.steps:
        console.print(f"complete: {config.train.steps} steps are done in {workdir}", soft_wrap=True)
        console.print(f"report: {Path(workdir) / 'report.html'}", soft_wrap=True)
        return None
    if config.data.text_cache:
        check_output_folder(config.data.text_cache, "data.text_cache")
    check_output_folder(Path(workdir) / "export", "--workdir", check_target_of_any)
    if is_main() and (idle := unused_accelerator()):
        print(f"warning: {idle}", file=sys.stderr)
    meshes = make_meshes(config.mesh, config.reward.devices)
    check_meshes(config, meshes)
    prompts = load_prompts(config.data.prompts, "data.prompts")
    if config.data.held_out:
        held_out_prompts = load_prompts(config.data.held_out, "data.held_out")
    else:
        prompts, held_out_prompts = set_apart(prompts)
    rewards = load_rewards(config.reward.scorers, training=True, settings=config.reward)
    held_out = load_rewards(config.held_out.scorers, settings=config.reward)
    pipeline = load_pipeline(config.model.path, place="disk")
    policy = check_inputs(config, pipeline, rewards, held_out, meshes)
    adapters = read_initial(config, pipeline.family, pipeline.trainable)
    # Least size of the export.
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(pipeline.params))
    check_output_folder(workdir, "--workdir", needed_bytes=needed)
    with open_workdir(workdir, config.to_dict(), contents) as opened, catch_signals() as stop:
        if opened.note:
            console.print(opened.note, soft_wrap=True, highlight=False, markup=False)
        said = describe_start(
            config, pipeline, policy, rewards, held_out, meshes, prompts, held_out_prompts, opened.report
        )
        console.print(said, soft_wrap=True, highlight=False, markup=False)
        result = train(
            config,
            pipeline,
            rewards,
            opened,
            meshes=meshes,
            prompts=prompts,
            tuning_prompts=tuning_prompts(config, prompts),
            # A scorer that is never used for training is not used for selection either: it scores only the result.
            held_out=[scorer for scorer in held_out if scorer.trains],
            initial=adapters,
            stop=stop,
        )
        tuned = result.pipeline
        if adapters is not None:
            # The comparison's base is the model that the run started from, with its adapter.
            pipeline = pipeline.with_trainable(result.policy.merged(pipeline.trainable, adapters))
        del result  # frees training's arrays on the devices; some are in reference cycles
        gc.collect()
        return finish(config, opened, pipeline, tuned, held_out_prompts, rewards, held_out, stop, console)


def tuning_prompts(config: Any, prompts: Sequence[str]) -> Sequence[str]:
    """Prompts of the evaluations during a run: never those that the result is reported on."""
    if not config.eval.every:
        return ()
    if config.data.prompts.startswith("shapes:"):
        prompts = load_prompts("shapes:tune")
    return prompts[: config.eval.prompts]


def finish(
    config: Any,
    workdir: Workdir,
    base: Any,
    tuned: Any,
    prompts: Sequence[str],
    rewards: Sequence[Any],
    held_out: Sequence[Any],
    stop: Stop,
    console: Console,
) -> Comparison:
    """Exports the tuned model, compares it with the base, writes the report, marks the run complete and says so.

    `held_out` may repeat `rewards`. Interrupted, it starts over at the next call.
    """
    main_first(lambda: tuned.save_pretrained(workdir.export))
    rollout = config.rollout
    num_frames, height, width = tuned.video_size(rollout.num_frames, rollout.height, rollout.width)
    sampling = Sampling(
        seed=config.eval.seed,
        samples=max(1, config.eval.prompts // len(prompts)),
        num_frames=num_frames,
        height=height,
        width=width,
        num_inference_steps=config.eval.num_inference_steps or rollout.num_inference_steps,
        guidance_scale=config.eval.guidance_scale or rollout.guidance_scale,
        guidance_rescale=rollout.guidance_rescale or None,
        guidance_scale_2=rollout.guidance_scale_2 or None,
        shift=config.eval.shift or rollout.shift or None,
        negative_prompt=rollout.negative_prompt,
        sampler=rollout.sampler or None,
        batch=videos_at_a_time(rollout.microbatch),
    )
    roles = {reward.name: "trained" for reward in rewards}
    for scorer in held_out:
        selects = scorer.trains and config.eval.every > 0
        roles.setdefault(scorer.name, "used for selection" if selects else "held out")
    scorers = list({scorer.name: scorer for scorer in (*rewards, *held_out)}.values())
    with console.status("comparing base and tuned") as status:

        def show(what: str, done: int, total: int) -> None:
            stop.check()
            status.update(f"comparing: {what} {done}/{total}")

        try:
            how, prompts = (DTYPES[config.model.dtype], config.model.attention), prompts[: config.eval.prompts]
            comparison = compare(
                base.as_sampled(*how), tuned.as_sampled(*how), prompts, scorers, sampling, roles, progress=show
            )
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise DoesNotFit(
                f"the closing comparison does not fit into a device's memory; the tuned model is in {workdir.export}:"
                f" python -m vpo_jax.evaluate --base={config.model.path} --tuned={workdir.export} --batch=1 compares"
                f" where there is more of it"
            ) from error
    main_first(lambda: write_result(config, workdir, comparison, tuned.family))
    console.print(table(comparison))
    videos = config.train.prompts_per_step * rollout.candidates
    console.print(describe_end(read_metrics(workdir.path), videos), soft_wrap=True, highlight=False, markup=False)
    console.print(f"report: {workdir.report}", soft_wrap=True, highlight=False)
    console.print("to load the tuned model:\n", soft_wrap=True, highlight=False)
    keys = ("num_frames", "height", "width", "num_inference_steps", "guidance_scale")
    settings = {key: comparison.settings[key] for key in keys}
    export = str(workdir.export.resolve())
    for line in tuned.family.loading_lines(export, prompt=comparison.prompts[0], settings=settings):
        console.print(f"    {line}", soft_wrap=True, highlight=False, markup=False)
    if missing := tuned.family.beyond_diffusers(tuned.configs):
        console.print(f"diffusers has no {' and no '.join(missing)}: its videos differ", soft_wrap=True)
    main_first(lambda: workdir.complete(config.train.steps))
    return comparison


def videos_at_a_time(microbatch: int) -> int:
    """Videos that a process samples at a time in the comparison: as many a device as in a rollout, if that is set."""
    return max(1, microbatch * jax.local_device_count() // jax.device_count()) if microbatch else Sampling.batch


def write_result(config: Any, workdir: Workdir, comparison: Comparison, family: Family) -> None:
    """Writes evaluation.json, the export's card, the videos and the report."""
    write_json(workdir.path / "evaluation.json", comparison)
    weights = "ema" if config.ema.decay > 0 else "policy"
    write_card(workdir.export, model_card(config, family, workdir.path, config.train.steps, weights))
    write_videos(workdir.samples / "final", comparison)
    write_report(workdir.report, comparison, read_metrics(workdir.path), workdir.config)


def command(argv: Sequence[str]) -> None:
    """`main`, with a run that stopped by itself (not finite, an alarm, no memory) as a message and exit code 1."""
    try:
        main(argv)
    except (Alarmed, DoesNotFit, NonFinite) as error:
        raise SystemExit(f"stopped: {error}") from error


if __name__ == "__main__":
    cli.run(command)
