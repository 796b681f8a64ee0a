"""An op that fails with a given status, for graphs that were built where no kernel is: without it every fault that
Python code in a graph meets is an `UnknownError`.

It is defined through TensorFlow's C interface, so it needs no compiler. It is in no SavedModel that loads elsewhere.

State: the op, registered once, under `_LOCK`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from pathlib import Path
from typing import Any

import tensorflow as tf

__all__ = ["fail_if"]

_LOCK = threading.Lock()
_NAME = b"RemoteOpsFailure"
_POINTER = ctypes.c_void_p
_COMPUTE = ctypes.CFUNCTYPE(None, _POINTER, _POINTER)
# Without it, TensorFlow turns UNAVAILABLE into INTERNAL. Of C++: the C interface has no word for it.
_SET_IS_COMMUNICATION = "_ZN10tensorflow12OpDefBuilder29SetIsDistributedCommunicationEv"


def fail_if(code: Any, message: Any) -> Any:
    """Add an op to the graph that is being built; when it runs, it fails with `code`, unless that is 0.

    Args:
        code: an int32 scalar, one of TensorFlow's status codes.
        message: a string scalar.
    """
    with _LOCK:
        _define()
    graph = tf.compat.v1.get_default_graph()
    return graph.create_op(_NAME.decode(), [code, tf.io.decode_raw(message, tf.uint8)], [])


@functools.cache
def _define() -> Any:
    """Register the op and its kernel, once; gives what must live as long as they do."""
    builder = _c("TF_NewOpDefinitionBuilder", _POINTER, ctypes.c_char_p)(_NAME)
    add_input = _c("TF_OpDefinitionBuilderAddInput", None, _POINTER, ctypes.c_char_p)
    add_input(builder, b"code: int32")
    add_input(builder, b"message: uint8")
    with contextlib.suppress(AttributeError):  # a TensorFlow that calls it otherwise: then it says INTERNAL
        _c(_SET_IS_COMMUNICATION, _POINTER, _POINTER)(builder)
    status = _c("TF_NewStatus", _POINTER)()
    _c("TF_RegisterOpDefinition", None, _POINTER, _POINTER)(builder, status)
    _check(status)
    compute = _COMPUTE(_compute)
    new_kernel = _c("TF_NewKernelBuilder", _POINTER, ctypes.c_char_p, ctypes.c_char_p, _POINTER, _COMPUTE, _POINTER)
    kernel = new_kernel(_NAME, b"CPU", None, compute, None)
    _c("TF_RegisterKernelBuilder", None, ctypes.c_char_p, _POINTER, _POINTER)(_NAME, kernel, status)
    _check(status)
    _c("TF_DeleteStatus", None, _POINTER)(status)
    return compute


def _compute(_: Any, context: int) -> None:
    status = _c("TF_NewStatus", _POINTER)()
    code = int.from_bytes(_input(context, 0, status), "little", signed=True)
    if code:
        # A copy of its own: the C interface takes text up to a NUL.
        message = _input(context, 1, status).replace(b"\0", b" ")
        _c("TF_SetStatus", None, _POINTER, ctypes.c_int, ctypes.c_char_p)(status, code, message)
        _c("TF_OpKernelContext_Failure", None, _POINTER, _POINTER)(context, status)
    _c("TF_DeleteStatus", None, _POINTER)(status)


def _input(context: int, index: int, status: int) -> bytes:
    tensor = _POINTER()
    _c("TF_GetInput", None, _POINTER, ctypes.c_int, ctypes.POINTER(_POINTER), _POINTER)(
        context, index, ctypes.byref(tensor), status
    )
    size = _c("TF_TensorByteSize", ctypes.c_size_t, _POINTER)(tensor)
    data = ctypes.string_at(_c("TF_TensorData", _POINTER, _POINTER)(tensor), size)
    _c("TF_DeleteTensor", None, _POINTER)(tensor)
    return data


def _check(status: int) -> None:
    if _c("TF_GetCode", ctypes.c_int, _POINTER)(status):
        raise tf.errors.InternalError(None, None, _c("TF_Message", ctypes.c_char_p, _POINTER)(status).decode())


@functools.cache
def _c(name: str, result: Any, *arguments: Any) -> Any:
    """A function of TensorFlow's C interface."""
    function = _library()[name]
    function.restype, function.argtypes = result, arguments
    return function


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(next(Path(tf.sysconfig.get_lib()).glob("libtensorflow_framework.*"))))
