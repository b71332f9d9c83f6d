"""VideoCrafter2's file: every tensor has a place, and the models compute what a reference in PyTorch computes."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from vpo_jax import convert, load_pipeline
from vpo_jax.checkpoints.keys import torch_key, torch_shape
from vpo_jax.families.text_to_video_sd import videocrafter
from vpo_jax.families.text_to_video_sd.layout import COMPONENTS, LAYOUT, param_shapes
from vpo_jax.families.text_to_video_sd.videocrafter import PREFIXES, read_videocrafter
from vpo_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from vpo_jax.models.unet3d import UNet3DConditionModel, UNet3DConfig
from vpo_jax.runtime import cli
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.trees import flatten

torch = pytest.importorskip("torch")

from tests.families import lvdm_reference as lvdm  # noqa: E402

# float32 on both sides; the layers are few.
TOLERANCE = 1e-5
SMALL = {"width": 32, "multiples": (1, 2), "layers": 1, "head_dim": 8, "context": 64}
TEXT = {"width": 64, "layers": 3, "inner": 80, "vocabulary": 600, "positions": 16}
VAE = {"widths": (32, 64), "layers": 1}


def randomised(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(torch.randn_like(parameter) * scale)
    return module.eval()


def arrays(module):
    return {key: value.numpy() for key, value in module.state_dict().items()}


@pytest.fixture(scope="module")
def denoiser():
    return randomised(lvdm.Denoiser(**SMALL))


@pytest.fixture(scope="module")
def tower():
    return randomised(lvdm.TextTower(**TEXT))


@pytest.fixture(scope="module")
def state(denoiser, tower):
    rng = np.random.default_rng(0)
    vae = {key: rng.normal(scale=0.2, size=s).astype(np.float32) for key, s in lvdm.autoencoder_shapes(**VAE).items()}
    parts = {"unet": arrays(denoiser), "vae": vae, "text_encoder": arrays(tower)}
    return {PREFIXES[name] + key: array for name, part in parts.items() for key, array in part.items()}


@pytest.fixture(scope="module")
def file(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("videocrafter") / "model.safetensors"
    # A checkpoint of a training also holds its schedule.
    save_file({**state, "betas": np.zeros(1000, np.float32), "scale_arr": np.zeros(1000, np.float32)}, path)
    return path


@pytest.mark.parametrize("name", COMPONENTS)
def test_every_tensor_of_the_real_size_has_one_place(name):
    """Consumed and produced, no more and no less, with the right shape: nothing is allocated."""
    with torch.device("meta"):
        shapes = {
            "unet": lambda: {key: tuple(v.shape) for key, v in lvdm.Denoiser().state_dict().items()},
            "vae": lvdm.autoencoder_shapes,
            "text_encoder": lambda: {key: tuple(v.shape) for key, v in lvdm.TextTower().state_dict().items()},
        }[name]()
    assert len(shapes) == {"unet": 1484, "vae": 248, "text_encoder": 295}[name]
    theirs = {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}
    config = videocrafter._CONFIGS[name](theirs)
    wanted = param_shapes(name, config)
    ours = videocrafter._squeezed(videocrafter._RENAMES[name](theirs, config), wanted)
    expected = {torch_key(path): torch_shape(path, leaf.shape) for path, leaf in flatten(wanted).items()}
    assert {key: array.shape for key, array in ours.items()} == expected
    if name == "text_encoder":  # its joint projections are three here; the last layer and the projections go
        return
    assert len(ours) == len(theirs)


def test_the_denoiser_of_the_real_size_is_that_of_modelscope():
    from diffusers import UNet3DConditionModel as Reference

    with torch.device("meta"):
        theirs = {key: tuple(v.shape) for key, v in Reference().state_dict().items()}
        state = {k: np.broadcast_to(np.float32(0), tuple(v.shape)) for k, v in lvdm.Denoiser().state_dict().items()}
    shapes = flatten(param_shapes("unet", videocrafter.unet_config(state)))
    ours = {torch_key(path): torch_shape(path, leaf.shape) for path, leaf in shapes.items()}
    assert {key: shape for key, shape in ours.items() if not key.startswith("fps_embedding")} == theirs
    assert len(ours) == len(theirs) + 4


@pytest.mark.slow
def test_the_denoiser_predicts_what_lvdms_does_at_any_frame_rate(denoiser, file):
    parts = read_videocrafter(file)
    unet = UNet3DConditionModel(UNet3DConfig.from_dict(parts.configs["unet"]))
    torch.manual_seed(1)
    sample, text = torch.randn(2, 4, 3, 8, 6), torch.randn(2, 5, 64)
    timesteps, fps = torch.tensor([7, 801]), torch.tensor([8, 28])
    with torch.no_grad():
        expected = denoiser(sample, timesteps, text, fps).permute(0, 2, 3, 4, 1).numpy()
    inputs = (sample.permute(0, 2, 3, 4, 1).numpy(), timesteps.numpy(), text.numpy())
    result = jax.jit(unet.apply)({"params": parts.params["unet"]}, *inputs, fps.numpy())
    assert np.abs(result - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_the_text_encoder_ends_before_the_last_layer(tower, file):
    parts = read_videocrafter(file)
    model = CLIPTextModel(CLIPTextConfig.from_dict(parts.configs["text_encoder"]))
    ids = np.random.default_rng(0).integers(0, 600, (2, 16)).astype(np.int32)
    with torch.no_grad():
        expected = tower(torch.from_numpy(ids).long()).numpy()
    result = jax.jit(model.apply)({"params": parts.params["text_encoder"]}, ids)
    assert np.abs(result - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.fixture(scope="module")
def donor(file, tmp_path_factory):
    """A diffusers folder with a tokenizer for the file's text encoder."""
    from vpo_jax.checkpoints.folders import PipelineParts, write_pipeline
    from vpo_jax.recipes.tokenizer import make_tokenizer

    parts = read_videocrafter(file)
    folder = tmp_path_factory.mktemp("donor") / "model"
    write_pipeline(folder, PipelineParts(LAYOUT, parts.configs, parts.params, make_tokenizer()))
    return folder


