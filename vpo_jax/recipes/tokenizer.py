"""The embedded world's CLIP tokenizer: byte-level BPE whose merges make each word of the captions one token."""

import itertools
from typing import Any

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
