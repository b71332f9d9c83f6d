import io
import json

import numpy as np
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from vpo_jax.runtime.metrics import MetricsWriter, read_metrics


def events(directory):
    found = []
    for path in sorted(directory.glob("events.out.tfevents.*")):
        data, place = path.read_bytes(), 0
        while place < len(data):
            length = int.from_bytes(data[place : place + 8], "little")
            event = Event.FromString(data[place + 12 : place + 12 + length])
            found += [(event.step, value) for value in event.summary.value]
            place += length + 16
    return found


def test_a_step_is_a_line_and_a_point(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(3, {"reward/mean": np.float32(0.5), "loss/dpo": 0.25})
    assert read_metrics(tmp_path) == [{"step": 3, "reward/mean": 0.5, "loss/dpo": 0.25}]
    assert [(step, v.tag, v.simple_value) for step, v in events(tmp_path)] == [
        (3, "reward/mean", 0.5),
        (3, "loss/dpo", 0.25),
    ]
    writer.close()


def test_numbers_that_are_none_stay_valid_json(tmp_path):
    MetricsWriter(tmp_path, tensorboard=False).write(0, {"loss/dpo": float("nan"), "x": float("inf")})

    def refuse(name):
        raise AssertionError(name)

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 0, "loss/dpo": None, "x": None}
    assert not list(tmp_path.glob("events*"))


def test_a_video_is_an_animated_gif_of_the_same_frames(tmp_path):
    video = np.zeros((5, 12, 16, 3), np.uint8)
    video[:, :, :, 0] = np.arange(5)[:, None, None] * 50
    writer = MetricsWriter(tmp_path)
    writer.video(2, "samples/a", video)
    writer.close()
    ((step, value),) = events(tmp_path)
    gif = Image.open(io.BytesIO(value.image.encoded_image_string))
    assert (step, value.tag, gif.format, gif.size, gif.n_frames) == (2, "samples/a", "GIF", (16, 12), 5)
    gif.seek(3)
    assert np.array_equal(np.asarray(gif.convert("RGB")), video[3])


def test_cut_leaves_one_point_a_step_in_both(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in range(1, 6):
        writer.write(step, {"x": step})
    writer.close()
    resumed = MetricsWriter(tmp_path)
    resumed.truncate_after(3)
    for step in range(4, 6):
        resumed.write(step, {"x": 10 * step})
    resumed.close()
    assert [(m["step"], m["x"]) for m in read_metrics(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50)]
    assert sorted((step, v.simple_value) for step, v in events(tmp_path)) == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50)]


def test_what_a_kill_cut_short_goes(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in range(1, 4):
        writer.write(step, {"x": step})
    writer.close()
    (file,) = tmp_path.glob("events*")
    file.write_bytes(file.read_bytes()[:-3])
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 4, "x"')
    assert len(read_metrics(tmp_path)) == 3
    writer.truncate_after(10)
    assert [m["step"] for m in read_metrics(tmp_path)] == [1, 2, 3]
    assert [step for step, _ in events(tmp_path)] == [1, 2]


def test_cut_of_an_empty_directory_is_nothing(tmp_path):
    MetricsWriter(tmp_path).truncate_after(0)
    assert list(tmp_path.iterdir()) == [] and read_metrics(tmp_path) == []
