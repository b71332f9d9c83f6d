"""A model family in full: bytes as tokens, latents of half the size, and a denoiser of five layers."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vpo_jax.checkpoints.folders import Component, Configs, Layout
from vpo_jax.diffusion.process import Process, make_process
from vpo_jax.families.protocol import Params, Text, Tree
from vpo_jax.models.layers import Dense
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.mesh import PARAMETER_RULES, Rules

CHANNELS, TOKENS, FACTOR = 4, 16, 2


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    """config.json of every component."""

    width: int = 16

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ToyConfig":
        """Fields that begin with an underscore are the library's."""
        return cls(**{name: value for name, value in config.items() if not name.startswith("_")})


class ToyDenoiser(nn.Module):
    """Latents [B, f, h, w, C], timesteps [B] and text [B, L, width] to a prediction."""

    config: ToyConfig
    dtype: Any = jnp.float32
    lora_scale: float = 1.0

    @nn.compact
    def __call__(self, latents: jax.Array, timesteps: jax.Array, text: jax.Array) -> jax.Array:
        def dense(features: int, name: str) -> Dense:
            return Dense(features, dtype=self.dtype, lora_scale=self.lora_scale, name=name)

        width, time = self.config.width, timesteps.astype(jnp.float32)[:, None] / 100.0
        context = dense(width, "time")(jnp.concatenate([jnp.sin(time), jnp.cos(time)], axis=-1))  # [B, width]
        context = context + dense(width, "to_v")(text.mean(axis=1))
        x = dense(width, "conv_in")(latents) + context[:, None, None, None]
        x = x + dense(width, "to_frames")(jnp.roll(x, 1, axis=1) - x)
        return dense(latents.shape[-1], "conv_out")(nn.silu(x)).astype(jnp.float32)


class ToyTextEncoder(nn.Module):
    """Token ids [B, L] to hidden states [B, L, width]."""

    config: ToyConfig

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        return nn.Embed(256, self.config.width, name="tokens")(ids)


class ToyDecoder(nn.Module):
    """Latents [..., C] to colours [..., 3] in [0, 1]."""

    config: ToyConfig

    @nn.compact
    def __call__(self, latents: jax.Array) -> jax.Array:
        return nn.sigmoid(Dense(3, name="to_rgb")(latents))


def _shapes(*shapes: tuple[int, ...], dtype: Any = jnp.float32) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)


