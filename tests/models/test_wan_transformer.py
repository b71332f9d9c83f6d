"""WanTransformer3DModel against diffusers' class, with random numbers in every weight."""

import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpo_jax.checkpoints.keys import from_torch, init_shapes, to_torch, torch_shapes
from vpo_jax.models.lora import merge_lora
from vpo_jax.models.wan_transformer import REMAT_POLICIES, WanTransformer3DModel, WanTransformerConfig, log_counts
from vpo_jax.models.wan_transformer_layers import gated_sum, modulate, rotary_tables
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.trees import count, flatten, unflatten

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

# Both sides sum in float32 in different orders, which gives 1e-6 to 3e-6 of the output's scale.
TOLERANCE = 1e-5

SMALL = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 10,
    "freq_dim": 16,
    "ffn_dim": 20,
    "num_layers": 2,
}
# (changes to SMALL, latents [B, f, h, w], timesteps, rows of text)
CASES = {
    "patches of 1x2x2": ({}, (2, 3, 6, 10), (999.0, 3.25), 5),
    "one frame, 3x5 tokens": ({"num_layers": 3}, (1, 1, 6, 10), (500.0,), 7),
    "3x5x7 tokens, head of 8": ({"attention_head_dim": 8, "num_layers": 1}, (1, 3, 10, 14), (17.5,), 3),
    "patches of one position": ({"patch_size": [1, 1, 1], "attention_head_dim": 20}, (2, 2, 5, 3), (0.0, 1000.0), 4),
    "patches along time": ({"patch_size": [2, 2, 2], "num_layers": 1}, (3, 4, 4, 6), (1.0, 250.0, 999.0), 6),
    "unequal patches": ({"patch_size": [3, 1, 2], "attention_head_dim": 24}, (1, 6, 3, 8), (812.0,), 5),
    "more channels out": ({"in_channels": 3, "out_channels": 7}, (2, 2, 4, 6), (40.0, 41.0), 5),
    "fewer channels out, four layers": (
        {"in_channels": 9, "out_channels": 2, "num_layers": 4}, (1, 2, 4, 4), (999.0,), 5,
    ),
    "out_channels null": ({"in_channels": 5, "out_channels": None}, (1, 1, 2, 4), (7.0,), 2),
    "one head": ({"num_attention_heads": 1, "attention_head_dim": 14}, (2, 2, 4, 2), (600.0, 2.0), 1),
    "a head with time only": ({"attention_head_dim": 4, "num_attention_heads": 3}, (1, 5, 2, 4), (123.0,), 5),
    "five heads, odd frequencies": (
        {"num_attention_heads": 5, "attention_head_dim": 6, "freq_dim": 9}, (1, 2, 4, 6), (88.0,), 5,
    ),
    "no norm before the text": ({"cross_attn_norm": False}, (2, 2, 4, 4), (10.0, 990.0), 5),
    "large epsilon": ({"eps": 1e-1, "ffn_dim": 7}, (1, 3, 2, 2), (321.0,), 5),
    "long in one direction": ({"num_layers": 1, "attention_head_dim": 8}, (1, 1, 2, 202), (5.0,), 9),
}  # fmt: skip

_REAL = {
    "_class_name": "WanTransformer3DModel",
    "added_kv_proj_dim": None,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-06,
    "freq_dim": 256,
    "image_dim": None,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 4096,
}


def real(heads, layers, ffn, channels):
    sizes = {"num_attention_heads": heads, "num_layers": layers, "ffn_dim": ffn}
    return _REAL | sizes | {"in_channels": channels, "out_channels": channels}


# name -> (transformer/config.json, millions of parameters, tensors)
PUBLISHED = {
    "Wan2.1-T2V-1.3B": (real(12, 30, 8960, 16), 1419.0, 825),
    "Wan2.1-T2V-14B, and each expert of Wan2.2-T2V-A14B": (real(40, 40, 13824, 16), 14288.5, 1095),
    "Wan2.2-TI2V-5B": (real(24, 30, 14336, 48), 4999.8, 825),
}


