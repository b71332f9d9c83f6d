"""The whole pipeline against diffusers' WanPipeline: the same folder, prompts and initial latents."""

import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

import vpo_jax  # noqa: E402
from tests.families.wan import tiny  # noqa: E402

PROMPTS = ["a small red circle moving left", 'two "quoted" words &amp; an émoji 🙂  with   spaces']
STEPS, FRAMES = 4, 9
SIZES = {"2.1": (32, 48), "a14b": (32, 48), "5b": (32, 64)}
# Of values before rounding, in [0, 1]: float32 in two libraries, through some steps and a decoder.
BEFORE_ROUNDING = 2e-4
ROUNDED_DIFFERENTLY = 0.005


@functools.cache
def folder_of(kind, scheduler, root):
    folder = root / f"{kind}-{scheduler}"
    tiny.pipeline(kind, scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("wan")


def initial(pipe, kind):
    height, width = SIZES[kind]
    shape = pipe.latent_shape(FRAMES, height, width)
    return np.random.default_rng(5).normal(size=(len(PROMPTS), *shape)).astype(np.float32)


def both(kind, scheduler, guidance, root, guidance_2=None):
    folder = folder_of(kind, scheduler, root)
    pipe = vpo_jax.load_pipeline(folder)
    latents = initial(pipe, kind)
    height, width = SIZES[kind]
    ours = pipe(
        PROMPTS, FRAMES, height, width, STEPS, guidance, negative_prompt="blurry", latents=latents,
        guidance_scale_2=guidance_2,
    )  # fmt: skip
    theirs = tiny.WanPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    more = {} if guidance_2 is None else {"guidance_scale_2": guidance_2}
    with torch.no_grad():
        frames = theirs(
            PROMPTS, negative_prompt="blurry", height=height, width=width, num_frames=FRAMES,
            num_inference_steps=STEPS, guidance_scale=guidance, output_type="np", **more,
            latents=torch.from_numpy(np.ascontiguousarray(latents.transpose(0, 4, 1, 2, 3))),
        ).frames  # fmt: skip
    return ours, np.asarray(frames)


def check_same(ours, theirs):
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.05, "the videos show something"
    rounded = np.round(theirs * 255).astype(np.uint8)
    difference = np.abs(ours.astype(int) - rounded.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < ROUNDED_DIFFERENTLY


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("scheduler", ["unipc", "euler"])
@pytest.mark.parametrize("kind", ["2.1", "a14b", "5b"])
@pytest.mark.slow
def test_videos_equal_diffusers(kind, scheduler, guidance, root):
    check_same(*both(kind, scheduler, guidance, root))


@pytest.mark.slow
def test_two_experts_have_two_guidance_scales(root):
    ours, theirs = both("a14b", "unipc", 4.0, root, guidance_2=2.0)
    check_same(ours, theirs)
    one, _ = both("a14b", "unipc", 4.0, root)
    assert np.abs(one.astype(int) - ours.astype(int)).max() > 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["2.1", "a14b", "5b"])
def test_a_folder_that_is_written_is_read_alike_by_both(kind, root, tmp_path):
    pipe = vpo_jax.load_pipeline(folder_of(kind, "unipc", root))
    pipe.save_pretrained(tmp_path / "copy")
    theirs = tiny.WanPipeline.from_pretrained(tmp_path / "copy")
    first = tiny.WanPipeline.from_pretrained(folder_of(kind, "unipc", root))
    for name in ("transformer", "transformer_2", "vae", "text_encoder"):
        one, other = getattr(first, name), getattr(theirs, name)
        assert (one is None) == (other is None)
        if one is not None:
            state = other.state_dict()
            assert all(torch.equal(value, state[key]) for key, value in one.state_dict().items()), name
    assert theirs.config.boundary_ratio == first.config.boundary_ratio
    assert theirs.config.expand_timesteps == first.config.expand_timesteps
    prompts = [*PROMPTS, "", "a large unknownword 漢字"]
    ids = theirs.tokenizer(prompts, padding="max_length", max_length=512, return_tensors="np").input_ids
    np.testing.assert_array_equal(
        ids, first.tokenizer(prompts, padding="max_length", max_length=512, return_tensors="np").input_ids
    )
    again = vpo_jax.load_pipeline(tmp_path / "copy")
    latents, (height, width) = initial(pipe, kind), SIZES[kind]
    same = [p(PROMPTS, FRAMES, height, width, 2, latents=latents) for p in (pipe, again)]
    np.testing.assert_array_equal(*same)
