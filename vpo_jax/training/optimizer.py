"""AdamW with warm-up and clipping by the global norm, from optax."""

from typing import Any

import jax
import optax


def make_optimizer(config: Any) -> optax.GradientTransformation:
    """The optimizer of `config.optimizer`.

    The learning rate rises over `warmup_steps` updates and then stays constant; it is above 0 from the first update on.
    Vectors (norms, biases) have no weight decay. `clip_norm` 0 switches clipping off.
    """
    warmup = max(1, config.warmup_steps)
    rate = config.learning_rate
    schedule = optax.linear_schedule(rate / warmup, rate, warmup - 1) if warmup > 1 else rate
    adamw = optax.adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=lambda params: jax.tree.map(lambda x: x.ndim >= 2, params),
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw) if config.clip_norm > 0 else adamw