def model_of(config, **options):
    return WanTransformer3DModel(WanTransformerConfig.from_dict(config), **options)


def randomised(config, seed=0):
    """diffusers' model of this config with random numbers of a natural size in every parameter."""
    model = diffusers.WanTransformer3DModel(**config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            matrix = parameter.ndim > 1 and "table" not in name
            scale = parameter[0].numel() ** -0.5 if matrix else 0.3
            parameter.copy_(noise * scale + (1.0 if parameter.ndim == 1 else 0.0))
    return model.eval()


def video_and_text(config, shape, rows, seed=1):
    rng = np.random.default_rng(seed)
    sample = rng.normal(size=(*shape, config["in_channels"])).astype(np.float32)
    return sample, rng.normal(size=(shape[0], rows, config["text_dim"])).astype(np.float32)


def params_of(theirs, model, sample, text):
    state = {key: value.float().numpy() for key, value in theirs.state_dict().items()}
    return from_torch(state, init_shapes(model, sample, 1.0, text), "transformer")


def predict(theirs, sample, timesteps, text):
    """diffusers' prediction, channels last, float32."""
    dtype = theirs.patch_embedding.weight.dtype
    video = torch.from_numpy(sample).permute(0, 4, 1, 2, 3).to(dtype)
    with torch.no_grad():
        value = theirs(video, torch.tensor(timesteps), torch.from_numpy(text).to(dtype)).sample
    return value.permute(0, 2, 3, 4, 1).float().numpy()


def assert_equals_diffusers(changes, shape, timesteps, rows):
    """The prediction for random weights, latents and text is diffusers'."""
    config = SMALL | changes
    theirs, model = randomised(config), model_of(config, text_length=rows)
    sample, text = video_and_text(config, shape, rows)
    expected = predict(theirs, sample, timesteps, text)
    params = params_of(theirs, model, sample, text)
    result = jax.jit(model.apply)({"params": params}, sample, np.array(timesteps, np.float32), text)
    assert result.shape == expected.shape and result.dtype == jnp.float32
    assert np.abs(result - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("name", CASES)
def test_prediction_is_that_of_diffusers(name):
    assert_equals_diffusers(*CASES[name])


@pytest.fixture(scope="module")
def small():
    """(model, parameters, latents, timesteps, text) of the first case, by diffusers' model."""
    model = model_of(SMALL, text_length=5)
    sample, text = video_and_text(SMALL, (2, 3, 6, 10), 5)
    return model, params_of(randomised(SMALL), model, sample, text), sample, np.array([999.0, 3.25], np.float32), text


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_give_every_tensor_of_diffusers(name):
    raw, millions, tensors = PUBLISHED[name]
    with torch.device("meta"):
        theirs = diffusers.WanTransformer3DModel(**{k: v for k, v in raw.items() if k != "_class_name"})
    expected = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    latents = jax.ShapeDtypeStruct((1, 1, 2, 2, raw["in_channels"]), jnp.float32)
    shapes = init_shapes(model_of(raw), latents, 1.0, jax.ShapeDtypeStruct((1, 512, 4096), jnp.float32))
    assert torch_shapes(shapes) == expected
    assert len(expected) == tensors
    assert round(count(shapes) / 1e6, 1) == millions


def test_names_survive_the_way_to_torch_and_back(small):
    params = small[1]
    back = from_torch(to_torch(params), params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_bfloat16_is_as_near_to_float32_as_diffusers_is(tmp_path):
    theirs = randomised(SMALL | {"num_layers": 4})
    theirs.save_pretrained(tmp_path)
    # Not .to(bfloat16): that rounds the tables, the time embedder and the norms too.
    half = diffusers.WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.scale_shift_table.dtype == torch.float32 and half.proj_out.weight.dtype == torch.bfloat16
    model = model_of(SMALL | {"num_layers": 4}, dtype=jnp.bfloat16, text_length=5)
    sample, text = video_and_text(SMALL, (8, 3, 6, 10), 5)
    timesteps = [999.0, 3.25, 40.0, 500.0, 875.0, 120.0, 750.0, 250.0]
    exact = predict(theirs, sample, timesteps, text)
    params = params_of(theirs, model, sample, text)
    ours = jax.jit(model.apply)({"params": params}, sample, np.array(timesteps, np.float32), text)
    error, other = (np.sqrt(np.square(x - exact).mean()) for x in (ours, predict(half, sample, timesteps, text)))
    assert error > 1e-4 * np.abs(exact).max()  # it is bfloat16
    # The same roundings of sums in another order: of one video the ratio is 0.9 to 1.35, of eight about 1.05.
    assert error <= 1.2 * other


def test_modulation_and_gated_sums_of_bfloat16_are_rounded_once():
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=(2, 50, 24)), jnp.bfloat16) for _ in range(2))
    shift, scale, gate = (jnp.asarray(rng.normal(size=(2, 1, 24)), jnp.float32) for _ in range(3))
    a, b, c, d, e = (np.asarray(z).astype(np.float64) for z in (x, y, shift, scale, gate))
    standard = (a - a.mean(-1, keepdims=True)) / np.sqrt(a.var(-1, keepdims=True) + 1e-6)
    for value, exact in ((modulate(x, shift, scale, 1e-6), standard * (1 + d) + c), (gated_sum(x, y, gate), a + b * e)):
        assert value.dtype == jnp.bfloat16
        # float32 may fall on the other side of a tie, which is rare; with two roundings a quarter would differ.
        assert (np.asarray(value) != exact.astype(jnp.bfloat16)).mean() < 0.01


