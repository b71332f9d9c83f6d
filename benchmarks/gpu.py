"""Everything about speed that is to be measured on one GPU, the most important first, in one command.

    python benchmarks/gpu.py [--budget=540] [--size=small] [--again=NAME,NAME|failed] [--results=DIR] [--folder=DIR]

Every measurement is a process of its own: one that fails or hangs ends alone, and its error is recorded. One is started
only where its estimate fits into what is left of the budget. Results go to DIR/NAME-OF-THE-DEVICE.json after each, and the
same command goes on where the last one ended. Weights are random: nothing is downloaded, and what a machine lacks is
skipped. The step writes 21 GB into --folder. `python benchmarks/report.py` makes docs/speed.md of the results.
"""

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

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
      estimate: seconds on an H100, compilation included.
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
    full = size == "full"
    found = []
    compiled = []
    for name, model in (("unet", "modelscope"), ("wan", "wan")):
        small = () if full else ("--small", "--videos=1", "--frames=5", "--size=32", "--repeats=2")
        call = ("denoiser.py", f"--model={model}", *small)
        peer = (*call, "--peer_alone", "--peer=eager")
        found += [
            Measurement(f"{name}/xla", call, 80),
            Measurement(f"{name}/cudnn", (*call, "--attention=cudnn"), 80, ("gpu",)),
            Measurement(f"{name}/diffusers", peer, 50, _PEER),
        ]
        compiled.append(
            Measurement(f"{name}/diffusers compiled", (*call, "--peer_alone", "--peer=compiled"), 150, (*_PEER, "gpu"))
        )
    if full:
        job = ("--config=configs/vpo.py:modelscope", "--config.reward.scorers=videoscore")
        job += ("--config.train.prompts_per_step=2", "--config.rollout.microbatch=4", "--config.train.microbatch=2")
        shapes, scorer = ("--config.model.path=modelscope",), "score videoscore"
        steps = (f"--folder={folder}", *job[:1], *job[2:], "--config.train.steps=3")
    else:
        job, shapes, scorer = ("--config=configs/vpo.py:tiny", "--repeats=1"), (), "score shapes"
        steps = (f"--folder={folder}", "--size=small", job[0])
    stages = ("rollout", "decode", scorer, "errors", "update")
    return [
        *found,
        Measurement("stages", ("stages.py", *job, *shapes), 240, _JOB, stages),
        Measurement("step", ("full_size.py", "--only_steps", *steps), 240, _STEP),
        *compiled,
    ]


