"""Tests run on the CPU, keep their compiled programs between runs, and give torch one thread."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".jax_cache"))
# With jax's defaults nothing that compiles in under a second is stored, and that is most of what tests compile.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Most of the time is compiling, and most of that LLVM's optimisation of programs that run a few times. One device,
# whatever the machine has cores: a run in this process and one in another have to agree bitwise.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Files that take minutes, first: at the end one process would wait for the other.
_LONG = ("test_processes", "test_survival", "test_train_videoscore", "test_mesh_training")
_NOT_QUICK = ("slow", "long", "full_size")


@pytest.hookimpl(tryfirst=True)  # before pytest reads -m
def pytest_collection_modifyitems(items):
    """Marks as `quick` the first case of every test that has no other tier, and puts long files first."""
    seen = set()
    for item in items:
        test = item.path, item.originalname
        if test not in seen and not any(item.get_closest_marker(tier) for tier in _NOT_QUICK):
            item.add_marker(pytest.mark.quick)
            seen.add(test)
    items.sort(key=lambda item: item.path.stem not in _LONG)


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread():
    """Two-thread torch is ten times slower where the cores are shared with XLA."""
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A diffusers folder of random weights, as small as the classes allow: 4 frames of 8x8. Read only."""
    import jax
    import numpy as np

    from vpo_jax.checkpoints.folders import PipelineParts, write_pipeline
    from vpo_jax.families.text_to_video_sd.layout import LAYOUT, param_shapes
    from vpo_jax.recipes.tokenizer import make_tokenizer

    tokenizer = make_tokenizer()
    configs = {
        "unet": {
            "_class_name": "UNet3DConditionModel",
            "sample_size": 4,
            "block_out_channels": [8],
            "down_block_types": ["DownBlock3D"],
            "up_block_types": ["UpBlock3D"],
            "layers_per_block": 1,
            "attention_head_dim": 4,
            "norm_num_groups": 4,
            "cross_attention_dim": 8,
        },
        "vae": {
            "_class_name": "AutoencoderKL",
            "block_out_channels": [8, 8],
            "down_block_types": ["DownEncoderBlock2D"] * 2,
            "up_block_types": ["UpDecoderBlock2D"] * 2,
            "norm_num_groups": 4,
            "scaling_factor": 0.5,
        },
        "text_encoder": {
            "architectures": ["CLIPTextModel"],
            "vocab_size": len(tokenizer),
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": tokenizer.model_max_length,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        "scheduler": {
            "_class_name": "DDIMScheduler",
            "beta_schedule": "squaredcos_cap_v2",
            "prediction_type": "v_prediction",
            "clip_sample": False,
            "set_alpha_to_one": False,
        },
    }
    rng = np.random.default_rng(0)
    params = {
        name: jax.tree.map(
            lambda leaf: rng.normal(scale=0.2, size=leaf.shape).astype(np.float32), param_shapes(name, configs[name])
        )
        for name in ("unet", "vae", "text_encoder")
    }
    folder = tmp_path_factory.mktemp("model") / "base"
    write_pipeline(folder, PipelineParts(LAYOUT, configs, params, tokenizer, {"num_frames": 4, "guidance_scale": 2.0}))
    return folder


@pytest.fixture(scope="session")
def scorer_folder(tmp_path_factory) -> Path:
    """A video scorer of random weights with the five dimensions, for clips of 4 frames of 8x8. Read only."""
    import jax
    import numpy as np

    from vpo_jax.models.video_scorer import VideoScorerConfig
    from vpo_jax.rewards.protocol import DIMENSIONS
    from vpo_jax.rewards.shapes.folder import ScorerParts, make_word_tokenizer, scorer_shapes, write_scorer

    tokenizer = make_word_tokenizer(["red", "blue", "circle", "square", "moving", "left", "right"], 8)
    config = VideoScorerConfig(
        dimensions=DIMENSIONS,
        ranges=((1.0, 4.0),) * len(DIMENSIONS),
        num_frames=4,
        image_size=8,
        vocab_size=tokenizer.get_vocab_size(),
        max_length=8,
        channels=(4, 4),
        maps=2,
        text_width=4,
        hidden=8,
    )
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: rng.normal(scale=0.5, size=leaf.shape).astype(np.float32), scorer_shapes(config))
    folder = tmp_path_factory.mktemp("scorer") / "tiny"
    write_scorer(folder, ScorerParts(config, params, tokenizer))
    return folder


@pytest.fixture(scope="session")
def strange_prompts(tmp_path_factory) -> Path:
    """A .jsonl of prompts that only look like trouble: they have to work and to be shown as they are."""
    import json

    prompts = [
        """ "double" and 'single' quotes """,
        "<script>alert('x')</script><b>&amp; [bold]",
        "a red circle \U0001f534 moving left \u2190 \u0645\u0631\u062d\u0628\u0627",
        "a very " * 250 + "small circle",
        "",
    ]
    path = tmp_path_factory.mktemp("prompts") / "strange.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def job(model_folder, scorer_folder, strange_prompts) -> list[str]:
    """Flags of a run that takes seconds: the tiny preset with a tiny model and scorer."""
    return [
        "--config=configs/vpo.py:tiny",
        f"--config.model.path={model_folder}",
        f"--config.data.prompts={strange_prompts}",
        f"--config.data.held_out={strange_prompts}",
        f"--config.reward.scorers={scorer_folder}",
        "--config.held_out.scorers=",
        "--config.rollout.num_frames=0",
        "--config.rollout.height=0",
        "--config.rollout.width=0",
        "--config.eval.prompts=5",
        "--config.eval.num_inference_steps=3",
        "--config.eval.guidance_scale=1.5",
        "--config.preference.margin=0.01",
        "--config.preference.motion_tolerance=10",
        "--config.lora.rank=2",
    ]


@pytest.fixture(scope="session")
def finished(job, tmp_path_factory):
    """(workdir, what the terminal showed) of that run. Read only."""
    import contextlib
    import io

    from vpo_jax import main

    workdir = tmp_path_factory.mktemp("finished") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        main.main([*job, f"--workdir={workdir}"])
    return workdir, shown.getvalue()
