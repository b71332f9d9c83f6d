"""The stages of the embedded Wan base: an AutoencoderKLWan on videos, then WanTransformer3DModel with umT5's encoder.

Its videos are the same mixture of clean and degraded ones as the UNet's (`base_unet`), one frame longer: a causal
autoencoder takes 4 k + 1 frames. Noise and velocity are those of a rectified flow.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vpo_jax.checkpoints.folders import PipelineParts, write_pipeline
from vpo_jax.families.wan.family import Wan
from vpo_jax.families.wan.layout import LAYOUT
from vpo_jax.families.wan.published import SCHEDULER as PUBLISHED_SCHEDULER
from vpo_jax.models.autoencoder_kl_wan import AutoencoderKLWan
from vpo_jax.models.wan_vae_config import AutoencoderKLWanConfig, normalise_latents
from vpo_jax.recipes.fit import Fitted, Metrics, fit, make_muon, make_schedule, make_update
from vpo_jax.recipes.pools import encode_pool
from vpo_jax.recipes.tokenizer import MAX_LENGTH, make_umt5_tokenizer
from vpo_jax.runtime.files import write_json
from vpo_jax.runtime.trees import count, flatten, unflatten
from vpo_jax.shapes import world

Tree = Any

TRAINED = ("transformer", "text_encoder")  # what the second stage trains
OPTIONAL = ("decoder_steps",)  # no lessons: a token holds all frames and so knows their order
NUM_FRAMES = 9
_Z = 4
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKLWan",
    "base_dim": 32,
    "decoder_base_dim": 40,
    "dim_mult": [1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [True],
    "z_dim": _Z,
    "latents_mean": [0.0] * _Z,
    "latents_std": [1.0] * _Z,
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_temporal": 2,
    "scale_factor_spatial": 4,
}
TRANSFORMER: dict[str, Any] = {
    "_class_name": "WanTransformer3DModel",
    # Wan has rotary positions only, so tokens of single frames do not know the order of frames in pure noise.
    "patch_size": [(NUM_FRAMES + 1) // 2, 4, 2],
    "num_attention_heads": 8,
    "attention_head_dim": 32,
    "in_channels": _Z,
    "out_channels": _Z,
    "text_dim": 64,
    "freq_dim": 64,
    "ffn_dim": 512,
    "num_layers": 3,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 1024,
}
TEXT: dict[str, Any] = {
    "architectures": ["UMT5EncoderModel"],
    "model_type": "umt5",
    "vocab_size": make_umt5_tokenizer().vocab_size,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "layer_norm_epsilon": 1e-6,
    "n_positions": MAX_LENGTH,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
SHIFT = 3.0
SCHEDULER = {**PUBLISHED_SCHEDULER, "flow_shift": SHIFT}
DEFAULTS = {
    "num_frames": NUM_FRAMES,
    "height": world.SIZE,
    "width": world.SIZE,
    "guidance_scale": 1.0,
    "num_inference_steps": 16,
}

_VIDEOS_A_VAE_STEP = 4
_ENCODER = ("encoder", "quant_conv")
_KL_WEIGHT = 1e-6
_LOG_VARIANCE_AT_START = -6.0
_MEASURED = 512  # videos whose latents are measured
_CAPTION_DROPOUT = 0.1
_POOL = 8192  # videos encoded at a time
_POOL_PASSES = 16  # times that a pool is gone through before the next


# Stage 1: videos to latents and back.


def train_vae(seed: int, steps: int, rate: float, workdir: Path, seconds: float | None) -> tuple[Tree, dict[str, Any]]:
    """AutoencoderKLWan on the training mixture.

    Returns:
      The moving average of the parameters, and the config with mean and standard deviation of the latents.
    """
    vae = AutoencoderKLWan(AutoencoderKLWanConfig.from_dict(VAE))
    seed_key = jax.random.fold_in(jax.random.key(seed), 1)
    params = _init_vae(jax.random.fold_in(seed_key, 0), vae)
    print(f"vae: {count(params):,} parameters", flush=True)
    # AdamW learns more slowly (docs/experiments.md).
    optimizer = make_muon(make_schedule(rate, steps, 0.3))
    update = make_update(partial(_reconstruction_loss, vae, jax.random.fold_in(seed_key, 2)), optimizer, 0.998)
    state = Fitted(params, jax.tree.map(jnp.copy, params), optimizer.init(params))
    params = fit(state, update, steps, workdir / "vae", seconds=seconds).ema

    rows = jnp.asarray(world.caption_indices("train"))
    key = jax.random.fold_in(seed_key, 1)
    frames = world.render_videos(key, rows[jnp.arange(_MEASURED) % len(rows)], num_frames=NUM_FRAMES).frames
    means = np.asarray(_encode(vae, params, frames), np.float64)
    statistics = {"latents_mean": means.mean((0, 1, 2, 3)), "latents_std": means.std((0, 1, 2, 3))}
    return params, VAE | {name: [round(float(x), 5) for x in values] for name, values in statistics.items()}


def train_decoder(seed: int, steps: int, rate: float, vae_params: Tree, workdir: Path, seconds: float | None) -> Tree:
    """The autoencoder after `steps` more of its decoder alone; the encoder, so also the denoiser's data, stays.

    Decoded videos are sharper, as with the later decoders of Stable Diffusion's autoencoder (sd-vae-ft-mse).
    """
    vae = AutoencoderKLWan(AutoencoderKLWanConfig.from_dict(VAE))
    seed_key = jax.random.fold_in(jax.random.key(seed), 3)
    encoder = {name: tree for name, tree in vae_params.items() if name in _ENCODER}
    decoder = {name: jax.tree.map(jnp.asarray, tree) for name, tree in vae_params.items() if name not in _ENCODER}

    def loss(params: Tree, step: jax.Array) -> tuple[jax.Array, Metrics]:
        return _reconstruction_loss(vae, seed_key, encoder | params, step)

    optimizer = make_muon(make_schedule(rate, steps, 0.3))
    update = make_update(loss, optimizer, 0.998)
    state = Fitted(decoder, jax.tree.map(jnp.copy, decoder), optimizer.init(decoder))
    return encoder | fit(state, update, steps, workdir / "decoder", seconds=seconds).ema


def _init_vae(key: jax.Array, vae: AutoencoderKLWan) -> Tree:
    """Fresh parameters; kernels have the variance 1 / fan_in, three times PyTorch's, and the latents little noise.

    Convolutions between frames begin near the identity: a latent frame is the last of its frames, and each of them it.
    """
    video = jnp.zeros((1, NUM_FRAMES, world.SIZE, world.SIZE, 3))
    params = flatten(jax.jit(lambda: vae.init(key, video)["params"])())
    params = {path: 3**0.5 * leaf if path.endswith("kernel") else leaf for path, leaf in params.items()}
    for path in [path for path in params if path.endswith("time_conv/kernel")]:
        *_, channels, features = params[path].shape
        copies = jnp.tile(jnp.eye(channels), features // channels)
        params[path] = (0.1 * params[path]).at[-1, 0, 0].add(copies)
    params["quant_conv/bias"] = params["quant_conv/bias"].at[_Z:].set(_LOG_VARIANCE_AT_START)
    return unflatten(params)


def _reconstruction_loss(
    vae: AutoencoderKLWan, key: jax.Array, params: Tree, step: jax.Array
) -> tuple[jax.Array, Metrics]:
    """L1, squares, errors of differences and a light KL."""
    data_key, row_key, noise_key = jax.random.split(jax.random.fold_in(key, step), 3)
    rows = jnp.asarray(world.caption_indices("train"))
    chosen = rows[jax.random.randint(row_key, (_VIDEOS_A_VAE_STEP,), 0, len(rows))]
    videos = 2 * world.render_videos(data_key, chosen, num_frames=NUM_FRAMES).frames - 1
    mean, logvar = _moments(vae, params, videos)
    latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(noise_key, mean.shape)
    decoded: Any = vae.apply({"params": params}, latents, clip=False, method="decode")
    error = decoded - videos
    kl = 0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar).mean()
    # Errors of finite differences keep edges sharp and steps between frames true, where a plain L1 would blur them.
    differences = jnp.stack([jnp.abs(jnp.diff(error, axis=axis)).mean() for axis in (1, 2, 3)]).sum()
    squared = (error**2).mean()
    value = jnp.abs(error).mean() + squared + differences + _KL_WEIGHT * kl
    return value, {"loss": value, "kl": kl, "psnr": 10 * jnp.log10(4 / squared)}


def _moments(vae: AutoencoderKLWan, params: Tree, videos: jax.Array) -> tuple[jax.Array, jax.Array]:
    moments: Any = vae.apply({"params": params}, videos, method="encode")
    return moments


@partial(jax.jit, static_argnums=0)
def _encode(vae: AutoencoderKLWan, params: Tree, frames: jax.Array) -> jax.Array:
    """Mean of the latents [B, f, h, w, z] of videos [B, F, H, W, 3] in [0, 1]."""
    return jax.lax.map(lambda video: _moments(vae, params, 2 * video[None] - 1)[0][0], frames, batch_size=8)


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
    lessons: int = 0,  # none: see `OPTIONAL`
) -> Tree:
    """WanTransformer3DModel and umT5's encoder together, on flow velocities with caption dropout; the moving average.

    `start` {"transformer", "text_encoder"} are the parameters to begin with; None draws fresh ones.
    """
    family = Wan.from_configs(configs_of(vae_config))
    process = family.process
    seed_key = jax.random.fold_in(jax.random.key(seed), 2)
    captions = ["", *world.captions("train")]
    ids = jnp.asarray(family.tokenize(make_umt5_tokenizer(), captions))  # [1 + captions, L]; row 0 is the empty one

    def loss(params: Tree, step: jax.Array, latents: jax.Array, captioned: jax.Array) -> tuple[jax.Array, Metrics]:
        keys = jax.random.split(jax.random.fold_in(seed_key, step), 4)
        pick = jax.random.randint(keys[0], (batch,), 0, len(latents))
        clean = latents[pick]
        dropped = jax.random.bernoulli(keys[1], _CAPTION_DROPOUT, (batch,))
        text = family.encode_text(params["text_encoder"], ids[jnp.where(dropped, 0, captioned[pick] + 1)])
        # Stratified timesteps: the same distribution with less noise in the gradient.
        share = (jnp.arange(batch) + jax.random.uniform(keys[2], (batch,))) / batch
        timesteps = process.num_train_timesteps * SHIFT * share / (1 + (SHIFT - 1) * share)
        noise = jax.random.normal(keys[3], clean.shape)
        noisy = process.add_noise(clean, noise, timesteps)
        prediction = family.denoise({"params": params["transformer"]}, noisy, timesteps, text)
        value = jnp.square(prediction - process.target(clean, noise, timesteps)).mean()
        return value, {"loss": value}

    params = init(jax.random.fold_in(seed_key, 0), family) if start is None else jax.tree.map(jnp.asarray, start)
    sizes = {name: count(tree) for name, tree in params.items()}
    print("; ".join(f"{name}: {size:,} parameters" for name, size in sizes.items()), flush=True)
    optimizer = make_muon(make_schedule(rate, steps, 0.5))
    update = make_update(loss, optimizer, 0.999)
    render = partial(world.render_videos, num_frames=NUM_FRAMES)
    pools: dict[int, tuple[jax.Array, ...]] = {}
    steps_a_pool = _POOL * _POOL_PASSES // batch

    def encode(frames: jax.Array) -> tuple[jax.Array]:
        return (normalise_latents(_encode(family.vae, vae_params, frames), family.vae.config),)

    def step_with_pool(state: Fitted, step: int) -> tuple[Fitted, Metrics]:
        number = step // steps_a_pool
        if number not in pools:
            pools.clear()
            pools[number] = encode_pool(jax.random.fold_in(seed_key, 1), number, _POOL, encode, render)
        return update(state, step, *pools[number])

    state = Fitted(params, jax.tree.map(jnp.copy, params), optimizer.init(params))
    return fit(state, step_with_pool, steps, workdir / "denoiser", seconds=seconds).ema


def init(key: jax.Array, family: Wan) -> Tree:
    """Fresh parameters of the transformer and the text encoder."""

    @jax.jit
    def draw() -> Tree:
        ids = jnp.ones((1, family.text_length), jnp.int32)
        text = family.text_encoder.init(key, ids, ids > 0)["params"]
        tokens = text["shared"]["embedding"]
        text["shared"]["embedding"] = tokens / tokens.std()
        latents = jnp.zeros((1, *family.latent_shape(NUM_FRAMES, world.SIZE, world.SIZE)))
        hidden = jnp.zeros((1, family.text_length, TRANSFORMER["text_dim"]))
        return {
            "transformer": family.transformer.init(key, latents, jnp.zeros(1), hidden)["params"],
            "text_encoder": text,
        }

    return draw()


def configs_of(vae: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The configs of the model with this autoencoder's."""
    index = {"boundary_ratio": None, "expand_timesteps": False}
    parts = {"transformer": TRANSFORMER, "vae": vae, "text_encoder": TEXT}
    return {**parts, "scheduler": SCHEDULER, "model_index": index}


def write_base(
    output: Path, vae_params: Tree, vae_config: Mapping[str, Any], denoiser: Tree, recipe: dict[str, Any]
) -> None:
    """The diffusers folder, the text encoder in float32 and the rest in float16, and the recipe beside it."""
    parts = PipelineParts(
        layout=LAYOUT,
        configs=configs_of(vae_config),
        params={"vae": vae_params, **denoiser},
        tokenizer=make_umt5_tokenizer(),
        defaults=DEFAULTS,
    )
    write_pipeline(output, parts, {"transformer": "float16", "vae": "float16", "text_encoder": "float32"})
    write_json(output / "recipe.json", recipe)
