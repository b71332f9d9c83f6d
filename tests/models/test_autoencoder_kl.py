"""AutoencoderKL against diffusers' class of the same name, in float32, with random numbers in every weight."""

import jax
import numpy as np
import pytest

from vpo_jax.checkpoints.keys import from_torch, torch_key, torch_shape
from vpo_jax.families.text_to_video_sd.layout import param_shapes
from vpo_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.trees import flatten

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

# Both sides sum in float32 in different orders, which gives about 2e-6 of the output's scale; five times that.
TOLERANCE = 1e-5

DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
# (config, image [N, H, W]): widths, depths, groups, attention and sizes that no checkpoint has
CONFIGS = {
    "one block": ({"block_out_channels": [8], "norm_num_groups": 2}, (3, 5, 7)),
    "two blocks, odd sizes": (
        {"block_out_channels": [12, 24], "norm_num_groups": 6, "latent_channels": 5, "layers_per_block": 2},
        (1, 13, 18),
    ),
    "three blocks that narrow": ({"block_out_channels": [32, 16, 8], "norm_num_groups": 4}, (2, 9, 22)),
    "attention in blocks": (
        {
            "block_out_channels": [8, 16],
            "down_block_types": ["AttnDownEncoderBlock2D", DOWN],
            "up_block_types": [UP, "AttnUpDecoderBlock2D"],
            "norm_num_groups": 8,
        },
        (2, 6, 10),
    ),
    "no quant convs": (
        {
            "block_out_channels": [10, 20],
            "norm_num_groups": 5,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "act_fn": "gelu",
        },
        (1, 11, 8),
    ),
    "no middle attention": (
        {"block_out_channels": [6, 6], "norm_num_groups": 3, "mid_block_add_attention": False, "act_fn": "mish"},
        (5, 4, 15),
    ),
    "grey images, three stages, relu": (
        {
            "block_out_channels": [4, 8, 12],
            "norm_num_groups": 1,
            "in_channels": 1,
            "out_channels": 2,
            "act_fn": "ReLU",
            "latent_channels": 1,
            "layers_per_block": 3,
        },
        (1, 17, 12),
    ),
}
STABLE_DIFFUSION = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": [DOWN] * 4,
    "up_block_types": [UP] * 4,
    "layers_per_block": 2,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}


def full(config):
    """The config with block types written out, as config.json has them."""
    n = len(config["block_out_channels"])
    return {"down_block_types": [DOWN] * n, "up_block_types": [UP] * n, **config}


def randomised(model, seed=0):
    """The torch model with random numbers of a natural size in every parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 16
            parameter.copy_(noise / fan_in**0.5 + (1.0 if parameter.ndim == 1 else 0.0))
    return model.eval()


def channel_last(x):
    return x.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("name", CONFIGS)
def test_encoder_and_decoder_equal_diffusers(name):
    config, (n, height, width) = CONFIGS[name]
    config = full(config)
    theirs = randomised(diffusers.AutoencoderKL(**config))
    ours = AutoencoderKL(AutoencoderKLConfig.from_dict(config))
    state = {key: value.numpy() for key, value in theirs.state_dict().items()}
    variables = {"params": from_torch(state, param_shapes("vae", config))}
    images = np.random.default_rng(1).normal(size=(n, height, width, config.get("in_channels", 3)))
    images = images.astype(np.float32)
    with torch.no_grad():
        posterior = theirs.encode(torch.from_numpy(images).permute(0, 3, 1, 2)).latent_dist
        decoded = channel_last(theirs.decode(posterior.mean).sample)

    @jax.jit
    def both(variables, images, latents):
        return (
            *ours.apply(variables, images, method="encode"),
            ours.apply(variables, latents, method="decode"),
        )

    mean, log_variance, images_again = both(variables, images, channel_last(posterior.mean))
    for value, expected in (
        (mean, channel_last(posterior.mean)),
        (log_variance, channel_last(posterior.logvar)),
        (images_again, decoded),
    ):
        assert value.shape == expected.shape
        assert np.abs(value - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_the_stable_diffusion_config_gives_every_tensor_of_diffusers():
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKL(**STABLE_DIFFUSION)
    expected = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    ours = flatten(param_shapes("vae", STABLE_DIFFUSION))
    assert {torch_key(path): torch_shape(path, leaf.shape) for path, leaf in ours.items()} == expected


def test_a_config_goes_back_as_it_was_read():
    raw = {"_class_name": "AutoencoderKL", "_diffusers_version": "0.20.0", **full(CONFIGS["one block"][0])}
    assert AutoencoderKLConfig.from_dict(raw).to_dict() == raw
    by_hand = AutoencoderKLConfig(block_out_channels=(32,))
    assert AutoencoderKLConfig.from_dict(by_hand.to_dict()) == by_hand


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("act_fn", "tanh"),
        ("down_block_types", ["DownBlock2D"]),
        ("up_block_types", [UP, UP]),
        ("norm_num_groups", 3),
        ("norm_num_groups", None),
        ("layers_per_block", 0),
        ("shift_factor", 0.1),
        ("latents_mean", [0.0]),
        ("latents_std", [1.0]),
        ("temporal_compression", 4),
    ],
)
def test_a_field_that_is_not_honoured_is_refused_by_name(field, value):
    with pytest.raises(UserError, match=rf"^vae\.{field}: "):
        AutoencoderKLConfig.from_dict(full({"block_out_channels": [8], "norm_num_groups": 4}) | {field: value})
