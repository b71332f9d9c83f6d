"""LoRA files of PEFT, diffusers and kohya's scripts: what can be mapped exactly is read, anything else is named."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vpo_jax.checkpoints.adapter_config import refuse_unusual
from vpo_jax.checkpoints.peft import read_adapter, write_adapter
from vpo_jax.models.lora import LoRAConfig, init_lora
from vpo_jax.runtime.errors import UserError

LORA = LoRAConfig(rank=3, alpha=6.0, targets=(r"\.to_(q|k|v|out\.0)$", r"resnets\.0\.conv1$"))
PLAIN = LoRAConfig(rank=3, alpha=3.0, targets=LORA.targets)


@pytest.fixture
def adapters(parts):
    rng = np.random.default_rng(1)
    fresh = init_lora(jax.random.key(0), parts.params["unet"], LORA)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), fresh)


@pytest.fixture
def tensors(adapters, tmp_path):
    """Of a PEFT file: {"base_model.model.a.b.lora_A.weight": array}."""
    write_adapter(tmp_path / "peft", adapters, LORA, "base")
    return load_file(tmp_path / "peft" / "adapter_model.safetensors")


def module_of(key):
    return key.removeprefix("base_model.model.").rpartition(".lora_")[0]


def modules(tensors):
    return sorted({module_of(key) for key in tensors})


def kohya(tensors, alpha=6.0):
    named = {}
    for key, array in tensors.items():
        which = "lora_down" if "lora_A" in key else "lora_up"
        named[f"lora_unet_{module_of(key).replace('.', '_')}.{which}.weight"] = array
    alphas = {f"lora_unet_{module.replace('.', '_')}.alpha": np.float32(alpha) for module in modules(tensors)}
    return named | {key: np.asarray(value) for key, value in alphas.items()}


def diffusers(tensors, prefix="unet", factors=("lora_A", "lora_B")):
    names = dict(zip(("A", "B"), factors, strict=True))
    return {
        f"{prefix}.{module_of(key)}.{names[key.rpartition('.lora_')[2][0]]}.weight": value
        for key, value in tensors.items()
    }


def processors(tensors):
    """As diffusers 0.15 to 0.20 wrote the attention's adapters."""
    named = {}
    for key, array in tensors.items():
        place, _, layer = module_of(key).removesuffix(".0").rpartition(".")
        which = "down" if "lora_A" in key else "up"
        is_attention = layer.startswith("to_")
        name = f"{place}.processor.{layer}_lora.{which}" if is_attention else f"{module_of(key)}.lora.{which}"
        named[f"unet.{name}.weight"] = array
    return named


def assert_read(path, adapters, lora):
    jax.tree.map(np.testing.assert_array_equal, read_adapter(path, adapters, lora), adapters)


@pytest.mark.parametrize("name", ["", "pytorch_lora_weights.safetensors", "my_style.safetensors"])
def test_kohyas_names_with_alpha_are_read_from_a_file_or_its_folder(tensors, adapters, tmp_path, name):
    file = tmp_path / "k" / (name or "lora.safetensors")
    file.parent.mkdir()
    save_file(kohya(tensors), file)
    assert_read(file.parent if name else file, adapters, LORA)


@pytest.mark.parametrize(
    "layout",
    [
        diffusers,
        processors,
        lambda tensors: diffusers(tensors, "transformer"),
        lambda tensors: diffusers(tensors, "unet", ("lora.down", "lora.up")),
        lambda tensors: {key.removeprefix("base_model.model."): value for key, value in tensors.items()},
        lambda tensors: {key: value for key, value in kohya(tensors).items() if not key.endswith(".alpha")},
    ],
)
def test_a_file_without_alpha_has_the_scale_1_as_its_writers_say(tensors, adapters, tmp_path, layout):
    save_file(layout(tensors), tmp_path / "pytorch_lora_weights.safetensors")
    assert_read(tmp_path / "pytorch_lora_weights.safetensors", adapters, PLAIN)
    with pytest.raises(UserError, match=r"has alpha 3, but lora\.alpha is 6; give --config\.lora\.alpha=3"):
        read_adapter(tmp_path / "pytorch_lora_weights.safetensors", adapters, LORA)


def test_diffusers_metadata_says_alpha_and_what_is_unusual(tensors, adapters, tmp_path):
    file = tmp_path / "pytorch_lora_weights.safetensors"
    said = {"unet.r": 3, "unet.lora_alpha": 6, "unet.use_dora": False, "unet.target_modules": ["to_q"]}
    save_file(diffusers(tensors), file, metadata={"lora_adapter_metadata": json.dumps(said)})
    assert_read(file, adapters, LORA)
    for value, says in ((json.dumps(said | {"unet.use_dora": True}), "use_dora=True"), ("[1]", "no JSON object")):
        save_file(diffusers(tensors), file, metadata={"lora_adapter_metadata": value})
        with pytest.raises(UserError, match=says):
            read_adapter(file, adapters, LORA)


