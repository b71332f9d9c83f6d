"""LoRA files of Wan: their forms, the modules' names in the original code, and the lines that load an adapter.

Source of the names: Wan-Video/Wan2.1 (`wan/modules/model.py`), whose names ComfyUI and most training scripts keep.
diffusers 0.42 reads a file of them where it adapts some block and not `patch_embedding`; ComfyUI reads any.
"""

from collections.abc import Sequence

from vpo_jax.checkpoints.lora_files import DIFFUSERS, ORIGINAL, PEFT, weights_name
from vpo_jax.checkpoints.lora_layouts import NameTable

ADAPTER_FORMS: tuple[str, ...] = (DIFFUSERS, ORIGINAL, PEFT)

ORIGINAL_NAMES: NameTable = (
    (r"blocks\.(\d+)\.attn1\.to_([qkv])", r"blocks.\1.self_attn.\2"),
    (r"blocks\.(\d+)\.attn1\.to_out\.0", r"blocks.\1.self_attn.o"),
    (r"blocks\.(\d+)\.attn2\.to_([qkv])", r"blocks.\1.cross_attn.\2"),
    (r"blocks\.(\d+)\.attn2\.to_out\.0", r"blocks.\1.cross_attn.o"),
    (r"blocks\.(\d+)\.ffn\.net\.0\.proj", r"blocks.\1.ffn.0"),
    (r"blocks\.(\d+)\.ffn\.net\.2", r"blocks.\1.ffn.2"),
    (r"condition_embedder\.(time|text)_embedder\.linear_1", r"\1_embedding.0"),
    (r"condition_embedder\.(time|text)_embedder\.linear_2", r"\1_embedding.2"),
    (r"condition_embedder\.time_proj", "time_projection.1"),
    (r"patch_embedding", "patch_embedding"),
    (r"proj_out", "head.head"),
)


def adapter_lines(folder: str, base: str, form: str, components: Sequence[str] = ()) -> list[str]:
    """Lines of Python that load an adapter folder on its base model in diffusers as `pipe`.

    Args:
      folder: of `write_adapter`.
      base: name or path of the model.
      form: one of `ADAPTER_FORMS`.
      components: the transformers whose adapters the folder has, where there are two; () is `transformer` alone.
    """
    load = f"pipe = WanPipeline.from_pretrained({base!r})"
    if form == PEFT:
        at = {name: f"{folder}/{name}" for name in components} or {"transformer": folder}
        lines = [f"pipe.{name} = PeftModel.from_pretrained(pipe.{name}, {where!r})" for name, where in at.items()]
        return ["from diffusers import WanPipeline; from peft import PeftModel", load, *lines]
    lines = [f"pipe.load_lora_weights({folder!r}{_options(name)})" for name in components or ("transformer",)]
    return ["from diffusers import WanPipeline", load, *lines]


def _options(component: str) -> str:
    second = f", weight_name={weights_name(component)!r}, load_into_transformer_2=True"
    return second if component == "transformer_2" else ""
