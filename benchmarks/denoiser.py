"""Seconds and memory of a guided call of ModelScope's denoiser on this machine's device, beside floor and PyTorch.

    python benchmarks/denoiser.py [--videos=4] [--frames=16] [--size=256] [--attention=xla] [--profile=DIR]
        [--peer=eager|compiled] [--output=FILE.json]

Guidance computes every video twice in a call, with its text and without. The weights are random bfloat16: nothing is
downloaded. The floor is the FLOPs of the products over the device's published peak. `--peer` also times diffusers'
UNet3DConditionModel on the same shapes in bfloat16 with PyTorch's own attention, as it is or through torch.compile.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
from measuring import chip_of, random_weights, run_peer, timed

from vpo_jax.families.text_to_video_sd.layout import param_shapes
from vpo_jax.families.text_to_video_sd.published import MODELSCOPE
from vpo_jax.models.attention import BACKENDS
from vpo_jax.models.unet3d import UNet3DConditionModel, UNet3DConfig
from vpo_jax.planning import cost
from vpo_jax.runtime import cli
from vpo_jax.runtime.backend import keep_compiled_programs
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.trees import bytes_of

TOKENS = 77  # of a text
FACTOR = 8  # pixels on a side of a latent


def main(argv: Sequence[str]) -> None:
    """Measures what the flags name."""
    parser = cli.Parser("benchmarks.denoiser", (__doc__ or "").partition("\n")[0])
    parser.add_argument("--videos", type=int, default=4)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=256, help="pixels on a side")
    parser.add_argument("--attention", choices=tuple(BACKENDS), default="xla")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", default="", help="a folder for a profile of one call")
    parser.add_argument("--peer", choices=("eager", "compiled"), help="time PyTorch too")
    parser.add_argument("--only_peer", default="", help=argparse.SUPPRESS)
    parser.add_argument("--output", default="", help="JSON file to write beside what is printed")
    flags = parser.parse(argv)
    for name, least in (("videos", 1), ("frames", 1), ("size", FACTOR), ("repeats", 1)):
        if getattr(flags, name) < least:
            raise UserError(f"--{name}: {getattr(flags, name)} is too few; give {least} or more")
    if flags.only_peer:
        print(json.dumps(torch_peer(**json.loads(flags.only_peer))))
        return
    result = measure(flags)
    if flags.peer:
        case = {"rows": 2 * flags.videos, "frames": flags.frames, "side": flags.size // FACTOR}
        result |= run_peer(__file__, case | {"repeats": flags.repeats, "compiled": flags.peer == "compiled"})
        result["torch_over_ours"] = result["torch_seconds"] / result["seconds"]
    print(json.dumps(result, indent=2))
    cli.write_output(flags.output, result)


def measure(flags: Any) -> dict[str, Any]:
    """Of one call: {"seconds": ..., "share_of_peak": ..., "peak_bytes": ..., ...}."""
    keep_compiled_programs()
    config = MODELSCOPE["unet"]
    plain = UNet3DConditionModel(UNet3DConfig.from_dict(config), dtype=jnp.bfloat16)
    unet = plain.clone(attention_backend=flags.attention)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), param_shapes("unet", config))
    rows, side = 2 * flags.videos, flags.size // FACTOR
    keys = jax.random.split(jax.random.key(1), 2)
    latents = jax.random.normal(keys[0], (rows, flags.frames, side, side, plain.config.in_channels), jnp.bfloat16)
    text = jax.random.normal(keys[1], (rows, TOKENS, plain.config.cross_attention_dim), jnp.bfloat16)
    timesteps = jnp.full(rows, 500)

    def call(of: Any, params: Any, *inputs: jax.Array) -> jax.Array:
        return jnp.asarray(of.apply({"params": params}, *inputs))

    inputs = (latents, timesteps, text)
    needed = cost.measure(lambda *args: call(plain, *args), shapes, *inputs)  # a kernel's products are not seen
    params = random_weights(shapes)
    predict = jax.jit(lambda *args: call(unet, *args))
    found, first = timed(predict, params, *inputs)
    assert bool(jnp.isfinite(found).all()), "the prediction is not finite"
    seconds = statistics.median(timed(predict, params, *inputs)[1] for _ in range(flags.repeats))
    device = jax.devices()[0]
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    with jax.profiler.trace(flags.profile) if flags.profile else contextlib.nullcontext():
        timed(predict, params, *inputs)
    expected = found if flags.attention == "xla" else jax.jit(lambda *args: call(plain, *args))(params, *inputs)
    result = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "videos": flags.videos,
        "attention": flags.attention,
        "apart_from_xla": float(jnp.abs(found - expected).max() / jnp.abs(expected).max()),
        "weights_bytes": bytes_of(shapes),
        "peak_bytes": peak,
        "first_call_seconds": first,
        "seconds": seconds,
        "tflop": needed.flops / 1e12,
        "tflop_a_second": needed.flops / seconds / 1e12,
    }
    if kind := chip_of(device):
        result["share_of_peak"] = needed.flops / kind.flops / seconds
    return result


def torch_peer(rows: int, frames: int, side: int, repeats: int, compiled: bool) -> dict[str, Any]:
    """Of diffusers' denoiser: {"torch_seconds": ..., "torch_peak_bytes": ..., ...}."""
    import diffusers
    import torch

    place = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_device(place)
    torch.set_default_dtype(torch.bfloat16)
    config = MODELSCOPE["unet"]
    with torch.no_grad():
        unet: Any = diffusers.UNet3DConditionModel(**config)
        unet = torch.compile(unet.eval()) if compiled else unet.eval()
        latents = torch.randn(rows, config["in_channels"], frames, side, side)
        text = torch.randn(rows, TOKENS, config["cross_attention_dim"])

        def call() -> float:
            began = time.perf_counter()
            unet(latents, 500, encoder_hidden_states=text).sample.float().sum().item()
            return time.perf_counter() - began

        first = call()
        seconds = statistics.median(call() for _ in range(repeats))
    return {
        "torch": torch.__version__,
        "torch_is_compiled": compiled,
        "diffusers": diffusers.__version__,
        "torch_first_call_seconds": first,
        "torch_seconds": seconds,
        "torch_peak_bytes": torch.cuda.max_memory_allocated() if place == "cuda" else None,
    }


if __name__ == "__main__":
    cli.run(main)
