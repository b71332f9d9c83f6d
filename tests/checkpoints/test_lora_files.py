"""LoRA files of a transformer of stacked blocks: written and read back, and read in the layouts that others write."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.flax import save_file as save_any
from safetensors.numpy import load_file, save_file

from vpo_jax.checkpoints.lora_files import FORMS, weights_name
from vpo_jax.checkpoints.lora_layouts import METADATA, original_name
from vpo_jax.checkpoints.peft import read_adapter, write_adapter
from vpo_jax.families.wan.lora_names import ORIGINAL_NAMES
from vpo_jax.models.lora import LoRAConfig
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.trees import flatten, unflatten

LAYERS, RANK = 3, 2
PLAIN = LoRAConfig(RANK, float(RANK))
LORA = LoRAConfig(RANK, 5.0)
EXPERTS = ("transformer", "transformer_2")
# path -> (in, out, window)
SIZES = {
    "blocks.*/attn1/to_q": (6, 6, ()),
    "blocks.*/attn1/to_out.0": (6, 6, ()),
    "blocks.*/attn2/to_k": (5, 6, ()),
    "blocks.*/ffn/net.0.proj": (6, 7, ()),
    "blocks.*/ffn/net.2": (7, 6, ()),
    "condition_embedder/time_proj": (6, 36, ()),
    "condition_embedder/text_embedder/linear_2": (6, 6, ()),
    "patch_embedding": (4, 6, (1, 2, 2)),
    "proj_out": (6, 16, ()),
}


def make_adapters(seed=0):
    rng, flat = np.random.default_rng(seed), {}
    for path, (fan_in, out, window) in SIZES.items():
        stack = (LAYERS,) if ".*/" in path else ()
        flat[f"{path}/lora_A"] = rng.normal(size=(*stack, *window, fan_in, RANK)).astype(np.float32)
        flat[f"{path}/lora_B"] = rng.normal(size=(*stack, RANK, out)).astype(np.float32)
    return unflatten(flat)


def products(adapters, scale):
    flat = flatten(adapters)
    return {
        path: np.float64(scale) * flat[path].astype(np.float64) @ flat[path.replace("lora_A", "lora_B")]
        for path in flat
        if path.endswith("lora_A")
    }


def in_layout(adapters, rename, factors, dtype=np.float32, alpha=None):
    """The adapters as a file has them: `rename` makes a module's name; alpha is a tensor beside the factors."""
    tensors = {}
    for path, leaf in flatten(adapters).items():
        module, _, which = path.rpartition("/")
        for layer, array in enumerate(leaf if ".*" in path else leaf[None]):
            name = rename(module.replace("/", ".").replace("*", str(layer)))
            turned = array.transpose(array.ndim - 1, array.ndim - 2, *range(array.ndim - 2))
            if which == "lora_B" and module == "patch_embedding":
                turned = turned[..., None, None, None]
            tensors[f"{name}.{factors[which == 'lora_B']}.weight"] = jnp.asarray(turned, dtype)
            if alpha is not None:
                tensors[f"{name}.alpha"] = jnp.asarray(alpha, dtype)
    return tensors


def original(module):
    return original_name(module, ORIGINAL_NAMES)


DOWN_UP, A_B = ("lora_down", "lora_up"), ("lora_A", "lora_B")
LAYOUTS = {
    "diffusers": (lambda m: f"transformer.{m}", A_B, None),
    "diffusers without a prefix": (lambda m: m, A_B, None),
    "ComfyUI": (lambda m: f"diffusion_model.{original(m)}", A_B, None),
    "ComfyUI with alpha": (lambda m: f"diffusion_model.{original(m)}", A_B, 5.0),
    "ComfyUI, down and up": (lambda m: f"diffusion_model.{original(m)}", DOWN_UP, 5.0),
    "original": (original, A_B, None),
    "original, down and up": (original, DOWN_UP, 5.0),
    "original, as PEFT names it": (original, ("lora_A.default", "lora_B.default"), None),
    "kohya, original": (lambda m: "lora_unet_" + original(m).replace(".", "_"), DOWN_UP, 5.0),
    "kohya, original, no alpha": (lambda m: "lora_unet_" + original(m).replace(".", "_"), DOWN_UP, None),
    "kohya, diffusers": (lambda m: "lora_unet_" + m.replace(".", "_"), DOWN_UP, 5.0),
}


