"""What stands in for the compiled op: the same call by Python code in the graph.

It does where no C++ compiler is, and for models of the Open Inference Protocol, which the op does not speak.

It gives the same answers and the same errors. It cannot be saved for another process, runs as many calls of a
`tf.function` at once as TensorFlow has threads between ops, and does not end a call that is cancelled.

State: endpoints, each with its connections, for the clients of this process, in a cache that locks itself.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from remote_ops.client import Endpoint
from remote_ops.deadline import Deadline
from remote_ops.errors import (
    BadStatus,
    ConnectError,
    ConnectionLost,
    DecodeError,
    FramingError,
    NotDifferentiable,
    RemoteError,
    RemoteOpsError,
    answer_of,
)
from remote_ops.policy import Retry
from remote_ops.signature import DTYPES, Array, Signature, TensorSpec
from remote_ops.tf.callsite import Ask
from remote_ops.tf.client import Client
from remote_ops.tf.failure import fail_if
from remote_ops.tf.tensors import array_of
from remote_ops.transport import HttpTransport
from remote_ops.url import TLS

__all__ = ["FallbackWarning", "call"]

Tensor = Any  # tf.Tensor: tensorflow has no types that mypy reads


class FallbackWarning(UserWarning):
    """Remote ops run as Python code, since no C++ compiler is here or for their protocol; says what that cannot do."""


def call(client: Client, ask: Ask) -> tuple[list[Tensor], Tensor, Tensor]:
    """One call without a gradient: the outputs, a status code and its words; as the compiled op gives them.

    Raises:
        tf.errors.OpError: when it runs; the classes of the compiled op.

    Warns:
        FallbackWarning: once per process and reason.
    """
    _warn(oip=client.speaks_oip)
    site = _Site.of(client, ask)
    run = _run_eagerly if tf.executing_eagerly() else _run_in_graph

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def once(*tensors: Tensor) -> Any:
        outputs, code, message = run(site, ask, tensors)
        return [*outputs, code, message], _no_second_derivative

    *outputs, code, message = once(tf.cast(ask.timeout_s, tf.float64), *ask.inputs)
    return outputs, code, message


def _no_second_derivative(*_: Any) -> Any:
    raise NotDifferentiable(
        "a remote model has no second derivative: expected one tape around it, got the gradient of a gradient; "
        "put tf.stop_gradient around the first"
    )


@functools.cache
def _warn(*, oip: bool) -> None:
    why, instead = _OIP if oip else _NO_COMPILER
    warnings.warn(
        f"{why}, so remote ops run as Python code in the graph: a SavedModel of them cannot be loaded by another "
        "process, the calls of one tf.function run one or two at a time, and a cancelled call runs on to its end; "
        + instead,
        FallbackWarning,
        stacklevel=3,
    )


_NO_COMPILER = (
    "there is no C++ compiler here",
    "install g++ (apt-get install g++), or bring a library that 'python -m remote_ops.tf.build' built for the same "
    "TensorFlow, in $REMOTE_OPS_CACHE/ops",
)
_OIP = (
    "the compiled op speaks GraphPipe, and this URL means the Open Inference Protocol",
    "for what that lacks, call a server_ref that serves the model: server_ref.serve({'m': load(url)})",
)


# --------------------------------------------------------------------------- in TensorFlow


def _run_eagerly(site: _Site, ask: Ask, inputs: Sequence[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
    code, message, *arrays = site(*(array_of(tensor) for tensor in inputs))
    if code and ask.on_error == "raise":
        raise tf.compat.v1.errors.exception_type_from_error_code(int(code))(None, None, message.item().decode())
    with tf.device("/CPU:0"):
        outputs = [tf.constant(array, dtype) for array, dtype in zip(arrays, ask.output_types, strict=True)]
        return outputs, tf.constant(code), tf.constant(message.item())


def _run_in_graph(site: _Site, ask: Ask, inputs: Sequence[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
    types = [tf.int32, tf.string, *ask.output_types]
    if ask.pure:
        code, message, *found = tf.numpy_function(
            lambda _, *values: site(*values), [_nonce(), *inputs], types, stateful=False
        )
    else:
        code, message, *found = tf.numpy_function(site, list(inputs), types, stateful=True)
    code.set_shape([])
    message.set_shape([])
    with tf.control_dependencies([fail_if(code, message)] if ask.on_error == "raise" else []):
        outputs = [tf.identity(tensor) for tensor in found]
    for tensor, shape in zip(outputs, ask.output_shapes, strict=True):
        tensor.set_shape(shape)
    return outputs, code, message


def _nonce() -> Tensor:
    """A number from an op with state: a call of constants is then not folded into one, nor two alike merged.

    The call itself must be without state: TensorFlow runs those with state one after the other.
    """
    none, most = tf.constant([], tf.int32), tf.constant(2**31 - 1)
    return tf.raw_ops.RandomUniformInt(shape=none, minval=tf.constant(0), maxval=most, seed=1, seed2=1)


# --------------------------------------------------------------------------- over the wire


@dataclass(frozen=True)
class _Site:
    """A call site: what it sends and expects, as the signature that the server is held to."""

    client: Client
    signature: Signature
    config: bytes

    @classmethod
    def of(cls, client: Client, ask: Ask) -> _Site:
        """A call site of what the op is given."""
        taken = [
            _spec("input", name, value.dtype, None) for name, value in zip(ask.input_names, ask.inputs, strict=True)
        ]
        outputs = zip(ask.output_names, ask.output_types, ask.output_shapes, strict=True)
        given = [_spec("output", *output) for output in outputs]
        config = ask.config.encode() if isinstance(ask.config, str) else ask.config
        return cls(client, Signature(tuple(taken), tuple(given)), config)

    def __call__(self, timeout_s: Any, *values: Any) -> tuple[Any, ...]:
        """Make the call: seconds and arrays in; a status code, its words, and the outputs out."""
        names = [spec.name for spec in self.signature.outputs]
        arrays = {spec.name: _array(value) for spec, value in zip(self.signature.inputs, values, strict=True)}
        try:
            found = self._endpoint().infer(arrays, names, config=self.config, deadline=Deadline.after(float(timeout_s)))
        except RemoteOpsError as error:
            code, message = _status(error)
            return np.int32(code), _text(message), *(_filler(spec, arrays.values()) for spec in self.signature.outputs)
        return np.int32(0), _text(""), *(found[name] for name in names)

    def _endpoint(self) -> Endpoint:
        client = self.client
        return _endpoint(client.places, client.headers, client.tls, client.retry, self.signature)


def _filler(spec: TensorSpec, inputs: Iterable[Array]) -> Array:
    """What stands for an output that there is none of."""
    rows = next((array.shape[0] for array in inputs if array.ndim), 0)
    sizes = spec.shape or ()
    shape = tuple(size if size >= 0 else rows if axis == 0 else 0 for axis, size in enumerate(sizes))
    if spec.dtype == "string":
        return np.full(shape, b"", object)
    return np.full(shape, np.nan if spec.is_float else 0, DTYPES[spec.dtype].numpy)


def _spec(kind: str, name: str, dtype: tf.DType, shape: tf.TensorShape | None) -> TensorSpec:
    if dtype.name not in DTYPES:
        message = f"{kind} '{name}' is {dtype.name}, which has no form on the wire"
        raise tf.errors.InvalidArgumentError(None, None, message)
    known = shape is not None and tf.TensorShape(shape).rank is not None
    return TensorSpec(name, dtype.name, tuple(-1 if n is None else n for n in tf.TensorShape(shape)) if known else None)


@functools.lru_cache(maxsize=1024)
def _endpoint(urls: tuple[str, ...], headers: Any, tls: Any, retry: Retry, signature: Signature) -> Endpoint:
    made = Endpoint(urls, math.inf, dict(headers), None, retry, _transport(tls))
    made._signature = signature  # the op says what it sends and expects: nobody asks the server
    return made


@functools.lru_cache(maxsize=1024)
def _transport(tls: TLS | None) -> HttpTransport:
    """The connections that all call sites share."""
    return HttpTransport(tls)


def _array(value: Any) -> Array:
    if isinstance(value, bytes):  # numpy drops NULs at the end
        return _bytes(value)
    return np.asarray(value)


def _bytes(value: bytes) -> Array:
    array: Array = np.empty((), object)
    array[()] = value
    return array


def _text(message: str) -> Array:
    return _bytes(message.encode())


# --------------------------------------------------------------------------- faults

_UNKNOWN, _UNAVAILABLE, _INTERNAL = 2, 14, 13
_KNOWN = {3, 4, 5, 8, 12, 13, 14}
_BY_STATUS: Mapping[int, int] = {401: 16, 403: 7, 404: 5, 501: 12}


def _status(error: RemoteOpsError) -> tuple[int, str]:
    """The status code of TensorFlow, and the words, for an error of ours: those of the compiled op."""
    message = str(error)
    if isinstance(error, RemoteError):
        return (error.code, message) if error.code in _KNOWN else (_UNKNOWN, f"{message} (code {error.code})")
    if isinstance(error, BadStatus):
        return _BY_STATUS.get(error.status, 3 if 400 <= error.status < 500 else _INTERNAL), message
    if isinstance(error, ConnectError | ConnectionLost):
        return _UNAVAILABLE, message
    if isinstance(error, DecodeError | FramingError):
        return _INTERNAL, message
    return answer_of(error).code, message
