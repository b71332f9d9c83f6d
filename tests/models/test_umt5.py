"""UMT5EncoderModel against transformers' class of the same name, in float32, with random numbers in every weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpo_jax.checkpoints.keys import from_torch, init_shapes, torch_key, torch_shape
from vpo_jax.models.umt5 import UMT5Config, UMT5EncoderModel, one_embedding, relative_buckets
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.trees import flatten, is_stacked, layer_paths, stack_layers, unflatten

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Both sides sum in float32 in different orders, which gives about 2e-6 of the output's scale; five times that.
TOLERANCE = 1e-5

SMALL = {
    "vocab_size": 99,
    "d_model": 24,
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 3,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
}
# (changes to SMALL, real tokens of each row, L)
CONFIGS = {
    "gated gelu": ({}, (9, 4), 9),
    "the table of the published model": (
        {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128},
        (150, 1),
        150,
    ),
    "heads wider than the model": ({"d_kv": 17, "d_model": 10}, (5, 7, 1), 8),
    "one head, large epsilon": ({"num_heads": 1, "layer_norm_epsilon": 1e-1}, (11,), 11),
    "one layer, one token": ({"num_layers": 1}, (1,), 1),
    "five layers": ({"num_layers": 5}, (3, 6), 6),
    "no gate, relu": ({"feed_forward_proj": "relu"}, (4, 2), 5),
    "no gate, exact gelu": ({"feed_forward_proj": "gelu", "d_ff": 7}, (4, 2), 6),
    "gated silu": ({"feed_forward_proj": "gated-silu"}, (7, 3), 7),
    "gated relu, narrow feed-forward": ({"feed_forward_proj": "gated-relu", "d_ff": 3}, (2, 6), 6),
    "fields that say more than feed_forward_proj": ({"dense_act_fn": "relu", "is_gated_act": False}, (6, 2), 6),
    "four buckets, all far": (
        {"relative_attention_num_buckets": 4, "relative_attention_max_distance": 2},
        (12, 5),
        12,
    ),
    "odd buckets": ({"relative_attention_num_buckets": 7, "relative_attention_max_distance": 50}, (70, 33), 70),
    "one wide head of odd size": ({"num_heads": 1, "d_kv": 33, "d_model": 31}, (5,), 7),
}
# text_encoder/config.json of the Wan 2.1 and 2.2 folders, and google/umt5-small's sizes
UMT5_XXL = {
    "architectures": ["UMT5EncoderModel"],
    "classifier_dropout": 0.0,
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "umt5",
    "num_decoder_layers": 24,
    "num_heads": 64,
    "num_layers": 24,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "scalable_attention": True,
    "tie_word_embeddings": False,
    "tokenizer_class": "T5Tokenizer",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.49.0.dev0",
    "use_cache": True,
    "vocab_size": 256384,
}
UMT5_SMALL = UMT5_XXL | {"d_ff": 1024, "d_model": 512, "num_heads": 6, "num_layers": 8, "vocab_size": 256384}


def randomised(config, dtype=torch.float32, attention="sdpa"):
    """transformers' model of this config with random numbers of a natural size in every parameter."""
    model = transformers.UMT5EncoderModel(transformers.UMT5Config(**config))
    model.set_attn_implementation(attention)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(1.0 + noise / 4)
            elif "relative_attention_bias" in name:
                parameter.copy_(2 * noise)  # of the size of the scores
            else:
                fan_in = parameter.shape[1]
                # Scores are not divided by sqrt(d_kv), so queries of size 1 would look at one key alone.
                parameter.copy_(noise / fan_in**0.5 / (config["d_kv"] ** 0.5 if ".q." in name else 1.0))
    return model.eval().to(dtype)


def shapes_of(config):
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return init_shapes(UMT5EncoderModel(UMT5Config.from_dict(config)), ids, jax.ShapeDtypeStruct((1, 1), bool))


def by_layer(shapes):
    """Paths and shapes with a subtree for each of the stacked layers, as files have them."""
    found = {}
    for path, leaf in flatten(shapes).items():
        if is_stacked(path):
            one = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
            found |= dict.fromkeys(layer_paths(path, leaf.shape[0]), one)
        else:
            found[path] = leaf
    return found


def parameters(model, config):
    """Our tree of the torch model's parameters."""
    state = one_embedding({key: value.float().numpy() for key, value in model.state_dict().items()})
    shapes = shapes_of(config)
    return stack_layers(from_torch(state, unflatten(by_layer(shapes))), shapes)


