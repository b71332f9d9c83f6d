"""A run's checkpoint becomes a diffusers folder or a LoRA; another format's file a diffusers folder.

python -m vpo_jax.convert --workdir=DIR [--step=N] [--weights=ema|policy] --output=DIR [--dtype=float32]
python -m vpo_jax.convert --workdir=DIR [--step=N] [--weights=ema|policy] --output=DIR --lora_only [--lora_format=FORM]
python -m vpo_jax.convert --from_FORMAT=model.safetensors [--base=DIR] --output=DIR [--dtype=float32]
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from vpo_jax.checkpoints.folders import Configs, PipelineParts, check_target, write_pipeline
from vpo_jax.checkpoints.lora_files import FORMS, PEFT
from vpo_jax.checkpoints.orbax_store import CheckpointStore
from vpo_jax.checkpoints.peft import check_adapter_target, write_adapter
from vpo_jax.families.protocol import Family, Importer
from vpo_jax.families.table import FAMILIES, family_of_parts, read_pipeline
from vpo_jax.pipeline import DTYPES, SHIPPED, load_pipeline
from vpo_jax.report.card import ModelCard, licence_of, read_scores, write_card
from vpo_jax.runtime import cli
from vpo_jax.runtime.buckets import local_folder
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.paths import check_output_folder, expand_user
from vpo_jax.training.check import check
from vpo_jax.training.policy import adapted_components, make_policy


def main(argv: Sequence[str]) -> None:
    """Converts what the flags name."""
    parser = cli.Parser("vpo_jax.convert", (__doc__ or "").partition("\n")[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", help="directory of the run, also gs://BUCKET/FOLDER")
    importers = {name: importer for family in FAMILIES.values() for name, importer in family.importers.items()}
    for name, importer in importers.items():
        source.add_argument(f"--from_{name}", metavar="FILE", help=importer.what)
    parser.add_argument("--step", type=int, default=None, help="which checkpoint (default: the newest)")
    parser.add_argument("--weights", choices=("ema", "policy"), default=None, help="default: ema where the run has it")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--lora_only", action="store_true", help="write the adapters alone")
    parser.add_argument(
        "--lora_format",
        choices=FORMS,
        default=None,
        help="of --lora_only: a PEFT folder, a file with diffusers' names, or one with the original code's, as ComfyUI "
        "reads (default: what the model's pipeline loads)",
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of the tensors that are written")
    parser.add_argument("--base", default="", help="diffusers folder with what --from_FORMAT's file lacks: a tokenizer")
    flags = parser.parse(argv)
    flags.output = str(check_output_folder(flags.output, "--output"))
    flags.base = expand_user(flags.base, "--base")
    for name, importer in importers.items():
        file = expand_user(getattr(flags, f"from_{name}") or "", f"--from_{name}")
        if not file:
            continue
        _refuse(flags, ("step", "weights", "lora_only", "lora_format"), f"--from_{name}")
        parts, absent = convert_file(importer, file, flags.output, flags.base, flags.dtype)
        print(f"{flags.output}: {', '.join(parts.params)} of {file}")
        if absent:
            print(f"not in the file, copy from another model (or give --base=DIR): {', '.join(absent)}")
            return
        read = family_of_parts(parts)
        _print_lines(read.loading_lines(str(Path(flags.output).resolve()), flags.dtype), read, parts.configs)
        return
    _refuse(flags, ("base",), "--workdir")
    if flags.lora_only and flags.dtype != "float32":
        raise UserError("--dtype: an adapter folder is always float32; leave the flag out")
    if flags.lora_format and not flags.lora_only:
        raise UserError("--lora_format: is the form of an adapter; give --lora_only too, or leave it out")
    made = convert(
        flags.workdir, flags.output, flags.step, flags.weights, flags.lora_only, flags.dtype, flags.lora_format
    )
    print(f"{flags.output}: the {made.weights} weights of step {made.step}")
    output = str(Path(flags.output).resolve())
    base = str(SHIPPED.get(made.base, made.base))  # diffusers knows no name of ours
    _print_lines(loading_lines(made.family, output, base, flags.dtype, made.adapter), made.family, made.configs)


class Adapter(NamedTuple):
    """What an adapter folder holds: its form, and the components that it adapts where the family trains several."""

    form: str
    components: Sequence[str]


class Converted(NamedTuple):
    """A checkpoint that was written: its step, which weights, the base model's path, family, configs; of an adapter."""

    step: int
    weights: str
    base: str
    family: Family
    configs: Configs
    adapter: Adapter | None


