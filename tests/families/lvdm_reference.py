"""VideoCrafter2's three models in plain PyTorch, named as its file names them: a reference for tests."""

import math

import torch
from torch import nn
from torch.nn import functional

HEADS_IN = 8


def sinusoids(t, dim):
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, dtype=torch.float32) / (dim // 2))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


def mlp(width):
    return nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))


class Attention(nn.Module):
    def __init__(self, width, heads, context):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0))

    def forward(self, x, context=None):
        context = x if context is None else context
        parts = (self.to_q(x), self.to_k(context), self.to_v(context))
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in parts)
        return self.to_out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Geglu(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x):
        hidden, gate = self.proj(x).chunk(2, -1)
        return hidden * functional.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(Geglu(width), nn.Dropout(0), nn.Linear(4 * width, width))


class Block(nn.Module):
    def __init__(self, width, heads, context):
        super().__init__()
        self.attn1, self.attn2 = Attention(width, heads, width), Attention(width, heads, context or width)
        self.ff = FeedForward(width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x, context=None):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff.net(self.norm3(x))


class Transformer(nn.Module):
    """Spatial with a context's width, else temporal; `window` 1 makes the projections 1-D convolutions."""

    def __init__(self, width, heads, head_dim, context=None, window=0):
        super().__init__()
        inner = heads * head_dim
        self.context, self.window = context, window
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.proj_in = nn.Conv1d(width, inner, 1) if window else nn.Linear(width, inner)
        self.transformer_blocks = nn.ModuleList([Block(inner, heads, context)])
        self.proj_out = nn.Conv1d(inner, width, 1) if window else nn.Linear(inner, width)

    def forward(self, x, text):  # [B, C, F, H, W]
        b, c, f, h, w = x.shape
        if self.context:
            y = self.norm(x.transpose(1, 2).flatten(0, 1)).flatten(2).transpose(1, 2)  # [BF, HW, C]
        else:
            y = self.norm(x).permute(0, 3, 4, 2, 1).reshape(b * h * w, f, c)
        y = self.proj_in(y.transpose(1, 2)).transpose(1, 2) if self.window else self.proj_in(y)
        y = self.transformer_blocks[0](y, text.repeat_interleave(f, 0) if self.context else None)
        y = self.proj_out(y.transpose(1, 2)).transpose(1, 2) if self.window else self.proj_out(y)
        if self.context:
            return x + y.transpose(1, 2).reshape(b, f, c, h, w).transpose(1, 2)
        return x + y.reshape(b, h, w, f, c).permute(0, 4, 3, 1, 2)


class TemporalConv(nn.Module):
    def __init__(self, width):
        super().__init__()
        for i in range(1, 5):
            dropout = [nn.Dropout(0)] if i > 1 else []
            conv = nn.Conv3d(width, width, (3, 1, 1), padding=(1, 0, 0))
            setattr(self, f"conv{i}", nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), *dropout, conv))

    def forward(self, x):
        return x + self.conv4(self.conv3(self.conv2(self.conv1(x))))


def per_frame(layer, x):
    y = layer(x.transpose(1, 2).flatten(0, 1))
    return y.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class ResBlock(nn.Module):
    def __init__(self, width, features, embedding):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, features, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, features))
        conv = nn.Conv2d(features, features, 3, padding=1)
        self.out_layers = nn.Sequential(nn.GroupNorm(32, features), nn.SiLU(), nn.Dropout(0), conv)
        self.skip_connection = nn.Identity() if width == features else nn.Conv2d(width, features, 1)
        self.temopral_conv = TemporalConv(features)

    def forward(self, x, embedding):
        y = per_frame(self.in_layers, x) + self.emb_layers(embedding)[:, :, None, None, None]
        y = per_frame(self.out_layers, y)
        return self.temopral_conv(per_frame(self.skip_connection, x) + y)


class Down(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x):
        return per_frame(self.op, x)


class Up(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return per_frame(self.conv, functional.interpolate(x, scale_factor=(1, 2, 2)))


class Stage(nn.Sequential):
    def forward(self, x, embedding, text):
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, embedding)
            elif isinstance(layer, Transformer):
                x = layer(x, text)
            else:
                x = per_frame(layer, x) if isinstance(layer, nn.Conv2d) else layer(x)
        return x


