"""Byte-pair tokenizers of transformers, from their folders and into them."""

import copy
from pathlib import Path
from typing import Any

from vpo_jax.checkpoints.untrusted import load_tokenizer
from vpo_jax.runtime.errors import UserError

_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))


def read_tokenizer(folder: Path, class_name: str, vocabulary: int, longest: int) -> Any:
    """A byte-pair tokenizer of transformers from its folder, never longer than the text encoder's positions.

    Args:
        folder: tokenizer.json, or vocab.json and merges.txt.
        class_name: transformers' class.
        vocabulary: how many tokens the text encoder knows.
        longest: how many tokens it takes.

    Raises:
        UserError: files are missing or broken, or it has more tokens than the text encoder.
    """
    if not any(all((folder / name).is_file() for name in names) for names in _FILES):
        raise UserError(f"{folder}: no tokenizer; tokenizer.json, or vocab.json and merges.txt, belong there")
    import transformers  # its tokenizers take seconds to import

    kind = getattr(transformers, class_name)
    tokenizer = load_tokenizer(lambda: kind.from_pretrained(str(folder)), folder, class_name)
    for key in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(key, None)  # how it was read; transformers would write it into every copy
    if len(tokenizer) > vocabulary:
        why = f"{len(tokenizer)} tokens, but text_encoder.vocab_size is {vocabulary}"
        raise UserError(f"{folder}: {why}; use the tokenizer that belongs to this text encoder")
    own = tokenizer.model_max_length
    if not isinstance(own, int | float) or not own >= 1:
        raise UserError(f"{folder}: model_max_length is {own!r:.60}, no number of tokens; copy the tokenizer again")
    tokenizer.model_max_length = min(own, longest)
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Writes a tokenizer of transformers as `read_tokenizer` reads it."""
    # A tokenizer that was called remembers how it padded and truncated, and would write that into the folder.
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(str(folder))
