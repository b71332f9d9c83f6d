"""The embedded world's tokenizers, in which each word of the captions is one token: CLIP's and umT5's."""

import itertools
import json
import string
from collections.abc import Sequence
from typing import Any

from vpo_jax.families.wan.prompts import WanTokenizer
from vpo_jax.shapes.world import BACKGROUNDS, COLORS, MOTIONS, SHAPES, SIZES

MAX_LENGTH = 24
_WORDS = ("a", "an", "moving", "on", "background", *SIZES, *COLORS, *SHAPES, *MOTIONS, *BACKGROUNDS)
_START, _END = "<|startoftext|>", "<|endoftext|>"


def _byte_characters() -> list[str]:
    """The 256 printable stand-ins for bytes of GPT-2's byte-level BPE, in the order of its vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(rest))]


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(token -> id, merges in order of rank), as CLIPTokenizer wants them."""
    characters = _byte_characters()
    tokens = characters + [f"{c}</w>" for c in characters]
    merges: list[tuple[str, str]] = []
    for word in _WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            ranked = [merges.index(pair) for pair in itertools.pairwise(pieces) if pair in merges]
            pair = merges[min(ranked)] if ranked else (pieces[0], pieces[1])
            if pair not in merges:
                merges.append(pair)
                tokens.append("".join(pair))
            at = next(i for i in range(len(pieces) - 1) if (pieces[i], pieces[i + 1]) == pair)
            pieces[at : at + 2] = ["".join(pair)]
    return {token: i for i, token in enumerate([*tokens, _START, _END])}, merges


def make_tokenizer() -> Any:
    """A transformers CLIPTokenizer of MAX_LENGTH tokens, padded with the end token."""
    from transformers import CLIPTokenizer

    vocab, merges = vocabulary()
    pairs: Any = merges  # its annotation lags behind what it takes
    return CLIPTokenizer(
        vocab=vocab,
        merges=pairs,
        bos_token=_START,
        eos_token=_END,
        unk_token=_END,
        pad_token=_END,
        model_max_length=MAX_LENGTH,
    )


def make_umt5_tokenizer(words: Sequence[str] = _WORDS) -> WanTokenizer:
    """A tokenizer in umT5's layout: <pad> 0, </s> 1, <s> 2, <unk> 3, then bytes, characters and `words`.

    Any text has tokens: a word that is not among `words` those of its characters, an unknown character those of its
    bytes in UTF-8. diffusers, which loads it as a T5Tokenizer, gives texts of ASCII the same ids.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    specials = ["<pad>", "</s>", "<s>", "<unk>"]
    characters = string.ascii_letters + string.digits + string.punctuation
    # Scores are log-probabilities: a word costs less than its first character.
    scores = dict.fromkeys(specials, 0.0) | {f"<0x{byte:02X}>": -20.0 for byte in range(256)}
    scores |= dict.fromkeys(("\u2581", *characters), -10.0) | {f"\u2581{word}": -5.0 for word in words}
    tokenizer = Tokenizer(models.Unigram(list(scores.items()), unk_id=3, byte_fallback=True))
    split = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), split])
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(replacement="\u2581")])
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    tokenizer.add_special_tokens(specials)
    named = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config = named | {"extra_ids": 0, "model_max_length": 512, "tokenizer_class": "T5Tokenizer"}
    return WanTokenizer({
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": json.dumps(config, indent=2, sort_keys=True).encode(),
        "special_tokens_map.json": json.dumps(named, indent=2, sort_keys=True).encode(),
    })  # fmt: skip
