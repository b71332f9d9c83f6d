"""The stages of the embedded UNet base: an AutoencoderKL on frames, then UNet3DConditionModel with CLIPTextModel.

Its videos are a mixture of clean and degraded ones, so it follows captions but flickers, shakes and blurs some of the
time: room for preference training. `lessons` come first where the UNet does not know the order of frames yet, without
which left is right.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vpo_jax.checkpoints.folders import PipelineParts, write_pipeline
from vpo_jax.diffusion.process import make_process
from vpo_jax.families.text_to_video_sd.layout import LAYOUT
from vpo_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from vpo_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from vpo_jax.models.unet3d import UNet3DConditionModel, UNet3DConfig
from vpo_jax.recipes.fit import Fitted, Metrics, fit, make_schedule, make_update
from vpo_jax.recipes.frame_code import init_frame_code
from vpo_jax.recipes.pools import encode_pool
from vpo_jax.recipes.tokenizer import MAX_LENGTH, make_tokenizer, vocabulary
from vpo_jax.runtime.files import write_json
from vpo_jax.runtime.trees import count
from vpo_jax.shapes import world

Tree = Any
TRAINED = ("unet", "text_encoder")  # what the second stage trains
OPTIONAL = ("lessons",)  # flags of `train_base` that not every family has

_LATENT_CHANNELS = 6
VAE = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [16, 32, 64],
    "layers_per_block": 1,
    "latent_channels": _LATENT_CHANNELS,
    "norm_num_groups": 8,
    "sample_size": world.SIZE,
    "scaling_factor": 1.0,  # the latents are standardised inside the quant convolutions instead
}
UNET = {
    "_class_name": "UNet3DConditionModel",
    "sample_size": world.SIZE // 4,
    "in_channels": _LATENT_CHANNELS,
    "out_channels": _LATENT_CHANNELS,
    "down_block_types": ["DownBlock3D", "CrossAttnDownBlock3D"],
    "up_block_types": ["CrossAttnUpBlock3D", "UpBlock3D"],
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "attention_head_dim": 8,  # transformer_in is eight heads wide at full resolution: most of the cost, were they 16
    "norm_num_groups": 8,
    "cross_attention_dim": 64,
}
_VOCABULARY = len(vocabulary()[0])
TEXT = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "vocab_size": _VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_LENGTH,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "bos_token_id": _VOCABULARY - 2,
    "eos_token_id": _VOCABULARY - 1,
    "pad_token_id": _VOCABULARY - 1,
}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "timestep_spacing": "trailing",
}
DEFAULTS = {
    "num_frames": world.NUM_FRAMES,
    "height": world.SIZE,
    "width": world.SIZE,
    "guidance_scale": 2.0,
    "num_inference_steps": 16,
}

_VIDEOS_A_VAE_STEP, _FRAMES_A_VIDEO = 16, 2
# Light: at 5e-4 two of four latent channels collapse, and colours with them.
_KL_WEIGHT = 1e-6
_LOG_VARIANCE_AT_START = -6.0  # else the first thousand steps are spent on learning to drown out the noise
_EDGE_WEIGHT = 1.0
_CAPTION_DROPOUT = 0.1
_TOKEN_SPREAD = 50.0  # times CLIP's 0.02: else all captions look alike, and colours wait for 1,400 steps
_POOL = 12288  # videos encoded at a time
_POOL_PASSES = 4  # times that a pool is gone through before the next
_LESSON_POOL = 2048
_LESSON_NOISE = 0.97  # share of the timesteps below a lesson's: at most noise only the caption tells where it moves


# Stage 1: frames to latents and back.


def train_vae(seed: int, steps: int, rate: float, workdir: Path, seconds: float | None) -> tuple[Tree, dict[str, Any]]:
    """AutoencoderKL on frames of the training mixture: L1, edges and a light KL; latents standardised at the end.

    Returns:
      The moving average of the parameters, and the config.
    """
    vae = AutoencoderKL(AutoencoderKLConfig.from_dict(VAE))
    rows = jnp.asarray(world.caption_indices("train"))
    seed_key = jax.random.fold_in(jax.random.key(seed), 1)

    def loss(params: Tree, step: jax.Array) -> tuple[jax.Array, Metrics]:
        data_key, row_key, frame_key, noise_key = jax.random.split(jax.random.fold_in(seed_key, step), 4)
        chosen = rows[jax.random.randint(row_key, (_VIDEOS_A_VAE_STEP,), 0, len(rows))]
        frames = world.render_videos(data_key, chosen).frames
        take = jax.random.randint(frame_key, (_VIDEOS_A_VAE_STEP, _FRAMES_A_VIDEO), 0, world.NUM_FRAMES)
        images = jnp.take_along_axis(frames, take[:, :, None, None, None], axis=1)
        images = 2 * images.reshape(-1, *images.shape[2:]) - 1  # [N, H, W, 3]
        mean, logvar = _moments(vae, params, images)
        latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(noise_key, mean.shape)
        decoded: Any = vae.apply({"params": params}, latents, method=vae.decode)
        error = decoded - images
        kl = 0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar).mean()
        # Errors of finite differences: what keeps edges sharp where a plain L1 would blur them.
        edges = jnp.abs(jnp.diff(error, axis=1)).mean() + jnp.abs(jnp.diff(error, axis=2)).mean()
        squared = (error**2).mean()
        value = jnp.abs(error).mean() + squared + _EDGE_WEIGHT * edges + _KL_WEIGHT * kl
        return value, {"loss": value, "kl": kl, "psnr": 10 * jnp.log10(4 / squared)}

    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(make_schedule(rate, steps, 0.3), b2=0.99, weight_decay=1e-4)
    )
    images = jax.ShapeDtypeStruct((1, world.SIZE, world.SIZE, 3), jnp.float32)
    params = jax.jit(lambda: vae.init(jax.random.fold_in(seed_key, 0), jnp.zeros(images.shape))["params"])()
    bias = params["quant_conv"]["bias"].at[_LATENT_CHANNELS:].set(_LOG_VARIANCE_AT_START)
    params = params | {"quant_conv": params["quant_conv"] | {"bias": bias}}
    print(f"vae: {count(params):,} parameters", flush=True)
    update = make_update(loss, optimizer, 0.998)
    state = fit(
        Fitted(params, jax.tree.map(jnp.copy, params), optimizer.init(params)), update, steps, workdir / "vae",
        seconds=seconds,
    )  # fmt: skip

    videos = world.render_videos(jax.random.fold_in(seed_key, 1), rows[jnp.arange(512) % len(rows)])
    means = _encode(vae, state.ema, videos.frames)[0]
    return standardise_latents(state.ema, means.mean((0, 1, 2, 3)), means.std((0, 1, 2, 3))), VAE


def standardise_latents(params: Tree, mean: jax.Array, std: jax.Array) -> Tree:
    """The same autoencoder with latents (z - mean) / std: folded exactly into the 1x1 quant convolutions.

    mean and std are [Cz]. The log-variance half of the encoder's output moves by -2 log std.
    """
    scale = jnp.concatenate([1 / std, jnp.ones_like(std)])
    shift = jnp.concatenate([-mean / std, -2 * jnp.log(std)])
    quant, post = params["quant_conv"], params["post_quant_conv"]
    kernel = post["kernel"]  # [1, 1, Cz, Cz]
    return params | {
        "quant_conv": {"kernel": quant["kernel"] * scale, "bias": quant["bias"] * scale + shift},
        "post_quant_conv": {"kernel": kernel * std[:, None], "bias": post["bias"] + mean @ kernel[0, 0]},
    }


def _moments(vae: AutoencoderKL, params: Tree, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    moments: Any = vae.apply({"params": params}, images, method=vae.encode)
    return moments


@partial(jax.jit, static_argnums=0)
def _encode(vae: AutoencoderKL, params: Tree, frames: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of the latents of videos [B, F, H, W, 3] in [0, 1], each [B, F, h, w, Cz]."""

    def one(video: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean, logvar = _moments(vae, params, 2 * video - 1)
        return mean, jnp.exp(0.5 * logvar)

    return jax.lax.map(one, frames, batch_size=8)


# Stage 2: captions and noise to latents.


def train_denoiser(
    seed: int,
    steps: int,
    batch: int,
    rate: float,
    vae_params: Tree,
    vae_config: Mapping[str, Any],
    workdir: Path,
    seconds: float | None,
    start: Tree | None = None,
    lessons: int = 0,
) -> Tree:
    """UNet3DConditionModel and CLIPTextModel together, on v-prediction with caption dropout; the moving average.

    `start` {"unet", "text_encoder"} are the parameters to begin with; None draws fresh ones. In the first
    `lessons` of the steps, videos cross the middle of the frame at one speed and noise hides all of them: knowing
    where they move lowers the loss by four fifths, against a ninth in the mixture, so that it is soon learnt.
    """
    vae = AutoencoderKL(AutoencoderKLConfig.from_dict(vae_config))
    unet = UNet3DConditionModel(UNet3DConfig.from_dict(UNET))
    text_encoder = CLIPTextModel(CLIPTextConfig.from_dict(TEXT))
    process = make_process(SCHEDULER)
    seed_key = jax.random.fold_in(jax.random.key(seed), 2)

    captions = ["", *world.captions("train")]
    tokens = make_tokenizer()(captions, padding="max_length", truncation=True, max_length=MAX_LENGTH)["input_ids"]
    ids = jnp.asarray(np.asarray(tokens, np.int32))  # [1 + captions, L]; row 0 is the empty caption

    def loss(
        params: Tree, step: jax.Array, means: jax.Array, deviations: jax.Array, captioned: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        keys = jax.random.split(jax.random.fold_in(seed_key, step), 5)
        pick = jax.random.randint(keys[0], (batch,), 0, len(means))
        clean = means[pick] + deviations[pick] * jax.random.normal(keys[1], (batch, *means.shape[1:]))
        dropped = jax.random.bernoulli(keys[2], _CAPTION_DROPOUT, (batch,))
        text = text_encoder.apply({"params": params["text_encoder"]}, ids[jnp.where(dropped, 0, captioned[pick] + 1)])
        # Stratified timesteps: the same distribution with less noise in the gradient.
        offsets = (jnp.arange(batch) + jax.random.uniform(keys[3], (batch,))) / batch
        low = jnp.where(step < lessons, _LESSON_NOISE, 0.0)
        timesteps = ((low + (1 - low) * offsets) * process.num_train_timesteps).astype(jnp.int32)
        noise = jax.random.normal(keys[4], clean.shape)
        noisy = process.add_noise(clean, noise, timesteps)
        prediction: Any = unet.apply({"params": params["unet"]}, noisy, timesteps, text)
        value = jnp.square(prediction - process.target(clean, noise, timesteps)).mean()
        return value, {"loss": value}

    side = world.SIZE // 4
    init_key = jax.random.fold_in(seed_key, 0)

    @jax.jit
    def init() -> Tree:
        text = text_encoder.init(init_key, ids[:1])
        hidden = text_encoder.apply(text, ids[:1])
        tokens = text["params"]["embeddings"]["token_embedding"]
        tokens["embedding"] = _TOKEN_SPREAD * tokens["embedding"]
        latents = jnp.zeros((1, world.NUM_FRAMES, side, side, _LATENT_CHANNELS))
        return {"unet": unet.init(init_key, latents, jnp.zeros(1), hidden)["params"], "text_encoder": text["params"]}

    params = init() if start is None else jax.tree.map(jnp.asarray, start)
    if lessons:
        first = params["unet"]["down_blocks.0"]["temp_convs.0"]
        coded = init_frame_code(first, jax.random.fold_in(seed_key, 2), unet.config.norm_num_groups, world.NUM_FRAMES)
        params["unet"]["down_blocks.0"]["temp_convs.0"] = coded
    print(f"unet: {count(params['unet']):,} parameters; text: {count(params['text_encoder']):,}", flush=True)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(make_schedule(rate, steps, 0.5), b2=0.99, weight_decay=1e-3)
    )
    update = make_update(loss, optimizer, 0.999)
    pools: dict[int, tuple[jax.Array, ...]] = {}
    steps_a_pool = _POOL * _POOL_PASSES // batch

    def step_with_pool(state: Fitted, step: int) -> tuple[Fitted, Metrics]:
        number = -1 if step < lessons else (step - lessons) // steps_a_pool
        if number not in pools:
            pools.clear()
            key = jax.random.fold_in(seed_key, 1 if number >= 0 else 3)
            size, render = (_POOL, world.render_videos) if number >= 0 else (_LESSON_POOL, world.render_crossings)
            pools[number] = encode_pool(key, max(number, 0), size, partial(_encode, vae, vae_params), render)
        return update(state, step, *pools[number])

    state = Fitted(params, jax.tree.map(jnp.copy, params), optimizer.init(params))
    return fit(state, step_with_pool, steps, workdir / "denoiser", seconds=seconds).ema


def write_base(
    output: Path, vae_params: Tree, vae_config: Mapping[str, Any], denoiser: Tree, recipe: dict[str, Any]
) -> None:
    """The diffusers folder: UNet and VAE in float16, text encoder in float32, and the recipe beside them."""
    parts = PipelineParts(
        layout=LAYOUT,
        configs={"unet": UNET, "vae": vae_config, "text_encoder": TEXT, "scheduler": SCHEDULER},
        params={"vae": vae_params, **denoiser},
        tokenizer=make_tokenizer(),
        defaults=DEFAULTS,
    )
    write_pipeline(output, parts, {"unet": "float16", "vae": "float16", "text_encoder": "float32"})
    write_json(output / "recipe.json", recipe)
