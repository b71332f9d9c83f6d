"""VideoScore as a reward: a tiny Idefics2 in a folder, asked as transformers' processor and model would be."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from vpo_jax.checkpoints import safetensors_io as io
from vpo_jax.checkpoints.keys import to_torch
from vpo_jax.models.attention import BACKENDS
from vpo_jax.models.idefics2_config import Idefics2Config
from vpo_jax.rewards.loading import load_reward, load_scorer
from vpo_jax.rewards.protocol import DIMENSIONS, Reward
from vpo_jax.rewards.videoscore import Options, load
from vpo_jax.rewards.videoscore.folder import videoscore_shapes
from vpo_jax.rewards.videoscore.reward import choose_frames
from vpo_jax.runtime.errors import UserError

QUERY = 'Rate the video of "{text_prompt}" {well}.\nFrames: \n'
PROMPTS = ["a red ball", "", "two dogs on a beach, slowly turning"]
TOKENS = 3  # of an image


def make_tokenizer():
    """Like Llama's: a mark for every space, bytes for what is unknown, a start token; and Idefics2's two tokens."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [chr(code) for code in range(33, 127)]
    tokenizer = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Replace("▁", " ")
    names = ["<unk>", "<s>", "</s>", "<fake_token_around_image>", "<image>"]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def make_config(tokenizer):
    return {
        "architectures": ["Idefics2ForSequenceClassification"],
        "model_type": "idefics2",
        "image_token_id": tokenizer.token_to_id("<image>"),
        "vision_config": {
            "hidden_size": 12,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 4,
        },
        "perceiver_config": {
            "resampler_n_latents": TOKENS,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 4,
            "num_key_value_heads": 1,
        },
        "text_config": {
            "model_type": "mistral",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 400,
            "rms_norm_eps": 1e-5,
            "vocab_size": tokenizer.get_vocab_size(),
        },
    }


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A VideoScore's folder of random weights in float32. Read only."""
    folder = tmp_path_factory.mktemp("videoscore") / "tiny"
    folder.mkdir()
    tokenizer = make_tokenizer()
    config = make_config(tokenizer)
    rng = np.random.default_rng(0)

    def weight(leaf):
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 4.0
        return (rng.normal(size=leaf.shape) / np.sqrt(fan_in) + (leaf.ndim == 1)).astype(np.float32)

    params = jax.tree.map(weight, videoscore_shapes(Idefics2Config.from_dict(config), 5))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 16, "longest_edge": 28}}))
    (folder / "query_prompt.txt").write_text(QUERY)
    io.write_weights(folder, "model", to_torch(params))
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """The same, to break."""
    import shutil

    return shutil.copytree(original, tmp_path / "mine")


@pytest.fixture(scope="module")
def reward(original):
    return load_reward(str(original))


@pytest.fixture(scope="module")
def score(reward):
    return jax.jit(reward.score)


def noise(batch, frames=4, height=20, width=24):
    return np.random.default_rng(1).integers(0, 256, (batch, frames, height, width, 3), np.uint8)


def test_the_config_names_the_folder_the_query_and_the_frames(original, tmp_path):
    (tmp_path / "query.txt").write_text("Judge {text_prompt}: ")
    options = {"path": str(original), "query_prompt": str(tmp_path / "query.txt"), "frame_choice": "linspace"}
    chosen = load_reward("videoscore", {"timeout": 0.0, "videoscore": options | {"max_frames": 3}})
    assert chosen.name == "videoscore" and chosen.frame_indices(9) == (0, 4, 8)
    assert not np.array_equal(
        chosen.prepare(["a"])["input_ids"], load_reward(str(original)).prepare(["a"])["input_ids"]
    )
    with pytest.raises(UserError, match=r"reward\.videoreward\.path: .* holds 'Idefics2ForSequenceClassification'"):
        load_reward("videoreward", {"videoreward": {"path": str(original), "query_prompt": "", "video_fps": 8.0}})


