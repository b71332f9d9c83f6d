"""VideoReward as a reward: a tiny Qwen2-VL in a folder, asked as its authors' code asks, with and without a LoRA."""

import copy
import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from vpo_jax.checkpoints import safetensors_io as io
from vpo_jax.checkpoints.keys import to_torch
from vpo_jax.models.qwen2_vl_config import Qwen2VLConfig
from vpo_jax.rewards.frames import BICUBIC, prepare_frames, resize, resize_taps
from vpo_jax.rewards.loading import load_reward
from vpo_jax.rewards.protocol import Reward
from vpo_jax.rewards.scoring import Scorer
from vpo_jax.rewards.videoreward import Options, load
from vpo_jax.rewards.videoreward.folder import REWARD_TOKENS, read_videoreward, videoreward_shapes
from vpo_jax.rewards.videoreward.frames import SmartFrameSettings
from vpo_jax.rewards.videoreward.reward import REWARD_DIMENSIONS, choose_frames
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.mesh import make_mesh
from vpo_jax.runtime.trees import flatten

QUERY = "Look. {well}\nA: <|VQ_reward|>\nB: <|MQ_reward|>\n{text_prompt} C: <|TA_reward|>\n"
HEAD = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
TAIL = "<|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = ["a red ball", "x", "two dogs on a beach, slowly"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"]
NORM = {"VQ_mean": 0.5, "VQ_std": 2.0, "MQ_mean": -1.0, "MQ_std": 0.5, "TA_mean": 0.0, "TA_std": 1.5}
SETTINGS = {
    "data_config": {"max_frame_pixels": 200704, "num_frames": None, "fps": 2.0, "sample_type": "uniform"},
    "model_config": {"output_dim": 1, "use_special_tokens": True, "reward_token": "special"},
    "peft_lora_config": {"lora_enable": True, "lora_r": 2, "lora_alpha": 8, "use_rslora": False},
    "inference_config": NORM,
}
# Frames of 20 x 24 become 16 x 24, which is 6 tokens for two of them.
OPTIONS = Options(min_pixels=256, max_prompt_tokens=40)
TOKENS = 2 * 6
LORA_TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]


def make_tokenizer(special=(*SPECIAL, *REWARD_TOKENS)):
    """Like Qwen2's: bytes, and special tokens behind them."""
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


def make_config(tokenizer):
    """Flat, as on the hub; with more tokens than the tokenizer has."""
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "video_token_id": tokenizer.token_to_id("<|video_pad|>"),
        "image_token_id": 3,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 400,
        "rms_norm_eps": 1e-6,
        "vocab_size": 300,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 0, 1]},
        "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4},
    }


def legacy(state):
    """Names as in files on the hub."""
    named = {
        key.replace("model.language_model.", "model.").replace("model.visual.", "visual."): state[key] for key in state
    }
    return {key: np.ascontiguousarray(value) for key, value in named.items()}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A VideoReward's folder of random weights in float32, merged. Read only."""
    folder = tmp_path_factory.mktemp("videoreward") / "tiny"
    folder.mkdir()
    tokenizer = make_tokenizer()
    raw = make_config(tokenizer)
    rng = np.random.default_rng(0)

    def weight(leaf):
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 4.0
        return (rng.normal(size=leaf.shape) / np.sqrt(fan_in) + (leaf.ndim == 1)).astype(np.float32)

    params = jax.tree.map(weight, videoreward_shapes(Qwen2VLConfig.from_dict(raw), 1))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 9, "max_pixels": 10**7}))
    (folder / "model_config.json").write_text(json.dumps(SETTINGS))
    (folder / "query_prompt.txt").write_text(QUERY)
    io.write_weights(folder, "model", legacy(to_torch(params)) | {"lm_head.weight": np.zeros((300, 16), np.float32)})
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """The same, to break."""
    return shutil.copytree(original, tmp_path / "mine")


@pytest.fixture(scope="module")
def reward(original):
    return load(original, options=OPTIONS)


@pytest.fixture(scope="module")
def score(reward):
    return jax.jit(reward.score)


def noise(batch, frames=4, height=20, width=24):
    return np.random.default_rng(1).integers(0, 256, (batch, frames, height, width, 3), np.uint8)


