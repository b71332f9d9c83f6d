"""Base against tuned: same prompts, same seeds, every scorer; a table, a report and the videos.

python -m vpo_jax.evaluate --base=DIR --tuned=DIR [--prompts=FILE] [--scorers=a,b] --output=DIR
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from vpo_jax.data.prompts import load_prompts
from vpo_jax.evaluation.compare import Sampling, compare, table, write_json
from vpo_jax.evaluation.videos import write_videos
from vpo_jax.pipeline import SHIPPED, Pipeline, load_pipeline
from vpo_jax.report.page import write_report
from vpo_jax.rewards.loading import load_rewards
from vpo_jax.rewards.protocol import Reward
from vpo_jax.runtime import cli
from vpo_jax.runtime.backend import copies_on_cores, keep_compiled_programs, keep_freed_memory, share_cores
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.keys import check_seed
from vpo_jax.runtime.paths import check_output_folder, expand_user, weights_bytes

PROMPTS = "shapes:held_out"
FROM_BASE = ("num_frames", "height", "width", "num_inference_steps", "guidance_scale")


def main(argv: Sequence[str]) -> None:
    """Compares what the flags name."""
    flags = parse(argv)
    check(flags)
    output = check_output_folder(flags.output, "--output")
    flags.base, flags.tuned = (expand_user(getattr(flags, name), f"--{name}") for name in ("base", "tuned"))
    keep_compiled_programs()
    keep_freed_memory()
    console = Console()
    prompts = load_prompts(flags.prompts, "--prompts")
    # The analytic judge reads captions of the embedded world only.
    scorers = flags.scorers or ("shapes,judge" if flags.prompts.startswith("shapes:") else "shapes")
    folders = [SHIPPED.get(path, Path(path)) for path in (flags.base, flags.tuned)]
    if all(folder.is_dir() for folder in folders):  # a hub id is a model of unknown size
        share_cores(copies_on_cores(weights_bytes([*folders, *filter(None, scorers.split(","))])))
    rewards = load_rewards(scorers, field="--scorers")
    if not rewards:
        raise UserError("--scorers: is empty; name at least one scorer, as shapes")
    base, tuned = (load_pipeline(path, place="disk") for path in (flags.base, flags.tuned))
    make_folder(output)
    sampling = Sampling(
        seed=flags.seed,
        samples=flags.samples,
        negative_prompt=flags.negative_prompt,
        sampler=flags.sampler,
        batch=flags.batch,
        **{name: chosen(flags, base, name) for name in FROM_BASE},
    )
    with console.status("generating") as status:
        comparison = compare(
            base,
            tuned,
            prompts[: flags.limit],
            rewards,
            sampling,
            roles_of(flags.tuned, rewards, scorers),
            keep=flags.keep,
            progress=lambda what, done, total: status.update(f"{what}: {done} of {total} videos"),
        )
    write_json(output / "evaluation.json", comparison)
    write_videos(output / "videos", comparison)
    write_report(output / "report.html", comparison, title=f"{Path(flags.tuned).name} against {Path(flags.base).name}")
    console.print(table(comparison))
    console.print(f"report: {output / 'report.html'}", soft_wrap=True, highlight=False)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags."""
    parser = cli.Parser("vpo_jax.evaluate", (__doc__ or "").partition("\n")[0])
    parser.add_argument("--base", required=True, help="diffusers folder that training started from")
    parser.add_argument("--tuned", required=True, help="diffusers folder to compare with it")
    parser.add_argument("--prompts", default=PROMPTS, help="file of prompts or shapes:SPLIT (default: %(default)s)")
    parser.add_argument(
        "--scorers", default="", help="comma-separated: names, folders, MODULE:FUNCTION (default: shapes, judge)"
    )
    parser.add_argument("--output", required=True, help="folder for evaluation.json, report.html and videos/")
    parser.add_argument("--limit", type=int, default=None, help="first so many prompts (default: all)")
    parser.add_argument("--samples", type=int, default=1, help="videos a prompt (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the initial noise (default: %(default)s)")
    parser.add_argument("--keep", type=int, default=8, help="videos to keep and show (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="videos at a time (default: %(default)s)")
    for name in FROM_BASE:
        kind = float if name == "guidance_scale" else int
        parser.add_argument(f"--{name}", type=kind, default=None, help="default: what the base model was made for")
    parser.add_argument("--negative_prompt", default=None)
    parser.add_argument("--sampler", default=None, help="default: the one in scheduler_config.json")
    return parser.parse(argv)


def check(flags: argparse.Namespace) -> None:
    """Raises UserError for a number that makes no sense."""
    for name in ("limit", "samples", "batch", "num_frames", "height", "width", "num_inference_steps"):
        value = getattr(flags, name)
        if value is not None and not 1 <= value < 2**31:
            raise UserError(f"--{name}: {value} must be 1 or more, below 2**31")
    if flags.keep < 0:
        raise UserError(f"--keep: {flags.keep} must be 0 or more")
    check_seed(flags.seed, "--seed")


def chosen(flags: argparse.Namespace, base: Pipeline, name: str) -> Any:
    """A flag, or else what the base model was made for: never the tuned one's, so that both are sampled alike."""
    given = getattr(flags, name)
    return base.defaults.get(name) if given is None else given


def make_folder(folder: Path) -> None:
    """Makes the output folder; raises UserError where the disk refuses."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: {folder} cannot be made a folder: {error.strerror}; choose another") from error


def roles_of(tuned: str, rewards: Sequence[Reward], scorers: str = "") -> dict[str, str]:
    """What each scorer had to do with the tuned model, where it is the export of a run with its config beside it.

    `scorers` names the rewards, in their order: an object of one's own may have another name than its module says.
    """
    roles = {reward.name: "held out" for reward in rewards if not reward.trains}
    try:
        config = json.loads((Path(tuned).resolve().parent / "config.json").read_text(encoding="utf-8"))
        trained, held_out = config["reward"]["scorers"], config["held_out"]["scorers"]
        selecting = config["eval"]["every"] > 0
    except (OSError, ValueError, KeyError, TypeError):
        return roles
    of_run = dict.fromkeys(_names(held_out, config), "used for selection" if selecting else "held out")
    of_run |= dict.fromkeys(_names(trained, config), "trained")
    given = [name.strip() for name in scorers.split(",") if name.strip()] or [reward.name for reward in rewards]
    found = {
        reward.name: of_run.get(name, of_run.get(reward.name, "held out"))
        for reward, name in zip(rewards, given, strict=True)
    }
    return found | roles


def _names(scorers: str, config: dict[str, Any]) -> list[str]:
    """What the scorers of a config may be called elsewhere: as they stand, by their folders, by their functions."""
    names: list[str] = []
    for name in (part.strip() for part in scorers.split(",")):
        settings = config["reward"].get(name)
        folder = settings.get("path", "") if isinstance(settings, dict) else ""
        names += [name, Path(name).name, name.rpartition(":")[2], Path(folder).name]
    return [name for name in names if name]


if __name__ == "__main__":
    cli.run(main)
