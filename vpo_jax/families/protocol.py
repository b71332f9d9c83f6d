"""What a family of text-to-video models provides.

A family object holds linen modules, made from the configs of a diffusers folder, and no parameters: all of its
methods are pure functions of those. `vpo_jax.pipeline.Pipeline` holds a family together with its parameters.
To add a family, write a folder beside this file and a line in `vpo_jax.families.table`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self

import jax
import numpy as np

from vpo_jax.diffusion.process import Process
from vpo_jax.runtime.mesh import Rules

if TYPE_CHECKING:  # pairs and losses know `Text` and no flax
    from vpo_jax.checkpoints.folders import Configs, Layout, PipelineParts
    from vpo_jax.checkpoints.lora_layouts import NameTable

Tree = Any
# Parameter trees by component.
Params = Mapping[str, Tree]


class Text(NamedTuple):
    """Encoded prompts.

    Attributes:
      hidden: the text encoder's states [B, L, D].
      mask: bool [B, L], True at tokens that are no padding; None where the denoiser attends to all of them.
    """

    hidden: jax.Array
    mask: jax.Array | None = None


class Importer(NamedTuple):
    """A reader of checkpoints that come in another form than a diffusers folder.

    Attributes:
      read: (file) -> the parts that it holds, perhaps without some components and without a tokenizer.
      what: the file in words, for `--help`.
    """

    read: Callable[[Path], PipelineParts]
    what: str


class Family(Protocol):
    """One kind of text-to-video model; frozen and hashable by value, since compiled samplers are kept by it.

    Attributes:
      layout: the family's diffusers folder: components, tokenizer, `_class_name`.
      sharding_rules: of the parameters; the first pattern that is found in a path wins.
      lora_targets: regular expressions, searched in dotted module names, of the layers that get an adapter by default.
      adapter_forms: of `lora_files.FORMS`, those in which adapters can be written; the first is the default.
      original_names: of modules that may be adapted: (pattern of the name here, name in the model's original code), for
        LoRA files that have those names; () where there are none.
      float32_parameters: regular expressions, searched in parameter paths: float32 in a half-precision model too.
      half_text: whether a run in half precision has the text encoder's weights in it too. They compute in float32.
      published: name -> configs of published checkpoints, so that a run can be planned without weights.
      licences: part of a published checkpoint's name, in lower case -> licence of its weights, as the hub spells it.
      importers: name -> reader of another file format: `python -m vpo_jax.convert --from_NAME=FILE`.
    """

    layout: ClassVar[Layout]
    sharding_rules: ClassVar[Rules]
    lora_targets: ClassVar[tuple[str, ...]]
    float32_parameters: ClassVar[tuple[str, ...]]
    half_text: ClassVar[bool]
    adapter_forms: ClassVar[tuple[str, ...]]
    original_names: ClassVar[NameTable]
    published: ClassVar[Mapping[str, Configs]]
    licences: ClassVar[Mapping[str, str]]
    importers: ClassVar[Mapping[str, Importer]]

    def __hash__(self) -> int: ...

    @classmethod
    def from_configs(cls, configs: Configs, dtype: Any) -> Self:
        """The family's modules with these configs, computing in `dtype`.

        Raises:
          UserError: a field, or a value of one, that a module does not support.
        """
        ...

    def with_options(
        self,
        dtype: Any = None,
        remat: bool | None = None,
        lora_scale: float | None = None,
        attention: str | None = None,
    ) -> Self:
        """The family whose trainable modules have these options; None: as before.

        They compute in `dtype`, rematerialise, scale adapters, or attend by a name of `models.attention.BACKENDS`.
        """
        ...

    # Parameters.

    def trainable(self, params: Params) -> Tree:
        """The parameters that training changes. Where several components train, a dict by component."""
        ...

    def with_trainable(self, params: Params, tree: Tree) -> dict[str, Tree]:
        """`params` with `tree` in the place of `trainable(params)`."""
        ...

    def text_params(self, params: Params) -> Tree:
        """What `encode_text` reads."""
        ...

    def decoder_params(self, params: Params) -> Tree:
        """What `decode` reads."""
        ...

    # Process and sizes.

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """scheduler_config.json of the checkpoint."""
        ...

    @property
    def process(self) -> Process:
        """The noise process that the checkpoint was trained with."""
        ...

    @property
    def boundary(self) -> float | None:
        """The timestep below which a second model denoises, with a guidance scale of its own; None: there is one."""
        ...

    @property
    def text_length(self) -> int:
        """Tokens of a prompt, L of `encode_text`."""
        ...

    def video_size(self, num_frames: int | None, height: int | None, width: int | None) -> tuple[int, int, int]:
        """(frames, height, width), with the checkpoint's own sizes for what is left out (None or 0).

        Raises:
          UserError: a size that the autoencoder cannot make, or one that is left out and that the checkpoint lacks.
        """
        ...

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(f, h, w, C): the latents of one video of a size that `video_size` has returned."""
        ...

    def context_length(self, num_frames: int, height: int, width: int) -> int:
        """Positions of such a video that `mesh.context` shards: latent frames, or a transformer's tokens."""
        ...

    # Pure functions of parameters.

    def tokenize(self, tokenizer: Any, prompts: Sequence[str]) -> np.ndarray:
        """Token ids int32 [B, L], padded and truncated to `text_length`."""
        ...

    def count_tokens(self, tokenizer: Any, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt before it is padded or truncated, special tokens included."""
        ...

    def encode_text(self, params: Tree, ids: jax.Array) -> Text:
        """`Text` of token ids [B, L]; `params` as `text_params` returns them."""
        ...

    def read_text(self, variables: Tree, text: Text) -> Tree:
        """What `denoise` takes in place of `text`: what it computes of it alone, so that many steps share that.

        Where there is no such thing, the text as it is.
        """
        ...

    def denoise(self, variables: Tree, latents: jax.Array, timesteps: jax.Array, text: Text) -> jax.Array:
        """Prediction float32 [B, f, h, w, C].

        Args:
          variables: {"params": as `trainable` returns them, "lora": adapters, or absent}.
          latents: [B, f, h, w, C].
          timesteps: [B] or a scalar, in the units of the process.
          text: of B prompts, or what `read_text` made of it.
        """
        ...

    def decode(self, params: Tree, latents: jax.Array, frame_indices: Sequence[int] | None = None) -> jax.Array:
        """Frames float32 [B, F, H, W, 3] in [0, 1] of latents [B, f, h, w, C]; only those of `frame_indices`.

        `params` as `decoder_params` returns them.
        """
        ...

    # The folder, as others read it.

    @staticmethod
    def loading_lines(
        folder: str, dtype: str = "float32", prompt: str | None = None, settings: Mapping[str, Any] | None = None
    ) -> list[str]:
        """Lines of Python that load a folder of `dtype` in diffusers as `pipe`; with a prompt, that make a video too.

        `settings` are keyword arguments of the call: num_frames, height, width, num_inference_steps, guidance_scale.
        """
        ...

    @staticmethod
    def adapter_lines(folder: str, base: str, form: str, components: Sequence[str] = ()) -> list[str]:
        """Lines of Python that load an adapter folder of `form` on its base model in diffusers.

        `components` are those that it adapts, where several train; () where one does.
        """
        ...

    @staticmethod
    def beyond_diffusers(configs: Configs) -> list[str]:
        """What diffusers cannot express of a model, in words: it ignores these fields and makes other videos."""
        ...
