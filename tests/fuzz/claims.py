"""What the targets have in common: when two results are the same, and what an error and a tensor must be like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from remote_ops.errors import RemoteOpsError

Array = npt.NDArray[Any]
_MOST_CHARACTERS = 2000


def objects(items: Sequence[Any]) -> Array:
    """A flat array of Python objects."""
    array = np.empty(len(items), object)
    array[:] = items
    return array


def bits(value: Any) -> Any:
    """The value with each array told by its bits, so that NaN equals NaN and -0 is not 0; done twice, the same."""
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, tuple(value.ravel()) if value.dtype == object else value.tobytes()
    if isinstance(value, dict):
        return tuple([(key, bits(item)) for key, item in value.items()])
    if isinstance(value, list | tuple):
        return tuple([bits(item) for item in value])
    return value


def assert_same(got: Any, expected: Any, what: str) -> None:
    """Equal, bit by bit."""
    got, expected = bits(got), bits(expected)
    assert got == expected, f"{what}: expected {expected!r}, got {got!r}"


def lies_inside(tensor: Array, message: bytes | bytearray) -> bool:
    """Whether a tensor views the message and nothing else."""
    start = np.frombuffer(message, np.uint8).__array_interface__["data"][0]
    low, high = np.lib.array_utils.byte_bounds(tensor)
    return bool(start <= low and high <= start + len(message))


def assert_sensible(error: RemoteOpsError, message_bytes: int) -> None:
    """Its text can be shown and sent, and is no copy of the message; its place lies in the message."""
    text = str(error)
    text.encode()
    assert len(text) <= _MOST_CHARACTERS, f"an error of {len(text)} characters"
    assert 0 <= getattr(error, "offset", 0) <= message_bytes, f"an error outside the message: {error}"
