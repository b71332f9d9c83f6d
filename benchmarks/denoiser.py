"""Seconds and memory of a guided call of a denoiser on this machine's device, beside floor and PyTorch.

    python benchmarks/denoiser.py [--model=modelscope|wan] [--videos=N] [--frames=N] [--size=HEIGHTxWIDTH]
        [--attention=xla] [--profile=DIR] [--peer=eager|compiled [--peer_alone]] [--small] [--output=FILE.json]

Guidance computes every video twice in a call, with its text and without. `wan` is the transformer of Wan 2.1 1.3B; keys
and values of its text are computed once, as sampling does. The weights are random bfloat16: nothing is downloaded. The
floor is the FLOPs of the products over the device's published peak. `--peer` also times diffusers' class on the same
shapes in bfloat16 with PyTorch's own attention, as it is or through torch.compile.
"""

import argparse
import contextlib
import json
import re
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
from measuring import chip_of, peak_bytes, random_weights, repeated, run_peer, timed

from vpo_jax.families.text_to_video_sd import layout as unet_layout
from vpo_jax.families.text_to_video_sd.published import MODELSCOPE
from vpo_jax.families.wan import layout as wan_layout
from vpo_jax.families.wan.published import PUBLISHED as WAN
from vpo_jax.models.attention import BACKENDS
from vpo_jax.models.unet3d import UNet3DConditionModel, UNet3DConfig
from vpo_jax.models.wan_transformer import WanTransformer3DModel, WanTransformerConfig
from vpo_jax.planning import cost
from vpo_jax.runtime import cli
from vpo_jax.runtime.backend import keep_compiled_programs
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.trees import bytes_of, cast_floating

FACTOR = 8  # pixels on a side of a latent
TIMESTEP = 500


class Sizes(NamedTuple):
    """Of a call where the flags say nothing else: what public checkpoints are sampled at on one GPU."""

    videos: int
    frames: int
    height: int
    width: int


SIZES = {"modelscope": Sizes(4, 16, 256, 256), "wan": Sizes(1, 33, 480, 832)}
# What --small changes in a config.
_SMALL: dict[str, dict[str, Any]] = {
    "modelscope": {
        "block_out_channels": [32, 32],
        "down_block_types": ["CrossAttnDownBlock3D", "DownBlock3D"],
        "up_block_types": ["UpBlock3D", "CrossAttnUpBlock3D"],
        "layers_per_block": 1,
        "attention_head_dim": 8,
        "cross_attention_dim": 16,
    },
    "wan": {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64, "num_layers": 2, "text_dim": 32},
}


class Case(NamedTuple):
    """One call: the config, and the shapes of its latents and its text."""

    model: str
    config: dict[str, Any]
    latents: tuple[int, int, int, int, int]  # [B, f, h, w, C]
    text: tuple[int, int, int]  # [B, L, D]


def main(argv: Sequence[str]) -> None:
    """Measures what the flags name."""
    parser = cli.Parser("benchmarks.denoiser", (__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=tuple(SIZES), default="modelscope")
    parser.add_argument("--videos", type=int, help="4 of modelscope, 1 of wan")
    parser.add_argument("--frames", type=int, help="16 of modelscope, 33 of wan")
    parser.add_argument("--size", default="", help="pixels, HEIGHTxWIDTH or a side; 256 of modelscope, 480x832 of wan")
    parser.add_argument("--attention", choices=tuple(BACKENDS), default="xla")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="a network of a few layers, to try the command")
    parser.add_argument("--profile", default="", help="a folder for a profile of one call")
    parser.add_argument("--peer", choices=("eager", "compiled"), help="time PyTorch too")
    parser.add_argument("--peer_alone", action="store_true", help="time PyTorch only")
    parser.add_argument("--only_peer", default="", help=argparse.SUPPRESS)
    parser.add_argument("--output", default="", help="JSON file to write beside what is printed")
    flags = parser.parse(argv)
    if flags.only_peer:
        print(json.dumps(torch_peer(**json.loads(flags.only_peer))))
        return
    if flags.peer_alone and not flags.peer:
        raise UserError("--peer_alone: there is no --peer; give --peer=eager or --peer=compiled")
    sizes = _sizes(flags)
    case = make_case(flags.model, sizes, flags.small)
    result: dict[str, Any] = {"model": flags.model, **sizes._asdict()}
    if not flags.peer_alone:
        result |= measure(flags, case)
    if flags.peer:
        result["peer"] = run_peer(
            __file__, case._asdict() | {"repeats": flags.repeats, "compiled": flags.peer == "compiled"}
        )
        result |= result.pop("peer") if flags.peer_alone else {}
    if "peer" in result:
        result["peer_over_ours"] = result["peer"]["seconds"] / result["seconds"]
    print(json.dumps(result, indent=2))
    cli.write_output(flags.output, result)


def _sizes(flags: Any) -> Sizes:
    """What the flags say, or else the model's own."""
    own = SIZES[flags.model]
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", flags.size or f"{own.height}x{own.width}")
    if not found:
        raise UserError(f"--size: {flags.size} is no size; give pixels, as 256 or 480x832")
    height, width = int(found[1]), int(found[2] or found[1])
    videos, frames = (own[i] if value is None else value for i, value in enumerate((flags.videos, flags.frames)))
    for name, value in (("videos", videos), ("frames", frames), ("repeats", flags.repeats)):
        if value < 1:
            raise UserError(f"--{name}: {value} is too few; give 1 or more")
    side, every = (FACTOR, 1) if flags.model == "modelscope" else (2 * FACTOR, 4)
    if not (height and width) or height % side or width % side:
        raise UserError(f"--size: {height}x{width} has a side that is no multiple of {side}; give another")
    if (frames - 1) % every:
        below = frames - (frames - 1) % every
        raise UserError(f"--frames: {frames} is not {every} k + 1; give {below} or {below + every}")
    return Sizes(videos, frames, height, width)