def test_a_scalar_timestep_stands_for_every_video(small):
    model, params, sample, _, text = small
    run = jax.jit(model.apply)
    one = run({"params": params}, sample, 250.0, text)
    np.testing.assert_array_equal(one, run({"params": params}, sample, np.full(2, 250, np.int32), text))


def test_encoded_text_gives_the_same_numbers(small):
    model, params, sample, timesteps, text = small
    context = jax.jit(lambda p, t: model.apply({"params": p}, t, method="encode_text"))(params, text)
    assert context.keys.shape == context.values.shape == (2, 2, 5, 2, 12)  # [layers, B, L, H, D / H]
    assert context.keys.shape[1:3] == (2, 5) and context.bias is None
    run = jax.jit(model.apply)
    np.testing.assert_array_equal(
        run({"params": params}, sample, timesteps, context), run({"params": params}, sample, timesteps, text)
    )


@pytest.mark.parametrize("rows", [1, 20, 511])
def test_rows_that_are_left_out_are_shared_by_the_last(small, rows):
    _, params, sample, timesteps, _ = small
    _, text = video_and_text(SMALL, (2,), 512)
    text[0, rows - 1 :], text[1, max(0, rows - 6) :] = 0, 0
    run = jax.jit(model_of(SMALL).apply)
    whole = run({"params": params}, sample, timesteps, text)
    shared = run({"params": params}, sample, timesteps, text[:, :rows])
    # Two sums over the text in float32, one of 512 terms.
    assert np.abs(shared - whole).max() <= 1e-6 * np.abs(whole).max()
    if rows == 20:
        without = jax.jit(model_of(SMALL, text_length=20).apply)
        unshared = without({"params": params}, sample, timesteps, text[:, :rows])
        assert np.abs(unshared - whole).max() > 1e-2 * np.abs(whole).max()


def test_counts_of_shared_rows_survive_bfloat16():
    for rows in range(2, 513):
        counts = log_counts(rows)
        rounded = np.asarray(counts).astype(jnp.bfloat16).astype(np.float64)
        np.testing.assert_allclose(np.exp(counts.astype(np.float64)).sum(), rows, rtol=1e-6)
        np.testing.assert_allclose(np.exp(rounded).sum(), rows, rtol=1e-5)


