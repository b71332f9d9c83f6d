"""The families that can be loaded, by `_class_name` of model_index.json."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from vpo_jax.checkpoints.folders import (
    Configs,
    PipelineParts,
    Place,
    check_target,
    local_folder,
    read_index,
    read_parts,
)
from vpo_jax.families.protocol import Family
from vpo_jax.families.text_to_video_sd.family import TextToVideoSD
from vpo_jax.families.wan.family import Wan
from vpo_jax.runtime.errors import UserError

FAMILIES: dict[str, type[Family]] = {
    "TextToVideoSDPipeline": TextToVideoSD,
    "WanPipeline": Wan,
}


def family_of_folder(root: Path) -> type[Family]:
    """The family of a diffusers folder.

    Raises:
      UserError: no model_index.json, or a class that no family has.
    """
    name = read_index(root).get("_class_name")
    if name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UserError(
            f"{root / 'model_index.json'}: _class_name is {name!r}; only {known} can be loaded, give such a model"
        )
    return FAMILIES[name]


def family_of_parts(parts: PipelineParts) -> type[Family]:
    """The family that the parts were read for."""
    return FAMILIES[parts.layout.class_name]


def read_pipeline(path: str | Path, dtype: Any = jnp.float32, place: Place | None = None) -> PipelineParts:
    """All parts of a diffusers folder, or of a model on the hub when there is a network.

    Args:
      path: a folder, or a hub id ("owner/name").
      dtype: of the parameters, whatever dtype the files have.
      place: where they go; None is the host, as numpy arrays; "disk" leaves them there, as `Stored`.

    Raises:
      UserError: one line that names the file and the fix.
    """
    root = local_folder(path)
    return read_parts(root, family_of_folder(root).layout, dtype, place)


def check_target_of_any(path: Path) -> None:
    """Raises UserError for a folder that no family's export would be written over; writes nothing."""
    refusals: list[UserError] = []
    for family in FAMILIES.values():
        try:
            check_target(path, family.layout)
        except UserError as error:
            refusals.append(error)
    if len(refusals) == len(FAMILIES):
        raise refusals[0]


def published() -> dict[str, tuple[type[Family], Configs]]:
    """Published checkpoints by name: their family and configs, without weights."""
    return {name: (family, configs) for family in FAMILIES.values() for name, configs in family.published.items()}


def known_licence(base: str) -> str:
    """The licence of a published base model by its name or path; "" where it is not known."""
    name = base.lower()
    known = ((part, licence) for family in FAMILIES.values() for part, licence in family.licences.items())
    return next((licence for part, licence in known if part in name), "")
