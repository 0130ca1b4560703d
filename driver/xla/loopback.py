"""Collectives of CPU devices over the loopback interface, for processes of one host. Private API of jax, only here."""

from __future__ import annotations

from typing import Any

from jax._src import distributed, xla_bridge  # pyright: ignore
from jax._src.lib import _jax  # pyright: ignore
from jax.extend.backend import register_backend_factory

LOOPBACK = "127.0.0.1"


def use_loopback() -> None:
    """Let all processes of this job find each other at the loopback address; call it before jax starts.

    By default each is reached under the name of the host, which may not resolve, and listens to other hosts too.
    """
    register_backend_factory("cpu", _make_client, priority=0, fail_quietly=False)


def _make_client() -> Any:
    collectives = _jax.make_gloo_tcp_collectives(  # pyright: ignore
        distributed_client=distributed.global_state.client, hostname=LOOPBACK
    )
    return xla_bridge.make_cpu_client(collectives)  # pyright: ignore
