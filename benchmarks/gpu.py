"""Everything about speed that is to be measured on one GPU, the most important first, in one command.

    python benchmarks/gpu.py [--budget=540] [--size=small] [--again=NAME,NAME|failed] [--results=DIR] [--folder=DIR]

Every measurement is a process of its own: one that fails or hangs ends alone, and its error is recorded. One is started
only where its estimate fits into what is left of the budget. Results go to DIR/NAME-OF-THE-DEVICE.json after each, and
the same command goes on where the last one ended. Weights are random: nothing is downloaded, and what a machine lacks
is skipped. The step writes 21 GB into --folder. `python benchmarks/report.py` makes docs/speed.md of the results.
"""

import argparse
import importlib.util
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import children

from vpo_jax.runtime import cli
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.files import write_json

HERE = Path(__file__).resolve().parent
_PATIENCE = 3  # estimates after which a measurement is taken to hang
_JOB = ("ml_collections",)
_STEP = (*_JOB, "tensorboardX", "imageio_ffmpeg")
_PEER = ("torch", "diffusers")


class Measurement(NamedTuple):
    """One command.

    Attributes:
      name: of its result, "model/how" where several are compared.
      command: a benchmark of this folder and its flags.
      estimate: seconds on an H100, compilation included; guessed generously.
      needs: packages; "gpu" for an NVIDIA GPU.
      stages: names of its results where it has one for each stage; then `name` is of none.
    """

    name: str
    command: tuple[str, ...]
    estimate: float
    needs: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()

    @property
    def results(self) -> tuple[str, ...]:
        """Names of its results."""
        return self.stages or (self.name,)


def measurements(size: str, folder: str) -> list[Measurement]:
    """All of them, in order of importance."""
    calls, compiled = [], []
    for name, model in (("unet", "modelscope"), ("wan", "wan")):
        small = ("--small", "--videos=1", "--frames=5", "--size=32", "--repeats=2") if size == "small" else ()
        call = ("denoiser.py", f"--model={model}", *small)
        peer = (*call, "--peer_alone")
        calls += [
            Measurement(f"{name}/xla", call, 80),
            Measurement(f"{name}/cudnn", (*call, "--attention=cudnn"), 80, ("gpu",)),
            Measurement(f"{name}/diffusers", (*peer, "--peer=eager"), 50, _PEER),
        ]
        compiled.append(Measurement(f"{name}/compiled", (*peer, "--peer=compiled"), 150, ("gpu", *_PEER)))
    job: tuple[str, ...] = ("--config=configs/vpo.py:tiny",)
    stages: tuple[str, ...] = ("decode", "score shapes")
    of_stages: tuple[str, ...] = ("--repeats=1",)
    of_step: tuple[str, ...] = ("--size=small",)
    if size == "full":
        job = ("--config=configs/vpo.py:modelscope", "--config.train.prompts_per_step=2")
        job += ("--config.rollout.microbatch=4", "--config.train.microbatch=2")
        stages = ("rollout", "decode", "score videoscore", "errors", "update")
        of_stages = ("--config.model.path=modelscope", "--config.reward.scorers=videoscore")
        of_step = ("--config.train.steps=3",)
    return [
        *calls,
        Measurement("stages", ("stages.py", *job, *of_stages), 240, _JOB, stages),
        Measurement("step", ("full_size.py", "--only_steps", f"--folder={folder}", *job, *of_step), 240, _STEP),
        *compiled,
    ]


