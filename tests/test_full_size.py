"""ModelScope's sizes, all 1.41 billion parameters: run by hand, `pytest -m full_size -s tests/test_full_size.py`."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.running import ROOT, lines
from vpo_jax.checkpoints import safetensors_io as io
from vpo_jax.checkpoints.folders import COMPONENTS, param_shapes
from vpo_jax.checkpoints.keys import from_torch, torch_key, torch_shape
from vpo_jax.diffusion.samplers import make_sampler
from vpo_jax.models.unet3d import UNet3DConditionModel, UNet3DConfig
from vpo_jax.planning.specs import MODELSCOPE
from vpo_jax.runtime.trees import flatten
from vpo_jax.shapes.tokenizer import make_tokenizer
from vpo_jax.training.rollout import make_rollout

FRAMES, SIDE, STEPS, GUIDANCE = 8, 128 // 8, 2, 9.0


@pytest.mark.full_size
def test_two_guided_steps_make_the_latents_of_diffusers():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    key, shape = jax.random.key(0), (FRAMES, SIDE, SIDE, 4)
    noise = np.asarray(jax.random.normal(jax.random.split(key)[0], shape))  # what the rollout draws
    text, negative = (np.random.default_rng(i).standard_normal((77, 1024), np.float32) for i in range(2))

    torch.manual_seed(0)
    reference = diffusers.UNet3DConditionModel(**MODELSCOPE["unet"]).eval()
    schedule = {name: value for name, value in MODELSCOPE["scheduler"].items() if not name.startswith("_")}
    scheduler = diffusers.DDIMScheduler(**schedule)
    with torch.no_grad():
        for parameter in reference.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5
            parameter.copy_(torch.randn_like(parameter) * scale + (parameter.ndim == 1) * 0.2)
        latents = torch.from_numpy(np.moveaxis(noise, -1, 0)[None].copy())
        both = torch.from_numpy(np.stack([negative, text]))
        scheduler.set_timesteps(STEPS)
        for timestep in scheduler.timesteps:
            without, given = reference(latents.repeat(2, 1, 1, 1, 1), timestep, both).sample.chunk(2)
            latents = scheduler.step(without + GUIDANCE * (given - without), timestep, latents).prev_sample
    expected = np.moveaxis(latents.numpy()[0], 0, -1)

    state = {name: value.numpy() for name, value in reference.state_dict().items()}
    params = from_torch(state, param_shapes("unet", MODELSCOPE["unet"]), "reference", jnp.float32)
    del reference, state
    unet = UNet3DConditionModel(UNet3DConfig.from_dict(MODELSCOPE["unet"]))

    def denoise(frozen, _, latents, timesteps, text):
        return unet.apply({"params": frozen}, latents, timesteps, text)

    sampler = make_sampler(MODELSCOPE["scheduler"], STEPS, None, 0.0)
    rollout = make_rollout(denoise, sampler, shape, GUIDANCE)
    found = np.asarray(rollout(params, {}, text[None], negative, key[None]))[0]
    scale = np.abs(expected).max()
    apart = np.abs(found - expected).max() / scale
    print(f"latents up to {scale:.3g}, at most {apart:.2e} of that apart")
    assert np.std(expected - noise) > 0.1 and apart < 1e-3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder of ModelScope's sizes with random weights in float16, 3.7 GB."""
    folder, rng = tmp_path_factory.mktemp("modelscope") / "pipeline", np.random.default_rng(0)
    for name, part in COMPONENTS.items():
        config = MODELSCOPE[name]
        of_diffusers = part.library == "diffusers"
        named = {"_class_name": part.class_name} if of_diffusers else {"architectures": [part.class_name]}
        state = {}
        for path, leaf in flatten(param_shapes(name, config)).items():
            shape = torch_shape(path, leaf.shape)
            numbers = rng.standard_normal(shape, np.float32)
            numbers = numbers * np.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.2 + 0.5 * numbers
            state[torch_key(path)] = numbers.astype(np.float16)
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config | named))
        io.write_weights(folder / name, part.stem, state)
    classes = {name: [part.library, part.class_name] for name, part in COMPONENTS.items()}
    classes |= {"tokenizer": ["transformers", "CLIPTokenizer"], "scheduler": ["diffusers", "DDIMScheduler"]}
    index = {"_class_name": "TextToVideoSDPipeline", **classes}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(MODELSCOPE["scheduler"]))
    make_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


@pytest.mark.full_size
def test_a_step_of_the_job_with_a_lora_update_fits_into_24_gib(checkpoint, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog runs over a meadow\n")
    settings = {
        "model.path": checkpoint, "model.dtype": "float32", "data.prompts": prompts, "data.held_out": prompts,
        "reward.scorers": "shapes", "rollout.num_frames": FRAMES, "rollout.height": 8 * SIDE,
        "rollout.width": 8 * SIDE, "rollout.num_inference_steps": 1, "rollout.candidates": 2, "rollout.microbatch": 1,
        "train.steps": 1, "train.prompts_per_step": 1, "train.updates_per_step": 1, "train.microbatch": 1,
        "preference.margin": 0.0, "eval.prompts": 1, "eval.every": 1, "log.samples": 1,
    }  # fmt: skip
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "vpo_jax.main", "--config=configs/vpo.py:modelscope", *flags]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            [*command, f"--workdir={tmp_path / 'run'}"], cwd=ROOT, stdout=said, stderr=subprocess.STDOUT
        )
        _, status, used = os.wait4(process.pid, 0)
    assert status == 0, (tmp_path / "said").read_text()[-3000:]
    (step,) = lines(tmp_path / "run")
    print(f"most resident memory {used.ru_maxrss / 2**20:.1f} GiB;", {k: v for k, v in step.items() if "time/" in k})
    assert step["pair/kept"] > 0, step
    assert used.ru_maxrss < 24 * 2**20
