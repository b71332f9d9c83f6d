"""README.md of an exported model: its base and that one's licence, its training, its scores, and how to load it."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vpo_jax.families.table import known_licence
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.files import write_text_atomically

CARD_FILE = "README.md"

_NON_COMMERCIAL = "cc-by-nc-4.0"


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """What a card says.

    Attributes:
        base: hub id or path of the model that the training started from.
        licence: the base's, as the hub spells it; "" where it is not known.
        step: of the checkpoint.
        weights: "ema" or "policy".
        loading: lines of Python that load the folder.
        config: the run's settings, flat ("train.steps": 100).
        scores: rows (dimension, base mean, tuned mean, win rate) where a comparison was made.
        library: the hub's name of what loads the folder: "diffusers", or "peft".
    """

    base: str
    licence: str
    step: int
    weights: str
    loading: Sequence[str]
    config: Mapping[str, Any]
    scores: Sequence[tuple[str, float, float, float]] = ()
    library: str = "diffusers"


def licence_of(base: str) -> str:
    """The licence of a base model: what its own README.md says, else what is known of its name, else ""."""
    card = Path(base, CARD_FILE)
    if card.is_file():
        for line in card.read_text(encoding="utf-8", errors="replace").splitlines()[1:40]:
            key, _, value = line.partition(":")
            if key.strip() == "license" and value.strip():
                return value.strip().strip("\"'")
            if line.strip() == "---":
                break
    return known_licence(base)


def render(card: ModelCard) -> str:
    """The card as Markdown with a YAML header."""
    is_hub_id = card.base.count("/") == 1 and not Path(card.base).exists()
    header = {
        "license": card.licence or "other",
        **({} if card.licence else {"license_name": "see-base-model"}),
        **({"base_model": card.base} if is_hub_id else {}),
        "library_name": card.library,
        "pipeline_tag": "text-to-video",
    }
    # JSON strings are YAML strings, whatever they hold.
    yaml = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in header.items()]
    yaml += ["tags:", *(f"- {tag}" for tag in ("text-to-video", "dpo", "vpo-jax"))]
    lines = ["---", *yaml, "---", "", f"# {card.base}, tuned to video rewards", ""]
    lines += [
        f"{card.base} after {card.step} steps of online preference training (OnlineVPO, arXiv 2412.15159) with vpo_jax;"
        f" these are the {card.weights} weights.",
        "",
        *_licence(card),
        "",
        "## Load it",
        "",
        "```python",
        *card.loading,
        "```",
        "",
    ]
    if card.scores:
        lines += ["## Scores", "", "| dimension | base | tuned | win rate |", "|---|---|---|---|"]
        lines += [f"| {name} | {base:.4g} | {tuned:.4g} | {win:.3f} |" for name, base, tuned, win in card.scores]
        lines += ["", "The same prompts and noise for both; ties count one half. These are the run's own scorers.", ""]
    lines += ["## Settings", "", "| field | value |", "|---|---|"]
    lines += [f"| {key} | `{json.dumps(value)}` |" for key, value in card.config.items()]
    return "\n".join([*lines, ""])


def write_card(folder: str | Path, card: ModelCard) -> None:
    """Writes the card into an exported folder; UserError when the disk refuses."""
    file = Path(folder, CARD_FILE)
    try:
        write_text_atomically(file, render(card))
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error}); free space, the model itself is whole") from error


def read_scores(workdir: str | Path) -> list[tuple[str, float, float, float]]:
    """Rows for a card from a finished run's evaluation.json; none where there is no such file."""
    file = Path(workdir, "evaluation.json")
    if not file.is_file():
        return []
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    keys = ("base_mean", "tuned_mean", "win_rate")
    return [
        (f"{row['scorer']}/{row['dimension']}", *(row[key] for key in keys))
        for row in rows
        if None not in [row[key] for key in keys]
    ]


def _licence(card: ModelCard) -> list[str]:
    if card.licence == _NON_COMMERCIAL:
        return [f"Licence: the base model's, {card.licence}: **not for commercial use**, and this model inherits it."]
    if card.licence:
        return [f"Licence: the base model's, {card.licence}; this model inherits it."]
    return ["Licence: that of the base model, which its files do not say: look it up before you share this model."]