def main(argv: Sequence[str]) -> None:
    """Measures what is not measured yet, within the budget."""
    ends = time.monotonic()
    parser = cli.Parser("benchmarks.gpu", (__doc__ or "").partition("\n")[0])
    parser.add_argument("--budget", type=float, default=540, help="seconds of all of it")
    parser.add_argument("--size", choices=("full", "small"), default="full", help="small: a minute, on any machine")
    parser.add_argument("--again", default="", help="results to measure again, comma-separated, or failed")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the JSON files")
    parser.add_argument("--folder", default="runs/gpu", help="of the step's random weights")
    parser.add_argument("--describe", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse(argv)
    if flags.describe:
        print(json.dumps(describe()))
        return
    ends += flags.budget
    every = measurements(flags.size, flags.folder)
    names = [name for one in every for name in one.results]
    again = {name for name in flags.again.split(",") if name}
    if unknown := again - {*names, "failed"}:
        raise UserError(f"--again: {min(unknown)}: no such result{cli.nearest(min(unknown), names)}")
    machine = _described()
    kept = Results(flags.results, machine, flags.size, names)
    left = []
    for one in every:
        missing = [name for name in one.results if not kept.has(name, again)]
        while missing:
            seconds = ends - time.monotonic()
            estimate = one.estimate * (1 + len(missing)) / (1 + len(one.results))
            if lacks := [need for need in one.needs if not _has(need, machine)]:
                found = iter([(name, {"skipped": f"no {lacks[0]}"}) for name in missing])
            elif estimate > seconds:
                left.append(f"{', '.join(missing)} ({estimate:.0f} s)")
                break
            else:
                found = measure(one, missing, seconds)
            for name, result in found:
                kept.add(name, result)
                missing.remove(name)
    print(f"results: {kept.file}")
    if left:
        print(f"left: {'; '.join(left)}. The same command goes on.")


def measure(one: Measurement, names: Sequence[str], left: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Runs it for at most `left` seconds; (name, result) of `names` up to the first that failed."""
    limit = min(left, _PATIENCE * one.estimate)
    command = [*one.command, *([f"--stages={','.join(names)}"] if one.stages else [])]
    began = time.monotonic()
    found, why, is_up = children.run([str(HERE / command[0]), *command[1:]], limit)
    if is_up and limit == left:
        failed = {"skipped": f"{why}, the end of the budget"}
    else:
        failed = {"error": why or "it wrote no result"}
    shared = {"command": f"python benchmarks/{' '.join(command)}", "wall_seconds": time.monotonic() - began}
    for name in list(names):
        result = found.get(name) if one.stages else found
        yield name, {**(result or failed), **shared}
        if not result:
            return  # those after it have not been tried


class Results:
    """The JSON file of a device: {"device": ..., "size": ..., "results": [{"name": ...}, ...]}.

    A result has "error", "skipped", or "seconds" with what else its benchmark says of it.
    """

    def __init__(self, folder: Path, machine: Mapping[str, Any], size: str, order: Sequence[str]) -> None:
        slug = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
        self.file = folder / f"{slug}{'' if size == 'full' else '-small'}.json"
        known = json.loads(self.file.read_text())["results"] if self.file.is_file() else []
        self._found: dict[str, dict[str, Any]] = {name: {} for name in order} | {one["name"]: one for one in known}
        self._machine, self._size = machine, size

    def has(self, name: str, again: set[str]) -> bool:
        """Whether a result need not be measured; what was skipped is tried every time."""
        found = self._found[name]
        wrong = "error" in found and "failed" in again
        return bool(found) and "skipped" not in found and name not in again and not wrong

    def add(self, name: str, found: Mapping[str, Any]) -> None:
        """Keeps a result, and says it."""
        result = {"name": name, **found, "versions": self._machine["versions"]}
        # A peer does what ours does.
        tflop = found.get("tflop") or self._found.get(f"{name.partition('/')[0]}/xla", {}).get("tflop")
        if tflop and "seconds" in found:
            result["tflop"] = tflop
            if peak := self._machine["flops"]:
                result["share_of_peak"] = tflop * 1e12 / found["seconds"] / peak
        self._found[name] = result
        header = {"device": self._machine["device"], "chip": self._machine["chip"], "size": self._size}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.file, {**header, "results": [one for one in self._found.values() if one]})
        said = f"{found['seconds']:.4g} s" if "seconds" in found else found.get("error") or found["skipped"]
        print(f"{name}: {said}", flush=True)


def _has(need: str, machine: Mapping[str, Any]) -> bool:
    return machine["platform"] == "gpu" if need == "gpu" else importlib.util.find_spec(need) is not None


def _described() -> dict[str, Any]:
    """What `describe` says, of a process that gives the device back."""
    done = subprocess.run([sys.executable, __file__, "--describe"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"JAX finds no device: {children.last_line(done.stderr, done.returncode)}; install jax for it")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def describe() -> dict[str, Any]:
    """The first device, the peak of its data sheet, and versions."""
    import jax
    from measuring import chip_of, versions

    device = jax.devices()[0]
    chip = chip_of(device)
    known = {"chip": chip and chip.name, "flops": chip and chip.flops, "platform": device.platform}
    return {"device": device.device_kind, **known, "versions": versions()}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended too
    cli.run(main)
