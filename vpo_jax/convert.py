"""An Orbax checkpoint of a run becomes a diffusers folder, or a PEFT adapter folder.

python -m vpo_jax.convert --workdir=DIR [--step=N] [--weights=ema|policy] --output=DIR [--lora_only]
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from vpo_jax.checkpoints.orbax_store import CheckpointStore
from vpo_jax.checkpoints.peft import write_adapter
from vpo_jax.pipeline import load_pipeline
from vpo_jax.runtime import cli
from vpo_jax.runtime.errors import UserError
from vpo_jax.training.check import check
from vpo_jax.training.policy import make_policy


def main(argv: Sequence[str]) -> None:
    """Converts what the flags name."""
    parser = cli.Parser("vpo_jax.convert", (__doc__ or "").partition("\n")[0])
    parser.add_argument("--workdir", required=True, help="directory of the run")
    parser.add_argument("--step", type=int, default=None, help="which checkpoint (default: the newest)")
    parser.add_argument("--weights", choices=("ema", "policy"), default=None, help="default: ema where the run has it")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--lora_only", action="store_true", help="write a PEFT adapter folder")
    flags = parser.parse(argv)
    step, weights = convert(flags.workdir, flags.output, flags.step, flags.weights, flags.lora_only)
    print(f"{flags.output}: the {weights} weights of step {step}")
    print("\n".join(f"    {line}" for line in loading_lines(Path(flags.output), flags.lora_only, flags.workdir)))


def convert(
    workdir: str | Path,
    output: str | Path,
    step: int | None = None,
    weights: str | None = None,
    lora_only: bool = False,
) -> tuple[int, str]:
    """Writes the checkpoint of `step` (the newest when None) to `output`; returns its step and which weights.

    Raises UserError when there is no such run, checkpoint, average or adapter, or `output` cannot be written.
    """
    config = read_config(Path(workdir))
    averaged = config.ema.decay > 0
    if weights == "ema" and not averaged:
        raise UserError("--weights: this run kept no average (ema.decay=0); choose --weights=policy")
    if lora_only and config.lora.rank == 0:
        raise UserError("--lora_only: this run trained every weight (lora.rank=0); leave the flag out")
    weights = weights or ("ema" if averaged else "policy")
    store = CheckpointStore(Path(workdir, "checkpoints"), read_only=True)
    step, state, _ = store.read(step, parts=[weights])
    adapters = state[weights]
    pipeline = load_pipeline(config.model.path)
    policy = make_policy(config, pipeline.unet, pipeline.params["unet"], adapters)
    if lora_only:
        assert policy.lora is not None
        write_adapter(output, adapters, policy.lora, config.model.path)
    else:
        unet = policy.merged(pipeline.params["unet"], adapters)
        dataclasses.replace(pipeline, params={**pipeline.params, "unet": unet}).save_pretrained(output)
    return step, weights


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


def loading_lines(output: Path, lora_only: bool, workdir: str | Path) -> list[str]:
    """Lines of Python that load what was written in diffusers."""
    path = str(output.resolve())
    if not lora_only:
        load = f"pipe = TextToVideoSDPipeline.from_pretrained({path!r})"
        return ["from diffusers import TextToVideoSDPipeline", load]
    base = read_config(Path(workdir)).model.path
    return [
        "from diffusers import TextToVideoSDPipeline; from peft import PeftModel",
        f"pipe = TextToVideoSDPipeline.from_pretrained({base!r})",
        f"pipe.unet = PeftModel.from_pretrained(pipe.unet, {path!r})",
    ]


if __name__ == "__main__":
    cli.run(main)