def tokens(counts, length, vocab=99):
    """ids [B, L] with as many real tokens a row as `counts` says, zeros after them, and their mask."""
    mask = np.arange(length)[None] < np.array(counts)[:, None]
    ids = np.random.default_rng(1).integers(2, vocab, mask.shape)
    return np.where(mask, ids, 0).astype(np.int32), mask


def theirs_of(model, ids, mask):
    with torch.no_grad():
        found = model(torch.from_numpy(ids).long(), torch.from_numpy(mask).long()).last_hidden_state
    return found.float().numpy()


def difference(value, expected, mask):
    """The largest difference at real tokens, in parts of the largest value there."""
    assert value.shape == expected.shape
    return np.abs(np.asarray(value, np.float32) - expected)[mask].max() / np.abs(expected[mask]).max()


@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states_equal_transformers(name):
    changes, counts, length = CONFIGS[name]
    config = SMALL | changes
    theirs = randomised(config)
    ours = UMT5EncoderModel(UMT5Config.from_dict(config))
    ids, mask = tokens(counts, length)
    value = jax.jit(ours.apply)({"params": parameters(theirs, config)}, ids, mask)
    assert difference(value, theirs_of(theirs, ids, mask), mask) <= TOLERANCE


def test_padding_anywhere_is_masked_as_in_transformers():
    theirs = randomised(SMALL, attention="eager")
    ids, mask = tokens((9, 9), 9)
    mask[0, [0, 4]], mask[1, 2:5] = False, False
    value = UMT5EncoderModel(UMT5Config.from_dict(SMALL)).apply({"params": parameters(theirs, SMALL)}, ids, mask)
    assert difference(value, theirs_of(theirs, ids, mask), mask) <= TOLERANCE


@pytest.mark.parametrize("padded", [8, 13, 64])
def test_rows_of_real_tokens_equal_an_unpadded_run(padded):
    model = UMT5EncoderModel(UMT5Config.from_dict(SMALL))
    params = {"params": parameters(randomised(SMALL), SMALL)}
    counts = (7, 1, 4)
    ids, mask = tokens(counts, padded)
    together = model.apply(params, ids, mask)
    for row, count in enumerate(counts):
        alone = model.apply(params, ids[row : row + 1, :count], mask[row : row + 1, :count])
        assert difference(together[row : row + 1, :count], np.asarray(alone), np.ones((1, count), bool)) <= TOLERANCE


def test_a_row_without_a_real_token_is_finite_and_changes_no_other():
    model = UMT5EncoderModel(UMT5Config.from_dict(SMALL))
    params = {"params": parameters(randomised(SMALL), SMALL)}
    ids, mask = tokens((5, 0), 6)
    value = model.apply(params, ids, mask)
    assert np.isfinite(value).all()
    np.testing.assert_allclose(value[:1], model.apply(params, ids[:1], mask[:1]), atol=1e-5)


@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (4, 2), (7, 50), (16, 20), (64, 1000), (12, 64)])
def test_buckets_equal_transformers_to_far_beyond_the_longest_prompt(buckets, farthest):
    changes = {"relative_attention_num_buckets": buckets, "relative_attention_max_distance": farthest}
    attention = transformers.UMT5EncoderModel(transformers.UMT5Config(**SMALL | changes)).encoder.block[0].layer[0]
    positions = torch.arange(1100)
    expected = attention.SelfAttention._relative_position_bucket(positions[None] - positions[:, None]).numpy()
    np.testing.assert_array_equal(relative_buckets(1100, buckets, farthest), expected)
    assert expected.max() == buckets // 2 * 2 - 1


def test_bfloat16_is_as_near_to_float32_as_that_of_transformers():
    """With `wo` in bfloat16 on both sides: transformers keeps it in float32 under float16 alone."""
    config = SMALL | {"num_layers": 4}
    exact = randomised(config)
    ids, mask = tokens((9, 5, 2), 9)
    expected = theirs_of(exact, ids, mask)
    params = {"params": parameters(exact, config)}
    half = UMT5EncoderModel(UMT5Config.from_dict(config), jnp.bfloat16).apply(params, ids, mask)
    assert half.dtype == jnp.bfloat16
    theirs = difference(theirs_of(randomised(config, torch.bfloat16), ids, mask), expected, mask)
    # bfloat16 keeps 8 bits: 0.4 % an operation, some of which add up; softmax and bias stay in float32 here.
    assert difference(half, expected, mask) <= min(0.03, 1.5 * theirs)


