"""Seconds and memory of a full-size scorer on this machine's device, beside its floor and beside PyTorch.

    python benchmarks/scorers.py --scorer=videoscore|videoreward [--videos=8] [--prompts=2] [--at_a_time=4]
        [--frames=16] [--size=256] [--attention=xla] [--peer] [--output=FILE.json]

The weights are random bfloat16: nothing is downloaded. The floor is the FLOPs of the products over the device's
published peak. `--peer` also times transformers' Idefics2Model in bfloat16 with PyTorch's own attention on as many
tokens and the same frames, already resized: in a process of its own, so that neither sees the other's memory.
"""

import argparse
import dataclasses
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
import numpy as np
from measuring import chip_of, random_weights, run_peer, timed

from vpo_jax.models.attention import BACKENDS
from vpo_jax.planning import cost
from vpo_jax.rewards.loading import abstract_rewards
from vpo_jax.rewards.scoring import score_function
from vpo_jax.rewards.table import SCORERS
from vpo_jax.rewards.videoscore import published
from vpo_jax.runtime import cli
from vpo_jax.runtime.backend import keep_compiled_programs
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.trees import bytes_of


def main(argv: Sequence[str]) -> None:
    """Measures what the flags name."""
    parser = cli.Parser("benchmarks.scorers", (__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--scorer", choices=[name for name, entry in SCORERS.items() if entry.abstract], default="videoscore"
    )
    parser.add_argument("--videos", type=int, default=8, help="scored in a call")
    parser.add_argument("--prompts", type=int, default=2, help="of the videos, the same number of videos each")
    parser.add_argument("--at_a_time", type=int, default=4, help="frames of each video in the vision encoder at once")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--attention", choices=tuple(BACKENDS), default="xla")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer", action="store_true", help="time PyTorch too (videoscore)")
    parser.add_argument("--only_peer", default="", help=argparse.SUPPRESS)
    parser.add_argument("--output", default="", help="JSON file to write beside what is printed")
    flags = parser.parse(argv)
    if flags.only_peer:
        print(json.dumps(torch_peer(**json.loads(flags.only_peer))))
        return
    if flags.peer and flags.scorer != "videoscore":
        raise UserError("--peer: PyTorch's side is there for videoscore alone")
    result = measure(flags)
    if flags.peer:
        sizes = {name: result[name] for name in ("videos", "frames", "side", "tokens")}
        result |= run_peer(__file__, sizes | {"repeats": flags.repeats})
        result["torch_over_ours"] = result["torch_seconds_a_video"] / result["seconds_a_video"]
    print(json.dumps(result, indent=2))
    cli.write_output(flags.output, result)


def measure(flags: Any) -> dict[str, Any]:
    """Of scoring `videos` random videos: {"seconds_a_video": ..., "share_of_peak": ..., "peak_bytes": ..., ...}."""
    keep_compiled_programs()
    settings = cli.load_config(str(cli.ROOT / "configs" / "vpo.py")).reward
    (found,) = abstract_rewards(flags.scorer, settings)
    made: Any = found  # both have a model and options
    options = dataclasses.replace(made.options, frames_at_a_time=flags.at_a_time)
    plain = dataclasses.replace(made, options=options)
    reward = dataclasses.replace(plain, model=plain.model.clone(backend=flags.attention))
    rng = np.random.default_rng(0)
    seen = reward.frame_indices(flags.frames)
    shape = (flags.videos, len(seen), flags.size, flags.size, 3)
    videos = jnp.asarray(rng.integers(0, 256, shape, dtype=np.uint8))
    prepared = reward.prepare(["a prompt"] * flags.prompts)
    prepared["input_ids"] = rng.integers(5, 30000, prepared["input_ids"].shape, dtype=np.int32)

    needed = cost.measure(score_function(plain), reward.params, videos, prepared)  # a kernel's products are not seen
    params = random_weights(reward.params)
    score = score_function(reward)
    scores, first = timed(score, params, videos, prepared)
    assert bool(jnp.isfinite(scores).all()), "scores are not finite"
    seconds = statistics.median(timed(score, params, videos, prepared)[1] for _ in range(flags.repeats))
    device = jax.devices()[0]
    memory = device.memory_stats() or {}
    expected = scores if flags.attention == "xla" else score_function(plain)(params, videos, prepared)
    kind = chip_of(device)
    text = int(prepared["input_ids"].shape[1])
    result = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "videos": flags.videos,
        "frames": len(seen),
        "attention": flags.attention,
        "apart_from_xla": float(jnp.abs(scores - expected).max()),
        "weights_bytes": bytes_of(reward.params),
        "peak_bytes": memory.get("peak_bytes_in_use"),
        "first_call_seconds": first,
        "seconds_a_video": seconds / flags.videos,
        "tflop_a_video": needed.flops / flags.videos / 1e12,
        "tflop_a_second": needed.flops / seconds / 1e12,
    }
    if kind:
        result["share_of_peak"] = needed.flops / kind.flops / seconds
    if flags.scorer == "videoscore":
        result["side"] = max(reward.frames.output_size(flags.size, flags.size))
        result["tokens"] = text + len(seen) * len(reward.queries.frame_ids)
    return result


def torch_peer(videos: int, frames: int, side: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Of transformers' Idefics2 with a head of five: {"torch_seconds_a_video": ..., "torch_peak_bytes": ..., ...}.

    Takes the fastest number of videos at a time among `videos` and its halves that fit into memory.
    """
    import torch
    import transformers

    place = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_device(place)
    torch.set_default_dtype(torch.bfloat16)
    config: Any = transformers.Idefics2Config(**published.CONFIG)
    with torch.no_grad():
        model = transformers.Idefics2Model(config).eval()
        head = torch.nn.Linear(config.text_config.hidden_size, 5)
        per_frame = config.perceiver_config.resampler_n_latents
        ids = torch.randint(5, 30000, (videos, tokens))
        ids[:, -frames * per_frame :] = model.config.image_token_id
        pixels = torch.randn(videos, frames, 3, side, side)

        def call(some: int) -> float:
            began = time.perf_counter()
            for at in range(0, videos, some):
                part = slice(at, at + some)
                out = model(input_ids=ids[part], attention_mask=torch.ones_like(ids[part]), pixel_values=pixels[part])
                head(out.last_hidden_state[:, -1]).float().cpu()
            return time.perf_counter() - began

        best: dict[str, Any] = {}
        some = videos
        while some:
            try:
                call(some)
                seconds = statistics.median(call(some) for _ in range(repeats))
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
            else:
                if not best or seconds / videos < best["torch_seconds_a_video"]:
                    best = {"torch_seconds_a_video": seconds / videos, "torch_videos_at_a_time": some}
            some //= 2
    return best | {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "torch_peak_bytes": torch.cuda.max_memory_allocated() if place == "cuda" else None,
    }


if __name__ == "__main__":
    cli.run(main)