@pytest.mark.parametrize("alpha", [2.0, 5.0, 0.3], ids="alpha {}".format)
@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_is_read_back_with_the_same_product(tmp_path, form, alpha):
    adapters, lora = make_adapters(), LoRAConfig(RANK, alpha)
    write_adapter(tmp_path / "lora", adapters, lora, "base", form, ORIGINAL_NAMES)
    written = lora if form == "peft" else PLAIN
    read = read_adapter(tmp_path / "lora", adapters, written, ORIGINAL_NAMES)
    wanted = products(adapters, lora.scale)
    for path, product in products(read, written.scale).items():
        # alpha / rank is rounded once and each of lora_B once, half a unit of float32 (6e-8) both, of sums that
        # may cancel
        assert np.abs(product - wanted[path]).max() <= 1e-7 * np.abs(wanted[path]).max(), path


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_file_of_others_is_read_exactly(tmp_path, layout, dtype):
    rename, factors, alpha = LAYOUTS[layout]
    adapters = make_adapters()
    save_any(in_layout(adapters, rename, factors, dtype, alpha), tmp_path / "lora.safetensors")
    lora = PLAIN if alpha is None else LORA
    read = read_adapter(tmp_path / "lora.safetensors", adapters, lora, ORIGINAL_NAMES)
    for path, leaf in flatten(adapters).items():
        found = flatten(read)[path]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, np.asarray(jnp.asarray(leaf, dtype).astype(jnp.float32)), path)
    other = LoRAConfig(RANK, lora.alpha + 1)
    with pytest.raises(UserError, match=rf"has alpha {lora.alpha:g}.*give --config\.lora\.alpha={lora.alpha:g}"):
        read_adapter(tmp_path / "lora.safetensors", adapters, other, ORIGINAL_NAMES)
    with pytest.raises(UserError, match=r"has rank 2, but lora\.rank is 4; give --config\.lora\.rank=2"):
        read_adapter(tmp_path / "lora.safetensors", adapters, LoRAConfig(4, lora.alpha), ORIGINAL_NAMES)


def test_the_two_files_hold_the_public_names_and_alpha_over_rank_in_lora_b(tmp_path):
    adapters = make_adapters()
    up = flatten(adapters)["blocks.*/attn1/to_out.0/lora_B"][1].T * np.float32(2.5)
    for form, module in (("diffusers", "transformer.blocks.1.attn1.to_out.0"), ("original", "x.blocks.1.self_attn.o")):
        write_adapter(tmp_path / form, adapters, LORA, "base", form, ORIGINAL_NAMES)
        file = tmp_path / form / "pytorch_lora_weights.safetensors"
        assert [path.name for path in file.parent.iterdir()] == [file.name]
        tensors, module = load_file(file), module.replace("x.", "diffusion_model.")
        assert tensors[f"{module}.lora_A.weight"].shape == (RANK, 6)
        np.testing.assert_array_equal(tensors[f"{module}.lora_B.weight"], up)
        assert len(tensors) == 2 * (5 * LAYERS + 4) and all(array.dtype == np.float32 for array in tensors.values())
        with safe_open(file, "numpy") as opened:
            metadata = opened.metadata()
        assert metadata.pop("format") == "pt"
        if form == "original":
            assert metadata == {}
            continue
        said = json.loads(metadata[METADATA])
        assert said["transformer.r"] == said["transformer.lora_alpha"] == RANK
        assert said["transformer.target_modules"] == sorted(
            key.removeprefix("transformer.").removesuffix(".lora_A.weight") for key in tensors if ".lora_A" in key
        )


def test_a_layer_without_an_original_name_is_named_before_anything_is_written(tmp_path):
    adapters = make_adapters() | {"norm": make_adapters()["proj_out"]}
    with pytest.raises(UserError, match=r"--lora_format: norm has no name in the original code; .*=diffusers"):
        write_adapter(tmp_path / "lora", adapters, LORA, "base", "original", ORIGINAL_NAMES)
    assert list(tmp_path.iterdir()) == []


FIRST = "blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("layout", "change", "metadata", "says"),
    [
        ("diffusers", {f"transformer.{FIRST}.alpha": 2.0}, None, "to_q.alpha: diffusers reads no alpha beside these"),
        ("diffusers", {f"transformer.{FIRST}.lora_alpha": 2.0}, None, "to_q.lora_alpha: diffusers reads no alpha"),
        ("diffusers without a prefix", {f"{FIRST}.alpha": 2.0}, None, "multiply each lora_B by alpha / rank"),
        ("diffusers", {}, {"transformer.r": 2}, "no lora_alpha, and diffusers would take PEFT's default of 8; write"),
        ("diffusers", {}, {}, "has no lora_alpha"),
        ("diffusers", {}, {"transformer.r": 2, "transformer.lora_alpha": 4}, "lora.alpha=4"),
        ("diffusers", {}, {"transformer.lora_alpha": 2, "transformer.use_rslora": True}, "use_rslora=True"),
        ("ComfyUI with alpha", {}, {"transformer.lora_alpha": 2}, "has alphas beside lora_adapter_metadata; keep one"),
        ("ComfyUI", {"diffusion_model.blocks.0.self_attn.q.diff_b": [0.0] * 6}, None, "diff_b is of another method"),
        ("ComfyUI", {"diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight": [[0.0]]}, None, "cross_attn.k_img"),
        ("ComfyUI", {"diffusion_model.blocks.9.self_attn.q.lora_A.weight": [[0.0]]}, None, "blocks.9.self_attn.q"),
        ("ComfyUI", {f"transformer.{FIRST}.lora_A.weight": [[0.0] * 6] * 2}, None, "stands there twice in two layouts"),
        ("kohya, original", {"lora_unet_blocks_0_self_attn_q.alpha": 3.0}, None, "give --config.lora.alpha=3"),
    ],
)
def test_a_file_whose_scale_or_layers_are_not_clear_is_refused_by_name(tmp_path, layout, change, metadata, says):
    rename, factors, alpha = LAYOUTS[layout]
    tensors = in_layout(make_adapters(), rename, factors, np.float32, alpha)
    tensors |= {key: np.asarray(value, np.float32) for key, value in change.items()}
    text = None if metadata is None else {METADATA: json.dumps(metadata)}
    save_file({key: np.asarray(value) for key, value in tensors.items()}, tmp_path / "lora.safetensors", text)
    with pytest.raises(UserError) as refused:
        read_adapter(tmp_path / "lora.safetensors", make_adapters(), LORA if alpha else PLAIN, ORIGINAL_NAMES)
    message = str(refused.value)
    assert says in message and message.startswith("lora.path: ") and "\n" not in message