def adapters_of(params, targets=("kernel",), rank=3):
    """Adapters with random A and B for every kernel whose path holds one of `targets`."""
    rng, flat = np.random.default_rng(2), {}
    for path, kernel in flatten(params).items():
        module, _, leaf = path.rpartition("/")
        if leaf == "kernel" and any(target in path for target in targets):
            stack = kernel.shape[:1] if ".*" in path else ()
            flat[f"{module}/lora_A"] = rng.normal(size=(*kernel.shape[:-1], rank)).astype(np.float32) * 0.2
            flat[f"{module}/lora_B"] = rng.normal(size=(*stack, rank, kernel.shape[-1])).astype(np.float32) * 0.2
    return unflatten(flat)


@pytest.mark.slow
@pytest.mark.parametrize("targets", [("kernel",), ("attn2/to_k", "attn2/to_v"), ("blocks.*/ffn",)], ids=str)
def test_adapters_of_stacked_layers_do_what_merged_kernels_do(small, targets):
    model, params, sample, timesteps, text = small
    adapters = adapters_of(params, targets)
    adapted = model.clone(lora_scale=0.7)
    with_adapters = jax.jit(adapted.apply)({"params": params, "lora": adapters}, sample, timesteps, text)
    merged = jax.jit(model.apply)({"params": merge_lora(params, adapters, 0.7)}, sample, timesteps, text)
    plain = jax.jit(model.apply)({"params": params}, sample, timesteps, text)
    assert np.abs(with_adapters - plain).max() > 0.02 * np.abs(plain).max()
    # Two orders of summation in float32.
    assert np.abs(with_adapters - merged).max() <= TOLERANCE * np.abs(merged).max()

    context = jax.jit(lambda v, t: adapted.apply(v, t, method="encode_text"))(
        {"params": params, "lora": adapters}, text
    )
    again = jax.jit(adapted.apply)({"params": params, "lora": adapters}, sample, timesteps, context)
    np.testing.assert_array_equal(again, with_adapters)


@pytest.mark.slow
def test_adapters_get_a_gradient_in_every_layer(small):
    model, params, *inputs = small
    adapters = adapters_of(params)
    loss = lambda lora: jnp.square(model.apply({"params": params, "lora": lora}, *inputs)).mean()  # noqa: E731
    for path, gradient in flatten(jax.jit(jax.grad(loss))(adapters)).items():
        layers = gradient if ".*" in path else gradient[None]
        assert all(np.abs(layer).max() > 1e-6 for layer in layers), path


def products(jaxpr):
    """How many matrix products a program has, inner programs counted once."""
    found = 0
    for equation in jaxpr.eqns:
        found += equation.primitive.name == "dot_general"
        inner = [x for value in equation.params.values() for x in (value if isinstance(value, tuple) else (value,))]
        found += sum(products(getattr(x, "jaxpr", x)) for x in inner if hasattr(getattr(x, "jaxpr", x), "eqns"))
    return found


@pytest.mark.slow
def test_rematerialisation_changes_no_gradient_and_keeps_what_its_policy_says(small):
    model, params, *inputs = small

    def gradient(module):
        return jax.grad(lambda p: jnp.square(module.apply({"params": p}, *inputs)).mean())

    plain, counts = jax.jit(gradient(model))(params), {}
    for policy in REMAT_POLICIES:
        remat = gradient(model.clone(remat=True, remat_policy=policy))
        counts[policy] = products(jax.make_jaxpr(remat)(params).jaxpr)
        found = flatten(jax.jit(remat)(params)) if policy in ("full", "attention", "offload") else {}
        for path, leaf in flatten(plain).items() if found else ():
            # The recomputed forward is compiled anew; only rounding may differ.
            np.testing.assert_allclose(found[path], leaf, rtol=1e-3, atol=1e-4 * np.abs(leaf).max() + 1e-7)
    none = products(jax.make_jaxpr(gradient(model))(params).jaxpr)
    # Of a block's products, the two that make values from scores, and the feed-forward's first, are kept.
    assert counts["full"] == counts["offload"] > counts["attention"] > counts["attention_and_ffn"] > none
    assert counts["full"] > counts["dots"] > none


