"""A model family with its parameters, configs and tokenizer as the one object that people hold."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vpo_jax.checkpoints.folders import PipelineParts, Place, write_pipeline
from vpo_jax.diffusion.config import with_shift
from vpo_jax.diffusion.guidance import Guidance, guided
from vpo_jax.diffusion.process import Process
from vpo_jax.diffusion.samplers import make_sampler, sample
from vpo_jax.families.protocol import Family
from vpo_jax.families.table import family_of_parts, read_pipeline
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.keys import seed_key
from vpo_jax.runtime.mesh import VIDEO, constrain, infer_shardings
from vpo_jax.runtime.stored import put
from vpo_jax.runtime.trees import cast_floating

Tree = Any

_ASSETS = Path(__file__).parent / "shapes" / "assets"
SHIPPED = {"shapes": _ASSETS / "base", "shapes_wan": _ASSETS / "wan"}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """A text-to-video model; calling it samples videos.

    Pure functions of parameters, for use under `jax.jit`, are the family's. To use other weights,
    `with_trainable(tree)`, or `dataclasses.replace(pipeline, params=...)`.

    Attributes:
      family: the model's modules and what is known of its kind.
      params: parameter trees by component.
      configs: parsed JSON of every component and of "scheduler".
      tokenizer: what `family.tokenize` takes.
      defaults: of vpo_jax.json: num_frames, height, width, guidance_scale, num_inference_steps; may be {}.
    """

    family: Family
    params: Mapping[str, Tree]
    configs: Mapping[str, Mapping[str, Any]]
    tokenizer: Any
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def trainable(self) -> Tree:
        """The parameters that training changes."""
        return self.family.trainable(self.params)

    def with_trainable(self, tree: Tree) -> "Pipeline":
        """The same pipeline with `tree` in the place of `trainable`."""
        return dataclasses.replace(self, params=self.family.with_trainable(self.params, tree))

    @property
    def text_params(self) -> Tree:
        """What `family.encode_text` reads."""
        return self.family.text_params(self.params)

    @property
    def decoder_params(self) -> Tree:
        """What `family.decode` reads."""
        return self.family.decoder_params(self.params)

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """scheduler_config.json of the checkpoint."""
        return self.family.scheduler_config

    @property
    def process(self) -> Process:
        """The noise process that the checkpoint was trained with."""
        return self.family.process

    # Sizes.

    def video_size(
        self, num_frames: int | None = None, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int]:
        """(frames, height, width); what is left out (None or 0) is vpo_jax.json's, else the family's.

        Raises:
          UserError: a size that the autoencoder cannot make.
        """
        given = {"num_frames": num_frames, "height": height, "width": width}
        return self.family.video_size(**{name: value or self.defaults.get(name) for name, value in given.items()})

    def latent_shape(
        self, num_frames: int | None = None, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int, int]:
        """(f, h, w, C) of one video's latents."""
        return self.family.latent_shape(*self.video_size(num_frames, height, width))

    def on_mesh(self, mesh: Mesh) -> "Pipeline":
        """The same pipeline with its parameters on a mesh, by the family's rules: each call would copy them there.

        Under `jax.set_mesh(mesh)`, a call shards its batches over the mesh.
        """
        shardings = infer_shardings(self.params, mesh, self.family.sharding_rules)
        return dataclasses.replace(self, params=put(self.params, shardings))

    def as_sampled(self, dtype: Any, attention: str = "xla") -> "Pipeline":
        """The same model as a run with this `model.dtype` and `model.attention` samples it.

        The denoiser computes in `dtype`; its parameters are rounded to it, and the text encoder's where
        `family.half_text`. The autoencoder stays as it is.
        """
        family, params, text = self.family.with_options(dtype=dtype, attention=attention), self.params, self.text_params
        if jnp.dtype(dtype) != jnp.float32:
            params = family.with_trainable(params, cast_floating(self.trainable, dtype, family.float32_parameters))
            if family.half_text:
                params = {name: cast_floating(tree, dtype) if tree is text else tree for name, tree in params.items()}
        return dataclasses.replace(self, family=family, params=params)

    def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
        """Token ids int32 [B, L], padded and truncated to the family's length."""
        return self.family.tokenize(self.tokenizer, prompts)

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt before it is padded or truncated."""
        return self.family.count_tokens(self.tokenizer, prompts)

    @staticmethod
    def to_uint8(frames: jax.Array) -> jax.Array:
        """Frames in [0, 1] as people see them: uint8, rounded to nearest even."""
        return jnp.round(frames * 255).astype(jnp.uint8)

    # Sampling.

    def guidance(self, scale: float, low_scale: float | None = None, rescale: float = 0.0) -> Guidance:
        """Guidance of this model; `low_scale` (None or 0: as `scale`) is that of a second expert, for low noise.

        Raises:
          UserError: a second scale for a model of one expert.
        """
        boundary = self.family.boundary
        if low_scale and boundary is None:
            raise UserError(
                f"guidance_scale_2: {low_scale} is for models of two experts, and this has one; leave it out"
                " (rollout.guidance_scale_2=0)"
            )
        return Guidance(float(scale), float(rescale), boundary, float(low_scale or scale))

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
        guidance_scale_2: float | None = None,
        shift: float | None = None,
    ) -> np.ndarray:
        """Samples one video a prompt.

        Args:
          prompts: B of them, or one.
          num_frames: left out: vpo_jax.json's, else the family's.
          height: pixels; left out: vpo_jax.json's, else the family's.
          width: as height.
          num_inference_steps: denoising steps.
          guidance_scale: classifier-free guidance; 1 or less switches it off. Left out: vpo_jax.json's, else 7.5.
          negative_prompt: what guidance leads away from: one, or one a prompt.
          sampler: a diffusers scheduler's name; None takes the checkpoint's own.
          seed: of 64 bits; the initial latents of prompt i are normal(fold_in(seed_key(seed), i)).
          latents: initial latents [B, f, h, w, C], unit Gaussian, in place of the seed's.
          eta: DDIM's share of fresh noise in a step.
          batch_size: videos at a time; changes nothing but memory and time.
          guidance_rescale: share, to 1, of the conditional prediction's standard deviation that guidance keeps.
          guidance_scale_2: of the expert for low noise, in a model of two; left out: guidance_scale.
          shift: of a flow model's schedule towards noise; left out: scheduler_config.json's.

        Returns:
          uint8 [B, F, H, W, 3].

        Raises:
          UserError: a size, a sampler or a number of prompts that does not fit.
        """
        if guidance_scale is None:
            guidance_scale = self.defaults.get("guidance_scale", 7.5)
        frames = self._generate(
            prompts, num_frames, height, width, num_inference_steps, guidance_scale, negative_prompt,
            sampler, seed, latents, eta, batch_size, guidance_rescale, guidance_scale_2, shift,
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
        guidance_scale_2: float | None = None,
        shift: float | None = None,
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
        guidance = self.guidance(guidance_scale, guidance_scale_2, guidance_rescale)
        run = self._sampler(num_inference_steps, guidance, sampler, float(eta), shift)
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
        self, steps: int, guidance: Guidance, name: str | None = None, eta: float = 0.0, shift: float | None = None
    ) -> Callable[..., jax.Array]:
        """The jitted (params, noise, ids, negative ids, keys) -> frames of these settings."""
        return _compiled_sampler(self.family, steps, guidance, name, eta, shift)

    def save_pretrained(self, path: str | Path, dtypes: Mapping[str, str] | None = None) -> None:
        """Writes a diffusers folder that the family's class there loads; see `write_pipeline`."""
        parts = PipelineParts(self.family.layout, self.configs, self.params, self.tokenizer, self.defaults)
        write_pipeline(path, parts, dtypes)