def convert(
    workdir: str | Path,
    output: str | Path,
    step: int | None = None,
    weights: str | None = None,
    lora_only: bool = False,
    dtype: str = "float32",
    lora_format: str | None = None,
) -> Converted:
    """Writes the checkpoint of `step` (the newest when None) to `output`, its tensors in `dtype`.

    With `lora_only` its adapters alone, in `lora_format` or the first form that the family offers.

    Raises UserError when there is no such run, checkpoint, average, adapter or form of it, or `output` cannot be
    written.
    """
    workdir = local_folder(workdir)
    config = read_config(workdir)
    averaged = config.ema.decay > 0
    if weights == "ema" and not averaged:
        raise UserError("--weights: this run kept no average (ema.decay=0); choose --weights=policy")
    if lora_only and config.lora.rank == 0:
        raise UserError("--lora_only: this run trained every weight (lora.rank=0); leave the flag out")
    weights = weights or ("ema" if averaged else "policy")
    check_output_folder(output, "--output", check_adapter_target if lora_only else None)
    store = CheckpointStore(workdir / "checkpoints", read_only=True)
    step, state, _ = store.read(step, parts=[weights])
    adapters = state[weights]
    pipeline = load_pipeline(config.model.path, place="disk")
    adapter = None
    if lora_only:
        form = _adapter_form(pipeline.family, lora_format)
        adapter = Adapter(form, adapted_components(pipeline.family, adapters))
    policy = make_policy(config, pipeline.family, pipeline.trainable, adapters)
    if weights == "ema":
        adapters = policy.extrapolated(policy.initial, adapters, config.ema.extrapolation)
    if adapter is not None:
        assert policy.lora is not None
        names = pipeline.family.original_names
        write_adapter(output, adapters, policy.lora, config.model.path, adapter.form, names, adapter.components)
    else:
        check_output_folder(output, "--output", partial(check_target, layout=pipeline.family.layout))
        tuned = pipeline.with_trainable(policy.merged(pipeline.trainable, adapters))
        tuned.save_pretrained(output, dict.fromkeys(pipeline.params, dtype))
    write_card(output, model_card(config, pipeline.family, workdir, step, weights, adapter, dtype))
    return Converted(step, weights, config.model.path, pipeline.family, pipeline.configs, adapter)


def _adapter_form(family: Family, form: str | None) -> str:
    if form is not None and form not in family.adapter_forms:
        offered, name = ", ".join(family.adapter_forms), family.layout.class_name
        raise UserError(f"--lora_format: {name} has no adapters of the form {form}; choose one of {offered}")
    return form or family.adapter_forms[0]


def loading_lines(family: Family, folder: str, base: str, dtype: str, adapter: Adapter | None) -> list[str]:
    """Lines of Python that load an export, or an adapter on its base."""
    if adapter is None:
        return family.loading_lines(folder, dtype)
    return family.adapter_lines(folder, base, adapter.form, adapter.components)


def model_card(
    config: ConfigDict,
    family: Family,
    workdir: str | Path,
    step: int,
    weights: str,
    adapter: Adapter | None = None,
    dtype: str = "float32",
) -> ModelCard:
    """The card of an export; with scores where the run has compared just these weights with the initial ones."""
    base = config.model.path
    last = step == config.train.steps and weights == ("ema" if config.ema.decay > 0 else "policy")
    return ModelCard(
        base=base,
        licence=licence_of(base),
        step=step,
        weights=weights,
        loading=loading_lines(family, "THIS_FOLDER", base, dtype, adapter),
        config=dict(cli.flatten_config(config)),
        scores=read_scores(workdir) if last else [],
        library="peft" if adapter is not None and adapter.form == PEFT else "diffusers",
    )


def convert_file(
    importer: Importer, file: str | Path, output: str | Path, base: str | Path = "", dtype: str = "float32"
) -> tuple[PipelineParts, list[str]]:
    """Writes a `file` of another format to `output` in `dtype`; returns what was written and which parts it lacks.

    Args:
      importer: of the format.
      file: safetensors in its layout.
      output: folder to write.
      base: diffusers folder whose tokenizer, and whose autoencoder and text encoder where the file has none, go in.
      dtype: of the tensors written.

    Raises:
      UserError: another layout, a broken file, or `output` cannot be written.
    """
    parts = importer.read(Path(file))
    check_output_folder(output, "--output", partial(check_target, layout=parts.layout))
    if base:
        given = read_pipeline(base, place="disk")
        parts = dataclasses.replace(
            parts,
            configs={**given.configs, **parts.configs},
            params={**given.params, **parts.params},
            tokenizer=given.tokenizer,
        )
    write_pipeline(output, parts, dict.fromkeys(parts.layout.components, dtype))
    absent = [name for name in parts.layout.components if name not in parts.params]
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


def _print_lines(lines: Sequence[str], family: Family | type[Family], configs: Configs) -> None:
    print("\n".join(f"    {line}" for line in lines))
    if missing := family.beyond_diffusers(configs):
        print(f"diffusers has no {' and no '.join(missing)}: its videos differ; vpo_jax.load_pipeline has them")


def _refuse(flags: argparse.Namespace, names: Sequence[str], source: str) -> None:
    for name in names:
        if getattr(flags, name):
            raise UserError(f"--{name}: does not go with {source}; leave it out")


if __name__ == "__main__":
    cli.run(main)