def main(argv: Sequence[str]) -> None:
    """Measures what is not measured yet, within the budget."""
    began = time.monotonic()
    parser = cli.Parser("benchmarks.gpu", (__doc__ or "").partition("\n")[0])
    parser.add_argument("--budget", type=float, default=540, help="seconds of all of it")
    parser.add_argument("--size", choices=("full", "small"), default="full", help="small: seconds, on any machine")
    parser.add_argument("--again", default="", help="results to measure again, comma-separated; failed: those with errors")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the JSON files")
    parser.add_argument("--folder", default="runs/gpu", help="of the step's random weights")
    parser.add_argument("--describe", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse(argv)
    if flags.describe:
        print(json.dumps(describe()))
        return
    every = measurements(flags.size, flags.folder)
    again = {name for name in flags.again.split(",") if name}
    if unknown := again - {*_names(every), "failed"}:
        raise UserError(f"--again: {min(unknown)}: no such result{cli.nearest(min(unknown), _names(every))}")
    machine = _described()
    slug = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-") + ("" if flags.size == "full" else "-small")
    file = flags.results / f"{slug}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(file.read_text())["results"] if file.is_file() else []
    results = {found["name"]: found for found in known}
    header = {name: machine[name] for name in ("device", "chip", "platform")} | {"size": flags.size}

    def place(found: Mapping[str, Any]) -> int:
        names = _names(every)
        return names.index(found["name"]) if found["name"] in names else len(names)

    def keep(name: str, found: Mapping[str, Any]) -> None:
        results[name] = {"name": name, **found, "versions": machine["versions"]}
        write_json(file, {**header, "results": sorted(results.values(), key=place)})
        print(f"{name}: {_said(results[name])}", flush=True)

    left = []
    for one in every:
        tried: set[str] = set()
        while missing := [name for name in one.results if name not in tried and not _done(results.get(name), name, again)]:
            if lacks := [need for need in one.needs if not _has(need, machine)]:
                for name in missing:
                    keep(name, {"skipped": f"{lacks[0]} is not there"})
                break
            seconds = flags.budget - (time.monotonic() - began)
            estimate = one.estimate * (1 + len(missing)) / (1 + len(one.results))
            if estimate > seconds:
                left.append(f"{', '.join(missing)} ({estimate:.0f} s)")
                break
            for name, found in measure(one, missing, seconds):
                tried.add(name)
                keep(name, found | _share(found, results.get(f"{name.partition('/')[0]}/xla", {}), machine["flops"]))
    print(f"results: {file}")
    if left:
        print(f"left: {'; '.join(left)}. The same command goes on.")


def measure(one: Measurement, names: Sequence[str], left: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Runs it for at most `left` seconds; (name, result) of `names` up to the first that failed."""
    limit = min(left, _PATIENCE * one.estimate)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        output, log = Path(folder, "found.json"), Path(folder, "log")
        flags = [f"--stages={','.join(names)}"] if one.stages else []
        command = [sys.executable, str(HERE / one.command[0]), *one.command[1:], *flags]
        environment = {"CUDA_VISIBLE_DEVICES": "0", **os.environ, "JAX_TRACEBACK_FILTERING": "off"}
        with log.open("w") as errors:
            process = subprocess.Popen(
                [*command, f"--output={output}"], stdout=errors, stderr=errors, env=environment, process_group=0
            )
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _kill(process)
        found = json.loads(output.read_text()) if output.is_file() else {}
        shared = {"command": " ".join(["python", f"benchmarks/{one.command[0]}", *one.command[1:], *flags])}
        shared["wall_seconds"] = time.monotonic() - began
        why = {"error": _last_line(log.read_text(errors="replace"), code)}
        if code is None:
            ended = limit < _PATIENCE * one.estimate
            why = {"skipped" if ended else "error": f"stopped after {limit:.0f} s" + ended * ", the end of the budget"}
        for name in names:
            measured = found.get(name) if one.stages else found
            yield name, {**(measured or why), **shared}
            if not measured:
                return  # what would have come after it


def _share(found: Mapping[str, Any], sibling: Mapping[str, Any], peak: float | None) -> dict[str, float]:
    """FLOPs, of a peer those that ours needs for the same, and their share of the device's peak."""
    tflop = found.get("tflop") or sibling.get("tflop")
    if not tflop or "seconds" not in found:
        return {}
    return {"tflop": tflop} | ({"share_of_peak": tflop * 1e12 / found["seconds"] / peak} if peak else {})


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends it and what it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # all have ended
        pass
    process.wait()


def _last_line(log: str, code: int | None) -> str:
    """The last line that says what went wrong."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    said = [line for line in lines if re.match(r"([\w.]*(Error|Exception|Interrupt|Exit)|error)\b", line)]
    if code is not None and code < 0 and not said:
        return f"ended by {signal.Signals(-code).name}"
    return (said or lines or [f"exit code {code}"])[-1][:300]


def _names(every: Sequence[Measurement]) -> list[str]:
    return [name for one in every for name in one.results]


def _done(found: Mapping[str, Any] | None, name: str, again: set[str]) -> bool:
    """Whether a result need not be measured; what was skipped is tried every time."""
    if found is None or "skipped" in found or name in again:
        return False
    return not ("error" in found and "failed" in again)


def _said(found: Mapping[str, Any]) -> str:
    for word in ("skipped", "error"):
        if word in found:
            return f"{word}: {found[word]}"
    share = f", {found['share_of_peak']:.1%} of the peak" if "share_of_peak" in found else ""
    return f"{found['seconds']:.4g} s{share}"


def _has(need: str, machine: Mapping[str, Any]) -> bool:
    return machine["platform"] == "gpu" if need == "gpu" else importlib.util.find_spec(need) is not None


def _described() -> dict[str, Any]:
    """What `describe` says, of a process that gives the device back."""
    done = subprocess.run([sys.executable, __file__, "--describe"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"JAX finds no device: {_last_line(done.stderr, done.returncode)}; install jax for your GPU")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def describe() -> dict[str, Any]:
    """The first device, what its data sheet says, and versions."""
    import jax
    from measuring import chip_of, versions

    device = jax.devices()[0]
    chip = chip_of(device)
    return {
        "device": device.device_kind,
        "chip": chip and chip.name,
        "flops": chip and chip.flops,
        "platform": device.platform,
        "versions": versions(),
    }


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended too
    cli.run(main)
