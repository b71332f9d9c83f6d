"""GB/s and peak memory of loading a denoiser's safetensors into its target dtype and place.

    python benchmarks/loading.py [--size=full|small] [--stored=float16] [--dtype=bfloat16] [--folder=DIR]

Makes a random checkpoint first (full: ModelScope's 1.41 B parameters, 2.8 GB in float16) and keeps it where `--folder`
names one. Memory is anonymous (RssAnon): the kernel may drop pages of the mapped file, so they do not count. The
bound is the parameters' own bytes plus twice the largest tensor.
"""

import argparse
import functools
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
from measuring import write_random

from vpo_jax.checkpoints import safetensors_io as io
from vpo_jax.checkpoints.folders import read_component
from vpo_jax.families.text_to_video_sd.layout import COMPONENTS, param_shapes
from vpo_jax.runtime.mesh import PARAMETER_RULES, infer_shardings, make_mesh
from vpo_jax.runtime.trees import bytes_of

SIZES: dict[str, dict[str, Any]] = {
    "full": {},
    "small": {"block_out_channels": [64, 128, 256, 256], "attention_head_dim": 32, "cross_attention_dim": 256},
}


def main() -> None:
    """Prints one line of results for each place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="full")
    parser.add_argument("--stored", default="float16", help="dtype in the file")
    parser.add_argument("--dtype", default="bfloat16", help="dtype in memory")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is, or is to be made")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = flags.folder or Path(scratch, "unet")
        config = {"_class_name": "UNet3DConditionModel", **SIZES[flags.size]}
        if not (folder / "config.json").is_file():
            make_checkpoint(folder, config, flags.stored)
        for place in ("host", "devices"):
            print(report(place, *load(folder, flags.dtype, place)))


def make_checkpoint(folder: Path, config: dict[str, Any], dtype: str) -> None:
    """Random weights of the config's denoiser, in shards above 5 GB."""
    write_random(folder, io.DIFFUSERS_STEM, param_shapes("unet", config), dtype)
    (folder / "config.json").write_text(json.dumps(config))


def load(folder: Path, dtype: str, place: str) -> tuple[float, int, int, int]:
    """(seconds, bytes of the parameters, bytes of the largest, peak of anonymous memory above its start)."""
    mesh = make_mesh()
    rule = None if place == "host" else functools.partial(infer_shardings, mesh=mesh, rules=PARAMETER_RULES)
    with Peak() as peak:
        start = time.perf_counter()
        _, params = read_component(folder, COMPONENTS["unet"], jnp.dtype(dtype), rule)
        jax.block_until_ready(params)
        seconds = time.perf_counter() - start
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    return seconds, bytes_of(params), largest, peak.bytes


def report(place: str, seconds: float, size: int, largest: int, peak: int) -> str:
    """The line for one place."""
    bound = size + 2 * largest
    # Parameters on an accelerator take no memory of the host.
    if place == "devices" and jax.default_backend() != "cpu":
        bound -= size
    verdict = "below" if peak <= bound else "ABOVE"
    return (
        f"{place:8} {size / 1e9:.3f} GB in {seconds:.2f} s = {size / 1e9 / seconds:.2f} GB/s; peak RssAnon "
        f"{peak / 1e9:.3f} GB, {verdict} the bound of {bound / 1e9:.3f} GB"
    )


class Peak:
    """The highest anonymous memory of this process while it is open, above what it was before: `bytes`."""

    def __enter__(self) -> "Peak":
        self.bytes, self._start, self._done = 0, anonymous(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.bytes = max(self.bytes, anonymous() - self._start)


def anonymous() -> int:
    """RssAnon of this process in bytes (Linux)."""
    status = Path(f"/proc/{os.getpid()}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main()
