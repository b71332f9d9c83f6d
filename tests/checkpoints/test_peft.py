import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpo_jax.checkpoints.peft import read_adapter, write_adapter
from vpo_jax.models.lora import ATTENTION_TARGETS, LoRAConfig, init_lora
from vpo_jax.models.unet3d import UNet3DConditionModel, UNet3DConfig
from vpo_jax.runtime.errors import UserError


def random_adapters(params, lora):
    adapters = init_lora(jax.random.key(0), params, lora)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: rng.normal(scale=0.3, size=x.shape).astype(np.float32), adapters)


MIXED_TARGETS = (r"\.to_q$", r"resnets\.0\.conv1$", r"temp_convs\.0\.conv2\.3$")


@pytest.mark.slow
@pytest.mark.parametrize("targets", [ATTENTION_TARGETS, MIXED_TARGETS], ids=["attention", "with convolutions"])
def test_peft_loads_what_is_written_and_predicts_the_same(written, parts, tmp_path, targets):
    torch = pytest.importorskip("torch", reason="parity against PyTorch needs it")
    peft = pytest.importorskip("peft")
    from diffusers import UNet3DConditionModel as TorchUNet

    lora = LoRAConfig(rank=3, alpha=6.0, targets=targets)
    params = parts.params["unet"]
    adapters = random_adapters(params, lora)
    write_adapter(tmp_path / "adapter", adapters, lora, "somewhere/base")

    rng = np.random.default_rng(2)
    sample = rng.normal(size=(2, 3, 8, 8, 4)).astype(np.float32)
    text = rng.normal(size=(2, 5, 12)).astype(np.float32)
    unet = UNet3DConditionModel(UNet3DConfig.from_dict(parts.configs["unet"]), lora_scale=lora.scale)
    apply = jax.jit(unet.apply)
    ours = apply({"params": params, "lora": adapters}, sample, jnp.array([3, 7]), text)

    torch_unet = TorchUNet.from_pretrained(written / "unet").eval()
    adapted = peft.PeftModel.from_pretrained(torch_unet, tmp_path / "adapter")
    with torch.no_grad():
        channel_second = torch.from_numpy(sample.transpose(0, 4, 1, 2, 3).copy())
        theirs = adapted(channel_second, torch.tensor([3, 7]), torch.from_numpy(text)).sample.numpy()
    theirs = theirs.transpose(0, 2, 3, 4, 1)
    plain = apply({"params": params}, sample, jnp.array([3, 7]), text)
    scale = np.abs(theirs).max()
    assert np.abs(np.asarray(plain) - theirs).max() > 0.01 * scale, "the adapter does something"
    # float32 in two libraries: the same bound as the model's own parity
    assert np.abs(np.asarray(ours) - theirs).max() <= 1e-4 * scale


def test_the_config_says_rank_scale_and_base(parts, tmp_path):
    lora = LoRAConfig(rank=2, alpha=4.0, targets=ATTENTION_TARGETS)
    write_adapter(tmp_path / "adapter", init_lora(jax.random.key(0), parts.params["unet"], lora), lora, "base")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (2, 4.0, "base")
    assert all("/" not in name for name in config["target_modules"])


def test_an_adapter_is_replaced_and_anything_else_is_left_alone(parts, tmp_path):
    lora = LoRAConfig(rank=2, alpha=4.0, targets=ATTENTION_TARGETS)
    adapters = init_lora(jax.random.key(0), parts.params["unet"], lora)
    for base in ("one", "two"):
        write_adapter(tmp_path / "adapter", adapters, lora, base)
    assert "two" in (tmp_path / "adapter" / "adapter_config.json").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match="is there already and is no adapter folder"):
        write_adapter(tmp_path / "mine", adapters, lora, "base")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"
    shutil.rmtree(tmp_path / "mine")


@pytest.mark.parametrize("targets", [ATTENTION_TARGETS, MIXED_TARGETS], ids=["attention", "with convolutions"])
def test_an_adapter_folder_is_read_back_to_the_bit(parts, tmp_path, targets):
    lora = LoRAConfig(rank=3, alpha=6.0, targets=targets)
    adapters = random_adapters(parts.params["unet"], lora)
    write_adapter(tmp_path / "adapter", adapters, lora, "base")
    jax.tree.map(np.testing.assert_array_equal, read_adapter(tmp_path / "adapter", adapters, lora), adapters)


def test_an_adapter_that_peft_wrote_is_read(written, parts, tmp_path):
    pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from diffusers import UNet3DConditionModel as TorchUNet

    names = ["to_q", "to_k", "to_v", "to_out.0"]
    adapted = peft.get_peft_model(
        TorchUNet.from_pretrained(written / "unet"),
        peft.LoraConfig(r=2, lora_alpha=4, target_modules=names, init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    lora = LoRAConfig(rank=2, alpha=4.0, targets=ATTENTION_TARGETS)
    shapes = init_lora(jax.random.key(0), parts.params["unet"], lora)
    read = read_adapter(tmp_path / "adapter", shapes, lora)
    place = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    theirs = adapted.get_submodule(f"base_model.model.{place}").lora_A["default"].weight.detach().numpy()
    ours = read["down_blocks.1"]["attentions.0"]["transformer_blocks.0"]["attn1"]["to_q"]["lora_A"]
    np.testing.assert_array_equal(ours, theirs.T)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"rank": 4}, "r is 3, but lora.rank is 4; give --config.lora.rank=3"),
        ({"alpha": 1.0}, "lora_alpha is 6.0, but lora.alpha is 1"),
        ({"targets": (r"\.to_q$",)}, "tensors that lora.targets has no place for"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"rank_pattern": {"to_q": 8}}, "rank_pattern"),
        ({"pickle": True}, "tools/pickle_to_safetensors.py"),
        ({"folder": "nowhere"}, "there is no folder"),
    ],
    ids=str,
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(parts, tmp_path, damage, message):
    lora = LoRAConfig(rank=3, alpha=6.0, targets=ATTENTION_TARGETS)
    folder = tmp_path / "adapter"
    write_adapter(folder, random_adapters(parts.params["unet"], lora), lora, "base")
    if damage.pop("pickle", False):
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    folder = tmp_path / damage.pop("folder", "adapter")
    wanted = LoRAConfig(damage.pop("rank", 3), damage.pop("alpha", 6.0), damage.pop("targets", ATTENTION_TARGETS))
    if damage:
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, **damage}))
    shapes = init_lora(jax.random.key(0), parts.params["unet"], wanted)
    with pytest.raises(UserError) as refused:
        read_adapter(folder, shapes, wanted)
    assert message in str(refused.value) and "\n" not in str(refused.value)