def test_a_linear_layer_saved_as_a_convolution_of_window_1_is_read(tensors, adapters, tmp_path):
    widened = {key: value[..., None, None] if value.ndim == 2 else value for key, value in kohya(tensors).items()}
    save_file(widened, tmp_path / "k.safetensors")
    assert_read(tmp_path / "k.safetensors", adapters, LORA)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": np.zeros((3, 4))}, "adapts a text encoder"),
        ({"text_encoder.layers.0.lora_A.weight": np.zeros((3, 4))}, "adapts a text encoder"),
        ({"lora_unet_input_blocks_1_1.lora_down.weight": np.zeros((3, 4))}, "lora_unet_input_blocks_1_1"),
        ({"lora_unet_x.hada_w1_a": np.zeros((3, 4))}, "lora_unet_x.hada_w1_a is of another method than LoRA"),
        ({"lora_unet_x.lokr_w1": np.zeros((3, 4))}, "lokr_w1 is of another method"),
        ({"lora_unet_x.dora_scale": np.zeros((3, 4))}, "dora_scale is of another method"),
        ({"lora_unet_x.lora_mid.weight": np.zeros((3, 3))}, "lora_mid.weight is of another method"),
        ({"something.else": np.zeros(3)}, "something.else"),
        ({"ALPHA": np.asarray(np.nan, np.float32)}, "alpha is no number above 0"),
        ({"ALPHA": np.asarray(2.0, np.float32)}, "lora.alpha is 6; give --config.lora.alpha=2"),
        ({"DOWN": np.zeros((4, 16), np.float32)}, "has rank 4, but lora.rank is 3; give --config.lora.rank=4"),
    ],
    ids=str,
)
def test_what_of_a_file_cannot_be_mapped_is_named(tensors, adapters, tmp_path, change, says):
    first = modules(tensors)[0].replace(".", "_")
    names = {"ALPHA": f"lora_unet_{first}.alpha", "DOWN": f"lora_unet_{first}.lora_down.weight"}
    changed = kohya(tensors) | {names.get(key, key): np.asarray(value, np.float32) for key, value in change.items()}
    save_file(changed, tmp_path / "k.safetensors")
    with pytest.raises(UserError) as refused:
        read_adapter(tmp_path / "k.safetensors", adapters, LORA)
    assert says in str(refused.value) and str(refused.value).startswith("lora.path: ")


def test_a_folder_with_two_files_asks_for_one(tensors, adapters, tmp_path):
    folder = tmp_path / "two"
    folder.mkdir()
    for name in ("a", "b"):
        save_file(kohya(tensors), folder / f"{name}.safetensors")
    with pytest.raises(UserError, match="has 2 safetensors files; give one of them, as") as refused:
        read_adapter(folder, adapters, LORA)
    assert_read(str(refused.value).rpartition(" as ")[2], adapters, LORA)


STARTS = ["pissa", "pissa_niter_4", "olora", "gaussian", "orthogonal", True, False]


@pytest.mark.parametrize("start", STARTS, ids=str)
def test_an_adapter_of_peft_is_read_where_its_start_left_the_base_alone(written, parts, tmp_path, start):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from diffusers import UNet3DConditionModel as TorchUNet

    torch.manual_seed(0)
    names = ["to_q", "to_k", "to_v", "to_out.0"]
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=names, init_lora_weights=start)
    peft.get_peft_model(TorchUNet.from_pretrained(written / "unet"), config).save_pretrained(tmp_path / "adapter")
    lora = LoRAConfig(rank=2, alpha=4.0)
    shapes = init_lora(jax.random.key(0), parts.params["unet"], lora)
    if str(start).startswith(("pissa", "olora")):
        with pytest.raises(UserError, match=rf"init_lora_weights='{start}' is not supported.*merge_and_unload"):
            read_adapter(tmp_path / "adapter", shapes, lora)
    else:
        read_adapter(tmp_path / "adapter", shapes, lora)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"to_q": 4}},
        {"alpha_pattern": {"to_q": 8}},
        {"bias": "all"},
        {"lora_bias": True},
        {"modules_to_save": ["conv_out"]},
        {"fan_in_fan_out": True},
    ],
    ids=str,
)
def test_every_option_of_peft_that_changes_the_meaning_is_refused_by_name(written, parts, tmp_path, options):
    peft = pytest.importorskip("peft")
    from diffusers import UNet3DConditionModel as TorchUNet

    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q"], **options)
    peft.get_peft_model(TorchUNet.from_pretrained(written / "unet"), config).save_pretrained(tmp_path / "adapter")
    raw = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (name,) = options
    if not raw[name]:  # PEFT itself switches it off, as fan_in_fan_out for a Linear
        raw[name] = options[name]
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(raw))
    shapes = init_lora(jax.random.key(0), parts.params["unet"], LoRAConfig(2, 4.0, (r"\.to_q$",)))
    with pytest.raises(UserError, match=f"{name}=.* is not supported"):
        read_adapter(tmp_path / "adapter", shapes, LoRAConfig(2, 4.0, (r"\.to_q$",)))


@pytest.mark.parametrize(
    "options",
    [
        {"layers_to_transform": [0], "layers_pattern": "blocks"},
        {"exclude_modules": ["conv_in"]},
        {"lora_dropout": 0.1},
        {"revision": "main", "task_type": "FEATURE_EXTRACTION"},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"loftq_config": {"bits": 4}},
        {"next_years_option": None, "and_another": False, "or_a_list": []},
    ],
    ids=str,
)
def test_what_changes_nothing_is_accepted(options):
    refuse_unusual({"peft_type": "LORA", "r": 2, "lora_alpha": 4, **options}, "adapter_config.json")


@pytest.mark.parametrize(
    "options",
    [
        {"next_years_option": "on"},
        {"target_parameters": ["experts.w"]},
        {"trainable_token_indices": [1]},
        {"layer_replication": [[0, 2]]},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "lora_ga"},
        {"init_lora_weights": "next_years"},
        {"init_lora_weights": {"a": 1}},
        {"use_qalora": True},
        {"alora_invocation_tokens": [1]},
        {"megatron_config": {"a": 1}},
        {"arrow_config": {"top_k": 2}},
        {"peft_type": "ADALORA"},
    ],
    ids=str,
)
def test_what_is_not_known_to_change_nothing_is_refused_by_name(options):
    (name,) = options
    with pytest.raises(UserError, match=f"adapter_config.json: {name}"):
        refuse_unusual({"peft_type": "LORA", "r": 2, "lora_alpha": 4, **options}, "adapter_config.json")
