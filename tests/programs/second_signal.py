"""Sends itself SIGTERM twice where signals are caught; the second one ends it before it can print."""

import os
import signal

from vpo_jax.runtime.signals import catch_signals

with catch_signals():
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here")
