"""torch tensors <-> numpy arrays, without a copy where both are on the CPU, through pinned memory where one is on CUDA.

Bits stay what they are. It knows the dtypes of both sides and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from remote_ops.errors import EncodeError
from remote_ops.signature import BY_NUMPY, DTYPES

__all__ = ["array_of", "arrays_of", "tensor_of"]

Array = npt.NDArray[Any]

# torch and numpy share no bfloat16 or float8: those pass as integers of their size.
_BITS: dict[int, tuple[torch.dtype, np.dtype[Any]]] = {
    1: (torch.uint8, np.dtype(np.uint8)),
    2: (torch.int16, np.dtype(np.int16)),
}
_NUMPY_OF = {
    getattr(torch, name): row.numpy
    for name, row in DTYPES.items()
    if row.is_bit_view and name != "bool" and hasattr(torch, name)
}
_TORCH_OF = {row: dtype for dtype, row in _NUMPY_OF.items()}


def array_of(tensor: torch.Tensor) -> Array:
    """Give a tensor `(*dims)` as an array, a view if it is on the CPU.

    Raises:
        EncodeError: its dtype has no form on the wire.
    """
    _require_dense(tensor)
    dtype = _NUMPY_OF.get(tensor.dtype)
    if dtype is not None:
        return tensor.detach().cpu().contiguous().view(_BITS[dtype.itemsize][0]).numpy().view(dtype)
    try:
        array = tensor.numpy(force=True)
    except TypeError:
        array = None
    if array is None or array.dtype not in BY_NUMPY:
        raise EncodeError(
            f"{tensor.dtype} {list(tensor.shape)} has no form on the wire: expected one of {', '.join(DTYPES)}",
            dtype=str(tensor.dtype), shape=tuple(tensor.shape),
        )  # fmt: skip
    return array


def arrays_of(tensors: Sequence[torch.Tensor]) -> list[Array]:
    """Give tensors `(*dims)` as arrays: views of those on the CPU, copies of those on CUDA.

    Raises:
        EncodeError: a dtype has no form on the wire.

    CUDA tensors are copied to pinned memory on the current stream of their device, and waited for once a device.
    """
    on_cuda = [tensor for tensor in tensors if tensor.is_cuda]
    if on_cuda:
        tensors = [_copying(tensor) if tensor.is_cuda else tensor for tensor in tensors]
        for device in {tensor.device for tensor in on_cuda}:
            torch.cuda.current_stream(device).synchronize()
    return [array_of(tensor) for tensor in tensors]


def tensor_of(array: Array, device: torch.device) -> torch.Tensor:
    """Give an array `(*dims)` as a tensor on `device`, sharing its memory if that is the CPU.

    Raises:
        EncodeError: strings, or a dtype that this torch does not have.

    For CUDA it copies to pinned memory, and from there on the current stream, which it does not wait for.
    """
    dtype = _TORCH_OF.get(array.dtype)
    if dtype is not None:
        stored = _BITS[array.dtype.itemsize][1]
        return _moved(torch.from_numpy(_usable(array.view(stored))).view(dtype), device)
    try:
        return _moved(torch.from_numpy(_usable(array)), device)
    except TypeError as error:
        raise EncodeError(
            f"{array.dtype} {list(array.shape)} has no torch tensor", dtype=str(array.dtype), shape=array.shape
        ) from error


def _usable(array: Array) -> Array:
    """torch wants aligned, writable, unreversed memory in native byte order; else it warns, misreads or fails."""
    flags = array.flags
    if flags.aligned and flags.writeable and flags.forc and array.dtype.isnative:
        return array
    return array.astype(array.dtype.newbyteorder("="), order="C")


def _require_dense(tensor: torch.Tensor) -> None:
    if tensor.layout is not torch.strided or tensor.is_meta:
        what = "meta" if tensor.is_meta else str(tensor.layout)
        raise EncodeError(
            f"a {what} tensor {tensor.dtype} {list(tensor.shape)} has no form on the wire: expected dense data",
            dtype=str(tensor.dtype), shape=tuple(tensor.shape),
        )  # fmt: skip


def _copying(tensor: torch.Tensor) -> torch.Tensor:
    """A CUDA tensor's copy in pinned memory, complete once the current stream is."""
    _require_dense(tensor)
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    with torch.cuda.device(tensor.device):  # the copy goes on this device's current stream
        return host.copy_(tensor.detach(), non_blocking=True)


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return tensor
    if device.type != "cuda":
        return tensor.to(device)
    # The allocator of pinned memory keeps it until the stream has read it.
    return tensor.pin_memory().to(device, non_blocking=True)
