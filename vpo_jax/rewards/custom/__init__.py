"""A person's own reward, named as MODULE:ATTRIBUTE."""

from vpo_jax.rewards.custom.loading import TIMEOUT, load

__all__ = ["TIMEOUT", "load"]