@pytest.mark.parametrize("config", [UMT5_XXL, UMT5_SMALL], ids=["xxl", "small"])
def test_the_published_configs_give_every_tensor_of_transformers(config):
    with torch.device("meta"):
        theirs = transformers.UMT5EncoderModel(transformers.UMT5Config(**config))
    expected = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    assert expected.pop("encoder.embed_tokens.weight") == expected["shared.weight"]
    ours = by_layer(shapes_of(config))
    assert {torch_key(path): torch_shape(path, leaf.shape) for path, leaf in ours.items()} == expected


def test_layers_are_stacked_on_the_first_axis():
    shapes = {path: leaf.shape for path, leaf in flatten(shapes_of(SMALL)).items()}
    assert shapes["encoder/block.*/layer.0/SelfAttention/q/kernel"] == (2, 24, 24)
    assert shapes["encoder/block.*/layer.0/SelfAttention/relative_attention_bias/embedding"] == (2, 8, 3)
    assert shapes["shared/embedding"] == (99, 24)


def test_the_table_of_embeddings_may_have_either_name_on_disk_or_both():
    table, other = np.ones((3, 2), np.float32), np.zeros((3, 2), np.float32)
    rest = {"encoder.final_layer_norm.weight": np.ones(2)}
    for names in (["shared.weight"], ["encoder.embed_tokens.weight"], ["shared.weight", "encoder.embed_tokens.weight"]):
        found = one_embedding(rest | dict.fromkeys(names, table))
        assert set(found) == {"shared.weight", *rest} and found["shared.weight"] is table
    state = {"shared.weight": table, "encoder.embed_tokens.weight": other}
    with pytest.raises(UserError, match=r"text_encoder: shared\.weight and encoder\.embed_tokens\.weight differ"):
        one_embedding(state, "text_encoder")
    assert set(state) == {"shared.weight", "encoder.embed_tokens.weight"}, "what is given stays as it is"


def test_a_fresh_model_makes_scores_and_states_of_a_natural_size():
    config = UMT5Config.from_dict(SMALL | {"d_model": 96, "num_heads": 12, "num_layers": 3})
    ids, mask = tokens((30, 20), 30)
    model = UMT5EncoderModel(config)
    variables = model.init(jax.random.key(0), ids, mask)
    hidden = np.asarray(model.apply(variables, ids, mask))[mask]
    assert 0.5 < hidden.std() < 2.0
    kernels = variables["params"]["encoder"]["block.*"]["layer.0"]["SelfAttention"]
    assert np.std(kernels["k"]["kernel"]) == pytest.approx(96**-0.5, rel=0.05)
    assert np.std(kernels["q"]["kernel"]) == pytest.approx((96 * 8) ** -0.5, rel=0.05)
    assert not np.array_equal(kernels["k"]["kernel"][0], kernels["k"]["kernel"][1]), "layers begin differently"


@pytest.mark.parametrize("changes", [{}, {"feed_forward_proj": "relu"}, {"tie_word_embeddings": False}])
def test_everything_that_transformers_writes_into_a_config_is_accepted(changes):
    raw = transformers.UMT5Config(**SMALL | changes).to_dict()
    config = UMT5Config.from_dict(raw)
    assert config.to_dict() == raw
    plain = UMT5Config.from_dict(SMALL | changes)
    assert (config.act_fn, config.gated) == (plain.act_fn, plain.gated) == (raw["dense_act_fn"], raw["is_gated_act"])


def test_a_config_made_by_hand_goes_through_transformers():
    by_hand = UMT5Config(d_model=64, feed_forward_proj="gated-silu")
    assert UMT5Config.from_dict(by_hand.to_dict()) == by_hand
    theirs = transformers.UMT5Config(**by_hand.to_dict())
    assert (theirs.d_model, theirs.dense_act_fn, theirs.is_gated_act) == (64, "silu", True)
    assert UMT5Config.from_dict(UMT5_XXL).to_dict() == UMT5_XXL


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("feed_forward_proj", "gated-softsign"),
        ("feed_forward_proj", "gated-gelu-new"),
        ("dense_act_fn", "tanh"),
        ("is_decoder", True),
        ("num_heads", 0),
        ("num_layers", 0),
        ("num_layers", 10**6),
        ("layer_norm_epsilon", 0.0),
        ("layer_norm_epsilon", None),
        ("d_model", "24"),
        ("relative_attention_num_buckets", 3),
        ("relative_attention_max_distance", 2),
        ("attention_scale", 0.5),
    ],
)
def test_a_field_that_is_not_honoured_is_refused_by_name(field, value):
    with pytest.raises(UserError, match=rf"^text_encoder\.{field}: "):
        UMT5Config.from_dict(SMALL | {field: value})
