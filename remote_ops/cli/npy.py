"""Arrays as `.npy` files: what numpy's format has no form for, it reads and writes in the nearest one.

It knows no models and runs no code: files of Python objects (pickles) are refused.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt

from remote_ops.errors import SpecError
from remote_ops.signature import DTYPES, TensorSpec

__all__ = ["dump", "parse", "storable", "typed"]

Array = npt.NDArray[Any]
_UNNAMED = frozenset(row.numpy for row in DTYPES.values() if row.is_bit_view and row.name != "bool")


def parse(data: bytes, *, at: str) -> Array:
    """Read the array in the bytes of a file; of bfloat16 and the float8 kinds a file keeps the bits, as dtype `V`.

    Raises:
        SpecError: it is no `.npy` file, is cut off, or holds Python objects.

    Costs a copy.
    """
    # What numpy writes for float8_e5m2 it does not read.
    whole = data.replace(b"'<f1'", b"'|V1'", 1) if b"'descr': '<f1'" in data[:64] else data
    try:
        array: Array = np.lib.format.read_array(io.BytesIO(whole), allow_pickle=False)
    except Exception as error:  # what numpy raises for a broken header ends with Python's own tokenizer
        if data[:4] == b"PK\3\4":
            reason = "it is an .npz archive: save each array to a file of its own, with np.save"
        elif "Object arrays" in str(error):
            reason = "it holds Python objects, which are not read: save strings with np.save(file, array.astype('S'))"
        else:
            reason = str(error)
        raise SpecError(f"expected a .npy file: {reason}", path=at) from error
    return array


def typed(array: Array, spec: TensorSpec) -> Array:
    """Give bits without a dtype the one that the spec says they are, if they can be; any other array as it is."""
    row = DTYPES.get(spec.dtype)
    fits = row is not None and row.numpy in _UNNAMED and array.dtype == np.dtype(f"V{row.numpy.itemsize}")
    return array.view(row.numpy) if row is not None and fits else array


def storable(array: Array, *, at: str) -> Array:
    """Give an array in a dtype that any numpy reads back: bfloat16 and float8 as float32, strings as `S`.

    Raises:
        SpecError: a string ends in a zero byte, which `S` does not keep.
    """
    if array.dtype in _UNNAMED:
        return array.astype(np.float32)
    if array.dtype != object:
        return array
    if any(item.endswith(b"\0") for item in array.flat):
        raise SpecError("a string ends in a zero byte, which a .npy file does not keep: call it from Python", path=at)
    return array.astype("S")


def dump(array: Array) -> bytes:
    """The bytes of a file that holds this array, which is storable. Costs two copies."""
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=False)
    return file.getvalue()