def their_model(folder, config=None):
    """transformers' model and the head's weight."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    raw = json.loads((folder / "config.json").read_text()) if config is None else config
    model = transformers.Qwen2VLModel(transformers.Qwen2VLConfig(**copy.deepcopy(raw))).eval()
    state = {key: torch.from_numpy(value.copy()) for key, value in io.read_weights(folder, "model").items()}
    named = {}
    for key, value in state.items():
        if key.startswith("visual."):
            named[key] = value
        elif key.startswith("model."):
            named[key.replace("model.", "language_model.", 1)] = value
    model.load_state_dict(named)
    return model, state["rm_head.weight"]


def their_patches(video):
    """Patches of a video, and its grid, by the Pillow image processor, where a single frame stands for two."""
    transformers = pytest.importorskip("transformers")
    processor = transformers.Qwen2VLImageProcessorPil(
        patch_size=4, size={"shortest_edge": OPTIONS.min_pixels, "longest_edge": 200704}
    )
    made = processor([Image.fromarray(frame) for frame in video], return_tensors="np")
    _, rows, columns = made["image_grid_thw"][0]
    patches = made["pixel_values"].reshape(len(video) // 2, 2, rows * columns, 3, 2, 4, 4)[..., 0, :, :]
    return np.moveaxis(patches, 1, 3).reshape(-1, 3 * 2 * 4 * 4), (len(video) // 2, rows, columns)


def test_a_folder_is_recognised_by_its_architecture(original):
    reward = load_reward(str(original))
    assert isinstance(reward, Reward)
    assert reward.name == "tiny" and reward.trains and reward.jittable
    assert reward.dimensions == REWARD_DIMENSIONS
    assert reward.ranges == ((-3.0, 3.0),) * 3
    assert reward.frames.max_pixels == 200704


def test_tokens_equal_those_of_the_whole_chat(reward, original):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(original / "tokenizer.json"))
    prepared = reward.prepare(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        text = HEAD + "<|video_pad|>" * 7 + TAIL.format(QUERY.replace("{text_prompt}", prompt))
        ids = prepared["input_ids"][row][prepared["mask"][row]].tolist()
        video = [reward.model.config.video_token_id] * 7
        assert [*reward.queries.head_ids.tolist(), *video, *ids] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("positions", ["count", "grid"])
def test_scores_equal_transformers_from_video_to_number(original, reward, score, positions):
    torch = pytest.importorskip("torch")
    theirs, head = their_model(original)
    videos, prepared = noise(3), reward.prepare(PROMPTS)
    if positions == "grid":
        reward = load(original, options=Options(min_pixels=256, positions="grid"))
        prepared, score = reward.prepare(PROMPTS), jax.jit(reward.score)
    scores = np.asarray(score(reward.params, videos, prepared))
    assert scores.shape == (3, 3) and scores.dtype == np.float32
    for row in range(3):
        text = prepared["input_ids"][row][prepared["mask"][row]]
        ids = np.concatenate([reward.queries.head_ids, [reward.model.config.video_token_id] * TOKENS, text])
        patches, grid = their_patches(videos[row])
        places = torch.arange(len(ids)).expand(3, 1, -1) if positions == "count" else None
        with torch.no_grad():
            hidden = theirs(
                input_ids=torch.from_numpy(ids)[None].long(),
                position_ids=places,
                pixel_values_videos=torch.from_numpy(patches),
                video_grid_thw=torch.tensor([grid]),
                mm_token_type_ids=torch.from_numpy(2 * (ids == reward.model.config.video_token_id))[None].int(),
            ).last_hidden_state[0]
            at = [int(np.argmax(ids == token)) for token in reward.queries.reward_token_ids]
            raw = (hidden[at] @ head.T)[:, 0].numpy()
        mean, std = (np.array([NORM[f"{name}_{kind}"] for name in ("VQ", "MQ", "TA")]) for kind in ("mean", "std"))
        expected = (raw - mean) / std
        np.testing.assert_allclose(scores[row], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_clip_scores_the_same_in_any_batch(reward, score):
    videos, prepared = noise(3), reward.prepare(PROMPTS)
    together = score(reward.params, videos, prepared)
    other = reward.prepare(["quite another prompt", PROMPTS[2], PROMPTS[2]])
    assert other["input_ids"].shape == prepared["input_ids"].shape
    np.testing.assert_array_equal(score(reward.params, videos, other)[2], together[2])


def test_candidates_of_a_prompt_share_its_row(reward, score):
    videos = noise(3)
    once = reward.prepare(PROMPTS[:1])
    for_each = jax.tree.map(lambda x: np.repeat(x, 3, axis=0), once)
    np.testing.assert_array_equal(score(reward.params, videos, once), score(reward.params, videos, for_each))
    with pytest.raises(UserError, match="2 for 3 videos"):
        reward.score(reward.params, videos, reward.prepare(PROMPTS[:2]))


def test_a_mesh_changes_no_score(reward, score):
    videos, prepared = noise(3), reward.prepare(PROMPTS)
    expected = score(reward.params, videos, prepared)
    with jax.set_mesh(make_mesh(data=1)):
        np.testing.assert_array_equal(jax.jit(reward.score)(reward.params, videos, prepared), expected)


def test_the_scorer_chooses_frames_and_fills_its_last_batch(original):
    reward = load(original, options=Options(min_pixels=256, videos_at_a_time=3))
    shapes = []

    def of_shape(params, videos, prepared):
        shapes.append(videos.shape)
        return np.zeros((len(videos), 3), np.float32)

    scores = Scorer(reward, of_shape, {})(noise(5, frames=17), [*PROMPTS, "a", "b"])
    assert tuple(scores) == REWARD_DIMENSIONS and all(values.shape == (5,) for values in scores.values())
    assert shapes == [(3, 4, 20, 24, 3)] * 2


def test_vision_in_parts_gives_the_same_scores(original, reward, score):
    videos, prepared = noise(3), reward.prepare(PROMPTS)
    parts = load(original, options=Options(min_pixels=256, max_prompt_tokens=40, frames_at_a_time=3))
    np.testing.assert_allclose(
        jax.jit(parts.score)(parts.params, videos, prepared), score(reward.params, videos, prepared), rtol=0, atol=1e-5
    )


def equal_params(folder, params, tolerance=0.0):
    found, expected = flatten(read_videoreward(folder).params), flatten(params)
    assert set(found) == set(expected)
    for path, leaf in found.items():
        np.testing.assert_allclose(leaf, expected[path], rtol=0, atol=tolerance, err_msg=path)


def test_new_names_shards_and_bfloat16_load(folder, reward):
    state = to_torch(reward.params)
    assert any(key.startswith("model.language_model.") for key in state)
    (folder / "model.safetensors").unlink()
    io.write_weights(folder, "model", state, max_shard_bytes=4000)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    equal_params(folder, reward.params)
    for file in folder.glob("model*safetensors*"):
        file.unlink()
    io.write_weights(folder, "model", {key: value.astype(jnp.bfloat16) for key, value in state.items()})
    stored = load(folder)
    assert {leaf.dtype for leaf in jax.tree.leaves(stored.params)} == {jnp.dtype(jnp.bfloat16)}
    assert stored.model.dtype == jnp.bfloat16
    exact = load(folder, options=Options(dtype="float32"))
    assert {leaf.dtype for leaf in jax.tree.leaves(exact.params)} == {jnp.dtype(jnp.float32)}


@pytest.fixture(scope="module")
def adapted(original):
    """transformers' model under a LoRA of PEFT, with random numbers in it, and its weights once merged by PEFT."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    theirs, _ = their_model(original)
    holder = torch.nn.Module()
    holder.model = theirs
    holder.config = {}
    wrapped = peft.get_peft_model(holder, peft.LoraConfig(r=2, lora_alpha=8, target_modules=LORA_TARGETS))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    merged = copy.deepcopy(wrapped).merge_and_unload().state_dict()
    return wrapped, {key: value.numpy() for key, value in merged.items()}


