"""WanTransformer3DModel of diffusers in Flax: the denoiser of Wan 2.1 and 2.2, text to video."""

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.sharding import PartitionSpec

from vpo_jax.models.attention import BACKENDS, KEYS
from vpo_jax.models.layers import activation, adapter, default_kernel_init, multiply, timestep_embedding
from vpo_jax.models.wan_transformer_config import WanTransformerConfig
from vpo_jax.models.wan_transformer_layers import TOKENS, Block, Compute, modulate, rotation
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.mesh import BATCH, VIDEO, constrain
from vpo_jax.runtime.types import DType, FloatTable

__all__ = ["REMAT_POLICIES", "TextContext", "WanTransformer3DModel", "WanTransformerConfig"]

_STACKED_KEYS = PartitionSpec(None, *KEYS)  # [layers, B, L, H, D / H]
_policies = jax.checkpoint_policies


def _is_flash_attention(primitive: Primitive, *_: object, **__: object) -> bool:
    # cuDNN's kernel gives the sums of its softmax besides the output, and its gradient needs both.
    return primitive.name == "dot_product_attention_fwd_wrapper"


_attention_saved = _policies.save_from_both_policies(
    _policies.save_only_these_names("self_attn", "cross_attn"), _is_flash_attention
)

# What a block keeps of its forward pass for its gradient, besides its input; the rest is computed again.
REMAT_POLICIES: dict[str, Callable[..., bool]] = {
    "full": _policies.nothing_saveable,
    "attention": _attention_saved,
    "attention_and_ffn": _policies.save_from_both_policies(
        _attention_saved, _policies.save_only_these_names("ffn_activation")
    ),
    "dots": _policies.dots_with_no_batch_dims_saveable,
    # As "full", and the input waits in the host's memory.
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["hidden_states"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class TextContext(NamedTuple):
    """What the blocks read of a text; it depends on the weights and adapters, not on the video or the timestep.

    Attributes:
      keys: [layers, B, K, H, D / H], normalised.
      values: as `keys`.
      bias: of each row's scores, float32 [1, 1, 1, K]: the logarithm of how many rows it stands for; None where each
        stands for itself.
    """

    keys: jax.Array
    values: jax.Array
    bias: jax.Array | None


class PatchEmbedding(nn.Module):
    """A convolution whose window is its stride, as one matrix product; kernel [*patch_size, C, D]."""

    config: WanTransformerConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [B, f, h, w, C] -> [B, T, D]
        cfg, dtype = self.config, self.compute.dtype
        kernel = self.param("kernel", default_kernel_init, (*cfg.patch_size, x.shape[-1], cfg.width))
        bias = self.param("bias", nn.initializers.zeros, (cfg.width,))
        patches = _patches(x.astype(dtype), cfg.patch_size)
        inputs = patches.shape[-1]
        y = multiply(patches, kernel.astype(dtype).reshape(inputs, cfg.width))
        if self.has_variable("lora", "lora_A"):
            down, up = adapter(self, dtype)  # [*patch_size, C, r], [r, D]
            y = y + self.compute.lora_scale * multiply(multiply(patches, down.reshape(inputs, -1)), up)
        return y + bias.astype(dtype)


class TwoLayers(nn.Module):
    """Two linear layers with an activation between them."""

    features: int
    act: str
    compute: Compute
    dtype: DType

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.compute.dense(self.features, "linear_1", self.dtype)(x)
        return self.compute.dense(self.features, "linear_2", self.dtype)(activation(self.act)(x))


class ConditionEmbedder(nn.Module):
    """What the blocks read of the timestep, and the projection of the text."""

    config: WanTransformerConfig
    compute: Compute

    def setup(self) -> None:
        width, compute = self.config.width, self.compute
        self.time_embedder = TwoLayers(width, "silu", compute, jnp.float32)  # diffusers keeps it in float32
        self.time_proj = compute.dense(6 * width, "time_proj")
        self.text_embedder = TwoLayers(width, "gelu_pytorch_tanh", compute, compute.dtype)

    def time(self, timesteps: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Embedding [B, D] and modulation [B, 6, D] of timesteps [B]."""
        sinusoids = timestep_embedding(timesteps, self.config.freq_dim)
        embedding = self.time_embedder(sinusoids).astype(self.compute.dtype)
        modulation = self.time_proj(nn.silu(embedding)).reshape(-1, 6, self.config.width)
        return embedding, constrain(modulation, BATCH)

    def text(self, text: jax.Array) -> jax.Array:  # [B, L, text_dim] -> [B, L, D]
        return self.text_embedder(text)


class WanTransformer3DModel(nn.Module):
    """Text-conditioned denoiser of videos, the Flax twin of diffusers' class of this name.

    The blocks are one scanned module: their parameters are stacked, "blocks.*/attn1/to_q/kernel" [layers, in, out],
    and what is compiled does not grow with their number.

    Attributes:
      config: the architecture.
      dtype: of the computation; parameters are float32 or what the tree holds. In half precision the norms, the
        modulation and the time embedding still are in float32.
      remat: compute a block's activations again in the backward pass.
      remat_policy: a name in `REMAT_POLICIES`; "attention" keeps what is dear to compute, "full" nothing.
      lora_scale: alpha / rank of the adapters in the `lora` collection, where there are any.
      attention_backend: a name in `vpo_jax.models.attention.BACKENDS`.
      text_length: rows of text that a token attends to, zero rows included: the checkpoints know 512.
    """

    config: WanTransformerConfig
    dtype: DType = jnp.float32
    remat: bool = False
    remat_policy: str = "full"
    lora_scale: float = 1.0
    attention_backend: str = "xla"
    text_length: int = 512

    def setup(self) -> None:
        for field, known in (("attention_backend", BACKENDS), ("remat_policy", REMAT_POLICIES)):
            if (name := getattr(self, field)) not in known:
                raise UserError(f"{field}: {name!r} is not known; use one of {', '.join(known)}")
        cfg = self.config
        compute = Compute(self.dtype, self.attention_backend, self.lora_scale)
        self.patch_embedding = PatchEmbedding(cfg, compute)
        self.condition_embedder = ConditionEmbedder(cfg, compute)
        policy = REMAT_POLICIES[self.remat_policy]
        block = nn.remat(Block, policy=policy, prevent_cse=False) if self.remat else Block
        stack = {"variable_axes": {"params": 0, "lora": 0}, "split_rngs": {"params": True}, "length": cfg.num_layers}
        over_blocks = {"in_axes": (0, nn.broadcast, nn.broadcast, nn.broadcast), **stack}
        scanned = nn.scan(block, methods={"__call__": over_blocks, "encode_text": {"in_axes": nn.broadcast, **stack}})
        self.blocks = scanned(cfg, compute, name="blocks.*")
        self.scale_shift_table = self.param(
            "scale_shift_table", nn.initializers.normal(cfg.width**-0.5), (1, 2, cfg.width)
        )
        self.proj_out = compute.dense(cfg.channels_out * cfg.patch_volume, "proj_out")

    def encode_text(self, text: jax.Array) -> TextContext:
        """What `__call__` reads of a text, so that many steps of sampling compute it once.

        Every token attends to `text_length` rows, of which those after a prompt's tokens are zero. Rows that are equal
        share their key and value, so the last one given stands for all that are left out: give at least one zero row
        after the longest prompt, or all rows.

        Args:
          text: the text encoder's states, [B, L, text_dim], zero after a prompt's tokens; L at most `text_length`.

        Returns:
          Its keys and values, with K = L rows, or L + 2 where L is less than `text_length`.

        Raises:
          UserError: more rows than `text_length`.
        """
        rows = text.shape[1]
        if rows > self.text_length:
            raise UserError(
                f"text: {rows} rows, and text_length is {self.text_length}; cut the prompts to so many tokens"
            )
        bias = None
        if rows < self.text_length:
            counts = log_counts(self.text_length - rows + 1)
            text = jnp.concatenate([text, *[text[:, -1:]] * (len(counts) - 1)], 1)
            bias = jnp.asarray(np.concatenate([np.zeros(rows - 1, np.float32), counts]))[None, None, None]
        hidden = constrain(self.condition_embedder.text(text), BATCH)
        _, (keys, values) = self.blocks.encode_text((), hidden)
        return TextContext(constrain(keys, _STACKED_KEYS), constrain(values, _STACKED_KEYS), bias)

    def __call__(self, sample: jax.Array, timesteps: jax.Array, text: jax.Array | TextContext) -> jax.Array:
        """The model's prediction, a velocity, for noisy latents.

        Args:
          sample: [B, f, h, w, in_channels] with f latent frames; `patch_size` divides the three sizes.
          timesteps: [B] or a scalar, 0 to 1000, integer or float.
          text: [B, L, text_dim] as `encode_text` takes it, or what that returned, with the same numbers as a result.

        Returns:
          [B, f, h, w, out_channels] in float32.

        Raises:
          UserError: a size that `patch_size` does not divide, or more tokens along an axis than there are positions.
        """
        cfg = self.config
        sizes = _token_grid(sample.shape[1:4], cfg)
        context = text if isinstance(text, TextContext) else self.encode_text(text)
        timesteps = jnp.broadcast_to(jnp.asarray(timesteps), (sample.shape[0],))
        embedding, modulation = self.condition_embedder.time(timesteps)

        x = constrain(self.patch_embedding(sample), TOKENS)
        positions = rotation(sizes, cfg.attention_head_dim)
        x, _ = self.blocks(x, (context.keys, context.values), modulation, positions, context.bias)

        table = self.scale_shift_table.astype(jnp.float32) + embedding[:, None].astype(jnp.float32)
        shift, scale = jnp.split(table, 2, axis=1)  # [B, 1, D]
        x = constrain(self.proj_out(modulate(x, shift, scale, cfg.eps)), TOKENS)
        return constrain(_video(x, sizes, cfg.patch_size), VIDEO).astype(jnp.float32)


def log_counts(rows: int) -> FloatTable:
    """Logarithms, float32 [3], of three numbers whose sum is `rows`; the first two are exact in bfloat16 too.

    So a kernel that rounds them errs by less than 1e-5 of the sum; one logarithm would be wrong by up to 1.6 %.
    """
    parts, rest = [], float(rows)
    for _ in range(2):
        log = math.log(rest)
        unit = 2.0 ** (math.floor(math.log2(abs(log))) - 7)  # of bfloat16's eight bits
        parts.append(math.floor(log / unit) * unit)
        rest -= math.exp(parts[-1])
    return np.array([*parts, math.log(rest)], np.float32)


def _token_grid(sides: tuple[int, ...], config: WanTransformerConfig) -> tuple[int, int, int]:
    """Tokens along frames, rows and columns of latents with these sides."""
    sizes = []
    for name, side, patch in zip(("frames", "height", "width"), sides, config.patch_size, strict=True):
        if side % patch or not side:
            raise UserError(f"sample: {side} latent positions along {name}; patch_size asks for a multiple of {patch}")
        if side // patch > config.rope_max_seq_len:
            raise UserError(
                f"sample: {side // patch} tokens along {name}; rope_max_seq_len allows {config.rope_max_seq_len}"
            )
        sizes.append(side // patch)
    return sizes[0], sizes[1], sizes[2]


def _patches(x: jax.Array, patch: tuple[int, int, int]) -> jax.Array:
    """[B, f, h, w, C] -> [B, T, C * patch], with the channel as the fastest axis."""
    batch, frames, height, width, channels = x.shape
    t, h, w = patch
    x = x.reshape(batch, frames // t, t, height // h, h, width // w, w, channels)
    return x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(batch, -1, t * h * w * channels)


def _video(tokens: jax.Array, sizes: tuple[int, int, int], patch: tuple[int, int, int]) -> jax.Array:
    """The inverse of `_patches` for tokens in a grid of `sizes`."""
    x = tokens.reshape(tokens.shape[0], *sizes, *patch, -1).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(x.shape[0], *(n * p for n, p in zip(sizes, patch, strict=True)), -1)
