"""Today's ModelScope, zeroscope, VideoCrafter2 and the shipped model: diffusers' TextToVideoSDPipeline."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from vpo_jax.checkpoints.folders import Configs, Layout
from vpo_jax.checkpoints.lora_files import PEFT
from vpo_jax.checkpoints.lora_layouts import NameTable
from vpo_jax.diffusion.process import Process, make_process
from vpo_jax.families.protocol import Importer, Params, Text, Tree
from vpo_jax.families.text_to_video_sd.layout import LAYOUT
from vpo_jax.families.text_to_video_sd.published import LICENCES, PUBLISHED
from vpo_jax.families.text_to_video_sd.videocrafter import read_videocrafter
from vpo_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from vpo_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from vpo_jax.models.lora import ATTENTION_TARGETS
from vpo_jax.models.unet3d import UNet3DConditionModel, UNet3DConfig
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.mesh import PARAMETER_RULES, ROWS, Rules, constrain

_NUM_FRAMES = 16  # diffusers' TextToVideoSDPipeline, where nothing else is said


@dataclasses.dataclass(frozen=True)
class TextToVideoSD:
    """A UNet on latent videos, an autoencoder of single frames and CLIP's text encoder; see `Family`.

    Parameters are {"unet", "vae", "text_encoder"}; the UNet trains. A video of F frames has F latent frames.

    Attributes:
      unet: denoiser.
      vae: autoencoder of frames.
      text_encoder: CLIP text model.
      scheduler: scheduler_config.json as text, since a family is hashable.
    """

    layout: ClassVar[Layout] = LAYOUT
    sharding_rules: ClassVar[Rules] = PARAMETER_RULES
    lora_targets: ClassVar[tuple[str, ...]] = ATTENTION_TARGETS
    float32_parameters: ClassVar[tuple[str, ...]] = ()
    half_text: ClassVar[bool] = False
    adapter_forms: ClassVar[tuple[str, ...]] = (PEFT,)
    original_names: ClassVar[NameTable] = ()
    published: ClassVar[Mapping[str, Configs]] = PUBLISHED
    licences: ClassVar[Mapping[str, str]] = LICENCES
    importers: ClassVar[Mapping[str, Importer]] = {
        "videocrafter": Importer(read_videocrafter, "VideoCrafter2's checkpoint as safetensors")
    }

    boundary: ClassVar[float | None] = None

    unet: UNet3DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    scheduler: str

    @classmethod
    def from_configs(cls, configs: Configs, dtype: Any = jnp.float32) -> "TextToVideoSD":
        """See `Family`."""
        return cls(
            unet=UNet3DConditionModel(UNet3DConfig.from_dict(configs["unet"]), dtype=dtype),
            vae=AutoencoderKL(AutoencoderKLConfig.from_dict(configs["vae"]), dtype=dtype),
            text_encoder=CLIPTextModel(CLIPTextConfig.from_dict(configs["text_encoder"]), dtype=dtype),
            scheduler=json.dumps(dict(configs["scheduler"]), sort_keys=True),
        )

    def with_options(
        self,
        dtype: Any = None,
        remat: bool | None = None,
        lora_scale: float | None = None,
        attention: str | None = None,
    ) -> "TextToVideoSD":
        """See `Family`."""
        options = {"dtype": dtype, "remat": remat, "lora_scale": lora_scale, "attention_backend": attention}
        chosen = {name: value for name, value in options.items() if value is not None}
        return dataclasses.replace(self, unet=self.unet.clone(**chosen))

    # Parameters.

    def trainable(self, params: Params) -> Tree:
        """See `Family`."""
        return params["unet"]

    def with_trainable(self, params: Params, tree: Tree) -> dict[str, Tree]:
        """See `Family`."""
        return {**params, "unet": tree}

    def text_params(self, params: Params) -> Tree:
        """See `Family`."""
        return params["text_encoder"]

    def decoder_params(self, params: Params) -> Tree:
        """See `Family`."""
        return params["vae"]

    # Process and sizes.

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """See `Family`."""
        config: dict[str, Any] = json.loads(self.scheduler)
        return config

    @property
    def process(self) -> Process:
        """See `Family`."""
        return make_process(self.scheduler_config)

    @property
    def text_length(self) -> int:
        """See `Family`."""
        return self.text_encoder.config.max_position_embeddings

    def video_size(
        self, num_frames: int | None = None, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int]:
        """See `Family`: 16 frames, and sample_size of the UNet's config times the autoencoder's factor."""
        factor = self.vae.config.scale_factor
        side = self.unet.config.sample_size
        sides = (side, side) if side is None or isinstance(side, int) else side
        given = {"num_frames": num_frames, "height": height, "width": width}
        trained = {"num_frames": _NUM_FRAMES, "height": (sides[0] or 0) * factor, "width": (sides[1] or 0) * factor}
        size = []
        for name, value in given.items():
            unit = 1 if name == "num_frames" else factor
            value = value or trained[name]
            if not value:
                raise UserError(f"{name}: the checkpoint names no size; give one (rollout.{name})")
            if value < 1 or value % unit:
                raise UserError(f"{name}: {value} is not a positive multiple of {unit}, a latent's size in pixels")
            size.append(value)
        return size[0], size[1], size[2]

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """See `Family`."""
        factor = self.vae.config.scale_factor
        return num_frames, height // factor, width // factor, self.unet.config.in_channels

    def context_length(self, num_frames: int, height: int, width: int) -> int:
        """See `Family`: frames."""
        return num_frames

    # Pure functions of parameters.

    def tokenize(self, tokenizer: Any, prompts: Sequence[str]) -> np.ndarray:
        """See `Family`."""
        length = tokenizer.model_max_length
        batch = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length)
        return np.asarray(batch["input_ids"], np.int32)

    def count_tokens(self, tokenizer: Any, prompts: Sequence[str]) -> list[int]:
        """See `Family`."""
        return [len(ids) for ids in tokenizer(list(prompts), verbose=False)["input_ids"]]

    def encode_text(self, params: Tree, ids: jax.Array) -> Text:
        """See `Family`: the last hidden states, all of which the UNet attends to."""
        hidden: Any = self.text_encoder.apply({"params": params}, ids)
        return Text(hidden)

    def read_text(self, variables: Tree, text: Text) -> Tree:
        """See `Family`."""
        return text

    def denoise(self, variables: Tree, latents: jax.Array, timesteps: jax.Array, text: Text) -> jax.Array:
        """See `Family`."""
        prediction: Any = self.unet.apply(variables, latents, timesteps, text.hidden)
        return prediction.astype(jnp.float32)

    def decode(self, params: Tree, latents: jax.Array, frame_indices: Sequence[int] | None = None) -> jax.Array:
        """See `Family`."""
        if frame_indices is not None and tuple(frame_indices) != tuple(range(latents.shape[1])):
            latents = latents[:, np.asarray(frame_indices)]
        batch, frames = latents.shape[:2]
        flat = constrain(latents.reshape(batch * frames, *latents.shape[2:]), ROWS) / self.vae.config.scaling_factor
        images: Any = self.vae.apply({"params": params}, flat, method=AutoencoderKL.decode)
        images = jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0.0, 1.0)
        return images.reshape(batch, frames, *images.shape[1:])

    # The folder, as diffusers reads it.

    @staticmethod
    def loading_lines(
        folder: str, dtype: str = "float32", prompt: str | None = None, settings: Mapping[str, Any] | None = None
    ) -> list[str]:
        """See `Family`."""
        imports = "from diffusers import TextToVideoSDPipeline"
        lines = [imports, f"pipe = TextToVideoSDPipeline.from_pretrained({folder!r})"]
        if dtype != "float32":
            # Without it diffusers widens the denoiser and transformers does not widen the text encoder.
            load = f"pipe = TextToVideoSDPipeline.from_pretrained({folder!r}, torch_dtype=torch.{dtype})"
            lines = [f"import torch; {imports}", load]
        if prompt is not None:
            chosen = "".join(f", {name}={value}" for name, value in (settings or {}).items())
            lines.append(f"video = pipe({prompt!r}{chosen}).frames")
        return lines

    @staticmethod
    def adapter_lines(folder: str, base: str, form: str, components: Sequence[str] = ()) -> list[str]:
        """See `Family`. The UNet has no PEFT mixin, so `pipe.load_lora_weights` does not work (diffusers 0.42.1)."""
        return [
            "from diffusers import TextToVideoSDPipeline; from peft import PeftModel",
            f"pipe = TextToVideoSDPipeline.from_pretrained({base!r})",
            f"pipe.unet = PeftModel.from_pretrained(pipe.unet, {folder!r})",
        ]

    @staticmethod
    def beyond_diffusers(configs: Configs) -> list[str]:
        """See `Family`."""
        missing = []
        if configs.get("unet", {}).get("fps_cond"):
            missing.append("embedding of the frame rate (unet/config.json: fps_cond, fps)")
        if configs.get("scheduler", {}).get("use_scale"):
            missing.append("scaled schedule (scheduler_config.json: use_scale, scale_b)")
        return missing
