"""Preprocessing inside jit against transformers' Idefics2ImageProcessorPil, on noise."""

import jax
import numpy as np
import PIL
import pytest
from PIL import Image

from vpo_jax.rewards.frames import prepare_frames, resize, resize_taps
from vpo_jax.rewards.videoscore.frames import FrameSettings
from vpo_jax.runtime.errors import UserError

transformers = pytest.importorskip("transformers")

# height, width of a video -> what Idefics2 makes of it with a shortest side of 60 and a longest of 150
SIZES = [(32, 32), (60, 96), (41, 77), (77, 311), (150, 60), (61, 149), (301, 300)]
if int(PIL.__version__.split(".")[0]) >= 13:
    SIZES += [(200, 90), (311, 40)]  # where Pillow 12 has its passes in another order
VALUES = {
    "size": {"shortest_edge": 60, "longest_edge": 150},
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.5, 0.25, 1],
}


def noise(height, width, frames=2):
    return np.random.default_rng(height * width).integers(0, 256, (frames, height, width, 3), np.uint8)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_frames_equal_the_image_processor(height, width):
    video = noise(height, width)
    processor = transformers.Idefics2ImageProcessorPil(**VALUES)
    expected = processor([[Image.fromarray(frame) for frame in video]], return_tensors="np")["pixel_values"][0]
    settings = FrameSettings.from_dict(processor.to_dict())
    value = np.asarray(jax.jit(lambda frames: prepare_frames(settings, frames))(video))
    assert value.shape == expected.transpose(0, 2, 3, 1).shape
    # The resize is equal to the bit; what follows is float32 rounding of values up to 4.
    np.testing.assert_allclose(value, expected.transpose(0, 2, 3, 1), rtol=0, atol=2e-6)


def test_full_size_frames_equal_pillow_to_the_bit():
    for old, new in [((256, 256), (378, 378)), ((320, 576), (378, 576)), ((720, 1280), (551, 980))]:
        video = noise(*old, frames=1)
        expected = np.asarray(Image.fromarray(video[0]).resize(new[::-1], Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(jax.jit(lambda x, new=new: resize(x, *new))(video)[0], expected)


@pytest.mark.parametrize(
    ("height", "width"), [(256, 256), (320, 576), (1280, 720), (1000, 999), (378, 378), (2000, 100)]
)
def test_sizes_are_those_of_idefics2(height, width):
    processor = transformers.Idefics2ImageProcessorPil()
    settings = FrameSettings.from_dict(processor.to_dict())
    expected = processor([[Image.new("RGB", (width, height))]], return_tensors="np")["pixel_values"].shape[-2:]
    assert settings.output_size(height, width) == expected


@pytest.mark.parametrize(("old", "new"), [(3, 8), (8, 3), (97, 31), (5, 5), (1, 4)])
def test_weights_of_a_place_sum_to_one(old, new):
    indices, weights = resize_taps(old, new)
    assert (np.abs(weights.sum(0) - (1 << 22)) <= len(weights)).all()
    assert indices.min() >= 0 and indices.max() < old


def test_a_file_that_says_nothing_gives_the_values_of_videoscore():
    assert FrameSettings.from_dict({}) == FrameSettings(378, 980, 1 / 255, (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", {"height": 3, "width": 4}),
        ("size", 378),
        ("resample", 3),
        ("do_image_splitting", True),
        ("do_normalize", False),
        ("image_mean", [0.5, 0.5]),
        ("image_std", [0.5, 0.5, 0.0]),
        ("rescale_factor", "1/255"),
    ],
)
def test_a_setting_that_is_not_honoured_is_refused_by_name(field, value):
    with pytest.raises(UserError, match=rf"^preprocessor_config\.{field}: "):
        FrameSettings.from_dict({field: value})
