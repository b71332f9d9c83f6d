"""Metrics of a run: one JSON object a step in metrics.jsonl, and curves and videos for TensorBoard."""

import io
import json
import math
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary

from vpo_jax.runtime.files import write_bytes_atomically


class MetricsWriter:
    """Appends to metrics.jsonl and to TensorBoard's event files in a directory; a silent one writes nothing."""

    def __init__(self, directory: str | Path, tensorboard: bool = True, silent: bool = False) -> None:
        self._directory = Path(directory)
        self._lines = self._directory / "metrics.jsonl"
        self._tensorboard = tensorboard and not silent
        self._silent = silent
        self._events: EventsWriter | None = None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds the step's line, {"step": step, name: value, ...}, on the disk on return; NaN and inf become null."""
        if self._silent:
            return
        values = {name: float(value) for name, value in metrics.items()}
        line = {"step": int(step)} | {k: v if math.isfinite(v) else None for k, v in values.items()}
        with self._lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._add(step, [Summary.Value(tag=name, simple_value=value) for name, value in values.items()])

    def video(self, step: int, name: str, video: np.ndarray, fps: int = 8) -> None:
        """Shows a video, uint8 [F, H, W, 3], in TensorBoard's image tab as an animated GIF."""
        if self._tensorboard:
            height, width = video.shape[1:3]
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=_gif(video, fps))
            self._add(step, [Summary.Value(tag=name, image=image)])

    def truncate_after(self, step: int) -> None:
        """Removes what was written after `step` (the restored one), and an incomplete last line or event."""
        self.close()
        if self._silent:
            return
        if self._lines.exists():
            write_bytes_atomically(self._lines, "".join(_lines_until(self._lines, step)).encode())
        for path in self._directory.glob("events.out.tfevents.*"):
            write_bytes_atomically(path, b"".join(_events_until(path, step)))

    def close(self) -> None:
        """Closes the event file; a later write opens another."""
        if self._events is not None:
            self._events.close()
            self._events = None

    def _add(self, step: int, values: list[Summary.Value]) -> None:
        if not self._tensorboard:
            return
        if self._events is None:
            # The name has whole seconds only, and a second file of the same second would replace the first.
            self._events = EventsWriter(str(self._directory / "events"), f".{time.time_ns()}")
        # Written here and not through tensorboardX's queue, whose flush leaves out queued events.
        self._events.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self._events.flush()


def read_metrics(directory: str | Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl, in order; empty where there is none."""
    path = Path(directory) / "metrics.jsonl"
    return [json.loads(line) for line in _lines_until(path, None)] if path.exists() else []


def _lines_until(path: Path, step: int | None) -> Iterator[str]:
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            return
        if step is None or json.loads(line)["step"] <= step:
            yield line


def _events_until(path: Path, step: int) -> Iterator[bytes]:
    # TFRecord: length uint64, its checksum, the event, its checksum.
    data, place = path.read_bytes(), 0
    while place + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        end = place + 12 + length + 4
        if end > len(data):
            return
        if Event.FromString(data[place + 12 : end - 4]).step <= step:
            yield data[place:end]
        place = end


def _gif(video: np.ndarray, fps: int) -> bytes:
    frames = [Image.fromarray(frame) for frame in np.asarray(video)]
    data = io.BytesIO()
    frames[0].save(data, "GIF", save_all=True, append_images=frames[1:], duration=1000 // fps, loop=0)
    return data.getvalue()


def standard_error_of(name: str) -> str:
    """Name of the metric that holds the standard error of the metric `name`."""
    return f"standard_error/{name}"
