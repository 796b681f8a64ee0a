"""TensorFlow tensors <-> numpy arrays; without a copy inwards where that is safe. It knows the dtypes of both sides."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from remote_ops.signature import Array

__all__ = ["array_of", "tensor_of"]

_ALIGNMENT = 64  # bytes, of what TensorFlow's kernels take
_SHARED_BYTES = 1 << 16  # below, a copy is as quick


def tensor_of(array: Array) -> Any:
    """Give an array `(*dims)` as a tensor on the CPU.

    A large one that is contiguous, aligned and writable shares its memory: it must not change while the tensor lives.
    """
    flags = array.flags
    if (
        array.nbytes >= _SHARED_BYTES
        and array.dtype.kind in "fiu"
        and array.dtype.isbuiltin == 1
        and array.dtype.isnative
        and flags.c_contiguous
        and flags.writeable
        and array.ctypes.data % _ALIGNMENT == 0
    ):
        return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
    with tf.device("/CPU:0"):
        return tf.constant(array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("=")))


def array_of(tensor: Any) -> Array:
    """Give a tensor `(*dims)` as an array of its own; strings as objects of bytes."""
    array = tensor.numpy()
    if not isinstance(array, bytes):
        return np.asarray(array)
    out: Array = np.empty((), dtype=object)
    out[()] = array
    return out
