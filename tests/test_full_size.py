"""ModelScope's sizes, all 1.41 billion parameters: run by hand, `pytest -m full_size -s tests/test_full_size.py`."""

import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpo_jax.algorithms.dpo.losses import make_pairwise_loss
from vpo_jax.algorithms.dpo.update import Noised, Weighed, make_errors, make_gradients
from vpo_jax.checkpoints.keys import from_torch
from vpo_jax.diffusion.guidance import Guidance
from vpo_jax.diffusion.samplers import make_sampler
from vpo_jax.families.protocol import Text
from vpo_jax.families.text_to_video_sd.family import TextToVideoSD
from vpo_jax.families.text_to_video_sd.layout import param_shapes
from vpo_jax.families.text_to_video_sd.published import MODELSCOPE
from vpo_jax.models.unet3d import UNet3DConditionModel, UNet3DConfig
from vpo_jax.runtime import cli
from vpo_jax.training.policy import make_policy
from vpo_jax.training.rollouts import make_rollout

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
        return unet.apply({"params": frozen}, latents, timesteps, text.hidden)

    sampler = make_sampler(MODELSCOPE["scheduler"], STEPS, None, 0.0)
    rollout = make_rollout(denoise, sampler, shape, Guidance(GUIDANCE))
    found = np.asarray(rollout(params, {}, Text(text[None]), Text(negative), key[None]))[0]
    scale = np.abs(expected).max()
    apart = np.abs(found - expected).max() / scale
    print(f"latents up to {scale:.3g}, at most {apart:.2e} of that apart")
    assert np.std(expected - noise) > 0.1 and apart < 1e-3


@pytest.mark.full_size
def test_a_lora_update_with_rematerialisation_fits_into_24_gib():
    config = cli.load_config("configs/vpo.py:modelscope")
    config.model.dtype = "float32"
    assert config.train.remat and config.lora.rank == 64
    rng = np.random.default_rng(0)

    def random(leaf):
        numbers = rng.standard_normal(leaf.shape, np.float32)
        return numbers * np.prod(leaf.shape[:-1]) ** -0.5 if leaf.ndim > 1 else 0.2 + 0.5 * numbers

    params = jax.tree.map(random, param_shapes("unet", MODELSCOPE["unet"]))
    policy = make_policy(config, TextToVideoSD.from_configs(MODELSCOPE), jax.device_put(params))
    del params
    shape = (2, FRAMES, SIDE, SIDE, 4)  # a pair
    latents, target = (jnp.asarray(rng.standard_normal(shape, np.float32)) for _ in range(2))
    text = Text(jnp.asarray(np.repeat(rng.standard_normal((1, 77, 1024), np.float32), 2, axis=0)))
    noised = Noised(latents, target, jnp.array([500, 500]), text)
    began = time.monotonic()
    ours, first = make_errors(policy.denoise)(policy.frozen, policy.initial, noised)
    preferred, learnt = jnp.array([[[False, True], [False, False]]]), jnp.ones((1, 2), bool)
    loss = make_pairwise_loss(config.preference.beta)((ours - ours).reshape(1, 2), jnp.zeros((1, 2)), preferred, learnt)
    one = jnp.ones(())
    weighed = Weighed(loss.coefficients, jnp.full((1, 2), 0.5), one, one, jnp.array(True), loss.loss[0])
    update = jax.jit(make_gradients(policy.denoise, anchor=config.preference.anchor))
    gradients, _ = update(policy.frozen, policy.initial, first, noised, weighed)
    sizes = [float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients)]
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"errors and gradients in {time.monotonic() - began:.0f} s with compiling; most memory {used:.1f} GiB")
    assert np.isfinite(sizes).all() and max(sizes) > 0.0
    assert used < 24
