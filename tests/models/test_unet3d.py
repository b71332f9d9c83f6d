"""UNet3DConditionModel against diffusers' class, with random weights in every layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpo_jax.checkpoints.keys import from_torch, init_shapes, to_torch, torch_key, torch_shape
from vpo_jax.models.lora import LoRAConfig, init_lora, merge_lora
from vpo_jax.models.unet3d import UNet3DConditionModel, UNet3DConfig
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.trees import flatten

# float32 on both sides; a few hundred layers of rounding leave about 1e-6 of the output's scale.
TOLERANCE = 1e-5

_TWO = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock3D", "CrossAttnDownBlock3D"),
    "up_block_types": ("CrossAttnUpBlock3D", "UpBlock3D"),
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
}
_CROSS, _PLAIN = ("CrossAttnDownBlock3D", "CrossAttnUpBlock3D"), ("DownBlock3D", "UpBlock3D")
# (changes to the config, frames, height, width, text length)
CASES = {
    "even": ({}, 4, 8, 8, 5),
    "odd height and width": ({}, 3, 9, 7, 5),
    "one frame": ({}, 1, 8, 6, 3),
    "attention first": (
        {"down_block_types": (_CROSS[0], _PLAIN[0]), "up_block_types": (_PLAIN[1], _CROSS[1])}, 5, 6, 10, 7,
    ),
    "three stages, odd": (
        {
            "block_out_channels": (8, 8, 24),
            "down_block_types": (_PLAIN[0], _CROSS[0], _CROSS[0]),
            "up_block_types": (_CROSS[1], _CROSS[1], _PLAIN[1]),
        }, 3, 11, 13, 4,
    ),
    "two layers a block": ({"layers_per_block": 2}, 2, 8, 8, 6),
    "head size that does not divide": ({"attention_head_dim": 5}, 3, 8, 8, 5),
    "other channels in and out": ({"in_channels": 5, "out_channels": 3}, 3, 6, 6, 5),
    "other norm": ({"norm_num_groups": 2, "norm_eps": 1e-3}, 3, 8, 8, 5),
    "no downsample padding": ({"downsample_padding": 0}, 3, 8, 8, 5),
    "scaled middle": ({"mid_block_scale_factor": 1.7}, 3, 8, 8, 5),
    "gelu": ({"act_fn": "gelu"}, 3, 8, 8, 5),
    "mish, wide text": ({"act_fn": "mish", "cross_attention_dim": 33}, 6, 4, 8, 2),
    "one stage": (
        {"block_out_channels": (12,), "down_block_types": (_CROSS[0],), "up_block_types": (_CROSS[1],)}, 3, 5, 5, 4,
    ),
}  # fmt: skip


def _torch_unet(config):
    torch = pytest.importorskip("torch")
    from diffusers import UNet3DConditionModel as Reference

    torch.manual_seed(0)
    reference = Reference(**config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5
            parameter.copy_(torch.randn_like(parameter) * scale + (parameter.ndim == 1) * 0.2)
    return torch, reference


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_prediction_is_that_of_diffusers(name):
    changes, frames, height, width, length = CASES[name]
    config = {**_TWO, **changes}
    torch, reference = _torch_unet(config)
    unet = UNet3DConditionModel(UNet3DConfig.from_dict(config))
    sample = torch.randn(2, unet.config.in_channels, frames, height, width)
    text = torch.randn(2, length, unet.config.cross_attention_dim)
    timesteps = torch.tensor([3, 871])
    with torch.no_grad():
        expected = reference(sample, timesteps, text).sample.permute(0, 2, 3, 4, 1).numpy()

    inputs = (sample.permute(0, 2, 3, 4, 1).numpy(), timesteps.numpy(), text.numpy())
    state = {key: value.numpy() for key, value in reference.state_dict().items()}
    params = from_torch(state, init_shapes(unet, *inputs), "unet")
    result = jax.jit(unet.apply)({"params": params}, *inputs)
    assert np.abs(result - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.slow
def test_every_tensor_of_modelscope_is_consumed_and_produced():
    torch = pytest.importorskip("torch")
    from diffusers import UNet3DConditionModel as Reference

    with torch.device("meta"):
        reference = Reference()  # the class's defaults are damo's text-to-video-ms-1.7b
    expected = {key: tuple(value.shape) for key, value in reference.state_dict().items()}
    unet = UNet3DConditionModel(UNet3DConfig())
    video = jax.ShapeDtypeStruct((1, 1, 8, 8, 4), jnp.float32)
    text = jax.ShapeDtypeStruct((1, 1, 1024), jnp.float32)
    shapes = flatten(init_shapes(unet, video, jax.ShapeDtypeStruct((1,), jnp.int32), text))
    assert {torch_key(path): torch_shape(path, leaf.shape) for path, leaf in shapes.items()} == expected


@pytest.fixture(scope="module")
def small():
    config = UNet3DConfig.from_dict(_TWO)
    unet = UNet3DConditionModel(config)
    keys = jax.random.split(jax.random.key(0), 4)
    inputs = (
        jax.random.normal(keys[0], (2, 3, 4, 4, 4)),
        jnp.array([5, 700]),
        jax.random.normal(keys[1], (2, 4, 12)),
    )
    params = init_shapes(unet, *inputs)
    leaves, structure = jax.tree.flatten(params)
    draws = jax.random.split(keys[2], len(leaves))
    leaves = [0.3 * jax.random.normal(k, leaf.shape) for k, leaf in zip(draws, leaves, strict=True)]
    return unet, jax.tree.unflatten(structure, leaves), inputs


def _everywhere(params, key):
    lora = LoRAConfig(rank=3, alpha=6.0, targets=(r".",))
    adapters = init_lora(key, params, lora)
    adapters = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape), adapters)
    return lora, adapters


@pytest.mark.slow
def test_adapters_on_every_layer_do_what_merged_weights_do(small):
    unet, params, inputs = small
    lora, adapters = _everywhere(params, jax.random.key(1))
    adapted = unet.clone(lora_scale=lora.scale)
    with_adapters = jax.jit(adapted.apply)({"params": params, "lora": adapters}, *inputs)
    merged = jax.jit(unet.apply)({"params": merge_lora(params, adapters, lora.scale)}, *inputs)
    plain = jax.jit(unet.apply)({"params": params}, *inputs)
    assert np.abs(with_adapters - plain).max() > 0.1 * np.abs(plain).max()
    # Two orders of summation in float32.
    assert np.abs(with_adapters - merged).max() <= 1e-4 * np.abs(merged).max()


@pytest.mark.slow
def test_fresh_adapters_change_no_bit(small):
    unet, params, inputs = small
    adapters = init_lora(
        jax.random.key(1), params, LoRAConfig(rank=2, alpha=2.0, targets=(r"\.to_[qkv]$", r"\.to_out\.0$"))
    )
    run = jax.jit(unet.apply)
    zero = jax.tree.map(jnp.zeros_like, adapters)
    with_fresh = run({"params": params, "lora": adapters}, *inputs)
    np.testing.assert_array_equal(with_fresh, run({"params": params, "lora": zero}, *inputs))
    np.testing.assert_allclose(with_fresh, run({"params": params}, *inputs), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_rematerialisation_changes_no_gradient(small):
    unet, params, inputs = small

    def gradient(module):
        return jax.jit(jax.grad(lambda p: jnp.square(module.apply({"params": p}, *inputs)).mean()))(params)

    plain, remat = gradient(unet), gradient(unet.clone(remat=True))
    for path, leaf in flatten(plain).items():
        # The recomputed forward is compiled anew; only rounding may differ.
        np.testing.assert_allclose(flatten(remat)[path], leaf, rtol=1e-3, atol=1e-4 * np.abs(leaf).max() + 1e-7)


def test_names_survive_the_way_to_torch_and_back(small):
    _, params, _ = small
    shapes = jax.eval_shape(lambda: params)
    back = from_torch(to_torch(params), shapes, "unet")
    jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_attention_heads", 8),
        ("time_cond_proj_dim", 16),
        ("attention_head_dim", [4, 4]),
        ("norm_num_groups", None),
        ("norm_num_groups", 3),
        ("act_fn", "tanhish"),
        ("down_block_types", ["DownBlock3D", "DownBlockMotion"]),
        ("block_out_channels", [8, 16, 32]),
        ("use_linear_projection", True),
    ],
)
def test_a_field_that_is_not_honoured_is_refused_by_name(field, value):
    with pytest.raises(UserError, match=field):
        UNet3DConfig.from_dict({**_TWO, field: value})


def test_an_adapter_target_without_a_match_is_refused(small):
    _, params, _ = small
    with pytest.raises(UserError, match=r"lora\.targets"):
        init_lora(jax.random.key(0), params, LoRAConfig(rank=2, alpha=2.0, targets=("to_nowhere",)))


def test_config_keeps_the_defaults_of_diffusers():
    pytest.importorskip("torch")
    from diffusers import UNet3DConditionModel as Reference

    with pytest.importorskip("torch").device("meta"):
        reference = dict(Reference().config)
    ours = {k: v for k, v in dataclasses.asdict(UNet3DConfig()).items() if k not in ("fps_cond", "fps")}
    assert {name: reference[name] for name in ours} == {
        name: tuple(value) if isinstance(value, list) else value for name, value in ours.items()
    }
