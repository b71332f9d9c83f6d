"""Command lines: flags and config overrides in, one-line errors and exit codes out."""

import argparse
import ast
import difflib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import logging

from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.files import write_json
from vpo_jax.runtime.paths import user_path
from vpo_jax.runtime.signals import Interrupted

ROOT = Path(__file__).resolve().parents[2]
_LIKE = 0.6  # the ratio of difflib from which a name is proposed


def run(command: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> NoReturn:
    """Runs `command(argv)` and exits: 0 done, 2 wrong input (one line on stderr), 130 and 143 interrupted."""
    logging.set_verbosity(logging.ERROR)  # Orbax warns about settings that are intended here
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # a warning that torch is missing
    try:
        command(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except Interrupted as interrupt:
        print(str(interrupt), file=sys.stderr)
        raise SystemExit(interrupt.exit_code) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        # The reader (head, less) is gone. The flush at exit must not fail as well, so stdout becomes the null device.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    raise SystemExit(0)


def write_output(name: str, value: Any) -> None:
    """What a command measured, as JSON in the file that its --output names; "" writes nothing.

    Raises UserError when the file cannot be written.
    """
    if not name:
        return
    try:
        write_json(user_path(name, "--output"), value)
    except OSError as error:
        raise UserError(f"--output: {name} cannot be written: {error.strerror}") from error


class Parser(argparse.ArgumentParser):
    """`argparse` whose errors are UserErrors that name the nearest flag."""

    def __init__(self, module: str, description: str, epilog: str = "") -> None:
        super().__init__(
            prog=f"python -m {module}",
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help lists the flags")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The flags of `argv`; an unknown one is a UserError with the nearest known."""
        flags, rest = self.parse_known_args(list(argv))
        self.refuse(rest)
        return flags

    def refuse(self, rest: Sequence[str]) -> None:
        """Raises UserError for what is left over after parsing."""
        if rest:
            name = rest[0].split("=")[0]
            raise UserError(f"{name}: unknown flag{nearest(name, list(self._option_string_actions))}")


def split_overrides(argv: Sequence[str], prefix: str = "--config.") -> tuple[list[str], list[tuple[str, str]]]:
    """`argv` without its `--config.a.b=c` (or `--config.a.b c`) and those as (key, text) pairs, in order."""
    rest, overrides = [], []
    words = iter(argv)
    for word in words:
        if not word.startswith(prefix):
            rest.append(word)
            continue
        key, equals, value = word.removeprefix(prefix).partition("=")
        if not equals:
            following = next(words, None)
            if following is None or following.startswith("--"):
                raise UserError(f"{key}: no value; write --config.{key}=VALUE")
            value = following
        overrides.append((key, value))
    return rest, overrides


def load_config(source: str) -> Any:
    """The `ml_collections.ConfigDict` of "FILE.py" or "FILE.py:PRESET", from `get_config(preset)` of the file.

    A relative path is looked for here, then in the checkout.
    """
    file, _, preset = source.partition(":")
    path = next((p for p in (user_path(file, "--config"), ROOT / file) if p.is_file()), None)
    if path is None:
        raise UserError(f"--config: there is no file {file}; the one that ships is configs/vpo.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config: {file} is not a Python file; give a .py file with a function get_config")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError, NameError) as error:
        raise UserError(f"--config: {file} does not load ({error}); correct the file") from error
    if not hasattr(module, "get_config"):
        raise UserError(f"--config: {file} has no function get_config(preset); see configs/vpo.py")
    try:
        return module.get_config(preset)
    except (KeyError, ValueError) as error:
        raise UserError(f"--config: {error.args[0] if error.args else error}") from error


def override(config: Any, overrides: Iterable[tuple[str, str]]) -> None:
    """Sets `a.b=text` in place, read as the type that the field has; a UserError names the nearest key."""
    fields = dict(flatten_config(config))
    for key, text in overrides:
        if key not in fields:
            raise UserError(f"{key}: unknown config key{nearest(key, list(fields))}")
        node = config
        *parents, last = key.split(".")
        for parent in parents:
            node = node[parent]
        node[last] = _parse(key, text, type(fields[key]))


def flatten_config(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("a.b", value) of every field, in the config's order."""
    for key, value in config.items():
        if hasattr(value, "items"):
            yield from flatten_config(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _parse(key: str, text: str, kind: type) -> Any:
    if kind is str:
        return text
    if kind is bool:
        if text.lower() in ("true", "1", "yes"):
            return True
        if text.lower() in ("false", "0", "no"):
            return False
        raise UserError(f"{key}: {text!r} is not true or false")
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            example = "a whole number, as 8" if kind is int else "a number, as 0.5 or 1e-4"
            raise UserError(f"{key}: {text!r} is not {example}") from None
    if kind in (tuple, list):
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = None
        if not isinstance(value, tuple | list):
            raise UserError(f"{key}: {text!r} is not a Python tuple, as (1,2)")
        return kind(value)
    raise UserError(f"{key}: cannot be set from the command line (it is a {kind.__name__}); edit the config file")


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of an error: the key of `known` most like `name`, or, where none is much like it, how to see them all."""

    def likeness(key: str) -> tuple[float, float]:
        # A similar last part counts for as much as a similar whole.
        last = difflib.SequenceMatcher(None, name.rpartition(".")[2], key.rpartition(".")[2]).ratio()
        return last, difflib.SequenceMatcher(None, name, key).ratio()

    if not known:
        return ""
    key = max(known, key=lambda key: sum(likeness(key)))
    if max(likeness(key)) < _LIKE:
        return "; --help lists all"
    return f"; did you mean {key}?"


def describe_config(config: Mapping[str, Any]) -> str:
    """Every field with its value, one a line, for `--help`."""
    fields = list(flatten_config(config))
    width = max(len(key) for key, _ in fields)
    return "\n".join(f"  --config.{key:<{width}}  {value!r}" for key, value in fields)
