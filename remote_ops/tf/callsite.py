"""One place that calls a model: what goes in, what comes out, and the gradient, as ops.

It says what the kernel is to send and expect; what goes over the wire, the kernel does. Gradients in a graph are
spelled out: `tf.custom_gradient` goes into a SavedModel, so whoever loads one needs no more than
`tf.load_op_library(remote_ops.tf.op_library())`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import tensorflow as tf

from remote_ops.deadline import ambient
from remote_ops.errors import SignatureError, SpecError
from remote_ops.signature import DTYPES, Signature, TensorSpec, did_you_mean
from remote_ops.tf.client import Client
from remote_ops.tf.rawop import has_kernel, load_ops, unless_failed, vjp_parts
from remote_ops.url import TLS

__all__ = ["Ask", "CallSite", "Status", "by_kernel", "call", "dtype_of", "handle_of", "shape_of"]

Tensor = Any  # tf.Tensor: tensorflow has no types that mypy reads


class Status(NamedTuple):
    """How a call ended, as scalar tensors.

    `code` is int32: 0, or the canonical code of the error, as `tf.errors` has them; `message` is a string.
    """

    code: Tensor
    message: Tensor


def dtype_of(spec: TensorSpec) -> tf.DType:
    """The tensorflow dtype of a spec.

    Raises:
        SpecError: the peer does not say which, or tensorflow has none.
    """
    row = DTYPES.get(spec.dtype)
    try:
        return tf.string if spec.dtype == "string" else tf.dtypes.as_dtype(row.numpy if row else "none")
    except TypeError:
        raise SpecError(f"'{spec.name}' is {spec}: expected a dtype that tensorflow has; give output_type") from None


def shape_of(spec: TensorSpec) -> tf.TensorShape:
    """The tensorflow shape of a spec."""
    return tf.TensorShape(None if spec.shape is None else [None if size == -1 else size for size in spec.shape])


def by_kernel(client: Client) -> bool:
    """Whether the compiled op makes the call: it speaks GraphPipe only, and Python code does what it cannot.

    Raises:
        BuildError: the compiler failed.
    """
    return not client.speaks_oip and has_kernel()


def handle_of(client: Client, *, pure: bool) -> Tensor:
    """What stands for a client in a graph, a new one for each call site."""
    tls = client.tls or TLS()
    return load_ops().remote_ops_client(
        urls=list(client.urls),
        endpoint=client.endpoint or "",
        header_names=[name for name, _ in client.headers],
        header_values=[value for _, value in client.headers],
        ca=tls.ca or "",
        cert=tls.cert or "",
        key=tls.key or "",
        key_password=tls.password or "",
        verify=tls.verify,
        attempts=client.retry.attempts if client.retry.idempotent else 1,
        retry_base_s=client.retry.base_s,
        retry_max_s=client.retry.max_s,
        retry_budget=client.retry.budget,
        connect_timeout_s=client.connect_timeout_s or 0.0,
        attempt_timeout_s=client.attempt_timeout_s or 0.0,
        kind=tf.variant if pure else tf.resource,
    )


class Ask(NamedTuple):
    """One call: names and tensors that go in; names, dtypes and shapes of what is to come out; and how it is made.

    `pure=False` has TensorFlow run it even where nobody uses its outputs. `timeout_s` is what it may take in all, with
    retries, in seconds; a number, or a scalar tensor. `on_error="status"` has the outputs filled and the code set where
    it fails, instead of an error.
    """

    inputs: Sequence[Tensor]
    input_names: Sequence[str]
    output_names: Sequence[str]
    output_types: Sequence[tf.DType]
    output_shapes: Sequence[tf.TensorShape]
    config: str | bytes = b""
    pure: bool = True
    timeout_s: Any = 30.0
    on_error: str = "raise"


def call(
    client: Client, ask: Ask, *, handle: Tensor | None = None, differentiable: Sequence[int] = ()
) -> tuple[list[Tensor], Tensor, Tensor]:
    """One call as one op: the outputs, and the code and message of `Status`.

    Args:
        client: who is called.
        ask: what goes in, and what is to come out.
        handle: what `handle_of` gave, to be used again.
        differentiable: the inputs that an eager tape is to ask gradients for.

    Raises:
        tf.errors.OpError: when it runs. Unavailable, DeadlineExceeded, Cancelled, ResourceExhausted (the server is
            overloaded), InvalidArgument, NotFound, Unimplemented (no gradient), Internal; with the URL and the words of
            the server.
    """
    if not by_kernel(client):
        fallback: Any = importlib.import_module("remote_ops.tf.fallback")
        outputs, code, message = fallback.call(client, ask)
        return list(outputs), code, message
    ops = load_ops()
    infer = ops.remote_ops_infer if ask.pure else ops.remote_ops_infer_ordered
    outputs, code, message = infer(
        client=handle_of(client, pure=ask.pure) if handle is None else handle,
        timeout_s=ask.timeout_s,
        inputs=ask.inputs,
        output_types=ask.output_types,
        output_shapes=ask.output_shapes,
        input_names=ask.input_names,
        output_names=ask.output_names,
        config=ask.config,
        on_error=ask.on_error,
        differentiable=differentiable,
        blocking=tf.executing_eagerly(),
    )
    return list(outputs), code, message


@dataclass(frozen=True, eq=False)
class CallSite:
    """The inputs and outputs of a call, as specs, and what is to be done with them."""

    client: Client
    inputs: tuple[TensorSpec, ...]
    output_names: list[str]
    types: list[tf.DType]
    shapes: list[tf.TensorShape]
    config: str | bytes
    pure: bool
    on_error: str

    @classmethod
    def of(
        cls,
        client: Client,
        count: int,
        input_names: Sequence[str] | None,
        output_names: Sequence[str] | None,
        types: Sequence[Any] | None,
        shapes: Sequence[Any] | None,
        *,
        single: bool,
        **options: Any,
    ) -> CallSite:
        """Fill in what is not given from the model's metadata.

        Args:
            count: how many inputs there are.
            single: whether one output is expected.
        """
        _same_length("input_names", input_names, count, "inputs")
        wanted: Sequence[TensorSpec] | None = None
        if input_names is None or output_names is None or types is None:
            signature, at = client.signature, client.text
            if single and output_names is None:
                _one_output(signature, at)
            inputs = _inputs_of(signature, count, input_names, at)
            wanted = signature.select_outputs(output_names, at=at)
            output_names = [spec.name for spec in wanted]
        else:
            inputs = tuple(TensorSpec(name, "any", None, differentiable=True) for name in input_names)
        _same_length("output_types", types, len(output_names), "outputs")
        _same_length("output_shapes", shapes, len(output_names), "outputs")
        if shapes is None:
            shapes = [shape_of(spec) for spec in wanted] if wanted else [None] * len(output_names)
        return cls(
            client,
            inputs,
            list(output_names),
            [dtype_of(spec) for spec in wanted or ()]
            if types is None
            else [tf.dtypes.as_dtype(dtype) for dtype in types],
            [tf.TensorShape(shape) for shape in shapes],
            **options,
        )

    @classmethod
    def between(
        cls, client: Client, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], **options: Any
    ) -> CallSite:
        """A call site of what is known in full: nobody asks the server."""
        return cls(
            client,
            tuple(inputs),
            [spec.name for spec in outputs],
            [dtype_of(spec) for spec in outputs],
            [shape_of(spec) for spec in outputs],
            **options,
        )

    def __call__(self, values: Sequence[Any], timeout_s: Any) -> tuple[list[Tensor], Status]:
        """The ops of one call.

        Raises:
            SignatureError: a value does not fit.
        """
        tensors = [self._tensor(*what, value) for what, value in zip(self._inputs, values, strict=True)]
        if not tf.executing_eagerly():
            with tf.name_scope("remote_op"):
                return self._in_graph(tensors, timeout_s)
        if not by_kernel(self.client):
            return self._in_graph(tensors, _bounded(timeout_s))
        outputs, code, message = self._call(tensors, _bounded(timeout_s), self._eager_handle)
        return outputs, Status(code, message)

    @functools.cached_property
    def _inputs(self) -> list[tuple[TensorSpec, tf.DType | None]]:
        return [(spec, None if spec.dtype == "any" else dtype_of(spec)) for spec in self.inputs]

    @functools.cached_property
    def _names(self) -> list[str]:
        return [spec.name for spec in self.inputs]

    @functools.cached_property
    def _differentiable(self) -> list[int]:
        return [i for i, spec in enumerate(self.inputs) if spec.differentiable]

    @functools.cached_property
    def _eager_handle(self) -> Tensor:
        """Eager calls run one after the other, so all share a handle; it lives as long as this call site."""
        return handle_of(self.client, pure=self.pure)

    def _tensor(self, spec: TensorSpec, dtype: tf.DType | None, value: Any) -> Tensor:
        try:
            # A `dtype` of None leaves it to tensorflow, as for what has one of its own.
            tensor = tf.convert_to_tensor(value, None if hasattr(value, "dtype") else dtype)
        except (TypeError, ValueError) as error:
            raise SignatureError(
                f"input '{spec.name}': expected {spec}, got a {type(value).__name__} that is no such tensor ({error})",
                name=spec.name, expected=str(spec), got=type(value).__name__, at=self.client.text,
            ) from error  # fmt: skip
        if dtype is not None and (tensor.dtype != dtype or not _accepts(spec, tensor.shape)):
            got = f"{tensor.dtype.name} {tensor.shape}"
            raise SignatureError(
                f"input '{spec.name}': expected {spec}, got {got}",
                name=spec.name, expected=str(spec), got=got, at=self.client.text,
            )  # fmt: skip
        return tensor

    def _call(
        self, tensors: list[Tensor], timeout_s: Any, handle: Tensor | None
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        ask = Ask(
            tensors, self._names, self.output_names, self.types, self.shapes,
            self.config, self.pure, timeout_s, self.on_error,
        )  # fmt: skip
        return call(self.client, ask, handle=handle, differentiable=self._differentiable)

    def _in_graph(self, tensors: list[Tensor], timeout_s: Any) -> tuple[list[Tensor], Status]:
        timeouts = [timeout_s] if tf.is_tensor(timeout_s) else []

        @tf.custom_gradient  # type: ignore[untyped-decorator]
        def forward(*own: Tensor) -> Any:
            within_s, tensors = (own[0], own[1:]) if timeouts else (timeout_s, own)
            outputs, code, message = self._call(list(tensors), within_s, None)

            def backward(*cotangents: Tensor) -> list[Tensor | None]:
                return [None] * len(timeouts) + self._gradients(tensors, cotangents, code, within_s)

            return [*outputs, code, message], backward

        # As tensors of this very graph: of those that a branch takes from outside, TensorFlow loses the gradient.
        *outputs, code, message = forward(*map(tf.identity, [*timeouts, *tensors]))
        return outputs, Status(code, message)

    def _gradients(
        self, tensors: Sequence[Tensor], cotangents: Sequence[Tensor], code: Tensor, timeout_s: Any
    ) -> list[Tensor | None]:
        """The vector-Jacobian product; None for inputs that have no gradient."""
        wanted, given = vjp_parts([tensor.dtype for tensor in tensors], self._differentiable, self.types, cotangents)
        found: list[Tensor | None] = [None] * len(tensors)
        if not wanted:
            return found
        # Made outside of what is conditional: the call is then no stateful part of it, and others need not wait.
        handle = handle_of(self.client, pure=self.pure) if by_kernel(self.client) else None

        def ask() -> list[Tensor]:
            asked = Ask(
                [*tensors, *(tf.cast(cotangents[i], self.types[i]) for i in given)],
                [*self._names, *(f"cotangent:{self.output_names[i]}" for i in given)],
                [f"gradient:{self._names[i]}" for i in wanted],
                [tensors[i].dtype for i in wanted],
                [tensors[i].shape for i in wanted],
                self.config,
                self.pure,
                timeout_s,
            )
            gradients, _, _ = call(self.client, asked, handle=handle)
            return gradients

        like = [tensors[i] for i in wanted]
        gradients = ask() if self.on_error == "raise" else unless_failed(code, ask, like)
        for index, gradient in zip(wanted, gradients, strict=True):
            found[index] = gradient
        return found


def _bounded(timeout_s: Any) -> Any:
    """What an eager call may take: the ambient deadline shortens it."""
    bound = ambient()
    if bound is None:
        return timeout_s
    left_s = bound.remaining()
    return tf.minimum(timeout_s, left_s) if tf.is_tensor(timeout_s) else min(timeout_s, left_s)


def _accepts(spec: TensorSpec, shape: tf.TensorShape) -> bool:
    if spec.shape is None:
        return True
    if shape.is_fully_defined():
        return spec.accepts_shape(tuple(shape.as_list()))
    return bool(shape_of(spec).is_compatible_with(shape))


def _one_output(signature: Signature, at: str) -> None:
    if len(signature.outputs) == 1:
        return
    names = ", ".join(f"'{spec.name}'" for spec in signature.outputs)
    raise SignatureError(
        f"the model has outputs {names}: name one with output_name, or call remote_op_multi",
        expected="one output", got=names, at=at,
    )  # fmt: skip


def _inputs_of(signature: Signature, count: int, names: Sequence[str] | None, at: str) -> tuple[TensorSpec, ...]:
    """The specs of the inputs that are given, in that order; all of the model's must be."""
    taken = {spec.name: spec for spec in signature.inputs}
    if names is None:
        names = list(taken)[:count]
    expected = ", ".join(taken)
    for name in names:
        if name not in taken:
            raise SignatureError(
                f"no input '{name}': expected {expected}{did_you_mean(name, taken)}",
                name=name, expected=expected, got=", ".join(names), at=at,
            )  # fmt: skip
    missing = [f"'{name}' ({spec})" for name, spec in taken.items() if name not in names]
    if missing or len(names) != count:
        raise SignatureError(
            f"expected {len(taken)} inputs ({expected}), got {count}: missing {', '.join(missing) or 'names'}",
            expected=str(len(taken)), got=str(count), at=at,
        )  # fmt: skip
    return tuple(taken[name] for name in names)


def _same_length(name: str, given: Sequence[Any] | None, count: int, what: str) -> None:
    if given is not None and len(given) != count:
        raise SpecError(f"expected as many as {what}, {count}: got {len(given)}", path=name)
