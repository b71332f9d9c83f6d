"""The whole pipeline against diffusers' TextToVideoSDPipeline: the same folder, prompts and initial latents."""

import functools

import jax
import numpy as np
import pytest

import vpo_jax.pipeline as ours
from vpo_jax.checkpoints.peft import write_adapter
from vpo_jax.models.lora import LoRAConfig, init_lora, merge_lora

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

PROMPTS = ["a small red circle moving left", 'two "quoted" words, <b>HTML</b> and an émoji 🙂']
NEGATIVE = "blurry"
FRAMES, HEIGHT, WIDTH, STEPS, GUIDANCE = 5, 16, 24, 7, 5.0

# Torch against itself, oneDNN on and off, differs by up to 3e-5 before rounding, and in up to 0.1 % of the
# uint8 values by one level. These limits leave room for another order of summation and for nothing else.
BEFORE_ROUNDING = 2e-4
ROUNDED_DIFFERENTLY = 0.005

SCHEDULES = {
    "modelscope": {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    },
    "v prediction": {
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "v_prediction",
        "clip_sample": False,
        "timestep_spacing": "trailing",
    },
}


def byte_vocabulary():
    """CLIP's alphabet: each byte as a printable character, alone and at the end of a word."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    return {word: i for i, word in enumerate(words)}


def randomise(model, seed):
    """Random numbers of a natural size in every parameter: some are zero at first and would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
            parameter.copy_(noise / fan_in**0.5 + (1.0 if parameter.ndim == 1 else 0.0))
    return model.eval()


def make_torch_pipeline(schedule):
    vocabulary = byte_vocabulary()
    text_encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=20,
            intermediate_size=28,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            hidden_act="gelu",
            bos_token_id=512,
            eos_token_id=513,
        )
    )
    unet = diffusers.UNet3DConditionModel(
        sample_size=(HEIGHT // 4, WIDTH // 4),
        block_out_channels=(8, 16),
        down_block_types=("DownBlock3D", "CrossAttnDownBlock3D"),
        up_block_types=("CrossAttnUpBlock3D", "UpBlock3D"),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=4,
        cross_attention_dim=20,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        scaling_factor=0.7,
    )
    pipe = diffusers.TextToVideoSDPipeline(
        vae=randomise(vae, 0),
        text_encoder=randomise(text_encoder, 1),
        tokenizer=transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=19),
        unet=randomise(unet, 2),
        scheduler=diffusers.DDIMScheduler(**schedule),
    )
    # A bias of one on every channel is brightness: without it the middle of the range is used.
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.zero_()
        pipe.vae.decoder.conv_out.weight.mul_(0.2)
        pipe.unet.conv_out.bias.zero_()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """By schedule: (torch pipeline, ours from the folder that it saved, that folder)."""

    @functools.cache
    def make(schedule):
        pipe = make_torch_pipeline(SCHEDULES[schedule])
        folder = tmp_path_factory.mktemp("torch") / "pipeline"
        pipe.save_pretrained(folder)
        return pipe, ours.load_pipeline(folder), folder

    return make


