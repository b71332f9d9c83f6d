"""Wan's LoRA files in diffusers: the printed lines load what is written, and it computes what was trained."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vpo_jax.checkpoints.lora_files import weights_name
from vpo_jax.checkpoints.lora_layouts import METADATA, original_name
from vpo_jax.checkpoints.peft import read_adapter, write_adapter
from vpo_jax.families.wan.lora_names import ADAPTER_FORMS, ORIGINAL_NAMES, adapter_lines
from vpo_jax.models.lora import LoRAConfig
from vpo_jax.runtime.trees import flatten, unflatten
from vpo_jax.training.policy import adapted_components

torch = pytest.importorskip("torch", reason="parity against PyTorch needs it")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

LORA = LoRAConfig(rank=3, alpha=7.0)
LAYERS = 3
EXPERTS = ("transformer", "transformer_2")
# Two libraries' float32: sums of W + B A in another order. Measured 4e-7 to 7e-7.
TOLERANCE = 5e-6


def transformer(seed):
    """A random WanTransformer3DModel of odd sizes, no weight of it zero or one."""
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=16,
        ffn_dim=20, num_layers=LAYERS, cross_attn_norm=True, rope_max_seq_len=16,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) * 0.3
    return model.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny pipelines on disk, by their number of experts."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    root = tmp_path_factory.mktemp("wan")
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("a", -1.0)]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram(vocabulary, 2)), pad_token="<pad>")
    text = UMT5EncoderModel(UMT5Config(vocab_size=4, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    for experts, second in ((1, None), (2, transformer(2))):
        pipe = diffusers.WanPipeline(
            tokenizer, text, vae, scheduler, transformer(1), second, 0.875 if second is not None else None
        )
        pipe.save_pretrained(root / str(experts))
    return {experts: str(root / str(experts)) for experts in (1, 2)}


def linear_modules(model):
    """Name -> (in, out, window) of every layer that can have an adapter."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv3d):
            out, fan_in, *window = module.weight.shape
            found[name] = (fan_in, out, window)
    return found


def random_adapters(seed, but=()):
    """Adapters of every layer, those of the blocks stacked as of a scanned transformer."""
    rng, flat = np.random.default_rng(seed), {}
    for name, (fan_in, out, window) in linear_modules(transformer(0)).items():
        path, stack = name.replace(".", "/"), ()
        if name.startswith("blocks."):
            _, layer, rest = name.split(".", 2)
            path, stack = f"blocks.*/{rest.replace('.', '/')}", (LAYERS,)
            if layer != "0":
                continue
        if name not in but:
            flat[f"{path}/lora_A"] = rng.normal(size=(*stack, *window, fan_in, LORA.rank)).astype(np.float32) * 0.3
            flat[f"{path}/lora_B"] = rng.normal(size=(*stack, LORA.rank, out)).astype(np.float32) * 0.3
    return unflatten(flat)


def merged(model, adapters, scale):
    """The model with scale * A B added to its weights, from the trees themselves."""
    state, flat = dict(model.state_dict()), flatten(adapters)
    for path in [path for path in flat if path.endswith("lora_A")]:
        product = scale * (flat[path] @ flat[path.replace("lora_A", "lora_B")])  # [(layers,) window..., in, out]
        module = path.removesuffix("/lora_A").replace("/", ".")
        many = product if ".*" in module else product[None]
        for layer, change in enumerate(many):
            axes = (change.ndim - 1, change.ndim - 2, *range(change.ndim - 2))
            state[f"{module.replace('*', str(layer))}.weight"] += torch.from_numpy(change.transpose(axes).copy())
    model.load_state_dict(state)
    return model


@torch.no_grad()
def predict(model):
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(1, 4, 3, 4, 6, generator=generator)
    text = torch.randn(1, 5, 8, generator=generator)
    return model(latents, torch.tensor([421]), text).sample.numpy()


def difference(one, other):
    return np.abs(one - other).max() / np.abs(other).max()


def load(lines):
    scope: dict = {}
    exec("\n".join(lines), scope)
    return scope["pipe"]


def without(form):
    """diffusers' reader of the original names does not know this layer."""
    return ("patch_embedding",) if form == "original" else ()


@pytest.mark.parametrize("form", ADAPTER_FORMS)
def test_the_printed_lines_load_an_adapter_of_every_layer(folders, tmp_path, form):
    adapters = random_adapters(3, without(form))
    write_adapter(tmp_path / "lora", adapters, LORA, folders[1], form, ORIGINAL_NAMES)
    lines = adapter_lines(str(tmp_path / "lora"), folders[1], form)
    tuned = predict(merged(transformer(1), adapters, LORA.scale))
    assert difference(predict(load(lines).transformer), tuned) <= TOLERANCE
    assert difference(predict(transformer(1)), tuned) > 0.05, "the adapter does something"
    assert difference(predict(merged(transformer(1), adapters, 1.0)), tuned) > 0.05, "and so does its scale"
    if form == "diffusers":
        assert lines[2] == f"pipe.load_lora_weights({str(tmp_path / 'lora')!r})"


