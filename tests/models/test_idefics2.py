"""Idefics2 with a head against transformers' Idefics2Model and a Linear, in float32, random numbers in every weight."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpo_jax.checkpoints.keys import from_torch, init_shapes, torch_key, torch_shape
from vpo_jax.models.idefics2 import Idefics2ForSequenceClassification
from vpo_jax.models.idefics2_config import Idefics2Config
from vpo_jax.models.idefics2_vision import position_buckets
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.trees import count, flatten

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Both sides sum in float32 in different orders: 1e-6 of the scores' scale or less was measured. The bar is 1e-4.
TOLERANCE = 1e-5

FAKE, IMAGE = 59, 60
SMALL = {
    "image_token_id": IMAGE,
    "vision_config": {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": 28,
        "patch_size": 4,
    },
    "perceiver_config": {
        "hidden_size": 32,
        "rms_norm_eps": 1e-3,
        "resampler_n_latents": 3,
        "resampler_depth": 2,
        "resampler_n_heads": 4,
        "resampler_head_dim": 6,
        "num_key_value_heads": 2,
    },
    "text_config": {
        "model_type": "mistral",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 0,
        "vocab_size": 61,
        "sliding_window": 4096,
    },
}
# (changes to the three parts, frames, height, width of each row's real pixels, words in front of the images of each
# row, side of the padding)
CONFIGS = {
    "square": ({}, 2, (20, 20), [7, 7], "left"),
    "wide, unequal prompts": ({}, 3, (12, 40), [2, 9, 5], "left"),
    "tall, pixels beyond the last patch, padding behind": ({}, 1, (39, 10), [4, 1], "right"),
    "larger than the table of positions": ({}, 1, (36, 44), [3], "left"),
    "one image of one patch": ({"perceiver": {"resampler_n_latents": 1}}, 1, (4, 4), [1, 6], "right"),
    "images of many sizes": ({}, 2, [(20, 28), (28, 9), (16, 16)], [5, 3, 8], "left"),
    "window shorter than the prompt": ({"text": {"sliding_window": 5}}, 3, (8, 16), [11, 2], "left"),
    "no window, other heads": (
        {"text": {"sliding_window": None, "num_key_value_heads": 1, "head_dim": 10, "rope_theta": 500.0}},
        2,
        (16, 24),
        [4, 9],
        "right",
    ),
    "every key its own head, other activations": (
        {
            "text": {"num_key_value_heads": 4, "hidden_act": "gelu"},
            "perceiver": {"num_key_value_heads": 4, "hidden_act": "gelu_pytorch_tanh", "resampler_depth": 1},
            "vision": {"hidden_act": "gelu", "layer_norm_eps": 1e-2, "num_attention_heads": 1},
        },
        2,
        (24, 12),
        [3, 6],
        "left",
    ),
    "many frames, deep": (
        {"text": {"num_hidden_layers": 5}, "vision": {"num_hidden_layers": 4}, "perceiver": {"resampler_depth": 3}},
        9,
        (8, 12),
        [2, 5],
        "left",
    ),
}
# config.json of idefics2-8b, the base of VideoScore, without its book-keeping
FULL_SIZE = {
    "architectures": ["Idefics2ForSequenceClassification"],
    "model_type": "idefics2",
    "image_token_id": 32001,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "perceiver_config": {"model_type": "idefics2"},
    "text_config": {
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "pad_token_id": 0,
        "rms_norm_eps": 1e-05,
        "vocab_size": 32003,
    },
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 980,
        "intermediate_size": 4304,
        "model_type": "idefics2",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
    },
}


def changed(changes):
    return SMALL | {f"{part}_config": SMALL[f"{part}_config"] | values for part, values in changes.items()}


def shapes(config):
    tokens = config.perceiver.resampler_n_latents
    side = config.vision.patch_size
    return init_shapes(
        Idefics2ForSequenceClassification(config),
        jax.ShapeDtypeStruct((1, tokens), jnp.int32),
        jax.ShapeDtypeStruct((1, tokens), jnp.bool_),
        jax.ShapeDtypeStruct((1, 1, side, side, 3), jnp.float32),
    )


def randomised(raw):
    """transformers' model and a head, with random numbers of a natural size in every parameter."""
    model = transformers.Idefics2Model(transformers.Idefics2Config(**raw))
    head = torch.nn.Linear(raw["text_config"]["hidden_size"], 5)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in [*model.parameters(), *head.parameters()]:
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 16
            parameter.copy_(noise / fan_in**0.5 + (1.0 if parameter.ndim == 1 else 0.0))
    state = {f"model.{key}": value.numpy() for key, value in model.state_dict().items()}
    state |= {f"score.{key}": value.numpy() for key, value in head.state_dict().items()}
    return model.eval(), head.eval(), state


