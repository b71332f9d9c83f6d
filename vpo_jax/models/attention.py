"""Scaled dot-product attention: one function, several backends."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from vpo_jax.models.config_fields import require
from vpo_jax.models.fused_attention import described_attention, is_described
from vpo_jax.runtime.mesh import fit, frames_are_sharded
from vpo_jax.runtime.types import DType

# (query, key, value, mask, bias)
Backend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array | None], jax.Array]

QUERIES = PartitionSpec(("data", "fsdp"), "context", "tensor")  # [B, Q, H, D]
KEYS = PartitionSpec(("data", "fsdp"), None, "tensor")  # [B, K, G, D]; every query sees every key
_SCORES = PartitionSpec(("data", "fsdp"), "tensor", "context")  # [B, H, Q, K]


def _xla(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, bias: jax.Array | None = None
) -> jax.Array:
    scale = query.shape[-1] ** -0.5
    if query.shape[-2] != key.shape[-2]:
        return _grouped(query * scale, key, value, mask, bias)
    scores = jnp.einsum("...qhd,...khd->...hqk", query * scale, key, preferred_element_type=jnp.float32)
    weights = _softmax(scores, mask, bias).astype(value.dtype)
    return jnp.einsum("...hqk,...khd->...qhd", weights, value)


def _grouped(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, bias: jax.Array | None
) -> jax.Array:
    batch, length, heads, size = query.shape
    groups = key.shape[2]
    query = query.reshape(batch, length, groups, heads // groups, size)  # no copy of a key is made for its queries
    scores = jnp.einsum("bqgrd,bkgd->bgrqk", query, key, preferred_element_type=jnp.float32)

    def grouped(x: jax.Array) -> jax.Array:  # [B, 1 or H, Q, K]
        return x[:, :, None] if x.shape[1] == 1 else x.reshape(x.shape[0], *scores.shape[1:3], *x.shape[2:])

    mask, bias = (None if x is None else grouped(x) for x in (mask, bias))
    weights = _softmax(scores, mask, bias).astype(value.dtype)
    return jnp.einsum("bgrqk,bkgd->bqgrd", weights, value).reshape(batch, length, heads, size)


def _softmax(scores: jax.Array, mask: jax.Array | None, bias: jax.Array | None) -> jax.Array:
    if bias is not None:
        scores = scores + bias.astype(scores.dtype)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    return jax.nn.softmax(scores, axis=-1)


def _cudnn(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, bias: jax.Array | None = None
) -> jax.Array:
    batch, queries, keys = query.shape[0], query.shape[1], key.shape[1]
    odd_queries, odd_keys = (0, queries % 2), (0, keys % 2)

    def whole(x: jax.Array) -> jax.Array:  # [B, H, Q, K] in the last two axes, and even there
        x = jnp.broadcast_to(x, (*x.shape[:2], queries, keys))
        return jnp.pad(x, ((0, 0), (0, 0), odd_queries, odd_keys))

    lengths: tuple[jax.Array | None, ...] = (None, None)
    if queries % 2 or keys % 2:  # which the kernel's backward pass refuses, with a bias or without
        query = jnp.pad(query, ((0, 0), odd_queries, (0, 0), (0, 0)))
        key, value = (jnp.pad(x, ((0, 0), odd_keys, (0, 0), (0, 0))) for x in (key, value))
        lengths = tuple(jnp.full(batch, length, jnp.int32) for length in (queries, keys))
    bias = None if bias is None else whole(bias).astype(query.dtype)
    mask = None if mask is None else whole(mask)
    if is_described() and jax.default_backend() != "gpu":
        added = [x.astype(query.dtype) for x in (bias, mask) if x is not None]
        one = added[0] if len(added) == 1 else jnp.add(*added) if added else jnp.zeros(0, query.dtype)
        return described_attention(query, key, value, one)[:, :queries]
    y = jax.nn.dot_product_attention(
        query,
        key,
        value,
        bias=bias,
        mask=mask,
        query_seq_lengths=lengths[0],
        key_value_seq_lengths=lengths[1],
        implementation="cudnn",
    )
    return y[:, :queries]


BACKENDS: dict[str, Backend] = {"xla": _xla, "cudnn": _cudnn}


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    backend: str = "xla",
    bias: jax.Array | None = None,
) -> jax.Array:
    """Softmax(query key^T / sqrt(D) + bias) value, with scores and softmax in float32.

    Args:
      query: [B, Q, H, D]; or [B, N, Q, H, D] with keys and values alike, each of N attending by itself.
      key: [B, K, G, D]; G divides H, and query heads h * H/G to (h + 1) * H/G - 1 share head h of the keys.
      value: [B, K, G, D].
      mask: bool, broadcastable to [B, H, Q, K]; True where a query may look at a key.
      backend: a name in `BACKENDS`. "cudnn" wants half precision on an NVIDIA GPU and D a multiple of 8, at
        most 128; a TPU kernel finds its place in the same table.
      bias: four axes, broadcastable to [B, H, Q, K]; "cudnn" rounds it to the dtype of `query`.

    Returns:
      As `query`, in the dtype of `value`.
    """
    if query.ndim == 4:
        if backend != "xla" and frames_are_sharded():
            return _by_shard(BACKENDS[backend], query, key, value, mask, bias)
        return BACKENDS[backend](query, key, value, mask, bias)
    assert mask is None and bias is None
    if frames_are_sharded():  # the two axes cannot become one; see there
        return _xla(query, key, value, None)
    one = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
    return BACKENDS[backend](one(query), one(key), one(value), None, None).reshape(query.shape)


def _by_shard(
    run: Backend,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None,
) -> jax.Array:
    """Each device's queries with all keys: a kernel of its own is not divided along the queries by the compiler."""
    mesh = jax.sharding.get_abstract_mesh()
    heads = "tensor" if key.shape[2] % mesh.shape["tensor"] == 0 else None  # a group stays with its queries
    queries, keys, scores = (
        PartitionSpec(*(heads if axis == "tensor" else axis for axis in spec)) for spec in (QUERIES, KEYS, _SCORES)
    )
    specs = tuple(
        None if x is None else fit(spec, x.shape, mesh)
        for x, spec in ((query, queries), (key, keys), (value, keys), (mask, scores), (bias, scores))
    )
    mapped = jax.shard_map(run, in_specs=specs, out_specs=specs[0], check_vma=False)
    y: jax.Array = mapped(query, key, value, mask, bias)
    return y


def check_attention(field: str, backend: str, dtype: DType) -> None:
    """Raises UserError, naming `field`, for a backend that cannot compute in this dtype on these devices."""
    if backend == "cudnn":
        kind = "gpu" if is_described() else jax.devices()[0].platform  # a plan is for other devices than these
        size = jnp.dtype(dtype).itemsize
        require(kind == "gpu", field, f"cudnn wants an NVIDIA GPU and found {kind}; take xla")
        require(size == 2, field, f"cudnn wants bfloat16 weights and found {jnp.dtype(dtype)}; take xla")
