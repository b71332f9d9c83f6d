import subprocess

import imageio_ffmpeg
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


def ffmpeg(*arguments):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", *map(str, arguments)]
    subprocess.run(command, check=True)


def write_gif(path, video):
    first, *rest = [Image.fromarray(frame) for frame in video]
    first.save(path, save_all=True, append_images=rest, duration=100)


def gray_levels(video):
    return [round(float(frame.mean())) for frame in video]


LEVELS = [20, 45, 70, 95, 120, 145, 170, 195]


@pytest.fixture
def pictures(tmp_path):
    for i, level in enumerate(LEVELS):
        Image.fromarray(np.full((66, 98, 3), level, np.uint8)).save(tmp_path / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("name", ["vfr.mp4", "vfr.mkv", "vfr.webm"])
def test_a_video_of_variable_frame_rate_has_the_frames_that_are_in_it(pictures, name):
    # One frame is shown for a second, the others for a tenth of it.
    lines = [f"file '{i}.png'\nduration {1.0 if i == 3 else 0.1}\n" for i in range(8)]
    (pictures / "list.txt").write_text("".join(lines) + "file '7.png'\n")
    codec = ["libvpx-vp9", "-lossless", 1] if name.endswith("webm") else ["libx264", "-crf", 1]
    ffmpeg(
        "-f", "concat", "-i", pictures / "list.txt", "-fps_mode", "vfr", "-frames:v", 8,
        "-c:v", *codec, "-pix_fmt", "yuv420p", pictures / name,
    )  # fmt: skip
    np.testing.assert_allclose(gray_levels(read_video(pictures / name)), LEVELS, atol=2)


@pytest.mark.parametrize("rate", [1, 7.5, 24, 29.97, 120])
def test_no_frame_is_repeated_or_dropped_at_any_rate(pictures, rate):
    ffmpeg(
        "-r", rate, "-i", pictures / "%d.png", "-c:v", "libx264", "-crf", 1, "-pix_fmt", "yuv420p", pictures / "a.mp4"
    )
    np.testing.assert_allclose(gray_levels(read_video(pictures / "a.mp4")), LEVELS, atol=2)


@pytest.mark.parametrize(("degrees", "red_side"), [(90, "left"), (180, "bottom"), (270, "right")])
def test_a_video_is_turned_as_its_metadata_says(tmp_path, degrees, red_side):
    video = np.zeros((3, 128, 192, 3), np.uint8)
    video[:, :64, :, 0] = 255  # the upper half is red
    write_mp4(tmp_path / "plain.mp4", video)
    ffmpeg("-display_rotation", degrees, "-i", tmp_path / "plain.mp4", "-c", "copy", tmp_path / "turned.mp4")
    turned = read_video(tmp_path / "turned.mp4")
    assert turned.shape == ((3, 128, 192, 3) if degrees == 180 else (3, 192, 128, 3))
    red = turned[0, ..., 0] > 128
    sides = {"left": red[:, :64], "right": red[:, 64:], "bottom": red[-64:], "top": red[:64]}
    assert sides[red_side].mean() > 0.95


def test_odd_sizes_and_transparency_are_read(tmp_path):
    source = "color=c=red@0.5:s=97x65:r=8:d=0.5,format=yuva420p"
    ffmpeg("-f", "lavfi", "-i", source, "-c:v", "libvpx-vp9", tmp_path / "alpha.webm")
    assert read_video(tmp_path / "alpha.webm").shape == (4, 65, 97, 3)
    Image.fromarray(np.zeros((5, 7, 3), np.uint8)).save(tmp_path / "one.gif")
    assert read_video(tmp_path / "one.gif").shape == (1, 5, 7, 3)


@pytest.mark.parametrize("name", ["a.mp4", "fast.mp4", "a.webm", "a.mkv", "a.gif", "a.webp"])
@pytest.mark.parametrize("share", [0.4, 0.8, 0.97])
def test_a_file_that_is_cut_short_is_named_and_not_read_in_part(tmp_path, name, share):
    path, video = tmp_path / name, np.random.default_rng(0).integers(0, 256, (12, 128, 128, 3), np.uint8)
    if name.endswith((".gif", ".webp")):
        (write_gif if name.endswith("gif") else write_webp)(path, video)
    else:
        write_mp4(tmp_path / "source.mp4", video)
        codec = (
            ["-c:v", "libvpx-vp9", "-crf", 30, "-b:v", 0, "-cpu-used", 8] if name.endswith("webm") else ["-c", "copy"]
        )
        flags = ["-movflags", "faststart"] if name == "fast.mp4" else []
        ffmpeg("-i", tmp_path / "source.mp4", *codec, *flags, path)
    assert len(read_video(path)) == 12
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(UserError, match=rf"{name}: cannot be read as a video"):
        read_video(path)


def test_a_git_lfs_pointer_in_place_of_a_video_says_how_to_fetch_it(tmp_path):
    (tmp_path / "a.mp4").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match=r"git-lfs pointer.* lfs pull"):
        read_video(tmp_path / "a.mp4")
