import numpy as np
import pytest
from PIL import Image

from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.video import enlarge, read_video, write_mp4, write_webp

VIDEO = np.kron(np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3)), np.ones((1, 8, 8, 1))).astype(np.uint8)


def test_small_videos_are_enlarged_by_whole_pixels():
    large = enlarge(VIDEO)
    assert large.shape == (5, 128, 192, 3)
    np.testing.assert_array_equal(large[:, ::4, ::4], VIDEO)
    assert enlarge(large) is large


def test_webp_comes_back_without_loss(tmp_path):
    write_webp(tmp_path / "new" / "video.webp", VIDEO)
    np.testing.assert_array_equal(read_video(tmp_path / "new" / "video.webp"), enlarge(VIDEO))


def test_every_frame_of_a_gif_is_read(tmp_path):
    frames = [Image.fromarray(frame) for frame in enlarge(VIDEO)]
    frames[0].save(tmp_path / "video.gif", "GIF", save_all=True, append_images=frames[1:])
    read = read_video(tmp_path / "video.gif")
    assert read.shape == enlarge(VIDEO).shape
    # 24 colours a frame fit into a palette of 256.
    assert np.abs(read.astype(int) - enlarge(VIDEO)).mean() < 4


@pytest.mark.parametrize("shape", [(5, 32, 48, 3), (3, 131, 133, 3), (1, 32, 32, 3), (2, 7, 200, 3)])
def test_mp4_keeps_frames_and_size_up_to_an_odd_pixel(tmp_path, shape):
    video = np.full(shape, 90, np.uint8)
    write_mp4(tmp_path / "video.mp4", video)
    read = read_video(tmp_path / "video.mp4")
    frames, height, width, _ = enlarge(video).shape
    assert read.shape == (frames, height + height % 2, width + width % 2, 3)
    # H.264 at this quality keeps a flat gray to a few levels.
    assert np.abs(read.astype(int) - 90).max() <= 4


def test_npy_videos_are_uint8_or_floats_between_0_and_1(tmp_path):
    np.save(tmp_path / "a.npy", VIDEO)
    np.save(tmp_path / "b.npy", VIDEO.astype(np.float32) / 255)
    np.testing.assert_array_equal(read_video(tmp_path / "a.npy"), VIDEO)
    np.testing.assert_array_equal(read_video(tmp_path / "b.npy"), VIDEO)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.mp4", None, "no such file"),
        ("text.txt", b"hello", "not a video file"),
        ("broken.mp4", b"not a video at all", "cannot be read"),
        ("broken.webp", b"RIFFxxxxWEBP", "cannot be read"),
        ("broken.npy", b"\x93NUMPY garbage", "cannot be read"),
        ("empty.gif", b"", "cannot be read"),
    ],
)
def test_what_is_not_a_video_is_refused_by_name(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_video(tmp_path / name)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4, 3), np.uint8), np.zeros((2, 4, 4, 3), np.int64), np.full((1, 2, 2, 3), 7.0)]
)
def test_an_array_that_is_no_video_is_refused(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(UserError, match=r"a\.npy"):
        read_video(tmp_path / "a.npy")


def test_a_pickled_array_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"a\.npy"):
        read_video(tmp_path / "a.npy")


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        write_webp(tmp_path / "file" / "video.webp", VIDEO)
