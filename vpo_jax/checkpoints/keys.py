"""Parameter trees to PyTorch state dicts and back, by one generic rule.

The modules are named as in PyTorch ("down_blocks.0", "resnets.1", "norm1"), so a parameter's path joined with
"." is its key. Only the leaf differs, by its kind and rank:

    flax kernel [in, out]          torch weight [out, in]                (Linear)
    flax kernel [*space, in, out]  torch weight [out, in, *space]        (Conv1d, Conv2d, Conv3d)
    flax scale, embedding          torch weight, the same layout         (norms, Embedding)
    flax any other name            the same name and layout              (bias, latents, ...)

Below a module whose name ends in ".*" the layers are stacked: a leaf's first axis counts them, and each has a tensor
of its own. "blocks.*/norm/scale" [N, C] is "blocks.0.norm.weight" [C] to "blocks.N-1.norm.weight".
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.stored import Stored, place_slices
from vpo_jax.runtime.trees import flatten, is_stacked, layer_paths, matches, unflatten

_LISTED = 5  # names in an error message before "and N more"

# Names that older releases of diffusers and transformers wrote, and what to call them when the new one is absent.
_LEGACY: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(^|\.)_orig_mod\."), r"\1"),  # a part that torch.compile wraps
    (re.compile(r"^module\."), ""),  # DistributedDataParallel
    (re.compile(r"^text_model\."), ""),
    (re.compile(r"(\battentions\.\d+)\.query\."), r"\1.to_q."),
    (re.compile(r"(\battentions\.\d+)\.key\."), r"\1.to_k."),
    (re.compile(r"(\battentions\.\d+)\.value\."), r"\1.to_v."),
    (re.compile(r"(\battentions\.\d+)\.proj_attn\."), r"\1.to_out.0."),
)
# Buffers, not weights: position indices that transformers saved before 4.31.
_BUFFERS = re.compile(r"(^|\.)position_ids$")


def init_shapes(module: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The tree of `ShapeDtypeStruct` that `module.init` would make for these inputs, computing nothing.

    `args` may be `ShapeDtypeStruct`s themselves.
    """
    return jax.eval_shape(lambda *a: module.init(jax.random.key(0), *a, **kwargs), *args)["params"]


def torch_key(path: str) -> str:
    """The state-dict key of the parameter at `path` ("a/b/kernel" gives "a.b.weight"), not of stacked layers."""
    *parents, leaf = path.split("/")
    return ".".join([*parents, "weight" if leaf in ("kernel", "scale", "embedding") else leaf])


def torch_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that the parameter at `path` has in PyTorch; of stacked layers give one layer's."""
    return tuple(shape[axis] for axis in _to_torch_axes(path, len(shape)))


