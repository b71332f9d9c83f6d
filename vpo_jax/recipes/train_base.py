"""Trains an embedded base model: `python -m vpo_jax.recipes.train_base --family=NAME --workdir=DIR --output=DIR`.

An ordinary small latent video diffusion model of the shapes world, in two stages: an autoencoder, then denoiser and
text encoder together on its latents. `--decoder_steps` adds a third, the autoencoder's decoder alone. `base_unet` and
`base_wan` are the two families. Held-out and tuning captions are never seen. Interrupted, the same command goes on.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from vpo_jax.families.table import read_pipeline
from vpo_jax.recipes import base_unet, base_wan
from vpo_jax.runtime.backend import keep_compiled_programs, keep_freed_memory
from vpo_jax.runtime.cli import Parser, run
from vpo_jax.runtime.errors import UserError

FAMILIES: dict[str, ModuleType] = {"text_to_video_sd": base_unet, "wan": base_wan}


def main(argv: Sequence[str]) -> None:
    """Trains both stages and writes the folder."""
    keep_compiled_programs()
    keep_freed_memory()
    parser = Parser("vpo_jax.recipes.train_base", __doc__ or "")
    parser.add_argument("--family", choices=tuple(FAMILIES), default="text_to_video_sd")
    parser.add_argument("--workdir", type=Path, required=True, help="checkpoints of the two stages")
    parser.add_argument("--output", type=Path, required=True, help="the diffusers folder to write")
    parser.add_argument("--seed", type=int, default=0, help="with --start another one: other videos and noise")
    parser.add_argument("--vae_steps", type=int, default=2200)
    parser.add_argument("--vae_learning_rate", type=float, default=2e-3)
    parser.add_argument(
        "--decoder_steps", type=int, default=0, help="of the autoencoder's decoder alone, at half the rate"
    )
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--lessons", type=int, default=0, help="the first of the steps, on what motion words mean")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    parser.add_argument("--seconds", type=float, default=None, help="stop each stage after this long, saved")
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument("--autoencoder", type=Path, default=None, help="a base whose autoencoder is kept")
    kept.add_argument("--start", type=Path, default=None, help="a base to train further; its autoencoder is kept")
    flags = parser.parse(argv)
    family, start, before = FAMILIES[flags.family], None, flags.start or flags.autoencoder
    for name in ("lessons", "decoder_steps"):
        if getattr(flags, name) and name not in family.OPTIONAL:
            raise UserError(f"--{name}: a base of the family {flags.family} is trained without; leave the flag out")
    if before is None:
        vae, vae_config = family.train_vae(
            flags.seed, flags.vae_steps, flags.vae_learning_rate, flags.workdir, flags.seconds
        )
    else:
        parts = read_pipeline(before)
        vae, vae_config = parts.params["vae"], parts.configs["vae"]
        if flags.start is not None:
            start = {name: parts.params[name] for name in family.TRAINED}
    denoiser = family.train_denoiser(
        flags.seed, flags.steps, flags.batch, flags.learning_rate, vae, vae_config, flags.workdir, flags.seconds, start,
        flags.lessons,
    )  # fmt: skip
    if flags.decoder_steps:
        vae = family.train_decoder(
            flags.seed, flags.decoder_steps, flags.vae_learning_rate / 2, vae, flags.workdir, flags.seconds
        )
    names = (
        "family", "seed", "vae_steps", "vae_learning_rate", "decoder_steps", "steps", "lessons", "batch",
        "learning_rate",
    )  # fmt: skip
    words = [f"--{name}={getattr(flags, name)}" for name in names]
    if before is not None:
        words.append("--start=THE_BASE_ABOVE" if flags.start else "--autoencoder=THE_BASE_ABOVE")
    command = " ".join(["python -m vpo_jax.recipes.train_base", *words])
    earlier = [] if before is None else json.loads((before / "recipe.json").read_text())["commands"]
    family.write_base(flags.output, vae, vae_config, denoiser, {"commands": [*earlier, command]})
    print(f"wrote {flags.output}")


if __name__ == "__main__":
    run(main, sys.argv[1:])