@pytest.mark.parametrize("form", ADAPTER_FORMS)
@pytest.mark.parametrize("experts", [EXPERTS, EXPERTS[1:]], ids=["both", "second"])
def test_the_printed_lines_load_the_adapters_of_two_experts(folders, tmp_path, form, experts):
    adapters = {name: random_adapters(4 + EXPERTS.index(name), without(form)) for name in experts}
    write_adapter(tmp_path / "lora", adapters, LORA, folders[2], form, ORIGINAL_NAMES, experts)
    pipe = load(adapter_lines(str(tmp_path / "lora"), folders[2], form, experts))
    for seed, name in enumerate(EXPERTS, start=1):
        own = merged(transformer(seed), adapters[name], LORA.scale) if name in experts else transformer(seed)
        assert difference(predict(getattr(pipe, name)), predict(own)) <= TOLERANCE
    again = read_adapter(
        tmp_path / "lora",
        adapters,
        LORA if form == "peft" else LoRAConfig(LORA.rank, LORA.rank),
        ORIGINAL_NAMES,
        experts,
    )
    factor = 1.0 if form == "peft" else np.float32(LORA.scale)
    for path, leaf in flatten(again).items():
        np.testing.assert_array_equal(leaf, flatten(adapters)[path] * (factor if path.endswith("lora_B") else 1.0))


@pytest.mark.parametrize("form", ["diffusers", "original"])
def test_diffusers_loses_an_alpha_that_is_neither_multiplied_in_nor_in_the_metadata(folders, tmp_path, form):
    adapters = random_adapters(3, without(form))
    tuned = predict(merged(transformer(1), adapters, LORA.scale))
    write_adapter(tmp_path / "lora", adapters, LORA, folders[1], form, ORIGINAL_NAMES)
    file = tmp_path / "lora" / weights_name()
    plain = {key: value / np.float32(LORA.scale if "lora_B" in key else 1) for key, value in load_file(file).items()}
    said = {f"transformer.{name}": value for name, value in (("r", LORA.rank), ("lora_alpha", LORA.alpha))}
    names = [key.removeprefix("transformer.").removesuffix(".lora_A.weight") for key in plain if "lora_A" in key]
    said["transformer.target_modules"] = names
    save_file(plain, file)
    assert difference(predict(load(adapter_lines(str(file.parent), folders[1], form)).transformer), tuned) > 0.05
    if form == "diffusers":
        save_file(plain, file, {METADATA: json.dumps(said)})
        found = predict(load(adapter_lines(str(file.parent), folders[1], form)).transformer)
        assert difference(found, tuned) <= TOLERANCE


def test_what_wan_pipeline_itself_saves_is_read(tmp_path):
    peft = pytest.importorskip("peft")
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

    model = transformer(1)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets, init_lora_weights=False)
    model.add_adapter(config)
    layers = peft.get_peft_model_state_dict(model)
    diffusers.WanPipeline.save_lora_weights(
        tmp_path / "lora", transformer_lora_layers=layers, transformer_lora_adapter_metadata=config.to_dict()
    )
    shapes = random_adapters(0)
    shapes = {"blocks.*": shapes["blocks.*"]}
    read = read_adapter(tmp_path / "lora", shapes, LORA, ORIGINAL_NAMES)
    for path, leaf in flatten(read).items():
        key = path.replace("/", ".").replace("*", "1") + ".weight"
        np.testing.assert_array_equal(leaf[1], layers[key].detach().numpy().T)
    assert LORA_ADAPTER_METADATA_KEY == METADATA


def test_every_layer_of_the_real_transformers_has_a_name_of_its_own():
    with torch.device("meta"):
        model = diffusers.WanTransformer3DModel(num_layers=40, num_attention_heads=12, ffn_dim=8960)
    names = {name: original_name(name, ORIGINAL_NAMES) for name in linear_modules(model)}
    assert len(names) == 40 * 10 + 7 and None not in names.values()
    assert len(set(names.values())) == len(names), "no two have one"
    kohyas = {name.replace(".", "_") for name in (*names, *names.values())}
    assert len(kohyas) == 2 * len(names) - 1, "dots apart too; the patch embedding's is the same in both"
    # Wan-Video/Wan2.1, wan/modules/model.py
    assert {name for name in names.values() if not name.startswith("blocks.")} == {
        "patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2",
        "time_projection.1", "head.head",
    }  # fmt: skip
    assert {name.removeprefix("blocks.39.") for name in names.values() if name.startswith("blocks.39.")} == {
        *(f"{kind}_attn.{layer}" for kind in ("self", "cross") for layer in "qkvo"), "ffn.0", "ffn.2",
    }  # fmt: skip


def test_the_components_of_a_tree_are_the_folders(tmp_path):
    family = SimpleNamespace(layout=SimpleNamespace(components=dict.fromkeys((*EXPERTS, "vae"))))
    adapters = random_adapters(0)
    assert adapted_components(family, adapters) == ()
    shapes = jax.eval_shape(lambda: dict.fromkeys(EXPERTS, adapters))
    assert adapted_components(family, shapes) == EXPERTS