def make_ids(words, frames, tokens, side, length=0):
    """Ids and mask [B, L]: words, the images, one word more; padded to the longest row, or to `length`."""
    random = np.random.default_rng(2)
    rows = []
    for number in words:
        images = [FAKE, *[IMAGE] * tokens, FAKE] * frames
        rows.append([1, *random.integers(2, FAKE, number), *images, 7])
    length = max(length, *map(len, rows))
    ids, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for row, (target, real) in zip(rows, zip(ids, mask, strict=True), strict=True):
        place = slice(length - len(row), None) if side == "left" else slice(0, len(row))
        target[place], real[place] = row, True
    return ids, mask


def make_pixels(rows, frames, size):
    """Noise [B, n, H, W, 3], and where its pixels are real [B, n, H, W] (None when all are)."""
    sizes = size if isinstance(size, list) else [size] * rows
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    pixels = np.random.default_rng(3).uniform(-1, 1, (rows, frames, height, width, 3)).astype(np.float32)
    real = np.zeros((rows, frames, height, width), bool)
    for row, (h, w) in enumerate(sizes):
        real[row, :, :h, :w] = True
    return pixels * real[..., None], None if isinstance(size, tuple) else real


def patches_of(real, side):
    """A patch is real when all of its pixels are."""
    b, n, h, w = real.shape
    cut = real[:, :, : h // side * side, : w // side * side]
    return cut.reshape(b, n, h // side, side, w // side, side).all((3, 5))


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_equal_transformers(name):
    changes, frames, size, words, side = CONFIGS[name]
    raw = changed(changes)
    config = Idefics2Config.from_dict(raw)
    theirs, head, state = randomised(raw)
    ids, mask = make_ids(words, frames, config.perceiver.resampler_n_latents, side)
    pixels, real = make_pixels(len(words), frames, size)
    with torch.no_grad():
        hidden = theirs(
            input_ids=torch.from_numpy(ids).long(),
            attention_mask=torch.from_numpy(mask).long(),
            pixel_values=torch.from_numpy(pixels.transpose(0, 1, 4, 2, 3).copy()),
            pixel_attention_mask=None if real is None else torch.from_numpy(real).long(),
        ).last_hidden_state
        last = [int(np.flatnonzero(row)[-1]) for row in mask]
        expected = head(hidden[torch.arange(len(last)), last]).numpy()
    patch_mask = None if real is None else patches_of(real, config.vision.patch_size)
    params = from_torch(state, shapes(config))
    scores = jax.jit(Idefics2ForSequenceClassification(config).apply)({"params": params}, ids, mask, pixels, patch_mask)
    assert scores.shape == (len(words), 5) and scores.dtype == jnp.float32
    assert np.abs(scores - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.fixture(scope="module")
def small():
    config = Idefics2Config.from_dict(SMALL)
    params = from_torch(randomised(SMALL)[2], shapes(config))
    model = Idefics2ForSequenceClassification(config)
    return params, jax.jit(lambda *inputs: model.apply({"params": params}, *inputs))


@pytest.mark.slow
def test_padding_never_changes_a_score(small):
    _, score = small
    pixels, _ = make_pixels(2, 2, (12, 16))
    length = 24
    variants = {}
    for side in ("left", "right"):
        ids, mask = make_ids([4, 9], 2, 3, side, length)
        for filler in (0, 13, FAKE):
            variants[side, filler] = score(np.where(mask, ids, filler).astype(np.int32), mask, pixels)
    exact = variants["left", 0]
    for (side, filler), value in variants.items():
        # What stands in the padding never enters a sum; on the other side the same sums are split otherwise.
        tolerance = 0.0 if (side, filler != FAKE) == ("left", True) else 1e-5
        np.testing.assert_allclose(value, exact, rtol=0, atol=tolerance)
    alone, mask = make_ids([4], 2, 3, "left")
    np.testing.assert_allclose(score(alone, mask, pixels[:1])[0], exact[0], rtol=0, atol=1e-5)


def test_pixels_outside_of_an_image_never_change_a_score(small):
    _, score = small
    ids, mask = make_ids([4, 9], 2, 3, "left")
    pixels, real = make_pixels(2, 2, [(12, 16), (20, 8)])
    patches = patches_of(real, 4)
    noise = np.where(real[..., None], pixels, 5.0).astype(np.float32)
    np.testing.assert_array_equal(score(ids, mask, pixels, patches), score(ids, mask, noise, patches))


def test_every_frame_and_every_word_counts(small):
    _, score = small
    ids, mask = make_ids([4], 3, 3, "left")
    pixels, _ = make_pixels(1, 3, (12, 16))
    exact = score(ids, mask, pixels)
    for frame in range(3):
        other = pixels.copy()
        other[:, frame] *= -1
        assert np.abs(score(ids, mask, other) - exact).max() > 1e-3
    swapped = pixels[:, [1, 0, 2]]
    assert np.abs(score(ids, mask, swapped) - exact).max() > 1e-3
    words = ids.copy()
    words[0, 2] = words[0, 2] % 50 + 3
    assert np.abs(score(words, mask, pixels) - exact).max() > 1e-3


@pytest.mark.slow
def test_bfloat16_ranks_as_float32(small):
    params, score = small
    half = Idefics2ForSequenceClassification(Idefics2Config.from_dict(SMALL), dtype=jnp.bfloat16)
    half_score = jax.jit(lambda *inputs: half.apply({"params": params}, *inputs))
    ids, mask = make_ids(list(np.arange(64) % 8 + 1), 2, 3, "left")
    pixels, _ = make_pixels(64, 2, (12, 16))
    pixels *= np.linspace(0.1, 2.0, 64, dtype=np.float32)[:, None, None, None, None]
    exact, rounded = np.asarray(score(ids, mask, pixels)), np.asarray(half_score(ids, mask, pixels))
    for column in range(5):
        ranks = [np.argsort(np.argsort(values[:, column])) for values in (exact, rounded)]
        assert np.corrcoef(*ranks)[0, 1] >= 0.99


def test_the_full_size_config_gives_every_tensor_of_transformers():
    with torch.device("meta"):
        theirs = transformers.Idefics2Model(transformers.Idefics2Config(**copy.deepcopy(FULL_SIZE)))
    expected = {f"model.{key}": tuple(value.shape) for key, value in theirs.state_dict().items()}
    expected |= {"score.weight": (5, 4096), "score.bias": (5,)}
    ours = shapes(Idefics2Config.from_dict(FULL_SIZE))
    assert {torch_key(path): torch_shape(path, leaf.shape) for path, leaf in flatten(ours).items()} == expected
    assert count(ours) == 8_271_704_309


@pytest.mark.parametrize("per_side", [7, 70])
def test_positions_are_spread_over_the_table(per_side):
    table = position_buckets(2 * per_side, per_side)
    assert table[per_side, :per_side].tolist() == list(range(per_side))
    for patches in range(1, 2 * per_side + 1):
        row = table[patches, :patches]
        assert row[0] == 0 and row.max() < per_side and (np.diff(row) >= 0).all()


def test_everything_that_transformers_writes_into_a_config_is_accepted():
    raw = transformers.Idefics2Config(**SMALL).to_dict()
    config = Idefics2Config.from_dict(raw)
    assert config == Idefics2Config.from_dict(SMALL)
    assert config.to_dict() == raw
    by_hand = Idefics2Config(config.vision, config.perceiver, config.text, config.image_token_id)
    assert Idefics2Config.from_dict(by_hand.to_dict()) == by_hand


def test_the_perceiver_takes_the_texts_epsilon_where_it_names_none():
    config = Idefics2Config.from_dict(FULL_SIZE)
    assert config.perceiver.rms_norm_eps == config.text.rms_norm_eps == 1e-5
    assert Idefics2Config.from_dict(SMALL).perceiver.rms_norm_eps == 1e-3


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("text", "model_type", "llama"),
        ("text", "rope_parameters", {"rope_type": "yarn"}),
        ("text", "rope_scaling", {"factor": 2.0}),
        ("text", "num_key_value_heads", 3),
        ("text", "hidden_act", "gelu_new"),
        ("text", "head_dim", 7),
        ("perceiver", "hidden_size", 64),
        ("perceiver", "qk_layer_norms", True),
        ("vision", "num_attention_heads", 5),
        ("vision", "num_channels", 4),
        ("vision", "image_size", [28, 28]),
    ],
)
def test_a_field_that_is_not_honoured_is_refused_by_name(part, field, value):
    with pytest.raises(UserError, match=rf"^{part}_config\.{field}: "):
        Idefics2Config.from_dict(changed({part: {field: value}}))
