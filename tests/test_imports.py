"""The layers of the package: imports run downward only. The files are parsed, not run."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vpo_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# A room may import its own level's rooms only where both names are the same, and any lower level.
LEVELS = (
    ("commands", "recipes"),
    ("report", "planning"),
    ("training",),
    ("algorithms",),
    ("evaluation",),
    ("pipeline",),
    ("families", "rewards"),
    ("checkpoints", "data"),
    ("models", "shapes"),
    ("diffusion",),
    ("runtime",),
)
LEVEL = {room: depth for depth, rooms in enumerate(LEVELS) for room in rooms}
COMMANDS = ("main", "evaluate", "score", "convert", "plan")


def room_of(module: str) -> str:
    """The room of "vpo_jax.a.b"."""
    parts = module.split(".")[1:]
    if not parts:
        return "runtime"
    if parts[0] in COMMANDS:
        return "commands"
    return parts[0]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Every module that the file imports, inside functions too, but not for type checking alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING")
        for node in ast.walk(block)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            is_package = (ROOT / module.replace(".", "/")).is_dir()
            found |= {f"{module}.{alias.name}" for alias in node.names} if is_package else {module}
    return found


def tops(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_run_downward_only(path):
    module = module_of(path)
    if module == "vpo_jax":
        pytest.skip("the public surface hands out what lies above")
    room = room_of(module)
    assert room in LEVEL, f"{module} belongs to no room"
    for other in imports(path):
        if not other.startswith("vpo_jax."):
            continue
        target = room_of(other)
        assert target in LEVEL, f"{module} imports {other}, which is in no room"
        down = LEVEL[target] > LEVEL[room] or target == room
        assert down, f"{module} ({room}) imports {other} ({target}), which lies above or beside it"


def reached(start: Path) -> set[Path]:
    """The file and every file of the package that it imports, however far."""
    seen, waiting = set(), [start]
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for module in imports(path):
            # "a.b.name" may be the module a/b/name.py or a name in a/b.py
            for dotted in (module, module.rpartition(".")[0]):
                file = ROOT / (dotted.replace(".", "/") + ".py")
                package = ROOT / dotted.replace(".", "/") / "__init__.py" if dotted != "vpo_jax" else file
                waiting += [found for found in (file, package) if found.exists() and found.is_relative_to(PACKAGE)]
    return seen


def test_diffusion_losses_and_selection_know_no_flax_however_far_one_follows():
    dpo = PACKAGE / "algorithms/dpo"
    pure = [*(PACKAGE / "diffusion").rglob("*.py"), dpo / "losses.py", dpo / "selection.py"]
    assert len(pure) > 3
    for start in pure:
        for path in reached(start):
            assert "flax" not in tops(path), f"{start} reaches {path}, which imports flax"


def test_only_checkpoints_know_orbax_safetensors_and_diffusers():
    for path in FILES:
        if path.parent.name != "checkpoints":
            assert not tops(path) & {"orbax", "safetensors", "diffusers"}, path


@pytest.mark.slow
def test_one_file_knows_orbax():
    assert [path.name for path in FILES if "orbax" in tops(path)] == ["orbax_store.py"]


def test_the_package_and_its_configs_know_no_torch():
    for path in [*FILES, *(ROOT / "configs").glob("*.py")]:
        assert not tops(path) & {"torch", "torchvision", "peft", "accelerate"}, path


def test_configs_import_only_ml_collections():
    for path in (ROOT / "configs").glob("*.py"):
        assert tops(path) <= {"ml_collections"}, path


def test_nothing_unpickles():
    for path in FILES:
        assert not tops(path) & {"pickle", "cloudpickle", "dill", "joblib"}, path


@pytest.mark.parametrize("recipe", ["train_base", "train_scorer", "train_videoscore"])
def test_the_judge_labels_nothing(recipe):
    """The recipes and whatever they import, however far, never reach the judge."""
    judge = PACKAGE / "shapes/judge.py"
    assert judge.exists() and judge not in reached(PACKAGE / f"recipes/{recipe}.py")


def test_import_vpo_jax_is_quick_and_loads_no_jax():
    code = "import sys, vpo_jax; assert not {'jax', 'flax', 'orbax', 'torch'} & set(sys.modules); vpo_jax.__all__"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_an_unknown_attribute_of_the_package_is_an_attribute_error():
    import vpo_jax

    with pytest.raises(AttributeError, match="load_pipelines"):
        _ = vpo_jax.load_pipelines
