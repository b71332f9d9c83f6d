"""Small WanPipelines of diffusers with random numbers in every parameter, and their folders."""

import numpy as np
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

torch.set_num_threads(1)

WORDS = ("a", "small", "large", "red", "green", "circle", "square", "moving", "left", "right", "on", "gray", "blurry")
TEXT = {
    "d_model": 24,
    "d_kv": 6,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
}
TRANSFORMER = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 3,
    "attention_head_dim": 12,
    "text_dim": 24,
    "freq_dim": 32,
    "ffn_dim": 56,
    "num_layers": 2,
    "rope_max_seq_len": 64,
}
VAE_2_1 = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1}
VAE_2_2 = {
    "base_dim": 8,
    "decoder_base_dim": 12,
    "z_dim": 6,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}
SCHEDULERS = {
    "unipc": (
        UniPCMultistepScheduler,
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
    ),
    "euler": (FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
}


def tokenizer():
    """A tokenizer in umT5's layout: pad 0, eos 1, <s> 2, unk 3, then words and letters."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = ["<pad>", "</s>", "<s>", "<unk>", *(f"▁{word}" for word in WORDS), "▁", *letters]
    tokens = Tokenizer(models.Unigram([(piece, -float(i) / 10) for i, piece in enumerate(pieces)], unk_id=3))
    tokens.normalizer = normalizers.Sequence([normalizers.NFKC()])
    tokens.pre_tokenizer = pre_tokenizers.Metaspace()
    tokens.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="<s>"
    )


def randomise(model, seed, spread=1.0):
    """Random numbers of a natural size in every parameter: some are zero or one at first and would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("gamma") or (parameter.ndim == 1 and "norm" in name and name.endswith("weight")):
                parameter.copy_(1 + 0.3 * noise)
            else:
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 16
                parameter.copy_(spread * noise / fan_in**0.5)
    return model.eval()


def transformer(seed, channels):
    """A WanTransformer3DModel."""
    return randomise(WanTransformer3DModel(in_channels=channels, out_channels=channels, **TRANSFORMER), seed)


def pipeline(kind, scheduler="unipc", seed=0):
    """A pipeline of "2.1", "a14b" (two experts) or "5b" (the autoencoder of 2.2)."""
    config = dict(VAE_2_2 if kind == "5b" else VAE_2_1)
    rng = np.random.default_rng(seed)
    config["latents_mean"] = [round(float(x), 3) for x in rng.normal(size=config["z_dim"])]
    config["latents_std"] = [round(float(x), 3) for x in rng.uniform(0.5, 2.0, size=config["z_dim"])]
    tokens = tokenizer()
    text = UMT5EncoderModel(UMT5Config(vocab_size=len(tokens) + 5, **TEXT))
    kind_of, settings = SCHEDULERS[scheduler]
    more = {}
    if kind == "a14b":
        more = {"transformer_2": transformer(seed + 7, config["z_dim"]), "boundary_ratio": 0.875}
    pipe = WanPipeline(
        tokenizer=tokens,
        text_encoder=randomise(text, seed + 1),
        transformer=transformer(seed + 2, config["z_dim"]),
        vae=randomise(AutoencoderKLWan(**config), seed + 3),
        scheduler=kind_of(**settings),
        expand_timesteps=kind == "5b",
        **more,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