def expected_params(reward, merged):
    """The reward's tree with PEFT's merged weights in it."""
    state = to_torch(reward.params)
    assert sum(np.abs(state[key] - value).max() > 0.01 for key, value in merged.items()) == 2 * len(LORA_TARGETS)
    return state | merged


def equal_states(folder, expected):
    found = to_torch(read_videoreward(folder).params)
    assert set(found) == set(expected)
    for key, value in found.items():
        # One product and one sum in float32, in another order.
        np.testing.assert_allclose(value, expected[key], rtol=0, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("stabilised", [False, True])
def test_an_adapter_folder_merges_into_its_base_as_peft_does(folder, tmp_path, reward, adapted, stabilised):
    wrapped, merged = adapted
    base = folder.rename(tmp_path / "base")
    state = {key: np.array(value) for key, value in io.read_weights(base, "model").items()}
    head = state.pop("rm_head.weight")
    io.write_weights(base, "model", state)
    adapter = tmp_path / "adapter"
    wrapped.save_pretrained(adapter)
    for name in ("model_config.json", "query_prompt.txt"):
        (base / name).rename(adapter / name)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "../base"}
    if stabilised:  # alpha / sqrt(r) is what alpha / r was
        config |= {"use_rslora": True, "lora_alpha": 4 * config["r"] ** 0.5}
    (adapter / "adapter_config.json").write_text(json.dumps(config))

    with pytest.raises(UserError, match=r"has no head \(rm_head\.weight\)"):
        read_videoreward(adapter)
    (adapter / "non_lora_state_dict.pth").write_bytes(b"")
    with pytest.raises(UserError, match=r"a pickle.*tools/pickle_to_safetensors\.py"):
        read_videoreward(adapter)
    io.write_weights(adapter, "non_lora_state_dict", {"base_model.model.rm_head.weight": head})
    equal_states(adapter, expected_params(reward, merged))
    assert load_reward(str(adapter)).name == "adapter"  # it has no config.json of its own

    # A head that PEFT saved itself, as one of modules_to_save, stands in the adapter's file.
    (adapter / "non_lora_state_dict.safetensors").unlink()
    (adapter / "non_lora_state_dict.pth").unlink()
    saved = {key: np.array(value) for key, value in io.read_file(adapter / "adapter_model.safetensors").items()}
    io.write_weights(adapter, "adapter_model", saved | {"base_model.model.rm_head.weight": head})
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["rm_head"]}))
    equal_states(adapter, expected_params(reward, merged))

    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "Qwen/none"}))
    with pytest.raises(UserError, match=r"base_model_name_or_path is 'Qwen/none', which is no folder"):
        read_videoreward(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(UserError, match=r"use_dora=True is not supported"):
        read_videoreward(adapter)


def test_the_published_layout_loads_its_last_checkpoint(folder, reward, adapted):
    """All weights as PEFT wraps them, in a folder checkpoint-N with the tokenizer in a folder of its own."""
    wrapped, merged = adapted
    last, first = folder / "checkpoint-100", folder / "checkpoint-20"
    for place in (first, last):
        (place / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer.json").rename(last / "tokenizer" / "tokenizer.json")
    (folder / "model.safetensors").unlink()
    state = {key.removeprefix("base_model.model."): value.numpy() for key, value in wrapped.state_dict().items()}
    state = legacy(state) | {"rm_head.weight": to_torch(reward.params)["rm_head.weight"]}
    state = {f"base_model.model.{key}": value for key, value in state.items()}
    assert any(".base_layer." in key for key in state) and any(".lora_A.default." in key for key in state)
    (last / "model.pth").write_bytes(b"")
    with pytest.raises(UserError, match=r"model\.pth: a pickle.*tools/pickle_to_safetensors\.py"):
        load_reward(str(folder))
    io.write_weights(last, "model", state)
    equal_states(folder, expected_params(reward, merged))
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"copy config\.json of the scorer's base \(Qwen/Qwen2-VL-2B-Instruct\)"):
        load_reward(str(folder))


def test_half_an_adapter_is_a_user_error(folder):
    state = {key: np.array(value) for key, value in io.read_weights(folder, "model").items()}
    name = "model.layers.1.self_attn.q_proj"
    half = {f"{name}.lora_A.default.weight": np.ones((2, 16), np.float32)}
    io.write_weights(folder, "model", state | half)
    with pytest.raises(UserError, match=r"q_proj\.lora_B\.default\.weight is missing"):
        read_videoreward(folder)
    io.write_weights(folder, "model", state | half | {f"{name}.lora_B.default.weight": np.ones((5, 2), np.float32)})
    with pytest.raises(UserError, match=r"do not fit .*q_proj\.weight \[16, 16\]"):
        read_videoreward(folder)


def test_a_head_of_three_outputs_gives_each_token_its_own(folder, reward, score):
    state = {key: np.array(value) for key, value in io.read_weights(folder, "model").items()}
    rows = np.concatenate([state["rm_head.weight"] * factor for factor in (1.0, 2.0, -1.0)])
    io.write_weights(folder, "model", state | {"rm_head.weight": rows})
    with pytest.raises(UserError, match=r"rm_head\.weight is \[3, 16\], but model_config\.json has output_dim 1"):
        read_videoreward(folder)
    (folder / "model_config.json").write_text(
        json.dumps(
            {name: SETTINGS[name] for name in ("data_config",)}
            | {"model_config": SETTINGS["model_config"] | {"output_dim": 3}}
        )
    )
    three = load(folder, options=OPTIONS)
    assert three.model.outputs == 3 and three.ranges == ((-4.0, 10.0),) * 3  # raw, without constants
    videos, prepared = noise(3), reward.prepare(PROMPTS)
    mean, std = (np.array([NORM[f"{name}_{kind}"] for name in ("VQ", "MQ", "TA")]) for kind in ("mean", "std"))
    raw = np.asarray(score(reward.params, videos, prepared)) * std + mean
    scores = np.asarray(jax.jit(three.score)(three.params, videos, prepared))
    np.testing.assert_allclose(scores, raw * [1, 2, -1], rtol=0, atol=1e-5)


def test_a_tokenizer_without_reward_tokens_gets_them_as_in_the_authors_code(folder, reward):
    make_tokenizer(SPECIAL).save(str(folder / "tokenizer.json"))
    assert load(folder).queries.reward_token_ids == reward.queries.reward_token_ids == (262, 263, 264)


@pytest.mark.parametrize(("height", "width"), [(20, 24), (8, 90), (61, 33), (300, 17), (5, 5), (130, 140)])
def test_frames_equal_the_image_processor(height, width):
    transformers = pytest.importorskip("transformers")
    size = {"shortest_edge": 1500, "longest_edge": 9000}
    processor = transformers.Qwen2VLImageProcessorPil(patch_size=4, size=size)
    settings = SmartFrameSettings.from_dict(processor.to_dict(), 8, 1500, 9000)
    video = noise(1, 2, height, width)[0]
    value = np.asarray(jax.jit(lambda frames: prepare_frames(settings, frames))(video))
    made = processor([Image.fromarray(frame) for frame in video], return_tensors="np")
    _, rows, columns = made["image_grid_thw"][0]
    assert value.shape == (2, rows * 4, columns * 4, 3)
    patches = made["pixel_values"].reshape(2, rows // 2, columns // 2, 2, 2, 3, 2, 4, 4)[..., 0, :, :]
    expected = patches.transpose(0, 1, 3, 6, 2, 4, 7, 5).reshape(value.shape)
    # The resize is equal to the bit; what follows is float32 rounding of values up to 3.
    np.testing.assert_allclose(value, expected, rtol=0, atol=2e-6)


def test_full_size_frames_equal_pillow_to_the_bit_and_torch_to_two_levels():
    """The authors resize with torchvision, which calls torch; it has weights of fewer bits than Pillow."""
    torch = pytest.importorskip("torch")
    settings = SmartFrameSettings(28, 128 * 28 * 28, 200704)
    for old in [(256, 256), (320, 512), (720, 1280), (848, 480)]:
        new = settings.output_size(*old)
        video = noise(1, 1, *old)[0]
        value = np.asarray(jax.jit(lambda x, new=new: resize(x, *new, BICUBIC))(video))[0]
        pillow = np.asarray(Image.fromarray(video[0]).resize(new[::-1], Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(value, pillow)
        theirs = torch.nn.functional.interpolate(
            torch.from_numpy(video.transpose(0, 3, 1, 2).copy()), new, mode="bicubic", antialias=True
        )
        apart = np.abs(theirs.numpy()[0].transpose(1, 2, 0).astype(int) - value)
        # 0.3 to 0.8 % of the values were a level apart on noise, 3 in a million two.
        assert apart.max() <= 2 and (apart > 0).mean() < 0.02 and (apart > 1).mean() < 1e-4


@pytest.mark.parametrize(("old", "new"), [(3, 8), (8, 3), (97, 31), (5, 5), (1, 4)])
def test_cubic_weights_of_a_place_sum_to_one(old, new):
    indices, weights = resize_taps(old, new, BICUBIC)
    assert indices.min() >= 0 and indices.max() < old
    np.testing.assert_allclose(weights.sum(0) / 2**22, 1, rtol=0, atol=1e-5)


def test_sizes_are_those_of_qwen2_vl():
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    settings = SmartFrameSettings(28, 100352, 200704)
    assert settings.output_size(256, 256) == (336, 336)
    for height in range(64, 1500, 89):
        for width in range(64, 1500, 97):
            assert settings.output_size(height, width) == module.smart_resize(height, width, 28, 100352, 200704)


@pytest.mark.parametrize("total", [2, 3, 4, 5, 16, 17, 24, 49, 100, 1000])
def test_frames_are_chosen_as_published(reward, total):
    torch = pytest.importorskip("torch")
    wanted = min(max(total / 8 * 2.0, 4), total // 2 * 2)  # 2 of 8 frames a second, at least 4, an even number
    expected = torch.linspace(0, total - 1, round(wanted / 2) * 2).round().long().tolist()
    assert list(reward.frame_indices(total)) == expected
    assert len(choose_frames(total, 6, 2, "it")) == min(6, total // 2 * 2)


def test_a_number_of_frames_can_be_given(original):
    fixed = load(original, options=Options(num_frames=6))
    assert fixed.frame_indices(16) == (0, 3, 6, 9, 12, 15) and fixed.frame_indices(5) == (0, 1, 3, 4)
    with pytest.raises(UserError, match=r"^videoreward\.num_frames: 3 is no multiple of the 2 frames"):
        load(original, options=Options(num_frames=3))


def test_without_a_query_prompt_a_warning_says_so(folder, tmp_path):
    (folder / "query_prompt.txt").unlink()
    with pytest.warns(UserWarning, match=r"no query_prompt\.txt.*DETAILED_PROMPT_WITH_SPECIAL_TOKEN"):
        own = load(folder)
    assert own.queries.length > 200
    (tmp_path / "mine.txt").write_text(QUERY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given = load(folder, options=Options(query_prompt=str(tmp_path / "mine.txt")))
    assert given.queries.length < own.queries.length


def test_a_prompt_longer_than_its_room_is_cut_with_a_warning(original):
    reward = load(original, options=Options(max_prompt_tokens=12))
    with pytest.warns(UserWarning, match="max_prompt_tokens=12"):
        prepared = reward.prepare(["the quick brown fox", "🎈" * 50])
    assert prepared["input_ids"].shape == (2, reward.queries.length)
    cut = reward.prepare(["the quick brown fox"[:length] for length in range(1, 13)])
    rows = [row[mask].tolist() for row, mask in zip(cut["input_ids"], cut["mask"], strict=True)]
    assert prepared["input_ids"][0][prepared["mask"][0]].tolist() in rows


def test_special_words_in_a_prompt_are_words(reward):
    prepared = reward.prepare(["<|video_pad|> <|TA_reward|><|VQ_reward|>", "{text_prompt} {0} %s {text}"])
    assert (prepared["input_ids"] != reward.model.config.video_token_id).all()
    for token in reward.queries.reward_token_ids:
        assert ((prepared["input_ids"] == token).sum(1) == 1).all()


def test_wrong_videos_and_prompts_are_user_errors(reward):
    prepared = reward.prepare(["a"])
    with pytest.raises(UserError, match=r"^videos: must be uint8 \[B, f, H, W, 3\], found float32 \[1, 4, 20, 24, 3\]"):
        reward.score(reward.params, noise(1).astype(np.float32), prepared)
    with pytest.raises(UserError, match=r"^videos: must be uint8"):
        reward.score(reward.params, noise(1)[0], prepared)
    with pytest.raises(UserError, match=r"^videos: 3 frames, and tiny reads 2 together; take those of frame_indices"):
        reward.score(reward.params, noise(1, frames=3), prepared)
    with pytest.raises(UserError, match=r"^videos: 1 frames, and tiny needs 2 or more"):
        reward.frame_indices(1)
    with pytest.raises(UserError, match=r"^prompts: number 2 is empty, .*give the prompt that each video was made for"):
        reward.prepare(["a", " "])


def test_more_tokens_than_places_is_a_user_error(original):
    reward = load(original, options=Options(max_prompt_tokens=400, min_pixels=256))
    with pytest.raises(UserError, match=r"^max_prompt_tokens: .* has 400 places"):
        reward.score(reward.params, noise(1), reward.prepare(["a"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": "mrope"}, r"^videoreward\.positions: 'mrope' is not one of count, grid"),
        ({"video_fps": 0}, r"^videoreward\.video_fps"),
        ({"frames_at_a_time": 0}, r"^videoreward\.frames_at_a_time"),
        ({"min_pixels": 10**6}, r"^data_config\.max_frame_pixels: 200704 is less than min_pixels"),
        ({"min_pixels": 4}, r"^preprocessor_config\.min_pixels"),
        ({"dtype": "int8"}, r"^dtype: 'int8'"),
        ({"query_prompt": "/no/such/file"}, "cannot be read as text"),
    ],
)
def test_wrong_options_are_user_errors(original, options, message):
    with pytest.raises(UserError, match=message):
        load(original, options=Options(**options))


def test_a_broken_folder_names_the_file_and_the_fix(folder):
    def breaks(file, content, message):
        path = folder / file
        before = path.read_bytes()
        path.write_text(content) if content is not None else path.unlink()
        with pytest.raises(UserError, match=message):
            load_reward(str(folder))
        path.write_bytes(before)

    def settings(part, field, value):
        return json.dumps(SETTINGS | {part: SETTINGS[part] | {field: value}})

    config = json.loads((folder / "config.json").read_text())
    breaks("config.json", json.dumps(config | {"architectures": ["Qwen2ForCausalLM"]}), "is no scorer")
    breaks("config.json", json.dumps(config | {"video_token_id": 3}), "has to be token 3")
    breaks("config.json", json.dumps(config | {"depth": 3}), r"^config\.depth")
    breaks("tokenizer.json", None, r"tokenizer\.json: no such file")
    breaks("tokenizer.json", "{}", "not a tokenizer")
    breaks("preprocessor_config.json", '{"max_pixels": 9}', r"^preprocessor_config\.max_pixels: 9 would resize")
    breaks("preprocessor_config.json", '{"resample": 2}', r"^preprocessor_config\.resample: 2 is not 3 \(bicubic\)")
    breaks("query_prompt.txt", QUERY.replace("{text_prompt}", ""), r"^query_prompt: has no \{text_prompt\}")
    breaks("query_prompt.txt", QUERY + "<|MQ_reward|>", r"^query_prompt: has <\|MQ_reward\|> 2 times; write it once")
    breaks("model.safetensors", None, r"model\.safetensors belongs there")
    breaks("model_config.json", None, r"model_config\.json: no such file")
    breaks("model_config.json", settings("model_config", "output_dim", 2), r"output_dim: must be 1 or 3, found 2")
    breaks("model_config.json", settings("data_config", "sample_type", "multi_pts"), r"sample_type: 'multi_pts' is not")
    breaks("model_config.json", settings("data_config", "max_frame_pixels", None), r"data_config\.max_frame_pixels")
    breaks("model_config.json", settings("inference_config", "MQ_std", 0), r"inference_config\.MQ_std")
    last = SETTINGS | {"model_config": {"output_dim": 3, "reward_token": "last"}}
    breaks("model_config.json", json.dumps(last), r"model_config\.reward_token: scores are read at the tokens")


def test_a_folder_without_its_head_is_no_scorer(folder):
    state = {key: np.array(value) for key, value in io.read_weights(folder, "model").items()}
    io.write_weights(folder, "model", {key: value for key, value in state.items() if key != "rm_head.weight"})
    with pytest.raises(UserError, match=r"has no head \(rm_head\.weight\)"):
        load_reward(str(folder))
    io.write_weights(folder, "model", {"rm_head.weight": state["rm_head.weight"]})
    with pytest.raises(UserError, match=r"embed_tokens\.weight; give all weights, or an adapter with its base"):
        load_reward(str(folder))
