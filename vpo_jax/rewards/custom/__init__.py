"""A person's own reward, named as MODULE:ATTRIBUTE."""

from vpo_jax.rewards.custom.load import TIMEOUT, load

__all__ = ["TIMEOUT", "load"]
