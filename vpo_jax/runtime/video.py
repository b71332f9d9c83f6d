"""Video files: mp4 and animated WebP out; mp4, GIF, WebP and npy in."""

import contextlib
import io
import re
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
from PIL import Image

from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.file_kinds import HEAD, known_stand_in
from vpo_jax.runtime.paths import user_path

SUFFIXES = (".mp4", ".mov", ".webm", ".mkv", ".avi", ".gif", ".webp", ".npy")
# Smaller videos are shown enlarged: players blur them, and 32 pixels are hardly visible on a screen.
LEAST_SIZE = 128
_PPM = re.compile(rb"P6\n(\d+) (\d+)\n255\n")


def enlarge(video: np.ndarray, least: int = LEAST_SIZE) -> np.ndarray:
    """Every pixel repeated k x k, with the smallest k for which the shorter side has `least` pixels.

    uint8 [F, H, W, 3] -> uint8 [F, kH, kW, 3]; `video[:, ::k, ::k]` undoes it.
    """
    factor = -(-least // min(video.shape[1:3]))
    return video.repeat(factor, axis=1).repeat(factor, axis=2) if factor > 1 else video


def write_mp4(path: str | Path, video: np.ndarray, fps: int = 8) -> None:
    """H.264 that every browser plays, from uint8 [F, H, W, 3]; small videos are enlarged, odd sides get a pixel."""
    video = enlarge(_checked(video))
    odd = [(0, side % 2) for side in video.shape[1:3]]
    even = np.pad(video, [(0, 0), *odd, (0, 0)], mode="edge")
    path = _folder_made(path)
    try:
        with _ffmpeg():
            iio.imwrite(path, even, fps=fps, codec="libx264", quality=8, macro_block_size=2, plugin="FFMPEG")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def write_webp(path: str | Path, video: np.ndarray, fps: int = 8) -> None:
    """Animated WebP without loss, from uint8 [F, H, W, 3]; small videos are enlarged."""
    _write(path, webp_bytes(video, fps))


def webp_bytes(video: np.ndarray, fps: int = 8) -> bytes:
    """What `write_webp` writes."""
    frames = [Image.fromarray(frame) for frame in enlarge(_checked(video))]
    data = io.BytesIO()
    # Milliseconds a frame, 0 loops for ever.
    looped = {"save_all": True, "append_images": frames[1:], "duration": round(1000 / fps), "loop": 0}
    frames[0].save(data, "WEBP", lossless=True, method=4, **looped)
    return data.getvalue()


def read_video(path: str | Path) -> np.ndarray:
    """The frames that are in a video file, each once, turned as its metadata says: uint8 [F, H, W, 3].

    A .npy file holds uint8 [F, H, W, 3], or floats in [0, 1]. Raises UserError for what is not a readable video.
    """
    path = user_path(path, "video")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with path.open("rb") as file:
        if kind := known_stand_in(path, file.read(HEAD)):
            raise UserError(f"{path}: is {kind}")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: not a video file; give one of {', '.join(SUFFIXES)}")
    try:
        if path.suffix.lower() == ".npy":
            return _from_array(path, np.load(path, allow_pickle=False))
        if path.suffix.lower() in (".gif", ".webp"):
            _refuse_truncated(path)
            with Image.open(path) as image:
                return np.stack([_frame(image, i) for i in range(getattr(image, "n_frames", 1))])
        return _decoded(path)
    except (OSError, ValueError, EOFError, RuntimeError, IndexError, Image.DecompressionBombError) as error:
        reason = next(iter(str(error).splitlines()), "damaged")
        raise UserError(f"{path}: cannot be read as a video ({reason})") from error


def _refuse_truncated(path: Path) -> None:
    """Raises OSError for an animation whose end is missing: Pillow would read the rest without an error."""
    data = path.read_bytes()
    whole = data.rstrip(b"\0").endswith(b";")
    if data[:4] == b"RIFF":
        whole = len(data) >= int.from_bytes(data[4:8], "little") + 8
    if not whole:
        raise OSError("truncated")


def _decoded(path: Path) -> np.ndarray:
    """What ffmpeg decodes: uint8 [F, H, W, 3].

    `passthrough` writes each decoded frame once; without it ffmpeg repeats and drops frames of a variable rate until
    the rate is constant. An error in the middle of a file is raised; ffmpeg's default keeps the frames before it.
    """
    source = ["-nostdin", "-loglevel", "error", "-xerror", "-err_detect", "explode", "-i", f"file:{path}"]
    # PPM frames carry their size, which is hard to predict where the stream is rotated or changes its size.
    raw = ["-map", "0:v:0", "-fps_mode", "passthrough", "-pix_fmt", "rgb24", "-c:v", "ppm", "-f", "image2pipe", "-"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), *source, *raw]
    with _ffmpeg():
        done = subprocess.run(command, capture_output=True, check=False)
    said = done.stderr.decode(errors="replace").strip().splitlines()
    if done.returncode or said:
        raise OSError(said[-1] if said else f"ffmpeg ended with {done.returncode}")
    frames = list(_portable_pixmaps(done.stdout))
    if not frames:
        raise OSError("it has no frames")
    if any(frame.shape != frames[0].shape for frame in frames):
        raise OSError("its frames change their size")
    return np.stack(frames)


def _portable_pixmaps(data: bytes) -> Iterator[np.ndarray]:
    """Pictures [H, W, 3] of concatenated binary PPM files."""
    place = 0
    while place < len(data):
        header = _PPM.match(data, place)
        if header is None:
            raise OSError("ffmpeg gave no picture")
        width, height = int(header[1]), int(header[2])
        pixels = np.frombuffer(data, np.uint8, width * height * 3, header.end())
        yield pixels.reshape(height, width, 3)
        place = header.end() + pixels.size


@contextlib.contextmanager
def _ffmpeg() -> Iterator[None]:
    """Silences JAX's warning about a fork: imageio starts ffmpeg as a program, and the child runs nothing else."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called", category=RuntimeWarning)
        yield


def _frame(image: Image.Image, index: int) -> np.ndarray:
    image.seek(index)
    return np.asarray(image.convert("RGB"))


def _from_array(path: Path, video: np.ndarray) -> np.ndarray:
    if video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
        raise UserError(f"{path}: shape {list(video.shape)} is not a video; save an array [frames, height, width, 3]")
    if video.dtype == np.uint8:
        return video
    if np.issubdtype(video.dtype, np.floating) and np.nanmin(video) >= 0 and np.nanmax(video) <= 1:
        return np.round(video * 255).astype(np.uint8)
    raise UserError(f"{path}: {video.dtype} is not a video; save uint8, or floats between 0 and 1")


def _checked(video: np.ndarray) -> np.ndarray:
    video = np.asarray(video)
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3:
        raise ValueError(f"a video is uint8 [F, H, W, 3], not {video.dtype} {list(video.shape)}")
    return video


def _folder_made(path: str | Path) -> Path:
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be created: {error.strerror}; choose another folder") from error
    return path


def _write(path: str | Path, data: bytes) -> None:
    try:
        _folder_made(path).write_bytes(data)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
