"""CLIPTextModel against transformers' class of the same name, in float32, with random numbers in every weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpo_jax.checkpoints.keys import from_torch, torch_key, torch_shape
from vpo_jax.families.text_to_video_sd.layout import param_shapes
from vpo_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.trees import flatten

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Both sides sum in float32 in different orders, which gives about 2e-6 of the output's scale; five times that.
TOLERANCE = 1e-5

SMALL = {
    "vocab_size": 99,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 11,
}
# (changes to SMALL, token ids [B, L])
CONFIGS = {
    "quick gelu": ({}, (2, 11)),
    "gelu, more layers, fewer tokens": ({"hidden_act": "gelu", "num_hidden_layers": 5}, (3, 7)),
    "one head, large epsilon": ({"num_attention_heads": 1, "layer_norm_eps": 1e-2, "hidden_size": 7}, (1, 11)),
    "as many heads as channels": ({"num_attention_heads": 24, "hidden_act": "silu"}, (5, 3)),
    "one layer, one token": ({"num_hidden_layers": 1, "hidden_act": "gelu_pytorch_tanh"}, (4, 1)),
    "narrow feed-forward": ({"intermediate_size": 5, "hidden_size": 30, "eos_token_id": 2, "pad_token_id": 1}, (2, 9)),
}
# text_encoder/config.json of damo-vilab/text-to-video-ms-1.7b
MODELSCOPE = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "pad_token_id": 1,
    "projection_dim": 512,
    "torch_dtype": "float32",
    "transformers_version": "4.28.1",
    "vocab_size": 49408,
}


def randomised(config):
    """transformers' model of this config with random numbers of a natural size in every parameter."""
    model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 16
            parameter.copy_(noise / fan_in**0.5 + (1.0 if parameter.ndim == 1 else 0.0))
    return model.eval()


def ids(shape, vocab=99):
    return np.random.default_rng(1).integers(0, vocab, shape).astype(np.int32)


@pytest.mark.parametrize("name", CONFIGS)
def test_last_hidden_state_equals_transformers(name):
    changes, shape = CONFIGS[name]
    config = SMALL | changes
    theirs = randomised(config)
    ours = CLIPTextModel(CLIPTextConfig.from_dict(config))
    state = {key: value.numpy() for key, value in theirs.state_dict().items()}
    params = from_torch(state, param_shapes("text_encoder", config))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids(shape))).last_hidden_state.numpy()
    value = jax.jit(ours.apply)({"params": params}, ids(shape))
    assert value.shape == expected.shape
    assert np.abs(value - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_both_key_layouts_give_the_same_parameters():
    theirs = randomised(SMALL)
    shapes = param_shapes("text_encoder", SMALL)
    plain = {key.removeprefix("text_model."): value.numpy() for key, value in theirs.state_dict().items()}
    prefixed = {f"text_model.{key}": value for key, value in plain.items()}
    prefixed["text_model.embeddings.position_ids"] = np.arange(11)[None]
    a, b = from_torch(plain, shapes), from_torch(prefixed, shapes)
    assert jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.mark.slow
def test_a_token_never_sees_the_ones_after_it():
    model = CLIPTextModel(CLIPTextConfig.from_dict(SMALL))
    variables = model.init(jax.random.key(0), ids((1, 6)))
    first, second = ids((1, 6)), ids((1, 6))
    second[0, 4:] = 0
    a, b = model.apply(variables, first), model.apply(variables, second)
    np.testing.assert_array_equal(a[:, :4], b[:, :4])
    assert np.abs(a[:, 4:] - b[:, 4:]).max() > 0


@pytest.mark.slow
def test_bfloat16_computes_near_float32():
    variables = CLIPTextModel(CLIPTextConfig.from_dict(SMALL)).init(jax.random.key(0), ids((2, 5)))
    exact = CLIPTextModel(CLIPTextConfig.from_dict(SMALL)).apply(variables, ids((2, 5)))
    half = CLIPTextModel(CLIPTextConfig.from_dict(SMALL), jnp.bfloat16).apply(variables, ids((2, 5)))
    assert half.dtype == jnp.bfloat16
    # bfloat16 keeps 8 bits: 0.4 % an operation, a few of which add up
    assert np.abs(half.astype(jnp.float32) - exact).max() <= 0.03 * np.abs(exact).max()


def test_the_modelscope_config_gives_every_tensor_of_transformers():
    with torch.device("meta"):
        theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(**MODELSCOPE))
    expected = {key.removeprefix("text_model."): tuple(value.shape) for key, value in theirs.state_dict().items()}
    ours = flatten(param_shapes("text_encoder", MODELSCOPE))
    assert {torch_key(path): torch_shape(path, leaf.shape) for path, leaf in ours.items()} == expected


def test_everything_that_transformers_writes_into_a_config_is_accepted():
    raw = transformers.CLIPTextConfig(**SMALL).to_dict()
    assert CLIPTextConfig.from_dict(raw).to_dict() == raw
    by_hand = CLIPTextConfig(hidden_size=64)
    assert CLIPTextConfig.from_dict(by_hand.to_dict()) == by_hand


def test_more_tokens_than_positions_is_an_error():
    model = CLIPTextModel(CLIPTextConfig.from_dict(SMALL))
    with pytest.raises(ValueError, match="12 tokens, but the text encoder has 11 positions"):
        model.init(jax.random.key(0), ids((1, 12)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu_new"),
        ("num_attention_heads", 5),
        ("layer_norm_eps", None),
        ("hidden_size", "24"),
        ("use_attention_mask", True),
    ],
)
def test_a_field_that_is_not_honoured_is_refused_by_name(field, value):
    with pytest.raises(UserError, match=rf"^text_encoder\.{field}: "):
        CLIPTextConfig.from_dict(SMALL | {field: value})