class Denoiser(nn.Module):
    """lvdm's UNetModel with VideoCrafter2's options; attention in every stage but the last."""

    def __init__(self, width=320, multiples=(1, 2, 4, 4), layers=2, head_dim=64, context=1024, channels=4):
        super().__init__()
        embedding = 4 * width
        self.width = width
        self.time_embed, self.fps_embedding = mlp(width), mlp(width)
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(channels, width, 3, padding=1))])
        self.init_attn = Stage(Transformer(width, HEADS_IN, head_dim, window=1))

        def attention(features):
            heads = features // head_dim
            return [Transformer(features, heads, head_dim, context), Transformer(features, heads, head_dim)]

        skips, now = [width], width
        last = len(multiples) - 1
        for i, multiple in enumerate(multiples):
            for _ in range(layers):
                block = [ResBlock(now, multiple * width, embedding)]
                now = multiple * width
                self.input_blocks.append(Stage(*block, *(attention(now) if i < last else [])))
                skips.append(now)
            if i < last:
                self.input_blocks.append(Stage(Down(now)))
                skips.append(now)
        self.middle_block = Stage(ResBlock(now, now, embedding), *attention(now), ResBlock(now, now, embedding))
        self.output_blocks = nn.ModuleList()
        for i, multiple in reversed(list(enumerate(multiples))):
            for j in range(layers + 1):
                block = [ResBlock(now + skips.pop(), multiple * width, embedding)]
                now = multiple * width
                block += attention(now) if i < last else []
                self.output_blocks.append(Stage(*block, *([Up(now)] if i and j == layers else [])))
        self.out = nn.Sequential(nn.GroupNorm(32, now), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, x, timesteps, text, fps):
        embedding = self.time_embed(sinusoids(timesteps, self.width))
        embedding = embedding + self.fps_embedding(sinusoids(fps, self.width))
        skips = []
        for i, stage in enumerate(self.input_blocks):
            x = stage(x, embedding, text)
            if i == 0:
                x = self.init_attn(x, embedding, text)
            skips.append(x)
        x = self.middle_block(x, embedding, text)
        for stage in self.output_blocks:
            x = stage(torch.cat([x, skips.pop()], 1), embedding, text)
        return per_frame(self.out, x)


class TextLayer(nn.Module):
    def __init__(self, width, heads, inner):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, inner), "c_proj": nn.Linear(inner, width)})

    def forward(self, x, mask):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp["c_proj"](functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class TextTower(nn.Module):
    """OpenCLIP's text tower, read as lvdm reads it: the last layer left out, then the final norm."""

    def __init__(self, width=1024, layers=24, inner=4096, vocabulary=49408, positions=77):
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.zeros(positions, width))
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(TextLayer(width, width // 64, inner) for _ in range(layers))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, width))
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("attn_mask", torch.full((positions, positions), -math.inf).triu(1))

    def forward(self, ids):
        length = ids.shape[1]
        x = self.token_embedding(ids) + self.positional_embedding[:length]
        for layer in self.transformer.resblocks[:-1]:
            x = layer(x, self.attn_mask[:length, :length])
        return self.ln_final(x)


def autoencoder_shapes(widths=(128, 256, 512, 512), layers=2, latents=4):
    """Names and shapes of Stable Diffusion's first stage."""
    shapes = {}

    def add(name, *shape):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def resnet(name, before, after):
        add(f"{name}.norm1", before)
        add(f"{name}.conv1", after, before, 3, 3)
        add(f"{name}.norm2", after)
        add(f"{name}.conv2", after, after, 3, 3)
        if before != after:
            add(f"{name}.nin_shortcut", after, before, 1, 1)

    top = widths[-1]
    for tower, entrance, leaving in (("encoder", 3, 2 * latents), ("decoder", latents, 3)):
        first, end = (widths[0], top) if tower == "encoder" else (top, widths[0])
        add(f"{tower}.conv_in", first, entrance, 3, 3)
        for i in (1, 2):
            resnet(f"{tower}.mid.block_{i}", top, top)
        add(f"{tower}.mid.attn_1.norm", top)
        for name in ("q", "k", "v", "proj_out"):
            add(f"{tower}.mid.attn_1.{name}", top, top, 1, 1)
        add(f"{tower}.norm_out", end)
        add(f"{tower}.conv_out", leaving, end, 3, 3)
    now = widths[0]
    for i, width in enumerate(widths):
        for j in range(layers):
            resnet(f"encoder.down.{i}.block.{j}", now, width)
            now = width
        if i < len(widths) - 1:
            add(f"encoder.down.{i}.downsample.conv", width, width, 3, 3)
    now = top
    for i, width in reversed(list(enumerate(widths))):
        for j in range(layers + 1):
            resnet(f"decoder.up.{i}.block.{j}", now, width)
            now = width
        if i:
            add(f"decoder.up.{i}.upsample.conv", width, width, 3, 3)
    add("quant_conv", 2 * latents, 2 * latents, 1, 1)
    add("post_quant_conv", latents, latents, 1, 1)
    return shapes
