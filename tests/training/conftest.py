"""A video model of a few hundred parameters, toy scorers and a small config: the whole loop in seconds."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpo_jax.checkpoints.folders import Layout
from vpo_jax.diffusion.process import make_process
from vpo_jax.families.protocol import Text
from vpo_jax.models.layers import Conv, Dense
from vpo_jax.pipeline import Pipeline
from vpo_jax.rewards.protocol import repeat_rows
from vpo_jax.runtime.mesh import PARAMETER_RULES, Meshes, make_mesh
from vpo_jax.runtime.signals import Stop
from vpo_jax.runtime.workdir import open_workdir
from vpo_jax.training.check import check
from vpo_jax.training.train import train

ROOT = Path(__file__).resolve().parents[2]
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 100,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "timestep_spacing": "leading",
}
PROMPTS = [f"clip {i} of a {color} ball" for i, color in enumerate(["red", "blue", "green", "grey", "pink"])]


class TinyDenoiser(nn.Module):
    """The denoiser's interface on 16 channels."""

    dtype: Any = jnp.float32
    remat: bool = False
    lora_scale: float = 1.0

    @nn.compact
    def __call__(self, sample: jax.Array, timesteps: jax.Array, text: jax.Array) -> jax.Array:
        def dense(features: int, name: str) -> Dense:
            return Dense(features, dtype=self.dtype, lora_scale=self.lora_scale, name=name)

        batch, frames, height, width, channels = sample.shape
        time = timesteps.astype(jnp.float32)[:, None] * jnp.array([0.01, 0.1, 1.0])
        at = dense(16, "time")(jnp.concatenate([jnp.sin(time), jnp.cos(time)], -1))
        at = at + dense(16, "attn.to_v")(text.mean(axis=1))
        x = sample.reshape(batch * frames, height, width, channels)
        x = Conv(16, (3, 3), padding=1, dtype=self.dtype, name="conv_in")(x).reshape(batch, frames, height, width, 16)
        x = nn.silu(x + at[:, None, None, None])
        x = nn.silu(x + dense(16, "attn.to_q")(jnp.roll(x, 1, axis=1) - x))
        return dense(channels, "conv_out")(x).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class ToyFamily:
    """All that `Family` asks for, and nothing more; a latent pixel is a video pixel."""

    unet: nn.Module

    layout: ClassVar[Any] = Layout("ToyPipeline", {}, (), lambda folder, configs: None, lambda folder, tokenizer: None)
    sharding_rules: ClassVar[Any] = PARAMETER_RULES
    lora_targets: ClassVar[tuple[str, ...]] = (r"\.to_q$", r"\.to_v$")
    adapter_forms: ClassVar[tuple[str, ...]] = ("peft",)
    original_names: ClassVar[Any] = ()
    published: ClassVar[Any] = {}
    licences: ClassVar[Any] = {}
    importers: ClassVar[Any] = {}
    scheduler_config: ClassVar[Any] = SCHEDULER
    text_length: ClassVar[int] = 6
    boundary: ClassVar[float | None] = None
    float32_parameters: ClassVar[tuple[str, ...]] = ()
    half_text: ClassVar[bool] = False

    @classmethod
    def from_configs(cls, configs: Any, dtype: Any = jnp.float32) -> "ToyFamily":
        return cls(TinyDenoiser(dtype=dtype))

    def with_options(self, attention: str | None = None, **options: Any) -> "ToyFamily":
        return ToyFamily(self.unet.clone(**{name: value for name, value in options.items() if value is not None}))

    def trainable(self, params: Any) -> Any:
        return params["denoiser"]

    def with_trainable(self, params: Any, tree: Any) -> Any:
        return {**params, "denoiser": tree}

    def text_params(self, params: Any) -> Any:
        return params["text"]

    def decoder_params(self, params: Any) -> Any:
        return params["decoder"]

    @property
    def process(self) -> Any:
        return make_process(self.scheduler_config)

    def video_size(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        return num_frames, height, width

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        return num_frames, height, width, 4

    def context_length(self, num_frames, height, width):
        """Frames."""
        return num_frames

    def tokenize(self, tokenizer: Any, prompts: Any) -> np.ndarray:
        return np.array([[ord(c) % 31 for c in prompt.ljust(6)[:6]] for prompt in prompts], np.int32)

    def count_tokens(self, tokenizer: Any, prompts: Any) -> list[int]:
        return [len(prompt) for prompt in prompts]

    def encode_text(self, params: Any, ids: Any) -> Text:
        return Text(params["embedding"][ids])

    def read_text(self, variables: Any, text: Any) -> Any:
        return text

    def denoise(self, variables: Any, latents: jax.Array, timesteps: jax.Array, text: Text) -> jax.Array:
        return self.unet.apply(variables, latents, timesteps, text.hidden)

    def decode(self, params: Any, latents: jax.Array, frame_indices: Any = None) -> jax.Array:
        if frame_indices is not None:
            latents = latents[:, np.array(frame_indices)]
        return jax.nn.sigmoid(latents @ params["kernel"])

    @staticmethod
    def loading_lines(folder: str, dtype: str = "float32", prompt: Any = None, settings: Any = None) -> list[str]:
        return ["import vpo_jax", f"pipe = vpo_jax.load_pipeline({folder!r}, {dtype!r})"]

    @staticmethod
    def adapter_lines(folder: str, base: str, form: str, components: Any = ()) -> list[str]:
        return []

    @staticmethod
    def beyond_diffusers(configs: Any) -> list[str]:
        return ["toy models"]


def make_pipeline(unet: nn.Module | None = None) -> Pipeline:
    """The toy family with random weights in every layer."""
    unet = unet or TinyDenoiser()
    key = jax.random.key(7)
    shapes = jax.eval_shape(unet.init, key, jnp.zeros((1, 4, 4, 4, 4)), jnp.zeros(1), jnp.zeros((1, 6, 8)))
    leaves, structure = jax.tree.flatten(shapes["params"])
    rng = np.random.default_rng(7)
    params = [rng.normal(0.0, 0.3, leaf.shape).astype(np.float32) for leaf in leaves]
    parts = {
        "denoiser": jax.tree.unflatten(structure, params),
        "text": {"embedding": rng.normal(size=(31, 8)).astype(np.float32)},
        "decoder": {"kernel": rng.normal(size=(4, 3)).astype(np.float32)},
    }
    return Pipeline(ToyFamily(unet), parts, {"scheduler": SCHEDULER}, None)


@dataclasses.dataclass(frozen=True)
class ToyReward:
    """Likes bright videos; measures motion too, and calls `poison`ed prompts' scores NaN."""

    name: str = "toy"
    dimensions: tuple[str, ...] = ("visual_quality", "dynamic_degree")
    ranges: tuple[tuple[float, float], ...] = ((0.0, 1.0), (0.0, 1.0))
    trains: bool = True
    jittable: bool = True
    params: Any = dataclasses.field(default_factory=dict)
    poison: str = "never"

    def frame_indices(self, num_frames: int) -> tuple[int, ...]:
        return tuple(range(0, num_frames, 2))

    def prepare(self, prompts: Any) -> Any:
        return np.array([self.poison in prompt for prompt in prompts])

    def score(self, params: Any, videos: Any, prepared: Any) -> Any:
        pixels = jnp.asarray(videos, jnp.float32) / 255.0
        bright = pixels.mean(axis=(1, 2, 3, 4))
        moves = jnp.abs(jnp.diff(pixels, axis=1)).mean(axis=(1, 2, 3, 4))
        scores = jnp.stack([bright, moves], axis=-1)[:, : len(self.dimensions)]
        poisoned = repeat_rows(prepared, len(pixels))
        return jnp.where(jnp.asarray(poisoned)[:, None], jnp.nan, scores)


def make_config(**overrides: Any) -> Any:
    """configs/vpo.py at its smallest; an override's name has two underscores for the dot."""
    spec = importlib.util.spec_from_file_location("vpo_config", ROOT / "configs" / "vpo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("tiny")
    config.rollout.num_frames, config.rollout.height, config.rollout.width = 4, 4, 4
    config.rollout.candidates = 4
    config.train.prompts_per_step, config.train.steps, config.train.updates_per_step = 8, 3, 2
    config.preference.margin, config.lora.rank = 0.1, 2
    config.log.samples, config.log.tensorboard, config.eval.prompts = 0, False, 4
    config.optimizer.learning_rate = 1e-3
    for name, value in overrides.items():
        *parents, last = name.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        node[last] = value
    check(config)
    return config


def run_training(config: Any, folder: Path, **options: Any) -> Any:
    """`train` on the tiny pipeline, one device unless a mesh is given."""
    options = {
        "meshes": Meshes.of(make_mesh(1, devices=jax.devices()[:1])),
        "prompts": PROMPTS,
        "stop": Stop(),
    } | options
    rewards = options.pop("rewards", (ToyReward(),))
    pipeline = options.pop("pipeline", None) or make_pipeline()
    with open_workdir(folder, config.to_dict()) as workdir:
        return train(config, pipeline, rewards, workdir, **options)


@pytest.fixture
def pipeline():
    return make_pipeline()


@pytest.fixture
def toy_reward():
    return ToyReward


@pytest.fixture
def configure():
    return make_config


@pytest.fixture
def run():
    run_training.pipeline = make_pipeline
    return run_training


@pytest.fixture
def pipeline_of():
    return make_pipeline
