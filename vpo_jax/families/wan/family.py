"""Wan 2.1 and 2.2 (arXiv 2503.20314): diffusers' WanPipeline, a rectified flow on causal video latents."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from vpo_jax.checkpoints.folders import Configs, Layout
from vpo_jax.checkpoints.lora_layouts import NameTable
from vpo_jax.diffusion.process import Process, RectifiedFlow, make_process
from vpo_jax.families.protocol import Importer, Params, Text, Tree
from vpo_jax.families.wan.layout import FLOAT32_PARAMETERS, LAYOUT
from vpo_jax.families.wan.lora_names import ADAPTER_FORMS, ORIGINAL_NAMES, adapter_lines
from vpo_jax.families.wan.prompts import WanTokenizer, clean_prompt, token_mask
from vpo_jax.families.wan.published import LICENCES, PUBLISHED
from vpo_jax.families.wan.sharding import WAN_PARAMETER_RULES
from vpo_jax.models.autoencoder_kl_wan import AutoencoderKLWan
from vpo_jax.models.lora import ATTENTION_TARGETS
from vpo_jax.models.umt5 import UMT5Config, UMT5EncoderModel
from vpo_jax.models.wan_transformer import TextContext, WanTransformer3DModel
from vpo_jax.models.wan_transformer_config import WanTransformerConfig
from vpo_jax.models.wan_vae_config import AutoencoderKLWanConfig, denormalise_latents
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.mesh import Rules

_TEXT_LENGTH = 512  # rows that the transformer attends to, whatever the prompt's length
_SIZE = (81, 480, 832)  # frames, height and width of diffusers' WanPipeline, where nothing else is said
# Bytes of the largest activation up to which a video is decoded in one pass; longer ones frame by frame.
_ONE_PASS = 2**30


@dataclasses.dataclass(frozen=True)
class Wan:
    """A transformer on latent videos, a causal autoencoder and umT5's encoder; see `Family`.

    Parameters are {"transformer", "vae", "text_encoder"}, and "transformer_2" in a model of two experts, whose
    `trainable` is a dict of the two. A video of F = 4 k + 1 frames has k + 1 latent frames.

    Attributes:
      transformer: the denoiser; of two experts the one for high noise.
      transformer_2: the one for low noise, or None.
      vae: autoencoder of videos.
      text_encoder: umT5.
      text_length: tokens of a prompt. The denoiser attends to 512 rows; where a prompt has fewer, the last row, which
        is empty then, stands for the rest.
      scheduler: scheduler_config.json as text, since a family is hashable.
      boundary: the timestep from which on `transformer` denoises; None with one expert.
    """

    layout: ClassVar[Layout] = LAYOUT
    sharding_rules: ClassVar[Rules] = WAN_PARAMETER_RULES
    lora_targets: ClassVar[tuple[str, ...]] = ATTENTION_TARGETS
    float32_parameters: ClassVar[tuple[str, ...]] = FLOAT32_PARAMETERS
    # umT5 was published in bfloat16; transformers loads all of it so, and keeps `wo` in float32 for float16 alone.
    half_text: ClassVar[bool] = True
    published: ClassVar[Mapping[str, Configs]] = PUBLISHED
    licences: ClassVar[Mapping[str, str]] = LICENCES
    importers: ClassVar[Mapping[str, Importer]] = {}
    adapter_forms: ClassVar[tuple[str, ...]] = ADAPTER_FORMS
    original_names: ClassVar[NameTable] = ORIGINAL_NAMES

    transformer: WanTransformer3DModel
    transformer_2: WanTransformer3DModel | None
    vae: AutoencoderKLWan
    text_encoder: UMT5EncoderModel
    text_length: int
    scheduler: str
    boundary: float | None = None

    @classmethod
    def from_configs(cls, configs: Configs, dtype: Any = jnp.float32) -> "Wan":
        """See `Family`.

        Raises:
          UserError: a field that a module does not support, parts that do not fit each other, a scheduler that is no
            rectified flow, two experts without a boundary, or float16, in which umT5 overflows.
        """
        if jnp.dtype(dtype) == jnp.float16:
            raise UserError("dtype: umT5 overflows in float16; load the model in bfloat16 or float32")
        parsed = {name: WanTransformerConfig.from_dict(configs[name]) for name in _experts(configs)}
        vae = AutoencoderKLWanConfig.from_dict(configs["vae"])
        text = UMT5Config.from_dict(configs["text_encoder"])
        _check_parts(parsed, vae, text)
        length = _text_length(configs["text_encoder"])
        first, *second = (
            WanTransformer3DModel(config, dtype=dtype, text_length=_TEXT_LENGTH) for config in parsed.values()
        )
        family = cls(
            transformer=first,
            transformer_2=second[0] if second else None,
            vae=AutoencoderKLWan(vae, dtype=dtype),
            text_encoder=UMT5EncoderModel(text, dtype=dtype),
            text_length=length,
            scheduler=json.dumps(dict(configs["scheduler"]), sort_keys=True),
        )
        return dataclasses.replace(family, boundary=_boundary(configs, family.process) if second else None)

    def with_options(
        self,
        dtype: Any = None,
        remat: bool | None = None,
        lora_scale: float | None = None,
        attention: str | None = None,
    ) -> "Wan":
        """See `Family`."""
        options = {"dtype": dtype, "remat": remat, "lora_scale": lora_scale, "attention_backend": attention}
        chosen = {name: value for name, value in options.items() if value is not None}
        second = self.transformer_2 and self.transformer_2.clone(**chosen)
        return dataclasses.replace(self, transformer=self.transformer.clone(**chosen), transformer_2=second)

    # Parameters.

    def trainable(self, params: Params) -> Tree:
        """See `Family`: the transformer's, or of two experts {"transformer", "transformer_2"}."""
        if self.transformer_2 is None:
            return params["transformer"]
        return {name: params[name] for name in ("transformer", "transformer_2")}

    def with_trainable(self, params: Params, tree: Tree) -> dict[str, Tree]:
        """See `Family`."""
        return {**params, "transformer": tree} if self.transformer_2 is None else {**params, **tree}

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
        """See `Family`: rectified flow with the scheduler's shift and a logit-normal density.

        Raises:
          UserError: the scheduler is no rectified flow.
        """
        process = make_process(self.scheduler_config)
        if not isinstance(process, RectifiedFlow):
            raise UserError(
                "scheduler_config.json: Wan is a rectified flow, and this is none; write UniPCMultistepScheduler with "
                "prediction_type flow_prediction and use_flow_sigmas true"
            )
        return process

    def video_size(
        self, num_frames: int | None = None, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int]:
        """See `Family`: 81 frames of 480x832 where nothing else is said.

        Raises:
          UserError: frames that are not 4 k + 1, or sides that are no multiple of a patch, with the nearest valid ones.
        """
        every, _, _ = self._latent_units
        frames, *sides = (value or own for value, own in zip((num_frames, height, width), _SIZE, strict=True))
        if frames < 1 or (frames - 1) % every:
            below = max(0, frames - 1) // every * every + 1
            raise UserError(
                f"num_frames: {frames} is not {every} k + 1; the nearest are {below} and {below + every}"
                " (rollout.num_frames)"
            )
        for name, value, unit in zip(("height", "width"), sides, self._pixels, strict=True):
            if value < unit or value % unit:
                below = value // unit * unit
                nearest = f"{below} and {below + unit}" if below else str(unit)
                raise UserError(
                    f"{name}: {value} is no multiple of {unit}, a patch of latents in pixels; the nearest: {nearest}"
                    f" (rollout.{name})"
                )
        return frames, sides[0], sides[1]

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """See `Family`."""
        every, down, right = self._latent_units
        return 1 + (num_frames - 1) // every, height // down, width // right, self.vae.config.z_dim

    def context_length(self, num_frames: int, height: int, width: int) -> int:
        """See `Family`: tokens."""
        frames, *sides, _ = self.latent_shape(num_frames, height, width)
        patches = zip((frames, *sides), self.transformer.config.patch_size, strict=True)
        return math.prod(size // patch for size, patch in patches)

    @property
    def _latent_units(self) -> tuple[int, int, int]:
        """Frames, rows and columns of pixels that a latent stands for."""
        config = self.vae.config
        return config.scale_factor_temporal, config.scale_factor_spatial, config.scale_factor_spatial

    @property
    def _pixels(self) -> tuple[int, int]:
        """Rows and columns of pixels that a token of the transformer stands for."""
        _, down, right = self._latent_units
        _, patch_height, patch_width = self.transformer.config.patch_size
        return down * patch_height, right * patch_width

    # Pure functions of parameters.

    def tokenize(self, tokenizer: WanTokenizer, prompts: Sequence[str]) -> np.ndarray:
        """See `Family`: padded with 0. Of fewer than 512 tokens the last is padding always."""
        live = self.text_length - (self.text_length < _TEXT_LENGTH)
        ids, _ = tokenizer.encode([clean_prompt(prompt) for prompt in prompts], live)
        return np.pad(ids, ((0, 0), (0, self.text_length - live)))

    def count_tokens(self, tokenizer: WanTokenizer, prompts: Sequence[str]) -> list[int]:
        """See `Family`."""
        return tokenizer.count([clean_prompt(prompt) for prompt in prompts])

    def encode_text(self, params: Tree, ids: jax.Array) -> Text:
        """See `Family`: the encoder's last hidden states, zeros where a prompt has ended.

        The denoiser attends to the zeros too, so there is no mask.
        """
        mask = token_mask(ids)
        hidden: Any = self.text_encoder.apply({"params": params}, ids, mask)
        return Text(jnp.where(mask[..., None], hidden, 0))

    def read_text(self, variables: Tree, text: Text) -> Tree:
        """See `Family`: keys and values of every block, of two experts those of both."""
        if self.transformer_2 is None:
            return _read(self.transformer, variables, text)
        first, second = self._by_expert(variables)
        return _read(self.transformer, first, text), _read(self.transformer_2, second, text)

    def denoise(self, variables: Tree, latents: jax.Array, timesteps: jax.Array, text: Tree) -> jax.Array:
        """See `Family`: the velocity eps - x_0. Where timesteps of a batch lie on both sides, both experts compute."""
        if isinstance(text, Text):
            text = self.read_text(variables, text)
        if self.transformer_2 is None:
            return _predict(self.transformer, variables, latents, timesteps, text)
        (first, second), low, boundary = self._by_expert(variables), self.transformer_2, self.boundary
        assert boundary is not None
        noisy = jnp.broadcast_to(timesteps, latents.shape[:1]) >= boundary

        def high_noise() -> jax.Array:
            return _predict(self.transformer, first, latents, timesteps, text[0])

        def low_noise() -> jax.Array:
            return _predict(low, second, latents, timesteps, text[1])

        def each() -> jax.Array:
            return jnp.where(noisy[:, None, None, None, None], high_noise(), low_noise())

        which = jnp.where(jnp.all(noisy), 0, jnp.where(jnp.any(noisy), 2, 1))
        return jax.lax.switch(which, (high_noise, low_noise, each))

    @staticmethod
    def _by_expert(variables: Tree) -> tuple[Tree, Tree]:
        """Each expert's own variables; an expert without adapters has none."""
        first, second = (
            {kind: tree[name] for kind, tree in variables.items() if name in tree}
            for name in ("transformer", "transformer_2")
        )
        return first, second

    def decode(self, params: Tree, latents: jax.Array, frame_indices: Sequence[int] | None = None) -> jax.Array:
        """See `Family`: causal, so that nothing after the last frame of `frame_indices` is decoded."""
        config, (_, frames, height, width, _) = self.vae.config, latents.shape
        every, down, right = self._latent_units
        count = 1 + (frames - 1) * every
        wanted = list(range(count) if frame_indices is None else frame_indices)
        pixels = (1 + max(wanted)) * height * down * width * right // (config.patch_size or 1) ** 2
        largest = pixels * (config.decoder_base_dim or config.base_dim) * jnp.dtype(self.vae.dtype).itemsize
        vae = self.vae.clone(chunk=0 if largest <= _ONE_PASS else 1)
        video: Any = vae.apply(
            {"params": params}, denormalise_latents(latents, config), num_frames=1 + max(wanted), method="decode"
        )
        if wanted != list(range(video.shape[1])):
            video = video[:, np.asarray(wanted)]
        return jnp.clip(video.astype(jnp.float32) / 2 + 0.5, 0.0, 1.0)

    # The folder, as diffusers reads it.

    @staticmethod
    def loading_lines(
        folder: str, dtype: str = "float32", prompt: str | None = None, settings: Mapping[str, Any] | None = None
    ) -> list[str]:
        """See `Family`."""
        imports, more = "from diffusers import WanPipeline", ""
        if dtype != "float32":
            imports, more = f"import torch; {imports}", f", torch_dtype=torch.{dtype}"
        lines = [imports, f"pipe = WanPipeline.from_pretrained({folder!r}{more})"]
        if prompt is not None:
            chosen = "".join(f", {name}={value}" for name, value in (settings or {}).items())
            lines.append(f"video = pipe({prompt!r}{chosen}).frames")
        return lines

    @staticmethod
    def adapter_lines(folder: str, base: str, form: str, components: Sequence[str] = ()) -> list[str]:
        """See `Family`."""
        return adapter_lines(folder, base, form, components)

    @staticmethod
    def beyond_diffusers(configs: Configs) -> list[str]:
        """See `Family`: nothing."""
        return []


def _read(transformer: WanTransformer3DModel, variables: Tree, text: Text) -> TextContext:
    context: Any = transformer.apply(variables, text.hidden, method="encode_text")
    return context


def _predict(
    transformer: WanTransformer3DModel, variables: Tree, latents: jax.Array, timesteps: jax.Array, text: TextContext
) -> jax.Array:
    prediction: Any = transformer.apply(variables, latents, timesteps, text)
    return prediction.astype(jnp.float32)


def _experts(configs: Configs) -> list[str]:
    return [name for name in ("transformer", "transformer_2") if name in configs]


def _text_length(config: Mapping[str, Any]) -> int:
    """`n_positions` of text_encoder/config.json, T5's old name for the longest input; 512 where it is not said."""
    length = config.get("n_positions", _TEXT_LENGTH)
    if isinstance(length, bool) or not isinstance(length, int) or length < 2:
        raise UserError(f"text_encoder.n_positions: {length!r} is no whole number from 2 up; leave it out for 512")
    return min(length, _TEXT_LENGTH)


def _boundary(configs: Configs, process: Process) -> float:
    ratio = configs.get("model_index", {}).get("boundary_ratio")
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1:
        raise UserError(
            f"model_index.json: boundary_ratio is {ratio!r}, and a model with transformer_2 needs the share of the "
            "timesteps where the experts change, 0.875 in Wan 2.2"
        )
    return float(ratio) * process.num_train_timesteps


def _check_parts(
    transformers: Mapping[str, WanTransformerConfig], vae: AutoencoderKLWanConfig, text: UMT5Config
) -> None:
    for name, config in transformers.items():
        for field, value, other, wanted in (
            ("in_channels", config.in_channels, "vae.z_dim", vae.z_dim),
            ("out_channels", config.out_channels, "vae.z_dim", vae.z_dim),
            ("text_dim", config.text_dim, "text_encoder.d_model", text.d_model),
        ):
            if value != wanted:
                raise UserError(
                    f"{name}.{field}: {value}, but {other} is {wanted}; use parts of one text-to-video checkpoint"
                )