def test_a_folder_is_recognised_by_its_architecture(reward):
    assert isinstance(reward, Reward)
    assert reward.name == "tiny" and reward.trains and reward.jittable
    assert reward.dimensions == DIMENSIONS
    assert reward.ranges == ((1.0, 4.0),) * 5


def test_tokens_equal_those_of_transformers_processor(reward, original):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(original / "tokenizer.json"))
    processor = transformers.Idefics2Processor(
        transformers.Idefics2ImageProcessorPil(do_image_splitting=False), tokenizer, image_seq_len=TOKENS
    )
    prepared = reward.prepare(PROMPTS)
    for frames in (1, 2, 5):
        for row, prompt in enumerate(PROMPTS):
            asked = QUERY.replace("{text_prompt}", prompt) + "<image> " * frames
            expected = processor(text=asked, images=[Image.new("RGB", (16, 16))] * frames)["input_ids"][0]
            ids = prepared["input_ids"][row][prepared["mask"][row]].tolist()
            assert ids + reward.queries.frame_ids.tolist() * frames == list(expected)


def test_scores_equal_transformers_from_video_to_number(reward, score, original):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    config = json.loads((original / "config.json").read_text())
    config["perceiver_config"] |= {"hidden_size": 16, "rms_norm_eps": 1e-5}
    theirs = transformers.Idefics2Model(transformers.Idefics2Config(**config)).eval()
    state = {key: torch.from_numpy(value.copy()) for key, value in io.read_weights(original, "model").items()}
    theirs.load_state_dict({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")})
    images = transformers.Idefics2ImageProcessorPil(**json.loads((original / "preprocessor_config.json").read_text()))
    videos, prepared = noise(3), reward.prepare(PROMPTS)
    scores = np.asarray(score(reward.params, videos, prepared))
    for row in range(3):
        text = prepared["input_ids"][row][prepared["mask"][row]]
        ids = np.concatenate([text, np.tile(reward.queries.frame_ids, 4)])
        pixels = images([[Image.fromarray(frame) for frame in videos[row]]], return_tensors="np")["pixel_values"]
        with torch.no_grad():
            hidden = theirs(input_ids=torch.from_numpy(ids)[None].long(), pixel_values=torch.from_numpy(pixels))
            expected = hidden.last_hidden_state[0, -1] @ state["score.weight"].T + state["score.bias"]
        np.testing.assert_allclose(scores[row], expected.numpy(), rtol=0, atol=1e-5 * np.abs(expected.numpy()).max())


def test_a_clip_scores_the_same_in_any_batch(reward, score):
    videos, prepared = noise(3), reward.prepare(PROMPTS)
    together = score(reward.params, videos, prepared)
    other = reward.prepare(["quite another prompt", PROMPTS[2], PROMPTS[2]])
    assert other["input_ids"].shape == prepared["input_ids"].shape
    np.testing.assert_array_equal(score(reward.params, videos, other)[2], together[2])


@pytest.mark.slow
def test_candidates_of_a_prompt_read_it_once(reward, score):
    videos = noise(6)
    once = reward.prepare(PROMPTS)
    for_each = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), once)
    expected = score(reward.params, videos, for_each)
    # The same sums in products of other shapes.
    np.testing.assert_allclose(score(reward.params, videos, once), expected, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="3 for 5 videos"):
        reward.score(reward.params, videos[:5], once)


def test_the_scorer_fills_its_last_batch(original):
    scorer = load_scorer(original)
    scores = scorer(noise(5), [*PROMPTS, "a", "b"])
    assert tuple(scores) == DIMENSIONS
    assert all(values.shape == (5,) and np.isfinite(values).all() for values in scores.values())


def test_vision_in_parts_gives_the_same_scores(original, reward, score):
    videos, prepared = noise(3), reward.prepare(PROMPTS)
    parts = load(original, options=Options(frames_at_a_time=1))
    np.testing.assert_allclose(
        jax.jit(parts.score)(parts.params, videos, prepared), score(reward.params, videos, prepared), rtol=0, atol=1e-5
    )