def latents():
    shape = (len(PROMPTS), FRAMES, HEIGHT // 4, WIDTH // 4, 4)
    return np.random.default_rng(3).normal(size=shape).astype(np.float32)


def torch_video(pipe, folder, sampler, guidance=GUIDANCE):
    """Frames in [0, 1] [B, F, H, W, 3] with the folder's scheduler_config.json read by the class `sampler`."""
    pipe.scheduler = getattr(diffusers, sampler).from_pretrained(folder, subfolder="scheduler")
    with torch.no_grad():
        return pipe(
            PROMPTS,
            num_frames=FRAMES,
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            negative_prompt=[NEGATIVE] * len(PROMPTS),
            latents=torch.from_numpy(latents()).permute(0, 4, 1, 2, 3),
            output_type="np",
        ).frames


def our_frames(pipe, sampler, guidance=GUIDANCE):
    """Frames in [0, 1], before they are rounded."""
    parts = pipe._generate(
        PROMPTS, FRAMES, HEIGHT, WIDTH, STEPS, guidance, NEGATIVE, sampler, 0, latents(), 0.0, len(PROMPTS)
    )
    return np.concatenate(parts)


def assert_same_video(frames, expected):
    assert frames.shape == expected.shape == (len(PROMPTS), FRAMES, HEIGHT, WIDTH, 3)
    inside = (expected > 0) & (expected < 1)
    assert inside.mean() > 0.5  # a clipped video would agree whatever the models did
    assert expected.std() > 0.05
    assert np.abs(frames - expected).max() <= BEFORE_ROUNDING
    levels = np.abs(np.round(frames * 255) - np.round(expected * 255))
    assert levels.max() <= 1
    assert (levels > 0).mean() < ROUNDED_DIFFERENTLY


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "sampler", "guidance"),
    [
        ("modelscope", "DDIMScheduler", GUIDANCE),
        ("modelscope", "DPMSolverMultistepScheduler", GUIDANCE),
        ("modelscope", "EulerDiscreteScheduler", GUIDANCE),
        ("modelscope", "UniPCMultistepScheduler", GUIDANCE),
        ("v prediction", "DDIMScheduler", 1.0),
    ],
)
def test_the_same_folder_and_latents_give_the_same_video(both, schedule, sampler, guidance):
    theirs, mine, folder = both(schedule)
    expected = torch_video(theirs, folder, sampler, guidance)
    assert_same_video(our_frames(mine, sampler, guidance), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.UniPCMultistepScheduler(beta_schedule="scaled_linear", beta_end=0.012, solver_order=3),
        diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ],
    ids=["variance preserving", "flow"],
)
def test_a_checkpoint_that_names_unipc_is_loaded_and_sampled_as_in_diffusers(both, tmp_path, scheduler):
    _, _, folder = both("modelscope")
    theirs = diffusers.TextToVideoSDPipeline.from_pretrained(folder, scheduler=scheduler)
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(tmp_path)
    mine = ours.load_pipeline(tmp_path)
    assert mine.process.prediction_type == scheduler.config.prediction_type
    assert_same_video(our_frames(mine, None), torch_video(theirs, tmp_path, "UniPCMultistepScheduler"))


@pytest.mark.slow
def test_what_is_saved_here_makes_the_same_video_in_diffusers(both, tmp_path):
    _, mine, _ = both("modelscope")
    rng = np.random.default_rng(5)
    nudged = jax.tree.map(lambda x: x + 0.05 * rng.normal(size=x.shape).astype(x.dtype), mine.trainable)
    tuned = mine.with_trainable(nudged)
    tuned.save_pretrained(tmp_path)
    loaded = diffusers.TextToVideoSDPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    frames = our_frames(tuned, None)
    assert_same_video(frames, torch_video(loaded, tmp_path, "DDIMScheduler"))
    assert np.abs(frames - our_frames(mine, None)).max() > 0.01  # the change is in it


def test_an_adapter_makes_the_same_video_in_diffusers_as_merged_here(both, tmp_path):
    peft = pytest.importorskip("peft")
    _, mine, folder = both("modelscope")
    lora, rng = LoRAConfig(rank=3, alpha=6.0, targets=mine.family.lora_targets), np.random.default_rng(6)
    adapters = init_lora(jax.random.key(0), mine.trainable, lora)
    adapters = jax.tree.map(lambda x: rng.normal(scale=0.2, size=x.shape).astype(np.float32), adapters)
    write_adapter(tmp_path / "adapter", adapters, lora, str(folder))
    pipe = diffusers.TextToVideoSDPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet = peft.PeftModel.from_pretrained(pipe.unet, tmp_path / "adapter")
    merged = merge_lora(mine.trainable, adapters, lora.scale)
    tuned = mine.with_trainable(merged)
    frames = our_frames(tuned, None)
    assert_same_video(frames, torch_video(pipe, folder, "DDIMScheduler"))
    assert np.abs(frames - our_frames(mine, None)).max() > 0.01  # the adapter is in it
