"""Qwen2-VL with a reward head against transformers' Qwen2VLModel and a Linear, in float32, with random weights."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpo_jax.checkpoints.keys import from_torch, torch_key, torch_shape
from vpo_jax.models.qwen2_vl import Qwen2VLRewardModel, count_positions, grid_positions
from vpo_jax.models.qwen2_vl_config import Qwen2VLConfig
from vpo_jax.rewards.videoreward.folder import videoreward_shapes
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.trees import count, flatten

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Both sides sum in float32 in different orders: 1.4e-6 of the scores' scale or less was measured. The bar is 1e-4.
TOLERANCE = 1e-5

START, END, VIDEO, REWARDS = 54, 55, 60, (57, 58, 59)
SMALL = {
    "video_token_id": VIDEO,
    "image_token_id": 56,
    "vision_config": {
        "depth": 2,
        "embed_dim": 24,
        "hidden_size": 32,
        "num_heads": 3,
        "mlp_ratio": 2,
        "patch_size": 4,
    },
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "vocab_size": 61,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 2, 1], "rope_theta": 1000000.0},
    },
}
ROPE = SMALL["text_config"]["rope_parameters"]
# (changes to the two parts, frames, height, width, words in front of the reward tokens of each row, side of the
# padding, outputs of the head, kind of positions)
CONFIGS = {
    "four frames, square": ({}, 4, 16, 16, [7, 7], "right", 1, "grid"),
    "positions that only count": ({}, 4, 16, 24, [3, 8], "right", 1, "count"),
    "wide, unequal prompts": ({}, 6, 8, 40, [2, 9, 5], "right", 1, "grid"),
    "tall, padding in front": ({}, 2, 40, 8, [4, 1], "left", 1, "grid"),
    "a head of three outputs": ({}, 4, 16, 8, [5, 3], "left", 3, "grid"),
    "more times than rows and columns": ({}, 12, 8, 16, [2, 6], "right", 1, "grid"),
    "one token a time": ({}, 2, 8, 8, [1, 6], "left", 1, "count"),
    "windows in the upper layers": (
        {"text": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "num_hidden_layers": 3}},
        4,
        16,
        16,
        [11, 2],
        "right",
        1,
        "grid",
    ),
    "windows by layer types, other heads, four sections": (
        {
            "text": {
                "num_key_value_heads": 1,
                "use_sliding_window": True,
                "sliding_window": 5,
                "layer_types": ["sliding_attention", "full_attention"],
                "hidden_act": "gelu",
                "rope_parameters": ROPE | {"mrope_section": [1, 0, 1, 2], "rope_theta": 500.0},
            }
        },
        2,
        16,
        24,
        [4, 9],
        "right",
        1,
        "grid",
    ),
    "every key its own head, other vision": (
        {
            "text": {"num_key_value_heads": None, "rms_norm_eps": 1e-3},
            "vision": {
                "num_heads": 2,
                "mlp_ratio": 3,
                "hidden_act": "gelu",
                "spatial_merge_size": 3,
                "temporal_patch_size": 3,
                "rope_parameters": {"rope_theta": 100.0},
            },
        },
        6,
        12,
        24,
        [3, 6],
        "left",
        1,
        "grid",
    ),
    "no merging, single frames, deep": (
        {
            "text": {"num_hidden_layers": 5},
            "vision": {"depth": 4, "spatial_merge_size": 1, "temporal_patch_size": 1},
        },
        3,
        8,
        12,
        [2, 5],
        "right",
        3,
        "count",
    ),
}
# config.json of Qwen/Qwen2-VL-2B-Instruct, the base of VideoReward, without its book-keeping
FULL_SIZE = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "attention_dropout": 0.0,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_chans": 3,
        "hidden_size": 1536,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 151936,
}


def changed(changes):
    return SMALL | {f"{part}_config": SMALL[f"{part}_config"] | values for part, values in changes.items()}


def randomised(raw, outputs=1):
    """transformers' model and a head, with random numbers of a natural size in every parameter."""
    model = transformers.Qwen2VLModel(transformers.Qwen2VLConfig(**copy.deepcopy(raw)))
    head = torch.nn.Linear(raw["text_config"]["hidden_size"], outputs, bias=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in [*model.parameters(), *head.parameters()]:
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 16
            parameter.copy_(noise / fan_in**0.5 + (1.0 if parameter.ndim == 1 else 0.0))
    state = {f"model.{key}": value.numpy() for key, value in model.state_dict().items()}
    return model.eval(), head.eval(), state | {"rm_head.weight": head.weight.detach().numpy()}


def make_ids(words, tokens, side, length=0):
    """Ids and mask [B, L]: a word, the video, words and reward tokens; padded to the longest row, or to `length`."""
    random = np.random.default_rng(2)
    rows = []
    for number in words:
        text = random.integers(2, START, number)
        rows.append([1, START, *[VIDEO] * tokens, END, REWARDS[0], 3, REWARDS[1], *text, REWARDS[2], 7])
    length = max(length, *map(len, rows))
    ids, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for row, (target, real) in zip(rows, zip(ids, mask, strict=True), strict=True):
        place = slice(length - len(row), None) if side == "left" else slice(0, len(row))
        target[place], real[place] = row, True
    return ids, mask


def make_pixels(rows, frames, height, width):
    return np.random.default_rng(3).uniform(-2, 2, (rows, frames, height, width, 3)).astype(np.float32)


def grid_of(config, frames, height, width):
    """Of a video's tokens."""
    vision = config.vision
    return frames // vision.temporal_patch_size, height // vision.factor, width // vision.factor


def patches_of(pixels, vision):
    """Patches in the order of transformers' processor, [rows * t * h * w, 3 * times * side * side]."""
    b, f, h, w, _ = pixels.shape
    time, side, merge = vision.temporal_patch_size, vision.patch_size, vision.spatial_merge_size
    cut = (b, f // time, time, h // vision.factor, merge, side, w // vision.factor, merge, side, 3)
    return pixels.reshape(cut).transpose(0, 1, 3, 6, 4, 7, 9, 2, 5, 8).reshape(-1, 3 * time * side * side)


def their_grid(config, grid, rows):
    merge = config.vision.spatial_merge_size
    return torch.tensor([[grid[0], grid[1] * merge, grid[2] * merge]] * rows)


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_equal_transformers(name):
    changes, frames, height, width, words, side, outputs, kind = CONFIGS[name]
    raw = changed(changes)
    config = Qwen2VLConfig.from_dict(raw)
    theirs, head, state = randomised(raw, outputs)
    grid = grid_of(config, frames, height, width)
    ids, mask = make_ids(words, int(np.prod(grid)), side)
    pixels = make_pixels(len(words), frames, height, width)
    positions = count_positions(mask) if kind == "count" else grid_positions(mask, ids == VIDEO, grid)
    with torch.no_grad():
        hidden = theirs(
            input_ids=torch.from_numpy(ids).long(),
            attention_mask=torch.from_numpy(mask).long(),
            # without positions transformers makes its own, of the grid
            position_ids=torch.from_numpy(np.array(positions)).long() if kind == "count" else None,
            pixel_values_videos=torch.from_numpy(patches_of(pixels, config.vision)),
            video_grid_thw=their_grid(config, grid, len(words)),
            mm_token_type_ids=torch.from_numpy(2 * (ids == VIDEO)).int(),
        ).last_hidden_state
        places = np.stack([np.argmax((ids == token) & mask, axis=1) for token in REWARDS], axis=1)
        read = head(torch.take_along_dim(hidden, torch.from_numpy(places)[..., None], dim=1))
        expected = (read[..., 0] if outputs == 1 else read.diagonal(dim1=1, dim2=2)).numpy()
    params = from_torch(state, videoreward_shapes(config, outputs))
    model = Qwen2VLRewardModel(config, REWARDS, outputs)
    scores = jax.jit(model.apply)({"params": params}, ids, mask, positions, pixels)
    assert scores.shape == (len(words), 3) and scores.dtype == jnp.float32
    assert np.abs(scores - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize(("grid", "side"), [((2, 3, 4), "right"), ((7, 1, 2), "left"), ((1, 5, 1), "right")])
def test_positions_on_the_grid_equal_those_of_transformers(grid, side):
    config = Qwen2VLConfig.from_dict(SMALL)
    with torch.device("meta"):
        theirs = transformers.Qwen2VLModel(transformers.Qwen2VLConfig(**copy.deepcopy(SMALL)))
    ids, mask = make_ids([1, 6, 3], int(np.prod(grid)), side, length=50)
    # a row may have several videos
    twice = np.concatenate([ids, np.zeros_like(ids[:, :5]) + 9, ids], axis=1)
    both = np.concatenate([mask, np.ones_like(mask[:, :5]), mask], axis=1)
    for row_ids, row_mask, videos in ((ids, mask, 3), (twice, both, 6)):
        expected, _ = theirs.get_rope_index(
            torch.from_numpy(row_ids).long(),
            torch.from_numpy(2 * (row_ids == VIDEO)).int(),
            video_grid_thw=their_grid(config, grid, videos),
            attention_mask=torch.from_numpy(row_mask).long(),
        )
        np.testing.assert_array_equal(grid_positions(row_mask, row_ids == VIDEO, grid), expected.numpy())


@pytest.fixture(scope="module")
def small():
    """Parameters of the small config, and its scores on a grid of 2 x 2 x 2: ids, mask, pixels -> [B, 3]."""
    config = Qwen2VLConfig.from_dict(SMALL)
    params = from_torch(randomised(SMALL)[2], videoreward_shapes(config, 1))

    def scores(dtype):
        model = Qwen2VLRewardModel(config, REWARDS, dtype=dtype)
        return jax.jit(
            lambda ids, mask, pixels: model.apply(
                {"params": params}, ids, mask, grid_positions(mask, ids == VIDEO, (2, 2, 2)), pixels
            )
        )

    return scores(jnp.float32), scores(jnp.bfloat16)


@pytest.mark.slow
def test_padding_never_changes_a_score(small):
    score, _ = small
    pixels = make_pixels(2, 4, 16, 16)
    variants = {}
    for side in ("left", "right"):
        ids, mask = make_ids([4, 9], 8, side, length=30)
        for filler in (0, 13, VIDEO, REWARDS[1]):
            variants[side, filler] = score(np.where(mask, ids, filler).astype(np.int32), mask, pixels)
    for (side, filler), value in variants.items():
        # What stands in the padding never enters a sum; on the other side the same sums are split otherwise.
        np.testing.assert_array_equal(value, variants[side, 0], err_msg=f"{side} {filler}")
    np.testing.assert_allclose(variants["left", 0], variants["right", 0], rtol=0, atol=1e-5)
    alone, mask = make_ids([4], 8, "right")
    np.testing.assert_allclose(score(alone, mask, pixels[:1])[0], variants["right", 0][0], rtol=0, atol=1e-5)


def test_every_frame_and_the_words_before_a_token_count(small):
    score, _ = small
    pixels = make_pixels(2, 4, 16, 16)
    ids, mask = make_ids([4, 9], 8, "right", length=30)
    exact = score(ids, mask, pixels)
    for frame in range(4):
        other = pixels.copy()
        other[:, frame] *= -1
        assert np.abs(score(ids, mask, other) - exact).min() > 1e-4
    assert np.abs(score(ids, mask, pixels[:, [2, 3, 0, 1]]) - exact).min() > 1e-4
    words = ids.copy()
    words[:, 14] = words[:, 14] % 50 + 3  # of the prompt, which stands behind the first two reward tokens
    changes = np.abs(score(words, mask, pixels) - exact)
    assert changes[:, :2].max() == 0 and changes[:, 2].min() > 1e-4


def test_bfloat16_ranks_as_float32(small):
    score, half = small
    ids, mask = make_ids(list(np.arange(64) % 8 + 1), 8, "right", length=30)
    # Frames of a colour each with noise on it: of noise alone all videos would score nearly the same.
    colours = np.random.default_rng(4).normal(size=(64, 4, 1, 1, 3)).astype(np.float32)
    pixels = colours + make_pixels(64, 4, 16, 16) / 4
    exact, rounded = np.asarray(score(ids, mask, pixels)), np.asarray(half(ids, mask, pixels))
    for column in range(3):
        ranks = [np.argsort(np.argsort(values[:, column])) for values in (exact, rounded)]
        assert np.corrcoef(*ranks)[0, 1] >= 0.99


@pytest.mark.slow
def test_the_full_size_config_gives_every_tensor_of_transformers():
    with torch.device("meta"):
        theirs = transformers.Qwen2VLModel(transformers.Qwen2VLConfig(**copy.deepcopy(FULL_SIZE)))
    expected = {f"model.{key}": tuple(value.shape) for key, value in theirs.state_dict().items()}
    expected |= {"rm_head.weight": (1, 1536)}
    ours = videoreward_shapes(Qwen2VLConfig.from_dict(FULL_SIZE), 1)
    assert {torch_key(path): torch_shape(path, leaf.shape) for path, leaf in flatten(ours).items()} == expected
    assert count(ours) == 2_208_987_136


def test_everything_that_transformers_writes_into_a_config_is_accepted():
    raw = transformers.Qwen2VLConfig(**copy.deepcopy(SMALL)).to_dict()
    config = Qwen2VLConfig.from_dict(raw)
    assert config.vision == Qwen2VLConfig.from_dict(SMALL).vision
    assert config.text.windows == (None, None) and config.text.rope_theta == 1000000.0
    flat = Qwen2VLConfig.from_dict(FULL_SIZE)
    again = Qwen2VLConfig.from_dict(transformers.Qwen2VLConfig(**copy.deepcopy(FULL_SIZE)).to_dict())
    assert flat.vision == again.vision and flat.text.windows == again.text.windows == (None,) * 28
    assert flat.text.mrope_section == again.text.mrope_section == (16, 24, 24)
    # names that transformers takes as well
    named = changed({"vision": {"num_attention_heads": 2, "num_hidden_layers": 7}})
    del named["vision_config"]["num_heads"], named["vision_config"]["depth"]
    assert Qwen2VLConfig.from_dict(named).vision.num_heads == 2 and Qwen2VLConfig.from_dict(named).vision.depth == 7


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("text", "rope_parameters", {"rope_type": "yarn", "factor": 2.0}),
        ("text", "rope_scaling", {"type": "mrope", "mrope_section": [1, 2, 1], "factor": 2.0}),
        ("text", "rope_parameters", {"mrope_section": [1, 2, 2]}),
        ("text", "mrope_section", [1, 2, 1]),
        ("text", "num_key_value_heads", 3),
        ("text", "num_attention_heads", 5),
        ("text", "hidden_act", "gelu_new"),
        ("text", "head_dim", 16),
        ("text", "layer_types", ["sliding_attention", "full_attention"]),
        ("text", "layer_types", ["full_attention"]),
        ("text", "quantization", {"bits": 4}),
        ("vision", "hidden_size", 64),
        ("vision", "rope_parameters", {"rope_type": "default"}),
        ("vision", "num_heads", 4),
        ("vision", "in_channels", 4),
        ("vision", "patch_size", [4, 4]),
        ("vision", "window_size", 112),
    ],
)
def test_a_field_that_is_not_honoured_is_refused_by_name(part, field, value):
    with pytest.raises(UserError, match=rf"^{part}_config\.{field}: "):
        Qwen2VLConfig.from_dict(changed({part: {field: value}}))


def test_a_flat_config_names_its_fields_without_a_part():
    with pytest.raises(UserError, match=r"^config\.hidden_act: "):
        Qwen2VLConfig.from_dict(FULL_SIZE | {"hidden_act": "gelu_new"})
    with pytest.raises(UserError, match=r"^config\.video_token_id: 151936 is outside"):
        Qwen2VLConfig.from_dict(FULL_SIZE | {"video_token_id": 151936})
    with pytest.raises(UserError, match=r"^config\.quantization_config: "):
        Qwen2VLConfig.from_dict(FULL_SIZE | {"quantization_config": {"bits": 4}})