@functools.lru_cache(maxsize=16)
def _compiled_sampler(
    family: Family, steps: int, guidance: Guidance, name: str | None, eta: float, shift: float | None
) -> Callable[..., jax.Array]:
    """One program for all pipelines of equal families and settings: base and tuned share it."""
    sampler = make_sampler(with_shift(family.scheduler_config, shift), steps, name, eta)

    def run(params: Tree, noise: jax.Array, ids: jax.Array, negative_ids: jax.Array, keys: jax.Array) -> jax.Array:
        noise = constrain(noise, VIDEO)
        text = family.encode_text(family.text_params(params), ids)
        negative = None
        if guidance.scale > 1.0:
            negative = family.encode_text(family.text_params(params), negative_ids)
        variables = {"params": family.trainable(params)}
        denoise = guided(
            lambda x, t, text: family.denoise(variables, x, t, text),
            text,
            negative,
            guidance,
            lambda text: family.read_text(variables, text),
        )
        return family.decode(family.decoder_params(params), sample(sampler, denoise, noise, keys))

    return jax.jit(run)


def load_pipeline(path: str | Path, dtype: str = "float32", place: Place | None = None) -> Pipeline:
    """Loads a diffusers text-to-video folder, a shipped model, or a model on the hub when online.

    Args:
      path: a folder with model_index.json, "shapes" or "shapes_wan", which ship, or a hub id "owner/name".
      dtype: "float32", "bfloat16" or "float16": of the parameters and the computation.
      place: a part's tree of shapes to its shardings, as `partial(infer_shardings, mesh=..., rules=...)`:
        each tensor goes from the file to its devices by itself. None keeps numpy arrays on the host. "disk" leaves
        them there (`Stored`), so that they take no memory: `on_mesh` reads them, or `save_pretrained`.

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
    family = family_of_parts(parts).from_configs(parts.configs, dtype)
    return Pipeline(family, parts.params, parts.configs, parts.tokenizer, parts.defaults)
