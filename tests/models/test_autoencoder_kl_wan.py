"""AutoencoderKLWan against diffusers' class of the same name, in float32, with random numbers in every weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpo_jax.checkpoints.keys import from_torch, init_shapes, to_torch, torch_key, torch_shape
from vpo_jax.families.wan.published_vae import VAE_2_1, VAE_2_2
from vpo_jax.models.autoencoder_kl_wan import AutoencoderKLWan
from vpo_jax.models.wan_vae_config import AutoencoderKLWanConfig, denormalise_latents, normalise_latents
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.trees import flatten

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

# Both sides sum in float32 in different orders, which gives about 1e-6 of the output's scale; ten times that.
TOLERANCE = 1e-5


def config(base_dim, dim_mult, temperal_downsample, z_dim=3, patch_size=None, **fields):
    """A config.json with statistics and scale factors that fit."""
    square = (patch_size or 1) ** 2
    return {
        "base_dim": base_dim,
        "dim_mult": dim_mult,
        "temperal_downsample": temperal_downsample,
        "z_dim": z_dim,
        "num_res_blocks": 1,
        "latents_mean": [0.5 - i for i in range(z_dim)],
        "latents_std": [0.5 + i for i in range(z_dim)],
        "patch_size": patch_size,
        "in_channels": 3 * square,
        "out_channels": 3 * square,
        "scale_factor_temporal": 2 ** sum(temperal_downsample),
        "scale_factor_spatial": (patch_size or 1) * 2 ** (len(dim_mult) - 1),
        **fields,
    }


# (config, video [B, F, H, W]): widths, depths, latents and sizes that no checkpoint has. Not fewer than three channels:
# a norm over two meets vectors near 0, where diffusers itself is 1e-5 from its float64.
PLAIN = {
    "one level": (config(5, [1], []), (2, 5, 7, 9)),
    "one level, wider, an image": (config(4, [3], [], num_res_blocks=2), (1, 1, 5, 6)),
    "two levels in space": (config(6, [1, 2], [False], z_dim=1), (1, 5, 10, 6)),
    "two levels in time": (config(3, [2, 1], [True], z_dim=5), (2, 9, 6, 14)),
    "three levels in time": (config(8, [1, 2, 4], [True, True]), (1, 9, 12, 20)),
    "three levels, time first": (config(4, [1, 1, 3], [True, False], num_res_blocks=2), (1, 5, 12, 4)),
    "three levels, time last": (config(4, [3, 2, 1], [False, True], z_dim=2), (2, 5, 4, 8)),
    "four levels, as published": (config(4, [1, 2, 4, 4], [False, True, True], z_dim=4), (1, 17, 8, 24)),
    "four levels, two residual blocks": (config(4, [1, 2, 4, 4], [True, False, True], num_res_blocks=2), (1, 9, 24, 8)),
    "a wider decoder": (config(4, [1, 2, 2], [True, True], decoder_base_dim=10), (1, 5, 8, 12)),
    "odd widths, which the upsamplers halve": (config(7, [1, 3], [True], z_dim=4), (1, 5, 6, 10)),
    "sizes that the levels do not divide": (config(4, [1, 2, 2], [True, True]), (1, 5, 13, 19)),
    "patches": (config(4, [1, 2], [True], patch_size=2), (1, 5, 12, 20)),
}
RESIDUAL = {
    "one level": (config(5, [1], []), (2, 5, 7, 9)),
    "one level, patches": (config(4, [1], [], patch_size=2, num_res_blocks=2), (1, 1, 6, 10)),
    "two levels in space": (config(6, [2, 2], [False], z_dim=1), (1, 5, 10, 6)),
    "two levels in time": (config(3, [2, 1], [True], z_dim=5), (2, 9, 6, 14)),
    "three levels in time": (config(4, [1, 2, 2], [True, True]), (1, 9, 12, 20)),
    "three levels, time first": (config(3, [2, 4, 4], [True, False], num_res_blocks=2), (1, 5, 12, 4)),
    "three levels, time last": (config(4, [4, 2, 1], [False, True], z_dim=2), (2, 5, 4, 8)),
    "four levels, as published": (
        config(4, [1, 2, 4, 4], [False, True, True], z_dim=4, patch_size=2, decoder_base_dim=6),
        (1, 17, 16, 48),
    ),
    "four levels, two residual blocks": (config(4, [1, 2, 4, 4], [True, False, True], num_res_blocks=2), (1, 9, 24, 8)),
    "a wider decoder": (config(4, [1, 2, 2], [True, True], decoder_base_dim=10), (1, 5, 8, 12)),
    "patches of three": (config(4, [1, 2, 2], [False, False], patch_size=3), (2, 1, 12, 36)),
    "a narrow last level": (config(6, [1, 2, 1], [True, True], z_dim=2, patch_size=2), (1, 13, 8, 24)),
}
CASES = {f"2.1: {name}": case for name, case in PLAIN.items()}
CASES |= {f"2.2: {name}": ({**raw, "is_residual": True}, size) for name, (raw, size) in RESIDUAL.items()}
STREAMED = ("2.1: three levels in time", "2.2: three levels in time")


def randomised(model, seed=0):
    """The torch model with random numbers of a natural size in every parameter; its videos stay within [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("gamma"):
                parameter.copy_(1 + noise / 4)
            else:
                parameter.copy_(noise / (parameter[0].numel() if parameter.ndim > 1 else 16) ** 0.5)
        for parameter in model.decoder.conv_out.parameters():
            parameter.mul_(0.1)
    return model.eval()


def torch_model(raw):
    return randomised(diffusers.AutoencoderKLWan(**raw))


def variables_of(theirs, raw):
    """The parameters of the torch model as ours."""
    state = {key: value.numpy() for key, value in theirs.state_dict().items()}
    return {"params": from_torch(state, param_shapes(raw))}


def param_shapes(raw):
    """The tree of our parameters, from the smallest video."""
    read = AutoencoderKLWanConfig.from_dict(raw)
    side = read.scale_factor_spatial
    video = jax.ShapeDtypeStruct((1, 1, side, side, read.pixel_channels), jnp.float32)
    return init_shapes(AutoencoderKLWan(read), video)


def channel_last(x):
    return x.permute(0, 2, 3, 4, 1).numpy()


def channel_first(x):
    return torch.from_numpy(np.asarray(x)).permute(0, 4, 1, 2, 3)


def random_video(size, seed=1):
    return np.random.default_rng(seed).uniform(-1, 1, (*size, 3)).astype(np.float32)


def expected_of(theirs, video):
    """Mean and log variance of diffusers, and its decode of the mean."""
    with torch.no_grad():
        posterior = theirs.encode(channel_first(video)).latent_dist
        decoded = theirs.decode(posterior.mean).sample
    return tuple(channel_last(x) for x in (posterior.mean, posterior.logvar, decoded))


def both(ours):
    """One program for `encode` and `decode`."""

    @jax.jit
    def run(variables, video, latents):
        decoded = ours.apply(variables, latents, clip=False, method="decode")
        return *ours.apply(variables, video, method="encode"), decoded

    return run


def assert_equal(found, expected, tolerance=TOLERANCE):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("name", CASES)
def test_encoder_and_decoder_equal_diffusers(name):
    raw, size = CASES[name]
    theirs = torch_model(raw)
    ours = AutoencoderKLWan(AutoencoderKLWanConfig.from_dict(raw))
    video = random_video(size)
    expected = expected_of(theirs, video)
    assert 0.05 < np.abs(expected[2]).max() < 1  # nothing is clipped on their side
    for found, value in zip(both(ours)(variables_of(theirs, raw), video, expected[0]), expected, strict=True):
        assert_equal(found, value)


@pytest.mark.slow
@pytest.mark.parametrize("frames", [1, 5, 9, pytest.param(17, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", STREAMED)
def test_the_loop_over_latent_frames_equals_one_pass_and_diffusers(name, frames):
    raw, _ = CASES[name]
    theirs = torch_model(raw)
    variables = variables_of(theirs, raw)
    video = random_video((2, frames, 8, 12))
    expected = expected_of(theirs, video)
    read = AutoencoderKLWanConfig.from_dict(raw)
    for chunk in (0, 1, 3) if frames == 17 else (0, 1):  # 3 leaves one of the four latent frames after the first
        found = both(AutoencoderKLWan(read, chunk=chunk))(variables, video, expected[0])
        for value, reference in zip(found, expected, strict=True):
            assert_equal(value, reference)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [0, 2])
@pytest.mark.parametrize("name", STREAMED)
def test_the_first_frames_of_a_video_are_decoded_from_the_latents_that_they_depend_on(name, chunk):
    raw, _ = CASES[name]
    read = AutoencoderKLWanConfig.from_dict(raw)
    ours = AutoencoderKLWan(read, chunk=chunk)
    variables = variables_of(torch_model(raw), raw)
    latents = np.random.default_rng(3).normal(size=(1, 4, 2, 3, 3)).astype(np.float32)
    decode = jax.jit(ours.apply, static_argnames=("num_frames", "method"))
    whole = decode(variables, latents, method="decode")
    assert whole.shape[1] == 13
    for num_frames, needed in ((2, 2), (5, 2), (6, 3)):
        # NaN where nothing may be read
        poisoned = np.where(np.arange(4)[:, None, None, None] < needed, latents, np.nan)
        found = decode(variables, poisoned, num_frames=num_frames, method="decode")
        assert_equal(found, whole[:, :num_frames])
    for wrong in (0, 14):
        with pytest.raises(ValueError, match=rf"^num_frames: {wrong} "):
            ours.apply(variables, latents, num_frames=wrong, method="decode")


@pytest.mark.slow
def test_a_decoded_video_is_clipped_as_in_diffusers():
    raw, _ = CASES["2.1: two levels in time"]
    theirs = torch_model(raw)
    with torch.no_grad():
        theirs.decoder.conv_out.weight.mul_(20)
    latents = np.random.default_rng(4).normal(size=(1, 2, 3, 4, 5)).astype(np.float32)
    with torch.no_grad():
        expected = channel_last(theirs.decode(channel_first(latents)).sample)
    assert 0.1 < (np.abs(expected) == 1).mean() < 0.9
    ours = AutoencoderKLWan(AutoencoderKLWanConfig.from_dict(raw))
    assert_equal(ours.apply(variables_of(theirs, raw), latents, method="decode"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", STREAMED)
def test_a_loop_compiles_the_same_program_and_needs_the_same_memory_for_a_longer_video(name):
    raw, _ = CASES[name]
    read = AutoencoderKLWanConfig.from_dict(raw)
    ours = AutoencoderKLWan(read, chunk=1)
    variables = {"params": param_shapes(raw)}

    def compiled(latent_frames):
        latents = jax.ShapeDtypeStruct((1, latent_frames, 4, 4, read.z_dim), jnp.float32)
        lowered = jax.jit(lambda v, x: ours.apply(v, x, method="decode")).lower(variables, latents)
        return lowered.as_text().count("stablehlo.convolution"), lowered.compile().memory_analysis()

    (short, small), (long, large) = compiled(3), compiled(9)
    assert short == long
    longer_video = large.output_size_in_bytes - small.output_size_in_bytes
    assert longer_video > 0
    # The frames of the loop are stacked, then joined to the first: the video twice, and nothing else that grows.
    assert large.temp_size_in_bytes - small.temp_size_in_bytes <= 1.1 * longer_video


@pytest.mark.slow
@pytest.mark.parametrize("name", STREAMED)
def test_bfloat16_is_near_float32_in_one_pass_and_in_a_loop(name):
    raw, _ = CASES[name]
    read = AutoencoderKLWanConfig.from_dict(raw)
    theirs = torch_model(raw)
    video = random_video((1, 9, 8, 12))
    expected = expected_of(theirs, video)
    for chunk in (0, 1):
        run = both(AutoencoderKLWan(read, jnp.bfloat16, chunk))
        for value, reference in zip(run(variables_of(theirs, raw), video, expected[0]), expected, strict=True):
            assert value.dtype == jnp.bfloat16
            # Eight bits of mantissa through some thirty layers.
            assert_equal(value.astype(jnp.float32), reference, 0.05)


def test_a_norm_of_small_or_no_numbers_is_that_of_diffusers_and_has_a_finite_gradient():
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

    from vpo_jax.models.wan_vae_layers import ChannelNorm

    x = np.random.default_rng(5).normal(size=(1, 2, 1, 4, 6)).astype(np.float32)
    x *= np.array([1e-3, 1e-9, 1e-13, 0], np.float32)[:, None]
    expected = channel_last(WanRMS_norm(6, images=False)(channel_first(x)).detach())
    variables = {"params": {"gamma": jnp.ones((6, 1, 1, 1))}}
    assert np.abs(ChannelNorm().apply(variables, x) - expected).max() <= TOLERANCE
    gradient = jax.grad(lambda x: ChannelNorm().apply(variables, x).sum())(jnp.zeros((1, 1, 1, 1, 6)))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(("raw", "tensors", "millions"), [(VAE_2_1, 194, 126.9), (VAE_2_2, 196, 704.7)])
def test_a_published_config_gives_every_tensor_of_diffusers(raw, tensors, millions):
    known = {key: value for key, value in raw.items() if key not in ("_class_name", "clip_output")}
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKLWan(**known)
    expected = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    ours = flatten(param_shapes(raw))
    assert {torch_key(path): torch_shape(path, leaf.shape) for path, leaf in ours.items()} == expected
    assert len(expected) == tensors
    assert round(sum(leaf.size for leaf in ours.values()) / 1e6, 1) == millions


@pytest.mark.parametrize("name", STREAMED)
def test_parameters_go_back_to_torch_unchanged(name):
    raw, _ = CASES[name]
    theirs = torch_model(raw)
    again = to_torch(variables_of(theirs, raw)["params"])
    state = theirs.state_dict()
    assert again.keys() == state.keys()
    assert all(np.array_equal(again[key], value.numpy()) for key, value in state.items())


def test_latents_are_scaled_by_channel_and_back():
    read = AutoencoderKLWanConfig.from_dict(VAE_2_2)
    latents = np.random.default_rng(6).normal(size=(2, 3, 1, 2, 48)).astype(np.float32)
    scaled = normalise_latents(latents, read)
    expected = (latents - np.float32(VAE_2_2["latents_mean"])) / np.float32(VAE_2_2["latents_std"])
    assert_equal(scaled, expected, 1e-6)
    assert_equal(denormalise_latents(scaled, read), latents, 1e-6)
    assert normalise_latents(jnp.asarray(latents, jnp.bfloat16), read).dtype == jnp.float32


def test_the_defaults_are_those_of_the_torch_class_and_of_the_published_config():
    with torch.device("meta"):
        theirs = dict(diffusers.AutoencoderKLWan().config)
    ours = AutoencoderKLWanConfig().to_dict()
    assert ours.pop("_class_name") == "AutoencoderKLWan"
    assert ours.pop("clip_output") is True
    assert ours == {key: value for key, value in theirs.items() if not key.startswith("_")}
    assert AutoencoderKLWanConfig.from_dict(VAE_2_1) == AutoencoderKLWanConfig()


def test_a_config_goes_back_as_it_was_read():
    raw = {"_diffusers_version": "0.33.0", **VAE_2_2}
    assert AutoencoderKLWanConfig.from_dict(raw).to_dict() == raw
    by_hand = AutoencoderKLWanConfig(latents_mean=(0.0,) * 16)
    assert AutoencoderKLWanConfig.from_dict(by_hand.to_dict()) == by_hand


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("attn_scales", {"attn_scales": [1.0]}),
        ("base_dim", {"base_dim": 0}),
        ("decoder_base_dim", {"decoder_base_dim": 0}),
        ("num_res_blocks", {"num_res_blocks": 17}),
        ("dim_mult", {"dim_mult": []}),
        ("dim_mult", {"dim_mult": [1, 0, 2]}),
        ("dim_mult", {"base_dim": 2**20}),
        ("dim_mult", {"dim_mult": [1, 2, 4], "is_residual": True}),  # diffusers refuses it too
        ("dim_mult", {"dim_mult": [4, 3, 3], "is_residual": True, "base_dim": 1}),
        ("temperal_downsample", {"temperal_downsample": [True]}),
        ("temperal_downsample", {"temperal_downsample": [0, 1]}),
        ("latents_mean", {"latents_mean": [0.0]}),
        ("latents_mean", {"latents_mean": [0.0, float("nan"), 0.0]}),
        ("latents_mean", {"latents_mean": None}),
        ("latents_std", {"latents_std": [1.0] * 4}),
        ("latents_std", {"latents_std": [1.0, 0.0, 1.0]}),
        ("latents_std", {"latents_std": [1.0, -1.0, 1.0]}),
        ("latents_std", {"latents_std": [1.0, float("inf"), 1.0]}),
        ("z_dim", {"z_dim": None}),
        ("scale_factor_spatial", {"scale_factor_spatial": 8}),
        ("scale_factor_spatial", {"patch_size": 2, "in_channels": 12, "out_channels": 12}),
        ("scale_factor_temporal", {"temperal_downsample": [False, True]}),
        ("scale_factor_temporal", {"scale_factor_temporal": None}),
        ("patch_size", {"patch_size": 0}),
        ("in_channels", {"patch_size": 2, "scale_factor_spatial": 8}),
        ("out_channels", {"patch_size": 2, "scale_factor_spatial": 8, "in_channels": 12}),
        ("out_channels", {"out_channels": 4}),
        ("clip_output", {"clip_output": 1}),
        ("scaling_factor", {"scaling_factor": 0.5}),
    ],
)
def test_a_field_that_is_not_honoured_is_refused_by_name(field, changes):
    raw = config(4, [1, 2, 4], [True, True])
    AutoencoderKLWanConfig.from_dict(raw)
    with pytest.raises(UserError, match=rf"^vae\.{field}: "):
        AutoencoderKLWanConfig.from_dict(raw | changes)


def test_three_halvings_in_time_are_refused():
    with pytest.raises(UserError, match=r"^vae\.temperal_downsample: more than 2"):
        AutoencoderKLWanConfig.from_dict(config(4, [1, 1, 1, 1], [True, True, True]))


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("2.1: three levels in time", (1, 7, 8, 8), "7 frames .* give 5 or 9"),
        ("2.1: three levels in time", (1, 5, 3, 8), "3 x 8 pixels; give multiples of 4"),
        ("2.2: three levels in time", (1, 5, 8, 10), "8 x 10 pixels; give multiples of 4"),
        ("2.1: patches", (1, 5, 8, 9), "8 x 9 pixels; give multiples of 4"),
    ],
)
def test_a_video_without_whole_latents_is_refused(name, size, message):
    ours = AutoencoderKLWan(AutoencoderKLWanConfig.from_dict(CASES[name][0]))
    with pytest.raises(ValueError, match=rf"^video: {message}\n?"):
        ours.apply({}, random_video(size), method="encode")


def test_a_negative_chunk_is_refused():
    ours = AutoencoderKLWan(AutoencoderKLWanConfig(), chunk=-1)
    with pytest.raises(ValueError, match=r"^chunk: -1 "):
        ours.apply({}, random_video((1, 1, 8, 8)), method="encode")
