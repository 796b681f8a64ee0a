"""Errors of ours as they are, through what would make new ones of their text. It needs no framework."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from remote_ops.errors import RemoteOpsError

__all__ = ["unwrapped"]


@contextmanager
def unwrapped() -> Iterator[None]:
    """Have autograph and keras raise an error of ours as it is, with its class and attributes."""
    try:
        yield
    except RemoteOpsError as error:
        error.ag_pass_through = True  # type: ignore[attr-defined]
        error._keras_call_info_injected = True  # type: ignore[attr-defined]
        raise