def test_shards_and_bfloat16_load(folder, reward):
    state = io.read_weights(folder, "model")
    state = {key: value.astype(jnp.bfloat16) for key, value in state.items()}
    (folder / "model.safetensors").unlink()
    io.write_weights(folder, "model", state, max_shard_bytes=4000)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    stored = load(folder)
    assert {leaf.dtype for leaf in jax.tree.leaves(stored.params)} == {jnp.dtype(jnp.bfloat16)}
    assert stored.model.dtype == jnp.bfloat16
    exact = load(folder, options=Options(dtype="float32"))
    assert {leaf.dtype for leaf in jax.tree.leaves(exact.params)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 24, 49, 100, 1000])
def test_frames_are_chosen_as_published(count):
    for most in (16, 48):
        step = np.arange(0, count, count / most).astype(int)
        expected = list(range(count)) if count <= most else [i for i in step if i < count][:most]
        assert list(choose_frames(count, most, "arange")) == expected
        assert list(choose_frames(count, most, "linspace")) == list(np.linspace(0, count - 1, most).astype(int))
        assert len(choose_frames(count, most, "arange")) == min(count, most)


def test_without_a_query_prompt_a_warning_says_so(folder, tmp_path):
    (folder / "query_prompt.txt").unlink()
    with pytest.warns(UserWarning, match=r"no query_prompt\.txt.*REGRESSION_QUERY_PROMPT"):
        own = load(folder)
    assert own.queries.length > 100
    (tmp_path / "mine.txt").write_text("Is it {text_prompt}? ")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given = load(folder, options=Options(query_prompt=str(tmp_path / "mine.txt")))
    assert given.queries.length < own.queries.length


def test_a_prompt_longer_than_its_room_is_cut_with_a_warning(original):
    reward = load(original, options=Options(max_prompt_tokens=12))
    with pytest.warns(UserWarning, match="max_prompt_tokens=12"):
        prepared = reward.prepare(["the quick brown fox", "🎈" * 50])
    assert prepared["input_ids"].shape == (2, reward.queries.length)
    cut = reward.prepare(["the quick brown fox"[:length] for length in range(13)])
    rows = [row[mask].tolist() for row, mask in zip(cut["input_ids"], cut["mask"], strict=True)]
    assert prepared["input_ids"][0][prepared["mask"][0]].tolist() in rows


def test_special_words_in_a_prompt_are_words(reward):
    prepared = reward.prepare(["a <image> ball</s> <fake_token_around_image>", "{text_prompt} {0} %s"])
    assert (prepared["input_ids"] != reward.model.config.image_token_id).all()
    assert (prepared["input_ids"] != reward.queries.frame_ids[0]).all()


def test_prompts_are_encoded_once(original):
    reward = load(original)
    calls = []
    encode = reward.queries._tokenizer.encode
    reward.queries._tokenizer = type("Counting", (), {"encode": lambda _, text: calls.append(text) or encode(text)})()
    reward.prepare(["a", "b", "a"])
    reward.prepare(["b", "a"])
    assert len(calls) == 2


def test_one_frame_and_an_empty_prompt_have_scores(reward):
    scores = jax.jit(reward.score)(reward.params, noise(1, frames=1), reward.prepare([""]))
    assert scores.shape == (1, 5) and np.isfinite(scores).all()


def test_wrong_videos_are_user_errors(reward):
    prepared = reward.prepare(["a"])
    with pytest.raises(UserError, match=r"^videos: must be uint8 \[B, f, H, W, 3\], found float32 \[1, 4, 20, 24, 3\]"):
        reward.score(reward.params, noise(1).astype(np.float32), prepared)
    with pytest.raises(UserError, match=r"^videos: must be uint8"):
        reward.score(reward.params, noise(1, frames=0), prepared)
    with pytest.raises(UserError, match=r"^videos: must be uint8"):
        reward.score(reward.params, noise(1)[0], prepared)
    with pytest.raises(UserError, match=r"^videos: 17 frames, and tiny reads 16 at most"):
        reward.score(reward.params, noise(1, frames=17), prepared)


