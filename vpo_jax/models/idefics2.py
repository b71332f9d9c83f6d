"""Idefics2 with a regression head, as VideoScore has it (arXiv 2406.15252), in Flax linen.

Images go through a SigLIP encoder and a perceiver, which makes a fixed number of tokens of each; a Mistral decoder
reads them between the words, and a linear head reads the decoder at the last token.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vpo_jax.models.idefics2_config import Idefics2Config
from vpo_jax.models.idefics2_vision import Connector, VisionModel
from vpo_jax.models.layers import Dense
from vpo_jax.models.mistral import MistralModel, Prefix, fill_in
from vpo_jax.runtime.types import DType


class Idefics2Model(nn.Module):
    """Images and tokens to hidden states."""

    config: Idefics2Config
    dtype: DType = jnp.float32
    backend: str = "xla"

    def setup(self) -> None:
        """Submodules, named as in the checkpoint."""
        self.vision_model = VisionModel(self.config.vision, self.dtype, self.backend)
        self.connector = Connector(self.config, self.dtype, self.backend)
        self.text_model = MistralModel(self.config.text, self.dtype, self.backend)

    def see(self, pixels: jax.Array, patch_mask: jax.Array | None = None) -> jax.Array:
        """Tokens of images: [N, H, W, 3], bool [N, h, w] or None -> [N, resampler_n_latents, C]."""
        patches = self.vision_model(pixels, patch_mask)
        return self.connector(patches, None if patch_mask is None else patch_mask.reshape(len(patch_mask), -1))

    def read(
        self, ids: jax.Array, token_mask: jax.Array, images: jax.Array | None, before: Prefix | None = None
    ) -> tuple[jax.Array, Prefix]:
        """Last hidden state [B, L, C] of ids [B, L], and what was read: see `MistralModel`.

        The tokens of images [B, n, T, C] take the image tokens' places, in order; None where ids have none.
        """
        embeddings = self.text_model.embed(ids)
        if images is not None:
            flat = images.reshape(len(images), -1, images.shape[-1])
            embeddings = fill_in(embeddings, ids == self.config.image_token_id, flat)
        return self.text_model(embeddings, token_mask, before)


class Idefics2ForSequenceClassification(nn.Module):
    """Scores of videos, read at each row's last real token.

    Attributes:
        config: of the model.
        num_labels: outputs of the head.
        dtype: of the computation; the head computes in float32.
        backend: of attention.
    """

    config: Idefics2Config
    num_labels: int = 5
    dtype: DType = jnp.float32
    backend: str = "xla"

    def setup(self) -> None:
        """Submodules, named as in the checkpoint."""
        self.model = Idefics2Model(self.config, self.dtype, self.backend)
        self.score = Dense(self.num_labels)

    def see(self, pixels: jax.Array, patch_mask: jax.Array | None = None) -> jax.Array:
        """Tokens of images, as many of them as fit into memory: see `Idefics2Model.see`."""
        return self.model.see(pixels, patch_mask)

    def read(self, ids: jax.Array, token_mask: jax.Array) -> Prefix:
        """The beginning of a query, without images, for several calls of `judge` to continue: int32, bool [B, L]."""
        return self.model.read(ids, token_mask, None)[1]

    def judge(
        self, ids: jax.Array, token_mask: jax.Array, images: jax.Array, before: Prefix | None = None
    ) -> jax.Array:
        """Scores, float32 [B, num_labels], unclamped.

        Args:
            ids: int32 [B, L], with n * T image tokens in each row.
            token_mask: bool [B, L]; False is padding, before or behind the row's tokens.
            images: [B, n, T, C], from `see`.
            before: what `read` made of the beginning, if ids go on from one.
        """
        hidden, _ = self.model.read(ids, token_mask, images, before)
        last = ids.shape[1] - 1 - jnp.argmax(token_mask[:, ::-1], axis=1)  # the last real token's place
        return self.score(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])

    def __call__(
        self, ids: jax.Array, token_mask: jax.Array, pixels: jax.Array, patch_mask: jax.Array | None = None
    ) -> jax.Array:
        """Scores, float32 [B, num_labels], of ids [B, L] and pixels [B, n, H, W, 3] (patch_mask bool [B, n, h, w])."""
        flat_mask = None if patch_mask is None else patch_mask.reshape(-1, *patch_mask.shape[2:])
        images = self.see(pixels.reshape(-1, *pixels.shape[2:]), flat_mask)
        return self.judge(ids, token_mask, images.reshape(*pixels.shape[:2], *images.shape[1:]))
