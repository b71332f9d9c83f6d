"""A run's checkpoint becomes a diffusers folder or a PEFT adapter folder; VideoCrafter2's file a diffusers folder.

python -m vpo_jax.convert --workdir=DIR [--step=N] [--weights=ema|policy] --output=DIR [--lora_only] [--dtype=float32]
python -m vpo_jax.convert --from_videocrafter=model.safetensors [--base=DIR] --output=DIR [--dtype=float32]
"""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vpo_jax.checkpoints.folders import (
    COMPONENTS,
    PipelineParts,
    beyond_diffusers,
    check_target,
    read_pipeline,
    write_pipeline,
)
from vpo_jax.checkpoints.orbax_store import CheckpointStore
from vpo_jax.checkpoints.peft import check_adapter_target, write_adapter
from vpo_jax.checkpoints.videocrafter import read_videocrafter
from vpo_jax.pipeline import DTYPES, SHIPPED, load_pipeline
from vpo_jax.report.card import ModelCard, licence_of, read_scores, write_card
from vpo_jax.runtime import cli
from vpo_jax.runtime.buckets import local_folder
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.paths import check_output_folder, expand_user
from vpo_jax.training.check import check
from vpo_jax.training.policy import make_policy


def main(argv: Sequence[str]) -> None:
    """Converts what the flags name."""
    parser = cli.Parser("vpo_jax.convert", (__doc__ or "").partition("\n")[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", help="directory of the run, also gs://BUCKET/FOLDER")
    source.add_argument("--from_videocrafter", metavar="FILE", help="VideoCrafter2's checkpoint as safetensors")
    parser.add_argument("--step", type=int, default=None, help="which checkpoint (default: the newest)")
    parser.add_argument("--weights", choices=("ema", "policy"), default=None, help="default: ema where the run has it")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--lora_only", action="store_true", help="write a PEFT adapter folder")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of the tensors that are written")
    parser.add_argument("--base", default="", help="diffusers folder with what VideoCrafter2's file lacks: a tokenizer")
    flags = parser.parse(argv)
    flags.output = str(check_output_folder(flags.output, "--output"))
    for name in ("from_videocrafter", "base"):
        setattr(flags, name, expand_user(getattr(flags, name) or "", f"--{name}"))
    if flags.from_videocrafter:
        _refuse(flags, ("step", "weights", "lora_only"), "--from_videocrafter")
        parts, absent = convert_videocrafter(flags.from_videocrafter, flags.output, flags.base, flags.dtype)
        print(f"{flags.output}: {', '.join(parts.params)} of {flags.from_videocrafter}")
        if absent:
            print(f"not in the file, copy from another model (or give --base=DIR): {', '.join(absent)}")
            return
        _print_lines(loading_lines(str(Path(flags.output).resolve()), flags.dtype), parts.configs)
        return
    _refuse(flags, ("base",), "--workdir")
    if flags.lora_only and flags.dtype != "float32":
        raise UserError("--dtype: an adapter folder is always float32; leave the flag out")
    made = convert(flags.workdir, flags.output, flags.step, flags.weights, flags.lora_only, flags.dtype)
    print(f"{flags.output}: the {made.weights} weights of step {made.step}")
    output = str(Path(flags.output).resolve())
    base = str(SHIPPED.get(made.base, made.base))  # diffusers knows no name of ours
    lines = adapter_lines(output, base) if flags.lora_only else loading_lines(output, flags.dtype)
    _print_lines(lines, made.configs)


class Converted(NamedTuple):
    """A checkpoint that was written: its step, which weights, the base model's path and the configs of its parts."""

    step: int
    weights: str
    base: str
    configs: Mapping[str, Mapping[str, Any]]


def convert(
    workdir: str | Path,
    output: str | Path,
    step: int | None = None,
    weights: str | None = None,
    lora_only: bool = False,
    dtype: str = "float32",
) -> Converted:
    """Writes the checkpoint of `step` (the newest when None) to `output`, its tensors in `dtype`.

    Raises UserError when there is no such run, checkpoint, average or adapter, or `output` cannot be written.
    """
    workdir = local_folder(workdir)
    config = read_config(workdir)
    averaged = config.ema.decay > 0
    if weights == "ema" and not averaged:
        raise UserError("--weights: this run kept no average (ema.decay=0); choose --weights=policy")
    if lora_only and config.lora.rank == 0:
        raise UserError("--lora_only: this run trained every weight (lora.rank=0); leave the flag out")
    weights = weights or ("ema" if averaged else "policy")
    check_output_folder(output, "--output", check_adapter_target if lora_only else check_target)
    store = CheckpointStore(workdir / "checkpoints", read_only=True)
    step, state, _ = store.read(step, parts=[weights])
    adapters = state[weights]
    pipeline = load_pipeline(config.model.path)
    policy = make_policy(config, pipeline.unet, pipeline.params["unet"], adapters)
    if weights == "ema":
        adapters = policy.extrapolated(policy.start, adapters, config.ema.extrapolation)
    if lora_only:
        assert policy.lora is not None
        write_adapter(output, adapters, policy.lora, config.model.path)
    else:
        unet = policy.merged(pipeline.params["unet"], adapters)
        tuned = dataclasses.replace(pipeline, params={**pipeline.params, "unet": unet})
        tuned.save_pretrained(output, dict.fromkeys(COMPONENTS, dtype))
    write_card(output, model_card(config, workdir, step, weights, lora_only, dtype))
    return Converted(step, weights, config.model.path, pipeline.configs)


def model_card(
    config: ConfigDict, workdir: str | Path, step: int, weights: str, lora_only: bool = False, dtype: str = "float32"
) -> ModelCard:
    """The card of an export; with scores where the run has compared just these weights with their start."""
    base = config.model.path
    last = step == config.train.steps and weights == ("ema" if config.ema.decay > 0 else "policy")
    return ModelCard(
        base=base,
        licence=licence_of(base),
        step=step,
        weights=weights,
        loading=adapter_lines("THIS_FOLDER", base) if lora_only else loading_lines("THIS_FOLDER", dtype),
        config=dict(cli.flatten_config(config)),
        scores=read_scores(workdir) if last else [],
        is_adapter=lora_only,
    )


def convert_videocrafter(
    file: str | Path, output: str | Path, base: str | Path = "", dtype: str = "float32"
) -> tuple[PipelineParts, list[str]]:
    """Writes VideoCrafter2's `file` to `output` in `dtype`; returns what was written and which parts it lacks.

    Args:
      file: safetensors in the lvdm layout.
      output: folder to write.
      base: diffusers folder whose tokenizer, and whose autoencoder and text encoder where the file has none, go in.
      dtype: of the tensors written.

    Raises:
      UserError: another layout, a broken file, or `output` cannot be written.
    """
    check_output_folder(output, "--output", check_target)
    parts = read_videocrafter(file)
    if base:
        given = read_pipeline(base)
        parts = dataclasses.replace(
            parts,
            configs={**given.configs, **parts.configs},
            params={**given.params, **parts.params},
            tokenizer=given.tokenizer,
        )
    write_pipeline(output, parts, dict.fromkeys(COMPONENTS, dtype))
    absent = [name for name in COMPONENTS if name not in parts.params]
    return parts, absent + (["tokenizer"] if parts.tokenizer is None else [])


def read_config(workdir: Path) -> ConfigDict:
    """The resolved config of a run."""
    path = workdir / "config.json"
    try:
        config = ConfigDict(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"--workdir: there is no {path}; give the directory of a run") from error
    except (OSError, ValueError) as error:
        raise UserError(f"--workdir: {path} cannot be read as JSON ({error}); give the directory of a run") from error
    check(config)
    return config


def loading_lines(output: str, dtype: str = "float32") -> list[str]:
    """Lines of Python that load a folder of `dtype` in diffusers."""
    if dtype == "float32":
        load = f"pipe = TextToVideoSDPipeline.from_pretrained({output!r})"
        return ["from diffusers import TextToVideoSDPipeline", load]
    # Without it diffusers widens the denoiser and transformers does not widen the text encoder.
    load = f"pipe = TextToVideoSDPipeline.from_pretrained({output!r}, torch_dtype=torch.{dtype})"
    return ["import torch; from diffusers import TextToVideoSDPipeline", load]


def adapter_lines(output: str, base: str) -> list[str]:
    """Lines of Python that put an adapter folder on its base model in diffusers."""
    return [
        "from diffusers import TextToVideoSDPipeline; from peft import PeftModel",
        f"pipe = TextToVideoSDPipeline.from_pretrained({base!r})",
        f"pipe.unet = PeftModel.from_pretrained(pipe.unet, {output!r})",
    ]


def _print_lines(lines: Sequence[str], configs: Mapping[str, Mapping[str, Any]]) -> None:
    print("\n".join(f"    {line}" for line in lines))
    if missing := beyond_diffusers(configs):
        print(f"diffusers has no {' and no '.join(missing)}: its videos are others; vpo_jax.load_pipeline has them")


def _refuse(flags: argparse.Namespace, names: Sequence[str], source: str) -> None:
    for name in names:
        if getattr(flags, name):
            raise UserError(f"--{name}: does not go with {source}; leave it out")


if __name__ == "__main__":
    cli.run(main)
