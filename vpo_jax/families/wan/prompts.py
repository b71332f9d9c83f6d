"""Prompts of Wan: cleaned as diffusers does, and as umT5's tokens.

transformers 5 reads the tokenizer's folder into a `T5Tokenizer` of its own making, with another unknown token, no bytes
for unknown characters and another pre-tokenizer. Here tokenizer.json is taken as it is, as in transformers 4.
"""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from vpo_jax.checkpoints.untrusted import load_tokenizer
from vpo_jax.runtime.errors import UserError

PAD, EOS = 0, 1  # ids of <pad> and </s>
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model")
_LARGEST = 64 << 20  # bytes of a file; those of umT5 have up to 17 MB


def clean_prompt(text: str) -> str:
    """The prompt without mojibake, HTML entities and runs of whitespace, as diffusers' `WanPipeline` reads it."""
    import ftfy  # nothing else wants it: plans and benchmarks of Wan read no prompts

    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


def token_mask(ids: jax.Array) -> jax.Array:
    """Which ids of int32 [B, L] are tokens of a prompt: bool [B, L], True up to the end token.

    What follows the end token is padding; a prompt that spells <pad> has that id before it.
    """
    return jnp.cumsum(ids[:, ::-1] != PAD, axis=1)[:, ::-1] > 0


class WanTokenizer:
    """umT5's tokenizer, from the bytes of its files by name; tokenizer.json is among them.

    Attributes:
        vocab_size: one more than the largest id.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        """Raises whatever the tokenizers library does where tokenizer.json is broken; `from_folder` checks it."""
        self._files = dict(files)
        self._tokenizer = Tokenizer.from_str(self._files["tokenizer.json"].decode("utf-8"))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    @classmethod
    def from_folder(cls, folder: str | Path, vocab_size: int) -> "WanTokenizer":
        """The tokenizer of a diffusers folder's tokenizer/.

        Args:
            folder: holds tokenizer.json.
            vocab_size: how many tokens the text encoder knows.

        Raises:
            UserError: a file is missing or broken, or it is no tokenizer of umT5 or of this text encoder.
        """
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            fix = "copy it from the repository of the model, or of google/umt5-xxl"
            raise UserError(f"{folder}: no tokenizer.json, which is needed even where spiece.model is there; {fix}")
        files = {name: _read(folder / name) for name in FILES if (folder / name).is_file()}
        tokenizer: WanTokenizer = load_tokenizer(lambda: cls(files), folder)
        tokenizer._check(folder / "tokenizer.json", vocab_size)
        return tokenizer

    def encode(self, prompts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int32 [B, length] and how many of each row are no padding, int32 [B].

        Every row ends with </s> before its padding; a prompt that is too long is cut in front of it. The prompts have
        been cleaned.
        """
        if length < 1:
            raise ValueError(f"length: {length} leaves no room for </s>")
        ids, counts = np.full((len(prompts), length), PAD, np.int32), np.zeros(len(prompts), np.int32)
        for row, tokens in enumerate(self._tokens(prompts)):
            kept = [*tokens[: length - 1], EOS]
            ids[row, : len(kept)], counts[row] = kept, len(kept)
        return ids, counts

    def count(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, </s> included, before anything is cut."""
        return [len(tokens) + 1 for tokens in self._tokens(prompts)]

    def save(self, folder: str | Path) -> None:
        """Writes the files that the tokenizer was made of, byte for byte.

        Raises:
            OSError: the disk refuses.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            Path(folder, name).write_bytes(content)

    def _tokens(self, prompts: Sequence[str]) -> list[list[int]]:
        # </s> is added here, since some tokenizer.json leave that to the class that loads them.
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(prompts), add_special_tokens=False)]

    def _check(self, file: Path, vocab_size: int) -> None:
        if self.vocab_size > vocab_size:
            why = f"{self.vocab_size} tokens, but text_encoder.vocab_size is {vocab_size}"
            raise UserError(f"{file}: {why}; use the tokenizer that belongs to this text encoder")
        fix = "use the tokenizer of umT5"
        for token, wanted in (("<pad>", PAD), ("</s>", EOS)):
            if (found := self._tokenizer.token_to_id(token)) != wanted:
                has = "is not there" if found is None else f"has the id {found}"
                raise UserError(f"{file}: {token} {has}, and umT5's is {wanted}; {fix}")
        plain, processed = (self._tokenizer.encode("", add_special_tokens=add).ids for add in (False, True))
        if processed not in (plain, [*plain, EOS]):
            raise UserError(f"{file}: its post_processor adds other tokens than </s> at the end; {fix}")


def _read(file: Path) -> bytes:
    try:
        if file.stat().st_size > _LARGEST:
            raise UserError(f"{file}: is larger than {_LARGEST >> 20} MB, as no such file is; copy it again")
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); check its permissions") from error