def torch_tensors(path: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Keys and shapes, in PyTorch, of the parameter at `path`: one, or one a layer, in order, of stacked layers."""
    if not is_stacked(path):
        return {torch_key(path): torch_shape(path, shape)}
    return {torch_key(layer): torch_shape(layer, shape[1:]) for layer in layer_paths(path, shape[0])}


def torch_shapes(tree: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the state dict of a parameter tree, whose leaves need only a `shape`."""
    tensors: dict[str, tuple[int, ...]] = {}
    for path, leaf in flatten(tree).items():
        tensors |= torch_tensors(path, tuple(leaf.shape))
    return tensors


def to_torch(params: Mapping[str, Any]) -> dict[str, np.ndarray | Stored]:
    """A parameter tree as a flat state dict of contiguous numpy arrays; dtypes stay as they are.

    What is on disk stays there: one `Stored` a tensor, of stacked layers too.
    """
    state: dict[str, np.ndarray | Stored] = {}
    for path, leaf in flatten(params).items():
        if isinstance(leaf, Stored):
            tensors = enumerate(torch_tensors(path, leaf.shape).items())
            state |= {key: _stored_tensor(path, leaf, number, shape) for number, (key, shape) in tensors}
            continue
        array = np.asarray(leaf)
        layers = array if is_stacked(path) else array[None]
        for key, layer in zip(torch_tensors(path, array.shape), layers, strict=True):
            state[key] = np.asarray(layer.transpose(_to_torch_axes(path, layer.ndim)), order="C")
    return state


def from_torch(
    state: Mapping[str, np.ndarray],
    shapes: Any,
    where: str = "state dict",
    dtype: Any = jnp.float32,
    shardings: Any = None,
    float32_parameters: Sequence[str] = (),
    stored: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """A parameter tree of `shapes` from a flat state dict, one tensor at a time.

    From a mapped file no tensor is in memory twice: each goes straight into its dtype and place, stacked layers one
    after the other, and of a sharded one a process reads only the slices that its own devices hold.

    Args:
        state: torch key -> array; legacy names are accepted (`text_model.` prefix, old VAE attention).
        shapes: a tree of arrays or `ShapeDtypeStruct`s, as `init_shapes` makes.
        where: file or folder, for the error messages.
        dtype: of floating leaves in the result.
        shardings: tree of the result's shardings; None gives numpy arrays on the host.
        float32_parameters: patterns of the paths of leaves that are float32 in the result whatever `dtype` is.
        stored: if given, the leaves are `Stored`, over the arrays of `state`; called before each reading, to raise
            where these are not what they were.

    Raises:
        UserError: tensors are missing, extra, of another shape or not finite; the first few are listed.
    """
    wanted = torch_shapes(shapes)
    state = _modern_names(state, set(wanted))
    compare_names(set(wanted), set(state), where, "config.json", "use the weights that belong to it")
    _check_shapes(wanted, state, where)
    places = flatten(shardings) if shardings is not None else {}
    leaves, damaged = {}, []
    for path, leaf in flatten(shapes).items():
        views = {key: _to_flax(path, state[key]) for key in torch_tensors(path, tuple(leaf.shape))}
        kind = jnp.float32 if matches(path, float32_parameters) else dtype
        if stored is None:
            leaves[path], bad = _place(views, is_stacked(path), kind, places.get(path))
        else:
            leaves[path] = _stored(list(views.values()), is_stacked(path), kind, stored)
            bad = {key for key, view in views.items() if not _finite(_narrowed(view, leaves[path].dtype))}
        damaged += [key for key in views if key in bad]
    if damaged:
        raise UserError(
            f"{where}: NaN or infinite values in {len(damaged)} tensors ({_some(damaged)}); use an undamaged copy"
        )
    return unflatten(leaves)


def _to_torch_axes(path: str, rank: int) -> tuple[int, ...]:
    if path.rsplit("/", 1)[-1] != "kernel":
        return tuple(range(rank))
    return (rank - 1, rank - 2, *range(rank - 2))


def _to_flax(path: str, array: np.ndarray) -> np.ndarray:
    """A view of a torch tensor in the layout of the leaf at `path`."""
    return array.transpose(np.argsort(_to_torch_axes(path, array.ndim)))


def _place(
    views: Mapping[str, np.ndarray], stacked: bool, dtype: Any, sharding: jax.sharding.Sharding | None
) -> tuple[Any, set[str]]:
    """The views' values as one leaf, in `dtype` where `sharding` wants them, and the keys of those not finite.

    Args:
        views: key -> a tensor in the leaf's layout; a single one unless `stacked`.
        stacked: whether the leaf's first axis counts the views.
        dtype: of the leaf, if its numbers are floating.
        sharding: None gives a numpy array.
    """
    leaf = _stored(list(views.values()), stacked, dtype)
    damaged: set[str] = set()

    def read(index: Any) -> np.ndarray:
        # Always a copy: what was read may be a view of a mapped file, which somebody may overwrite.
        part = leaf.read(index)
        chosen = list(views)[index[0]] if stacked and index is not ... else list(views)
        layers = zip(chosen, part if stacked else part[None], strict=True)
        damaged.update(key for key, array in layers if not _finite(array))
        return part

    return read(...) if sharding is None else place_slices(leaf.shape, sharding, read), damaged


def _stored(
    arrays: Sequence[np.ndarray], stacked: bool, dtype: Any, unchanged: Callable[[], None] | None = None
) -> Stored:
    """The arrays, one a layer, as a leaf in `dtype` if their numbers are floating."""
    floating = any(jnp.issubdtype(array.dtype, jnp.floating) for array in arrays)
    shape = (len(arrays), *arrays[0].shape) if stacked else arrays[0].shape

    def layer(number: int, index: Any) -> np.ndarray:
        if unchanged is not None:
            unchanged()
        return arrays[number][index]

    return Stored(shape, np.dtype(dtype if floating else arrays[0].dtype), layer, stacked)


def _stored_tensor(path: str, leaf: Stored, number: int, shape: tuple[int, ...]) -> Stored:
    """One layer of a leaf at `path`, in PyTorch's layout."""

    def layer(_: int, index: Any) -> np.ndarray:
        part = leaf.part(number)
        return part.transpose(_to_torch_axes(path, part.ndim))[index]

    return Stored(shape, leaf.dtype, layer)


def _narrowed(array: np.ndarray, dtype: Any) -> np.ndarray:
    """The array in `dtype` if that could make numbers infinite, else as it is."""
    if not jnp.issubdtype(array.dtype, jnp.floating) or jnp.promote_types(array.dtype, dtype) == dtype:
        return array
    with np.errstate(over="ignore"):
        return array.astype(dtype)


def _modern_names(state: Mapping[str, np.ndarray], wanted: set[str]) -> dict[str, np.ndarray]:
    renamed = {}
    for key, array in state.items():
        name = key
        for pattern, replacement in _LEGACY:
            name = name if name in wanted else pattern.sub(replacement, name)
        if name in wanted or not _BUFFERS.search(key):
            renamed[name if name in wanted else key] = array
    return renamed


def compare_names(wanted: set[str], found: set[str], where: str, holder: str, fix: str) -> None:
    """Raises UserError for tensors that are missing or that `holder`, which says what belongs there, does not name."""
    missing, extra = sorted(wanted - found), sorted(found - wanted)
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing tensors ({_some(missing)})")
    if extra:
        problems.append(f"{len(extra)} tensors that {holder} has no place for ({_some(extra)})")
    if problems:
        raise UserError(f"{where}: {' and '.join(problems)}; {fix}")


def _check_shapes(wanted: Mapping[str, tuple[int, ...]], state: Mapping[str, np.ndarray], where: str) -> None:
    wrong = [
        f"{key} is {list(state[key].shape)}, config.json makes it {list(shape)}"
        for key, shape in wanted.items()
        if tuple(state[key].shape) != shape
    ]
    if wrong:
        fix = "use the config.json that belongs to these weights"
        raise UserError(f"{where}: {len(wrong)} tensors of the wrong shape ({_some(wrong)}); {fix}")


def _finite(array: np.ndarray) -> bool:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return True
    # A sum is one pass with no array of booleans; it can overflow where every value is finite, so look closer then.
    with np.errstate(all="ignore"):
        total = np.sum(array, dtype=np.float32)
        return bool(np.isfinite(total)) or bool(np.isfinite(array.astype(np.float32)).all())


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