def make_case(model: str, sizes: Sizes, small: bool = False) -> Case:
    """A guided call of these sizes."""
    config = (MODELSCOPE["unet"] if model == "modelscope" else WAN["wan2.1-1.3b"]["transformer"]) | (
        _SMALL[model] if small else {}
    )
    rows, height, width = 2 * sizes.videos, sizes.height // FACTOR, sizes.width // FACTOR
    if model == "modelscope":
        latents = (rows, sizes.frames, height, width, config["in_channels"])
        return Case(model, config, latents, (rows, 77, config["cross_attention_dim"]))
    latents = (rows, 1 + (sizes.frames - 1) // 4, height, width, config["in_channels"])
    return Case(model, config, latents, (rows, 512, config["text_dim"]))


def make_denoiser(case: Case) -> tuple[Any, Any]:
    """The module and the shapes of its parameters, as training holds them where they are frozen."""
    if case.model == "modelscope":
        shapes = unet_layout.param_shapes("unet", case.config)
        module: Any = UNet3DConditionModel(UNet3DConfig.from_dict(case.config), dtype=jnp.bfloat16)
        return module, jax.eval_shape(lambda tree: cast_floating(tree, jnp.bfloat16), shapes)
    shapes = wan_layout.param_shapes("transformer", case.config)
    module = WanTransformer3DModel(WanTransformerConfig.from_dict(case.config), dtype=jnp.bfloat16)
    kept = wan_layout.FLOAT32_PARAMETERS
    return module, jax.eval_shape(lambda tree: cast_floating(tree, jnp.bfloat16, kept), shapes)


def measure(flags: Any, case: Case) -> dict[str, Any]:
    """Of one call: {"seconds": ..., "share_of_peak": ..., "peak_bytes": ..., ...}."""
    keep_compiled_programs()
    plain, shapes = make_denoiser(case)
    denoiser = plain.clone(attention_backend=flags.attention)

    def call(of: Any, params: Any, *inputs: Any) -> jax.Array:
        return jnp.asarray(of.apply({"params": params}, *inputs))

    params = random_weights(shapes)
    keys = jax.random.split(jax.random.key(1), 2)
    latents = jax.random.normal(keys[0], case.latents, jnp.bfloat16)
    text: Any = jax.random.normal(keys[1], case.text, jnp.bfloat16)
    if case.model == "wan":
        text = jax.jit(lambda params, text: plain.apply({"params": params}, text, method="encode_text"))(params, text)
    inputs = (latents, jnp.full(case.latents[0], TIMESTEP), text)
    needed = cost.measure(lambda *args: call(plain, *args), shapes, *inputs)  # a kernel's products are not seen
    predict = jax.jit(lambda *args: call(denoiser, *args))
    found, first = timed(predict, params, *inputs)
    assert bool(jnp.isfinite(found).all()), "the prediction is not finite"
    seconds = repeated(flags.repeats, predict, params, *inputs)
    device, peak = jax.devices()[0], peak_bytes()
    with jax.profiler.trace(flags.profile) if flags.profile else contextlib.nullcontext():
        timed(predict, params, *inputs)
    apart: float | None = 0.0
    if flags.attention != "xla":
        try:
            expected = jax.jit(lambda *args: call(plain, *args))(params, *inputs)
            apart = float(jnp.abs(found - expected).max() / jnp.abs(expected).max())
        except jax.errors.JaxRuntimeError:  # XLA's attention does not fit: there is nothing to compare with
            apart = None
    result = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "attention": flags.attention,
        "apart_from_xla": apart,
        "weights_bytes": bytes_of(shapes),
        "peak_bytes": peak,
        "first_call_seconds": first,
        **seconds,
        "tflop": needed.flops / 1e12,
        "tflop_a_second": needed.flops / seconds["seconds"] / 1e12,
    }
    if kind := chip_of(device):
        result["share_of_peak"] = needed.flops / kind.flops / seconds["seconds"]
    return result


def torch_peer(
    model: str, config: dict[str, Any], latents: Sequence[int], text: Sequence[int], repeats: int, compiled: bool
) -> dict[str, Any]:
    """Of diffusers' denoiser: {"seconds": ..., "all_seconds": ..., "peak_bytes": ..., ...}."""
    import diffusers
    import torch

    place = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_device(place)
    torch.set_default_dtype(torch.bfloat16)
    rows, frames, height, width, channels = latents
    of: Any = diffusers.UNet3DConditionModel if model == "modelscope" else diffusers.WanTransformer3DModel
    with torch.no_grad():
        denoiser: Any = of(**config).eval()
        if compiled:
            denoiser = torch.compile(denoiser)
        inputs = torch.randn(rows, channels, frames, height, width)
        context, timesteps = torch.randn(*text), torch.full((rows,), TIMESTEP)

        def call() -> float:
            began = time.perf_counter()
            denoiser(inputs, timesteps, encoder_hidden_states=context).sample.float().sum().item()
            return time.perf_counter() - began

        first = call()
        seconds = [call() for _ in range(repeats)]
    return {
        "torch": torch.__version__,
        "compiled": compiled,
        "diffusers": diffusers.__version__,
        "first_call_seconds": first,
        "seconds": statistics.median(seconds),
        "all_seconds": seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if place == "cuda" else None,
    }


if __name__ == "__main__":
    cli.run(main)
