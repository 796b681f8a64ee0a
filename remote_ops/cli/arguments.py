"""What the words of a command line mean: headers and numbers."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Sequence

from remote_ops.errors import SpecError

__all__ = ["headers_of", "seconds", "whole"]


def headers_of(texts: Sequence[str]) -> dict[str, str]:
    """Read headers, each `NAME: VALUE`.

    Raises:
        SpecError: one has no colon, or a name comes twice. What is wrong is not shown: it may be a secret.
    """
    headers: dict[str, str] = {}
    for text in texts:
        name, mark, value = text.partition(":")
        if not mark:
            raise SpecError("expected 'NAME: VALUE', got no colon", path="--header")
        if name.strip() in headers:
            raise SpecError(f"header '{name.strip()}' is given twice", path="--header")
        headers[name.strip()] = value.strip()
    return headers


_MOST_S = 1e6


def seconds(text: str) -> float:
    """Read a length of time, for argparse."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= _MOST_S:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a number of seconds, 0 to {_MOST_S:,.0f}, got '{text}'")


def whole(least: int) -> Callable[[str], int]:
    """What reads a whole number from `least`, for argparse."""

    def read(text: str) -> int:
        if text.isdecimal() and len(text) < 10 and int(text) >= least:
            return int(text)
        raise argparse.ArgumentTypeError(f"expected a whole number, {least} or more, got '{text}'")

    return read
