"""Online preference optimisation of text-to-video diffusion models with video rewards, in JAX."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vpo_jax.pipeline import load_pipeline
    from vpo_jax.rewards.loading import load_scorer

__all__ = ["load_pipeline", "load_scorer"]


def __getattr__(name: str) -> Any:
    # Loaded when they are asked for: `import vpo_jax` and every command's --help stay quick.
    if name == "load_pipeline":
        from vpo_jax.pipeline import load_pipeline

        return load_pipeline
    if name == "load_scorer":
        from vpo_jax.rewards.loading import load_scorer

        return load_scorer
    raise AttributeError(f"module 'vpo_jax' has no attribute {name!r}")
