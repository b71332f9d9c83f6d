"""Turn pickled PyTorch weights into safetensors: the one place of this project that opens a pickle. Needs torch.

    python tools/pickle_to_safetensors.py weights.ckpt [weights.safetensors]
    python tools/pickle_to_safetensors.py FOLDER          # a model or a whole diffusers folder, beside each pickle

Pickles are opened with `weights_only=True`, so that they can hold tensors and plain containers but run no code.
They stay where they are.
"""

import argparse
import json
import sys
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import save_file

SUFFIXES = (".bin", ".pth", ".pt", ".ckpt")
INDEX = ".bin.index.json"


def main() -> int:
    """Convert what the command line names; 0 when all of it was written, 2 with one line on stderr otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a pickle, or a folder in which every pickle is converted")
    parser.add_argument("output", type=Path, nargs="?", help="the safetensors file; beside the pickle if left out")
    arguments = parser.parse_args()
    try:
        convert(arguments.source, arguments.output)
    except (OSError, ValueError) as error:
        print(f"pickle_to_safetensors: {error}", file=sys.stderr)
        return 2
    return 0


def convert(source: Path, output: Path | None = None) -> list[Path]:
    """Convert one pickle, or every pickle and index under a folder; returns the files written.

    Raises:
        ValueError: nothing to convert, or a pickle with something else than tensors in it.
        OSError: a file cannot be read or written.
    """
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    if source.is_file():
        return [convert_file(source, output or target_of(source))]
    if output is not None:
        raise ValueError(f"{output}: a folder is converted in place; leave the output out")
    pickles = sorted(file for file in source.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    if not pickles:
        raise ValueError(f"{source}: no pickle in this folder ({', '.join(SUFFIXES)})")
    written = [convert_file(file, target_of(file)) for file in pickles]
    return written + [convert_index(file) for file in sorted(source.rglob(f"*{INDEX}"))]


def target_of(pickle: Path) -> Path:
    """The name that diffusers and transformers look for: `pytorch_model` is called `model` in safetensors."""
    return pickle.with_name(_renamed(pickle.name).removesuffix(pickle.suffix) + ".safetensors")


def convert_file(source: Path, target: Path) -> Path:
    """Write the tensors of one pickle to `target`, dense and apart from each other."""
    if target.exists():
        raise ValueError(f"{target}: exists already; move it away first")
    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, KeyError, AttributeError, IndexError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise ValueError(f"{source}: cannot be opened as weights alone ({reason})") from error
    tensors = {name: value.clone().contiguous() for name, value in _tensors(state, source).items()}
    partial = target.with_name(f".{target.name}.partial")
    try:
        save_file(tensors, partial, metadata={"format": "pt"})
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)
    print(f"{target}: {len(tensors)} tensors")
    return target


def convert_index(source: Path) -> Path:
    """Rewrite an index of pickled shards as one of safetensors shards."""
    index = json.loads(source.read_text(encoding="utf-8"))
    names = {name: target_of(Path(file)).name for name, file in index["weight_map"].items()}
    target = source.with_name(_renamed(source.name).removesuffix(INDEX) + ".safetensors.index.json")
    target.write_text(json.dumps({**index, "weight_map": names}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{target}: {len(names)} tensors in {len(set(names.values()))} shards")
    return target


def _renamed(name: str) -> str:
    return "model" + name.removeprefix("pytorch_model") if name.startswith("pytorch_model") else name


def _tensors(state: Any, source: Path) -> dict[str, torch.Tensor]:
    # Training checkpoints keep the weights one level down.
    for key in ("state_dict", "module", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise ValueError(f"{source}: holds a {type(state).__name__}, not tensors by name")
    tensors = {str(name): value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise ValueError(f"{source}: holds no tensors")
    return tensors


if __name__ == "__main__":
    sys.exit(main())