@pytest.mark.slow
def test_the_command_writes_a_folder_that_diffusers_opens(file, donor, tmp_path, capsys):
    from diffusers import TextToVideoSDPipeline

    convert.main([f"--from_videocrafter={file}", f"--base={donor}", f"--output={tmp_path}/model"])
    said = capsys.readouterr().out
    assert "diffusers has no embedding of the frame rate" in said and "and no scaled schedule" in said
    scope = {}
    exec("\n".join(line for line in said.splitlines() if line.startswith("    ")).replace("    ", ""), scope)
    assert isinstance(scope["pipe"], TextToVideoSDPipeline) and scope["pipe"].unet.config["fps_cond"]

    pipe = load_pipeline(tmp_path / "model")
    assert pipe.family.unet.config.fps_cond and pipe.family.unet.config.fps == 28
    assert pipe.defaults["guidance_scale"] == 12.0
    pipe.save_pretrained(tmp_path / "again")
    again = load_pipeline(tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, again.params, pipe.params)
    assert again.configs["unet"]["fps_cond"] and again.configs["scheduler"]["use_scale"]


def test_a_file_of_the_denoiser_alone_says_what_is_absent(state, tmp_path, capsys):
    prefix = PREFIXES["unet"]
    bare = {key.removeprefix(prefix): array for key, array in state.items() if key.startswith(prefix)}
    save_file(bare, tmp_path / "unet.safetensors")
    convert.main([f"--from_videocrafter={tmp_path}/unet.safetensors", f"--output={tmp_path}/model"])
    assert "vae, text_encoder, tokenizer" in capsys.readouterr().out
    assert (tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    with pytest.raises(UserError, match="vae"):
        load_pipeline(tmp_path / "model")


@pytest.mark.parametrize("damage", ["short", "extra", "turned", "foreign", "pickle", "nan"])
def test_a_file_that_does_not_fit_is_named_and_nothing_is_written(state, tmp_path, capsys, damage):
    key = PREFIXES["unet"] + "middle_block.0.in_layers.2.weight"
    broken, path = dict(state), tmp_path / "model.safetensors"
    if damage == "short":
        del broken[key]
        expected = "1 missing tensors (mid_block.resnets.0.conv1.weight)"
    elif damage == "extra":
        broken[PREFIXES["unet"] + "middle_block.9.weight"] = np.zeros(2, np.float32)
        expected = "middle_block.9.weight"
    elif damage == "turned":
        out = PREFIXES["unet"] + "out.2.weight"
        broken[out] = np.ascontiguousarray(broken[out].swapaxes(0, 1))
        expected = "tensors of the wrong shape"
    elif damage == "nan":
        broken[key] = np.full_like(broken[key], np.nan)
        expected = "NaN or infinite"
    elif damage == "foreign":
        broken = {"weight": np.zeros(2, np.float32)}
        expected = "not VideoCrafter2's layout"
    else:
        path, expected = tmp_path / "model.ckpt", "tools/pickle_to_safetensors.py"
        path.write_bytes(b"")
    if damage != "pickle":
        save_file(broken, path)
    with pytest.raises(SystemExit) as done:
        cli.run(convert.main, [f"--from_videocrafter={path}", f"--output={tmp_path}/out"])
    said = capsys.readouterr().err
    assert done.value.code == 2 and said.count("\n") == 1 and expected in said
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*partial"))


def test_flags_of_the_other_source_are_refused(file, tmp_path, capsys):
    with pytest.raises(UserError, match="--lora_only: does not go with --from_videocrafter"):
        convert.main([f"--from_videocrafter={file}", f"--output={tmp_path}/out", "--lora_only"])
