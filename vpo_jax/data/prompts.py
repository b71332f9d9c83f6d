"""Prompts from a file, or the embedded world's captions."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from vpo_jax.runtime.errors import UserError

SPLITS = ("train", "tune", "held_out")


def load_prompts(source: str, field: str = "data.prompts") -> list[str]:
    """Prompts in the order in which they stand.

    Args:
      source: "shapes:train", "shapes:tune" or "shapes:held_out"; a .jsonl file of objects with a "prompt"; or a text
        file, one prompt a line, whose blank lines are skipped. Only .jsonl can hold the empty prompt.
      field: the config key to name in errors.

    Raises:
      UserError: no such split or file, not UTF-8, nothing in it, or a line that is not an object with a "prompt".
    """
    world, colon, split = source.partition(":")
    if colon and world == "shapes":
        from vpo_jax.shapes.world import captions

        if split not in SPLITS:
            raise UserError(f"{field}: the shapes world has no split {split!r}; choose one of {', '.join(SPLITS)}")
        return list(captions(split))
    path = Path(source)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{field}: there is no file {source!r}; give one prompt a line, or shapes:train") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{field}: {source!r} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{field}: {source!r} cannot be read: {error.strerror}; give a text or .jsonl file") from None
    # Not splitlines(): it would also cut at rare separators that may stand inside a prompt.
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise UserError(f"{field}: {source!r} holds no prompt; write one a line")
    if path.suffix != ".jsonl":
        return [line for _, line in lines]
    return [_prompt_of(line, f"{field}: {source!r} line {number}") for number, line in lines]


def set_apart(prompts: Sequence[str]) -> tuple[list[str], list[str]]:
    """(training prompts, held-out prompts): every tenth different prompt, and one at least, is never trained on.

    Raises UserError where there is but one.
    """
    different = list(dict.fromkeys(prompts))
    if len(different) < 2:
        raise UserError("data.held_out: data.prompts has nothing to set apart for the comparison; name other prompts")
    held_out = different[9::10] or different[-1:]
    apart = set(held_out)
    return [prompt for prompt in prompts if prompt not in apart], held_out


def _prompt_of(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f'{where} is not JSON ({error.msg}); write {{"prompt": "..."}}') from None
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise UserError(f'{where} has no text under "prompt"; write {{"prompt": "..."}}')
    return record["prompt"]


def fingerprint(prompts: Sequence[str]) -> str:
    """SHA-256 of a prompt list, by which a resumed run knows that its prompts are still the same."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()