def test_a_model_without_original_names_does_not_read_them(tmp_path):
    rename, factors, _ = LAYOUTS["ComfyUI"]
    save_any(in_layout(make_adapters(), rename, factors), tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=r"tensors that lora\.targets has no place for"):
        read_adapter(tmp_path / "lora.safetensors", make_adapters(), PLAIN)


@pytest.mark.parametrize("form", FORMS)
def test_each_of_two_experts_has_a_file_or_folder_of_its_own(tmp_path, form):
    adapters = {name: make_adapters(seed) for seed, name in enumerate(EXPERTS)}
    write_adapter(tmp_path / "lora", adapters, PLAIN, "base", form, ORIGINAL_NAMES, EXPERTS)
    names = {path.name for path in (tmp_path / "lora").iterdir()}
    assert names == (set(EXPERTS) if form == "peft" else {weights_name(name) for name in EXPERTS})
    read = read_adapter(tmp_path / "lora", adapters, PLAIN, ORIGINAL_NAMES, EXPERTS)
    for path, leaf in flatten(adapters).items():
        np.testing.assert_array_equal(flatten(read)[path], leaf)
    write_adapter(tmp_path / "lora", adapters, PLAIN, "base", form, ORIGINAL_NAMES, EXPERTS)  # over itself


def test_of_two_experts_files_the_missing_or_needless_one_is_named(tmp_path):
    adapters = {name: make_adapters(seed) for seed, name in enumerate(EXPERTS)}
    write_adapter(tmp_path / "two", adapters, PLAIN, "base", "diffusers", ORIGINAL_NAMES, EXPERTS)
    write_adapter(tmp_path / "one", adapters[EXPERTS[0]], PLAIN, "base", "diffusers", ORIGINAL_NAMES)
    for path in (tmp_path / "one", tmp_path / "one" / weights_name(), tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"lora\.path: .* is not there; give a folder in which the adapter of tran"):
            read_adapter(path, adapters, PLAIN, ORIGINAL_NAMES, EXPERTS)
    with pytest.raises(UserError, match=r"_2\.safetensors: this model trains one transformer; give one of the two"):
        read_adapter(tmp_path / "two", adapters[EXPERTS[0]], PLAIN, ORIGINAL_NAMES)
    read = read_adapter(tmp_path / "two" / weights_name(EXPERTS[1]), adapters[EXPERTS[1]], PLAIN, ORIGINAL_NAMES)
    np.testing.assert_array_equal(read["proj_out"]["lora_A"], adapters[EXPERTS[1]]["proj_out"]["lora_A"])


@pytest.mark.parametrize(
    "files",
    [
        ["README.md"],
        ["pytorch_lora_weights.safetensors", "checkpoint-500/optimizer.bin"],
        ["pytorch_lora_weights.safetensors", "thesis.txt"],
        ["first_run/adapter_config.json", "second_run/adapter_config.json"],
        ["transformer/config.json", "model_index.json"],
        ["a.safetensors"],
    ],
    ids=lambda files: files[-1],
)
def test_a_folder_with_anything_else_in_it_is_left_alone(tmp_path, files):
    for name in files:
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("years")
    with pytest.raises(UserError, match="is there already and is no adapter folder"):
        write_adapter(tmp_path / "out", make_adapters(), LORA, "base", "diffusers")
    assert all((tmp_path / "out" / name).read_text() == "years" for name in files)


def test_an_adapter_of_one_form_takes_the_place_of_another(tmp_path):
    for form in (*FORMS, *FORMS[::-1]):
        write_adapter(tmp_path / "lora", make_adapters(), LORA, "base", form, ORIGINAL_NAMES)
        (tmp_path / "lora" / "README.md").write_text("the card")
    assert {path.name for path in (tmp_path / "lora").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
