"""Text encoder, denoiser, autoencoder and schedule of a text-to-video model as the one object that people hold."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vpo_jax.checkpoints.folders import PipelineParts, Place, read_pipeline, write_pipeline
from vpo_jax.diffusion.guidance import guide
from vpo_jax.diffusion.samplers import make_sampler, sample
from vpo_jax.diffusion.schedules import Schedule, make_schedule
from vpo_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from vpo_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from vpo_jax.models.unet3d import UNet3DConditionModel, UNet3DConfig
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.keys import seed_key
from vpo_jax.runtime.mesh import BATCH, CLIPS, constrain

Tree = Any

SHIPPED = {"shapes": Path(__file__).parent / "shapes" / "assets" / "base"}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
_NUM_FRAMES = 16  # diffusers' TextToVideoSDPipeline, where nothing else is said


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """A text-to-video model: linen modules, their parameters, a tokenizer and the schedule's config.

    The small methods are pure and take the parameters, for use under `jax.jit`; calling the object samples videos
    with the parameters that it holds. To use other weights, `dataclasses.replace(pipeline, params=...)`.

    Attributes:
      unet: denoiser.
      vae: autoencoder of frames.
      text_encoder: CLIP text model.
      params: {"unet", "vae", "text_encoder"}: parameter trees.
      configs: parsed JSON of the parts: "unet", "vae", "text_encoder", "scheduler".
      tokenizer: transformers' CLIPTokenizer.
      defaults: of vpo_jax.json: num_frames, height, width, guidance_scale, num_inference_steps; may be {}.
    """

    unet: UNet3DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    params: Mapping[str, Tree]
    configs: Mapping[str, Mapping[str, Any]]
    tokenizer: Any
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """scheduler_config.json of the checkpoint."""
        return self.configs["scheduler"]

    @property
    def schedule(self) -> Schedule:
        """The noise schedule that the checkpoint was trained with."""
        return make_schedule(self.scheduler_config)

    # Sizes.

    def video_size(
        self, num_frames: int | None = None, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int]:
        """(frames, height, width) with what is left out (None or 0) taken from vpo_jax.json, else from sample_size.

        Raises:
          UserError: a size that the autoencoder cannot make.
        """
        factor = self.vae.config.scale_factor
        side = self.unet.config.sample_size
        sides = (side, side) if side is None or isinstance(side, int) else side
        size = {"num_frames": num_frames, "height": height, "width": width}
        trained = {"num_frames": _NUM_FRAMES, "height": (sides[0] or 0) * factor, "width": (sides[1] or 0) * factor}
        for name, value in size.items():
            unit = 1 if name == "num_frames" else factor
            value = value or self.defaults.get(name) or trained[name]
            if not value:
                raise UserError(f"{name}: the checkpoint names no size; give one (rollout.{name})")
            if value < 1 or value % unit:
                raise UserError(f"{name}: {value} is not a positive multiple of {unit}, a latent's size in pixels")
            size[name] = value
        return size["num_frames"], size["height"], size["width"]  # type: ignore[return-value]

    def latent_shape(
        self, num_frames: int | None = None, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int, int]:
        """(F, h, w, C) of one video's latents."""
        frames, height, width = self.video_size(num_frames, height, width)
        factor = self.vae.config.scale_factor
        return frames, height // factor, width // factor, self.unet.config.in_channels

    def on_device(self, shardings: Any = None) -> "Pipeline":
        """The same pipeline with its parameters on the device already: each call would copy them from the host.

        With `shardings`, one or a tree of them, on a mesh, and under `jax.set_mesh`, a call cuts its batches over it.
        """
        return dataclasses.replace(self, params=jax.device_put(self.params, shardings))

    # Pure parts.

    def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
        """Token ids int32 [B, L], padded and cut to the tokenizer's length."""
        length = self.tokenizer.model_max_length
        batch = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length)
        return np.asarray(batch["input_ids"], np.int32)

    def encode_text(self, params: Tree, ids: jax.Array) -> jax.Array:
        """Last hidden states [B, L, D] of token ids [B, L]."""
        text: Any = self.text_encoder.apply({"params": params}, ids)
        return text

    def denoise(self, variables: Tree, latents: jax.Array, timesteps: jax.Array, text: jax.Array) -> jax.Array:
        """Prediction float32 [B, F, h, w, C]; variables = {"params": ..., "lora": ... or absent}."""
        prediction: Any = self.unet.apply(variables, latents, timesteps, text)
        return prediction

    def decode(self, params: Tree, latents: jax.Array, frame_indices: Sequence[int] | None = None) -> jax.Array:
        """Frames float32 [B, f, H, W, 3] in [0, 1] of latents [B, F, h, w, C]; only those of `frame_indices`."""
        if frame_indices is not None and tuple(frame_indices) != tuple(range(latents.shape[1])):
            latents = latents[:, np.asarray(frame_indices)]
        batch, frames = latents.shape[:2]
        flat = constrain(latents.reshape(batch * frames, *latents.shape[2:]), CLIPS) / self.vae.config.scaling_factor
        images: Any = self.vae.apply({"params": params}, flat, method=AutoencoderKL.decode)
        images = jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0.0, 1.0)
        return images.reshape(batch, frames, *images.shape[1:])

    @staticmethod
    def to_uint8(frames: jax.Array) -> jax.Array:
        """Frames in [0, 1] as people see them: uint8, rounded to nearest even."""
        return jnp.round(frames * 255).astype(jnp.uint8)

    # Sampling.

    def __call__(
        self,
        prompts: str | Sequence[str],
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] = "",
        sampler: str | None = None,
        seed: int = 0,
        latents: jax.Array | np.ndarray | None = None,
        eta: float = 0.0,
        batch_size: int = 16,
        guidance_rescale: float = 0.0,
    ) -> np.ndarray:
        """Samples one video a prompt.

        Args:
          prompts: B of them, or one.
          num_frames: left out: vpo_jax.json's, else 16.
          height: pixels; left out: vpo_jax.json's, else sample_size times the autoencoder's factor.
          width: as height.
          num_inference_steps: denoising steps.
          guidance_scale: classifier-free guidance; 1 or less switches it off. Left out: vpo_jax.json's, else 7.5.
          negative_prompt: what guidance leads away from: one, or one a prompt.
          sampler: a diffusers scheduler's name; None takes the checkpoint's own.
          seed: of 64 bits; the initial latents of prompt i are normal(fold_in(seed_key(seed), i)).
          latents: initial latents [B, F, h, w, C], unit Gaussian, in place of the seed's.
          eta: DDIM's share of fresh noise in a step.
          batch_size: videos at a time; changes nothing but memory and time.
          guidance_rescale: share, to 1, of the conditional prediction's standard deviation that guidance keeps.

        Returns:
          uint8 [B, F, H, W, 3].

        Raises:
          UserError: a size, a sampler or a number of prompts that does not fit.
        """
        if guidance_scale is None:
            guidance_scale = self.defaults.get("guidance_scale", 7.5)
        frames = self._generate(
            prompts, num_frames, height, width, num_inference_steps, guidance_scale, negative_prompt,
            sampler, seed, latents, eta, batch_size, guidance_rescale,
        )  # fmt: skip
        return np.concatenate([np.asarray(self.to_uint8(part)) for part in frames])

    def _generate(
        self,
        prompts: str | Sequence[str],
        num_frames: int | None,
        height: int | None,
        width: int | None,
        num_inference_steps: int,
        guidance_scale: float,
        negative_prompt: str | Sequence[str],
        sampler: str | None,
        seed: int,
        latents: jax.Array | np.ndarray | None,
        eta: float,
        batch_size: int,
        guidance_rescale: float = 0.0,
    ) -> list[jax.Array]:
        """Frames in [0, 1], batch by batch; the last batch is filled up so that one program serves all."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise UserError("prompts: none given; pass at least one")
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
        if len(negatives) != len(prompts):
            raise UserError(f"negative_prompt: {len(negatives)} for {len(prompts)} prompts; give one, or one to each")
        shape = self.latent_shape(num_frames, height, width)
        if latents is not None and latents.shape != (len(prompts), *shape):
            raise UserError(f"latents: shape {list(latents.shape)}, but {[len(prompts), *shape]} is needed")

        key = seed_key(seed)
        batch = min(batch_size, len(prompts))
        run = self._sampler(num_inference_steps, float(guidance_scale), sampler, float(eta), float(guidance_rescale))
        parts = []
        for start in range(0, len(prompts), batch):
            rows = np.minimum(np.arange(start, start + batch), len(prompts) - 1)
            keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.asarray(rows))
            if latents is None:
                noise = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)
            else:
                noise = jnp.asarray(latents)[rows]
            ids = self.tokenize([prompts[i] for i in rows])
            negative_ids = self.tokenize([negatives[i] for i in rows])
            frames = run(self.params, noise, ids, negative_ids, keys)
            parts.append(frames[: len(prompts) - start])
        return parts

    def _sampler(
        self, steps: int, guidance_scale: float, name: str | None, eta: float, guidance_rescale: float
    ) -> Callable[..., jax.Array]:
        """The jitted (params, noise, ids, negative ids, keys) -> frames of these settings."""
        return _compiled_sampler(
            self.unet, self.vae, self.text_encoder, json.dumps(dict(self.scheduler_config), sort_keys=True),
            steps, guidance_scale, name, eta, guidance_rescale,
        )  # fmt: skip

    def save_pretrained(self, path: str | Path, dtypes: Mapping[str, str] | None = None) -> None:
        """Writes a diffusers folder that `TextToVideoSDPipeline.from_pretrained` loads; see `write_pipeline`."""
        parts = PipelineParts(self.configs, self.params, self.tokenizer, self.defaults)
        write_pipeline(path, parts, dtypes)


@functools.lru_cache(maxsize=16)
def _compiled_sampler(
    unet: nn.Module,
    vae: nn.Module,
    text_encoder: nn.Module,
    scheduler_config: str,
    steps: int,
    guidance_scale: float,
    name: str | None,
    eta: float,
    guidance_rescale: float,
) -> Callable[..., jax.Array]:
    """One program for all pipelines of the same modules and settings: base and tuned share it."""
    config = json.loads(scheduler_config)
    parts = Pipeline(unet, vae, text_encoder, {}, {"scheduler": config}, None)  # type: ignore[arg-type]
    schedule = make_sampler(config, steps, name, eta)

    def run(params: Tree, noise: jax.Array, ids: jax.Array, negative_ids: jax.Array, keys: jax.Array) -> jax.Array:
        noise = constrain(noise, BATCH)
        text = parts.encode_text(params["text_encoder"], ids)
        variables = {"params": params["unet"]}
        if guidance_scale <= 1.0:
            denoise = lambda x, t: parts.denoise(variables, x, t, text)  # noqa: E731
        else:
            # Side by side, so that a device that holds a clip holds both of its predictions.
            both = jnp.stack([parts.encode_text(params["text_encoder"], negative_ids), text], axis=1)
            both = constrain(both.reshape(-1, *text.shape[1:]), BATCH)

            def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
                twice = constrain(jnp.repeat(x, 2, axis=0), BATCH)
                pair = parts.denoise(variables, twice, t, both).reshape(-1, 2, *x.shape[1:])
                return guide(pair[:, 0], pair[:, 1], guidance_scale, guidance_rescale)

        return parts.decode(params["vae"], sample(schedule, denoise, noise, keys))

    return jax.jit(run)


def load_pipeline(path: str | Path, dtype: str = "float32", place: Place | None = None) -> Pipeline:
    """Loads a diffusers text-to-video folder, the shipped model "shapes", or a model on the hub when online.

    Args:
      path: a folder with model_index.json, "shapes", or a hub id "owner/name".
      dtype: "float32", "bfloat16" or "float16": of the parameters and the computation.
      place: a part's tree of shapes to its shardings, as `partial(infer_shardings, mesh=..., rules=...)`:
        each tensor goes from the file to its devices by itself. None keeps numpy arrays on the host.

    Returns:
      A `Pipeline`: `pipe(prompts)` gives uint8 [B, F, H, W, 3].

    Raises:
      UserError: one line that names the file and the fix.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype: {dtype!r} is not supported; choose one of {', '.join(DTYPES)}")
    parts = read_pipeline(SHIPPED.get(str(path), path), DTYPES[dtype], place)
    return make_pipeline(parts, DTYPES[dtype])


def make_pipeline(parts: PipelineParts, dtype: Any = jnp.float32) -> Pipeline:
    """The pipeline of a folder's parts, computing in `dtype`."""
    return Pipeline(
        unet=UNet3DConditionModel(UNet3DConfig.from_dict(parts.configs["unet"]), dtype=dtype),
        vae=AutoencoderKL(AutoencoderKLConfig.from_dict(parts.configs["vae"]), dtype=dtype),
        text_encoder=CLIPTextModel(CLIPTextConfig.from_dict(parts.configs["text_encoder"]), dtype=dtype),
        params=parts.params,
        configs=parts.configs,
        tokenizer=parts.tokenizer,
        defaults=parts.defaults,
    )