def test_the_program_does_not_grow_with_the_number_of_layers():
    def lines(layers):
        model = model_of(SMALL | {"num_layers": layers}, remat=True)
        inputs = (*map(jnp.zeros, [(1, 2, 4, 4, 4), (1,), (1, 20, 10)]),)
        shapes = init_shapes(model, *inputs)
        loss = lambda p: jnp.square(model.apply({"params": p}, *inputs)).mean()  # noqa: E731
        return len(jax.jit(jax.grad(loss)).lower(shapes).as_text().splitlines())

    assert lines(2) == lines(12) > 100


def test_rotary_tables_are_those_of_diffusers():
    for head_dim, sizes in ((128, (21, 45, 80)), (12, (1, 3, 1024)), (4, (5, 2, 3))):
        theirs = diffusers.models.transformers.transformer_wan.WanRotaryPosEmbed(head_dim, (1, 1, 1), 1024)
        tables = rotary_tables(sizes, head_dim)
        start = 0
        for size, (cos, sin) in zip(sizes, tables, strict=True):
            stop = start + 2 * cos.shape[1]
            # One rounding to float32.
            np.testing.assert_allclose(cos, theirs.freqs_cos[:size, start:stop:2].numpy(), rtol=0, atol=6e-8)
            np.testing.assert_allclose(sin, theirs.freqs_sin[:size, start:stop:2].numpy(), rtol=0, atol=6e-8)
            start = stop
        assert start == head_dim
    assert [cos.shape[1] * 2 for cos, _ in rotary_tables((1, 1, 1), 128)] == [44, 42, 42]


def test_everything_that_diffusers_writes_into_a_config_is_accepted(tmp_path):
    diffusers.WanTransformer3DModel(**SMALL).save_config(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert WanTransformerConfig.from_dict(raw).to_dict() == raw
    by_hand = WanTransformerConfig(num_layers=3)
    assert WanTransformerConfig.from_dict(by_hand.to_dict()) == by_hand
    defaults = inspect.signature(diffusers.WanTransformer3DModel.__init__).parameters
    for name, value in WanTransformerConfig().to_dict().items():
        assert name == "_class_name" or defaults[name].default in (value, tuple(np.atleast_1d(value)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_dim", 1280),
        ("added_kv_proj_dim", 5120),
        ("pos_embed_seq_len", 514),
        ("qk_norm", "rms_norm"),
        ("qk_norm", None),
        ("attention_head_dim", 13),
        ("patch_size", [2, 2]),
        ("patch_size", [1, 0, 2]),
        ("num_layers", 0),
        ("num_layers", 1000),
        ("out_channels", 0),
        ("eps", 0.0),
        ("text_dim", "4096"),
        ("window_size", [-1, -1]),
    ],
)
def test_a_field_that_is_not_honoured_is_refused_by_name(field, value):
    with pytest.raises(UserError, match=rf"^transformer\.{field}: "):
        WanTransformerConfig.from_dict(SMALL | {field: value})


@pytest.mark.parametrize(
    ("options", "shape", "rows", "message"),
    [
        ({}, (1, 1, 3, 4), 5, r"sample: 3 latent positions along height; patch_size asks for a multiple of 2"),
        ({}, (1, 0, 2, 4), 5, r"sample: 0 latent positions along frames"),
        ({}, (1, 9, 2, 4), 5, r"sample: 9 tokens along frames; rope_max_seq_len allows 8"),
        ({"text_length": 4}, (1, 1, 2, 4), 5, r"text: 5 rows, and text_length is 4"),
        ({"attention_backend": "flash"}, (1, 1, 2, 4), 5, r"attention_backend: 'flash' is not known; use one of xla"),
        ({"remat_policy": "some"}, (1, 1, 2, 4), 5, r"remat_policy: 'some' is not known; use one of full, attention"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(options, shape, rows, message):
    config = SMALL | {"rope_max_seq_len": 8}
    sample, text = video_and_text(config, shape, rows)
    with pytest.raises(UserError, match=message):
        init_shapes(model_of(config, **options), sample, 1.0, text)