COMPONENTS = {
    "transformer": Component(
        "diffusers", "diffusion_pytorch_model", ToyConfig, ToyDenoiser,
        lambda config: _shapes((1, 1, 1, 1, CHANNELS), (1,), (1, 1, config.width)),
    ),
    "text_encoder": Component(
        "diffusers", "diffusion_pytorch_model", ToyConfig, ToyTextEncoder, lambda _: _shapes((1, 1), dtype=jnp.int32)
    ),
    "vae": Component(
        "diffusers", "diffusion_pytorch_model", ToyConfig, ToyDecoder, lambda _: _shapes((1, 1, 1, CHANNELS))
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ToyFamily:
    """See `vpo_jax.families.protocol.Family`."""

    transformer: ToyDenoiser
    text_encoder: ToyTextEncoder
    vae: ToyDecoder
    scheduler: str  # JSON, since a family is hashable
    remat: bool = False

    layout: ClassVar[Layout] = Layout(
        "ToyPipeline", COMPONENTS, ("ByteTokenizer",), lambda folder, configs: None, lambda folder, tokenizer: None
    )
    boundary: ClassVar[float | None] = None
    float32_parameters: ClassVar[tuple[str, ...]] = ()
    half_text: ClassVar[bool] = False
    sharding_rules: ClassVar[Rules] = PARAMETER_RULES
    lora_targets: ClassVar[tuple[str, ...]] = (r"to_v$", r"to_frames$")
    adapter_forms: ClassVar[tuple[str, ...]] = ("peft",)
    original_names: ClassVar[tuple[tuple[str, str], ...]] = ()
    published: ClassVar[Mapping[str, Configs]] = {}
    licences: ClassVar[Mapping[str, str]] = {}
    importers: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def from_configs(cls, configs: Configs, dtype: Any = jnp.float32) -> "ToyFamily":
        """The modules of a folder."""
        parsed = {name: ToyConfig.from_dict(configs[name]) for name in COMPONENTS}
        transformer = ToyDenoiser(parsed["transformer"], dtype=dtype)
        scheduler = json.dumps(dict(configs["scheduler"]), sort_keys=True)
        return cls(transformer, ToyTextEncoder(parsed["text_encoder"]), ToyDecoder(parsed["vae"]), scheduler)

    def with_options(
        self,
        dtype: Any = None,
        remat: bool | None = None,
        lora_scale: float | None = None,
        attention: str | None = None,
    ) -> "ToyFamily":
        """None leaves an option as it is; it has no attention."""
        options = {"dtype": dtype, "lora_scale": lora_scale}
        transformer = self.transformer.clone(**{name: value for name, value in options.items() if value is not None})
        return dataclasses.replace(self, transformer=transformer, remat=self.remat if remat is None else remat)

    def trainable(self, params: Params) -> Tree:
        """The denoiser trains, and nothing else."""
        return params["transformer"]

    def with_trainable(self, params: Params, tree: Tree) -> dict[str, Tree]:
        """The other components stay."""
        return {**params, "transformer": tree}

    def text_params(self, params: Params) -> Tree:
        """What `encode_text` reads."""
        return params["text_encoder"]

    def decoder_params(self, params: Params) -> Tree:
        """What `decode` reads."""
        return params["vae"]

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """scheduler_config.json."""
        return json.loads(self.scheduler)

    @property
    def process(self) -> Process:
        """The noise process that the scheduler's file names."""
        return make_process(self.scheduler_config)

    @property
    def text_length(self) -> int:
        """Tokens of a prompt."""
        return TOKENS

    def video_size(self, num_frames: int | None, height: int | None, width: int | None) -> tuple[int, int, int]:
        """4 frames of 8x8 where nothing is given."""
        size = num_frames or 4, height or 8, width or 8
        for name, value in zip(("height", "width"), size[1:], strict=True):
            if value % FACTOR:
                raise UserError(f"{name}: {value} is not a multiple of {FACTOR}; give {value + value % FACTOR}")
        return size

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """One latent frame a frame."""
        return num_frames, height // FACTOR, width // FACTOR, CHANNELS

    def context_length(self, num_frames: int, height: int, width: int) -> int:
        """Frames."""
        return num_frames

    def tokenize(self, tokenizer: Any, prompts: Sequence[str]) -> np.ndarray:
        """Bytes, padded with zeros."""
        rows = [prompt.encode()[:TOKENS].ljust(TOKENS, b"\0") for prompt in prompts]
        return np.array([list(row) for row in rows], np.int32)

    def count_tokens(self, tokenizer: Any, prompts: Sequence[str]) -> list[int]:
        """Bytes of each prompt."""
        return [len(prompt.encode()) for prompt in prompts]

    def encode_text(self, params: Tree, ids: jax.Array) -> Text:
        """Hidden states [B, L, width]; the denoiser attends to padding too."""
        return Text(self.text_encoder.apply({"params": params}, ids))

    def read_text(self, variables: Tree, text: Text) -> Tree:
        """It computes nothing of the text alone."""
        return text

    def denoise(self, variables: Tree, latents: jax.Array, timesteps: jax.Array, text: Text) -> jax.Array:
        """A prediction float32 [B, f, h, w, C]."""
        apply = jax.checkpoint(self.transformer.apply) if self.remat else self.transformer.apply
        return apply(variables, latents, jnp.broadcast_to(timesteps, latents.shape[:1]), text.hidden)

    def decode(self, params: Tree, latents: jax.Array, frame_indices: Sequence[int] | None = None) -> jax.Array:
        """Frames [B, F, H, W, 3] in [0, 1]; only those of `frame_indices`."""
        if frame_indices is not None:
            latents = latents[:, np.array(frame_indices)]
        frames = self.vae.apply({"params": params}, latents)
        return jnp.repeat(jnp.repeat(frames, FACTOR, axis=2), FACTOR, axis=3)

    @staticmethod
    def loading_lines(
        folder: str, dtype: str = "float32", prompt: str | None = None, settings: Mapping[str, Any] | None = None
    ) -> list[str]:
        """diffusers has no such pipeline, vpo_jax has."""
        lines = ["import vpo_jax", f"pipe = vpo_jax.load_pipeline({folder!r}, {dtype!r})"]
        return lines if prompt is None else [*lines, f"video = pipe({prompt!r}, **{dict(settings or {})!r})"]

    @staticmethod
    def adapter_lines(folder: str, base: str, form: str, components: Sequence[str] = ()) -> list[str]:
        """diffusers has no such pipeline, so nothing loads an adapter."""
        return []

    @staticmethod
    def beyond_diffusers(configs: Configs) -> list[str]:
        """All of it."""
        return ["the toy family"]
