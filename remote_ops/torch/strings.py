"""Strings as a tensor of bytes, since torch has none: on their way into an op, and out of it again.

It knows nothing of what they mean.
"""

from __future__ import annotations

import itertools
import json

import numpy as np
import torch

from remote_ops.errors import EncodeError
from remote_ops.signature import Array

__all__ = ["pack_strings", "unpack_strings"]


def pack_strings(array: Array) -> torch.Tensor:
    """Write an array `(*dims)` of str or bytes as a uint8 tensor `(bytes,)`: shape and lengths as JSON, NUL, text.

    Raises:
        EncodeError: something in it is no string.
    """
    values = [value.encode() if isinstance(value, str) else value for value in array.ravel().tolist()]
    if not all(isinstance(value, bytes) for value in values):
        raise EncodeError(
            f"expected strings, got {array.dtype} {list(array.shape)} with something else among them",
            dtype="string", shape=array.shape,
        )  # fmt: skip
    head = json.dumps([array.shape, [len(value) for value in values]]).encode()
    return torch.frombuffer(bytearray(b"\0".join([head, b"".join(values)])), dtype=torch.uint8)


def unpack_strings(tensor: torch.Tensor) -> Array:
    """Read what `pack_strings` wrote, as an object array of bytes."""
    head, _, text = tensor.cpu().numpy().tobytes().partition(b"\0")
    shape, lengths = json.loads(head)
    array: Array = np.empty(len(lengths), object)
    ends = list(itertools.accumulate(lengths))
    array[:] = [text[end - length : end] for end, length in zip(ends, lengths, strict=True)]
    return array.reshape(tuple(shape))
