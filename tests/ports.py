"""Ports for tests whose processes listen to one another."""

from __future__ import annotations

import contextlib
import random
import socket


def free_port() -> int:
    """Of those that the system gives to nobody by itself (Linux: from 32768 on), so that nothing
    takes it between this look and the process that listens there."""
    for port in random.SystemRandom().sample(range(20000, 32000), 100):  # no seed of a test
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port found between 20000 and 32000")