def test_more_tokens_than_places_is_a_user_error(original):
    reward = load(original, options=Options(max_prompt_tokens=300))
    with pytest.raises(UserError, match=r"^max_prompt_tokens: .* has 400 places"):
        reward.score(reward.params, noise(1, frames=16), reward.prepare(["a"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frame_choice": "random"}, r"^videoscore\.frame_choice"),
        ({"max_frames": 0}, r"^videoscore\.max_frames"),
        ({"dtype": "int8"}, r"^dtype: 'int8'"),
        ({"attention": "flash"}, r"^videoscore\.attention: 'flash' is not one of xla, cudnn"),
        ({"attention": "cudnn"}, r"^videoscore\.attention: cudnn wants an NVIDIA GPU and found cpu"),
        ({"query_prompt": "/no/such/file"}, "cannot be read as text"),
    ],
)
def test_wrong_options_are_user_errors(original, options, message):
    with pytest.raises(UserError, match=message):
        load(original, options=Options(**options))


@pytest.mark.slow
def test_the_attention_of_the_options_is_what_attends(original, monkeypatch):
    used = []

    def counted(*arguments):
        used.append(arguments[0].shape)
        return BACKENDS["xla"](*arguments)

    monkeypatch.setitem(BACKENDS, "counted", counted)
    plain, chosen = (load(original, options=Options(attention=a)) for a in ("xla", "counted"))
    scores = [np.asarray(r.score(r.params, noise(1), r.prepare(["a"]))) for r in (plain, chosen)]
    assert len(used) >= 3  # vision, perceiver, text
    np.testing.assert_array_equal(*scores)


def test_a_broken_folder_names_the_file_and_the_fix(folder):
    def breaks(file, content, message):
        path = folder / file
        before = path.read_bytes()
        path.write_text(content) if content is not None else path.unlink()
        with pytest.raises(UserError, match=message):
            load_reward(str(folder))
        path.write_bytes(before)

    config = json.loads((folder / "config.json").read_text())
    breaks("config.json", json.dumps(config | {"architectures": ["Idefics2ForConditionalGeneration"]}), "is no scorer")
    breaks("config.json", json.dumps(config | {"image_token_id": 3}), "has to be token 3")
    breaks("config.json", json.dumps(config | {"depth": 3}), r"^config\.depth")
    breaks("tokenizer.json", None, r"tokenizer\.json: no such file")
    breaks("tokenizer.json", "{}", "not a tokenizer")
    breaks("preprocessor_config.json", None, r"preprocessor_config\.json: no such file")
    breaks("preprocessor_config.json", '{"size": {"shortest_edge": 2, "longest_edge": 9}}', "smaller than a patch")
    breaks("query_prompt.txt", "What is it?", r"^query_prompt: has no \{text_prompt\}")
    breaks("model.safetensors", None, r"model\.safetensors belongs there")


def test_a_folder_without_its_head_is_no_scorer(folder):
    state = io.read_weights(folder, "model")
    state = {key: np.array(value) for key, value in state.items()}
    io.write_weights(folder, "model", {key: value for key, value in state.items() if not key.startswith("score.")})
    with pytest.raises(UserError, match=r"has no head \(score\.weight\)"):
        load_reward(str(folder))
    io.write_weights(folder, "model", state | {"score.weight": state["score.weight"][:3]})
    with pytest.raises(UserError, match="has 3 outputs, a VideoScore has 5"):
        load_reward(str(folder))


def test_settings_are_read_from_processor_config_too(folder):
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    whole = {"image_processor": settings | {"image_mean": [0.1, 0.2, 0.3]}, "image_seq_len": TOKENS}
    (folder / "processor_config.json").write_text(json.dumps(whole))
    assert load(folder).frames.mean == (0.1, 0.2, 0.3)
    (folder / "processor_config.json").write_text(json.dumps(whole | {"image_seq_len": 64}))
    with pytest.raises(UserError, match="image_seq_len is 64"):
        load(folder)
