"""`remote_op` and `remote_op_multi`: a remote model as an op, in eager mode, `tf.function`, SavedModel and `tf.data`.

They say what the kernel is to send and expect; what goes over the wire, the kernel does. Here metadata is fetched, once
per address, and gradients are spelled out: `tf.custom_gradient` goes into a SavedModel, so whoever loads one needs no
more than `tf.load_op_library(remote_ops.tf.op_library())`.

State: the loaded library, once, under `_LOCK`; the known signatures, by operations that are atomic in CPython.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from remote_ops.client import Endpoint
from remote_ops.deadline import Deadline
from remote_ops.errors import NotDifferentiable, SignatureError, SpecError
from remote_ops.policy import Retry
from remote_ops.signature import DTYPES, Signature, TensorSpec
from remote_ops.tf.library import op_library
from remote_ops.url import TLS, Url

__all__ = ["Client", "call", "dtype_of", "load_ops", "remote_op", "remote_op_multi", "shape_of"]

Tensor = Any  # tf.Tensor: tensorflow has no types that mypy reads
_LOCK = threading.Lock()
_SIGNATURES: dict[Client, Signature] = {}
_VARIABLE = re.compile(r"\$\{[A-Za-z_][A-Za-z0-9_]*\}")


def load_ops() -> Any:
    """The module of the raw ops; builds the kernel first if need be.

    Raises:
        BuildError: it could not be built.
    """
    with _LOCK:
        return _load()


@functools.cache
def _load() -> Any:
    ops = tf.load_op_library(str(op_library()))
    for name in ("RemoteOpsInfer", "RemoteOpsInferOrdered"):
        tf.RegisterGradient(name)(_no_second_derivative)
    return ops


def _no_second_derivative(op: Any, *gradients: Any) -> Any:
    raise NotDifferentiable(
        "a remote model has no second derivative: expected one tape around it, got the gradient of a gradient; "
        "put tf.stop_gradient around the first"
    )


# --------------------------------------------------------------------------- who is called


@dataclass(frozen=True)
class Client:
    """Who is called, and how: what a graph holds of an endpoint.

    Args:
        urls: of the replicas, one or more.
        headers: names and values; a value names environment variables as `${NAME}`, which are read at each call.
        tls: whom https trusts, and who we are.
        timeout_s: seconds that a call may take in all, retries included.
        connect_timeout_s, attempt_timeout_s: seconds that connecting and one sending may take; None for no own limit.
        attempts: sendings in all, 1 or more.

    Raises:
        SpecError: an argument is wrong, or a header has a literal value, which everybody could read in the graph.
    """

    urls: tuple[str, ...]
    headers: tuple[tuple[str, str], ...] = ()
    tls: TLS | None = None
    timeout_s: float = 30.0
    connect_timeout_s: float | None = None
    attempt_timeout_s: float | None = None
    attempts: int = 3

    def __post_init__(self) -> None:
        if not self.urls:
            raise SpecError("an op needs at least one URL: got none", path="uri")
        for url in self.urls:
            Url.parse(url)
        for name, length in (
            ("timeout_s", self.timeout_s),
            ("connect_timeout_s", self.connect_timeout_s),
            ("attempt_timeout_s", self.attempt_timeout_s),
        ):
            if length is not None and not length > 0:
                raise SpecError(f"expected a number of seconds above 0, got {length!r}", path=name)
        Deadline.after(self.timeout_s)
        for name, value in self.headers:
            if not isinstance(value, str) or not _VARIABLE.search(value):
                raise SpecError(
                    f"header '{name}' has a literal value, which everybody could read in the graph: write it as "
                    "'${NAME}', to be read from the environment at each call",
                    path="headers",
                )
        if self.tls is not None and self.tls.password and not _VARIABLE.search(self.tls.password):
            raise SpecError("the password of a key would stand in the graph: write it as '${NAME}'", path="tls")

    @classmethod
    def of(cls, uri: str | Sequence[str], headers: Mapping[str, str] | None, retry: Retry, **options: Any) -> Client:
        """A client from what `remote_op` takes."""
        urls = tuple(uri) if isinstance(uri, list | tuple) else (uri,)
        return cls(urls, tuple((headers or {}).items()), attempts=retry.attempts, **options)

    @property
    def signature(self) -> Signature:
        """What the model takes and gives; asked of the server once per process."""
        found = _SIGNATURES.get(self)
        if found is None:
            with Endpoint(list(self.urls), self.timeout_s, dict(self.headers), self.tls) as endpoint:
                found = _SIGNATURES.setdefault(self, endpoint.signature)
        return found

    def handle(self, *, pure: bool) -> Tensor:
        """What stands for it in a graph, a new one for each call site."""
        tls = self.tls or TLS()
        return load_ops().remote_ops_client(
            urls=list(self.urls),
            header_names=[name for name, _ in self.headers],
            header_values=[value for _, value in self.headers],
            ca=tls.ca or "",
            cert=tls.cert or "",
            key=tls.key or "",
            key_password=tls.password or "",
            verify=tls.verify,
            kind=tf.variant if pure else tf.resource,
        )


# --------------------------------------------------------------------------- the raw op


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


def call(
    client: Client,
    inputs: Sequence[Tensor],
    input_names: Sequence[str],
    output_names: Sequence[str],
    output_types: Sequence[tf.DType],
    output_shapes: Sequence[tf.TensorShape],
    config: str | bytes = b"",
    *,
    pure: bool = True,
) -> list[Tensor]:
    """One call as one op, without a gradient: names and tensors in, tensors out.

    Args:
        pure: False has TensorFlow run it even where nobody uses its outputs.

    Raises:
        tf.errors.OpError: when it runs. Unavailable, DeadlineExceeded, Cancelled, ResourceExhausted (the server is
            overloaded), InvalidArgument, NotFound, Unimplemented (no gradient), Internal; with the URL and the words of
            the server.
    """
    ops = load_ops()
    infer = ops.remote_ops_infer if pure else ops.remote_ops_infer_ordered
    outputs = infer(
        client=client.handle(pure=pure),
        inputs=list(inputs),
        output_types=list(output_types),
        output_shapes=list(output_shapes),
        input_names=list(input_names),
        output_names=list(output_names),
        config=config,
        timeout_s=client.timeout_s,
        connect_timeout_s=client.connect_timeout_s or 0.0,
        attempt_timeout_s=client.attempt_timeout_s or 0.0,
        retries=client.attempts - 1,
    )
    return list(outputs)


# --------------------------------------------------------------------------- the two faces


def remote_op(
    uri: str | Sequence[str],
    inp: Any,
    input_name: str | None = None,
    output_name: str | None = None,
    output_type: Any = None,
    output_shape: Any = None,
    config: str | bytes = "",
    *,
    timeout_s: float = 30.0,
    headers: Mapping[str, str] | None = None,
    tls: TLS | None = None,
    retry: Retry = Retry(),  # noqa: B008 (immutable)
    pure: bool = True,
) -> Tensor:
    """Call a model that has, or for which you name, one input and one output.

    Args:
        uri: `http://`, `https://` or `http+unix://%2Fpath.sock/model`; a list of them for replicas.
        inp: a tensor, or what tensorflow makes one of.
        input_name, output_name: the model's first input and first output unless said.
        output_type, output_shape: what the model's metadata says unless said; sizes may be None. With names and dtype
            given, the server is not asked for metadata, and the shape is unknown unless said.
        config: handed to the model.
        timeout_s: seconds that a call may take in all, retries included.
        headers: sent with every request; a value must name environment variables as `${NAME}`.
        tls: whom https trusts, and who we are. Paths go into the graph, a password must be `${NAME}`.
        retry: how often a call that failed for a passing reason is sent again.
        pure: False has TensorFlow run the call even where nobody uses its output.

    Returns:
        The output, differentiable with respect to `inp` as far as the model is.

    Raises:
        SpecError, SignatureError: an argument is wrong; at once.
        RemoteOpsError: the metadata cannot be had; at once.
        tf.errors.OpError: the call failed; when it runs.
    """
    found = remote_op_multi(
        uri,
        [inp],
        None if input_name is None else [input_name],
        None if output_name is None else [output_name],
        None if output_type is None else [output_type],
        None if output_shape is None else [output_shape],
        config,
        timeout_s=timeout_s, headers=headers, tls=tls, retry=retry, pure=pure,
    )  # fmt: skip
    return found[0]


def remote_op_multi(
    uri: str | Sequence[str],
    inputs: Sequence[Any],
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    output_types: Sequence[Any] | None = None,
    output_shapes: Sequence[Any] | None = None,
    config: str | bytes = "",
    *,
    timeout_s: float = 30.0,
    headers: Mapping[str, str] | None = None,
    tls: TLS | None = None,
    retry: Retry = Retry(),  # noqa: B008 (immutable)
    pure: bool = True,
) -> list[Tensor]:
    """Call a model by names: the outputs asked for (all unless said), in that order. The rest is as for `remote_op`."""
    client = Client.of(uri, headers, retry, tls=tls, timeout_s=timeout_s)
    op = _Op.of(client, list(inputs), input_names, output_names, output_types, output_shapes, config, pure)
    tensors = op.tensors(inputs)
    with tf.name_scope("remote_op"):
        return op.differentiable(tensors)


@dataclass(frozen=True)
class _Op:
    """One call site: the inputs and outputs of a call, as specs."""

    client: Client
    inputs: tuple[TensorSpec, ...]
    output_names: tuple[str, ...]
    types: tuple[tf.DType, ...]
    shapes: tuple[tf.TensorShape, ...]
    config: str | bytes
    pure: bool
    knows_gradients: bool

    @classmethod
    def of(
        cls,
        client: Client,
        values: Sequence[Any],
        input_names: Sequence[str] | None,
        output_names: Sequence[str] | None,
        types: Sequence[Any] | None,
        shapes: Sequence[Any] | None,
        config: str | bytes,
        pure: bool,
    ) -> _Op:
        """Fill in what is not given from the model's metadata."""
        _same_length("input_names", input_names, values, "inputs")
        _same_length("output_types", types, output_names, "output_names")
        _same_length("output_shapes", shapes, output_names, "output_names")
        if None in (input_names, output_names, types):
            return cls._by_metadata(client, values, input_names, output_names, types, shapes, config, pure)
        return cls(
            client,
            tuple(TensorSpec(name, "any", None, differentiable=True) for name in input_names or ()),
            tuple(output_names or ()),
            tuple(tf.dtypes.as_dtype(dtype) for dtype in types or ()),
            tuple(tf.TensorShape(shape) for shape in shapes or [None] * len(types or ())),
            config,
            pure,
            False,
        )

    @classmethod
    def _by_metadata(
        cls, client: Client, values: Sequence[Any], input_names: Any, output_names: Any, types: Any, shapes: Any,
        config: str | bytes, pure: bool,
    ) -> _Op:  # fmt: skip
        signature, at = client.signature, Url.parse(client.urls[0]).text
        if input_names is None:
            input_names = [spec.name for spec in signature.inputs][: len(values)]
        taken = {spec.name: spec for spec in signature.inputs}
        for name in input_names:
            if name not in taken:
                raise SignatureError(
                    f"no input '{name}': expected {', '.join(taken)}", name=name, expected=", ".join(taken), at=at
                )
        missing = [f"'{name}' ({spec})" for name, spec in taken.items() if name not in input_names]
        if missing or len(input_names) != len(values):
            raise SignatureError(
                f"expected {len(taken)} inputs, got {len(values)}: missing {', '.join(missing) or 'names'}",
                expected=str(len(taken)), got=str(len(values)), at=at,
            )  # fmt: skip
        wanted = signature.select_outputs(output_names, at=at)
        _same_length("output_types", types, wanted, "outputs")
        _same_length("output_shapes", shapes, wanted, "outputs")
        return cls(
            client,
            tuple(taken[name] for name in input_names),
            tuple(spec.name for spec in wanted),
            tuple(map(tf.dtypes.as_dtype, types)) if types else tuple(map(dtype_of, wanted)),
            tuple(map(tf.TensorShape, shapes)) if shapes else tuple(map(shape_of, wanted)),
            config,
            pure,
            True,
        )

    # calls

    def tensors(self, values: Sequence[Any]) -> list[Tensor]:
        """The inputs as tensors that fit."""
        return [self._tensor(spec, value) for spec, value in zip(self.inputs, values, strict=True)]

    def _tensor(self, spec: TensorSpec, value: Any) -> Tensor:
        if spec.dtype == "any":
            return tf.convert_to_tensor(value)
        dtype, at = dtype_of(spec), Url.parse(self.client.urls[0]).text
        try:
            tensor = tf.convert_to_tensor(value) if hasattr(value, "dtype") else tf.convert_to_tensor(value, dtype)
        except (TypeError, ValueError) as error:
            raise SignatureError(
                f"input '{spec.name}': expected {spec}, got a {type(value).__name__} that is no such tensor ({error})",
                name=spec.name, expected=str(spec), got=type(value).__name__, at=at,
            ) from error  # fmt: skip
        if tensor.dtype != dtype or not shape_of(spec).is_compatible_with(tensor.shape):
            got = f"{tensor.dtype.name} {tensor.shape}"
            raise SignatureError(
                f"input '{spec.name}': expected {spec}, got {got}", name=spec.name, expected=str(spec), got=got, at=at
            )
        return tensor

    def differentiable(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The outputs, with a gradient that comes over the wire."""

        @tf.custom_gradient  # type: ignore[untyped-decorator]
        def forward(*tensors: Tensor) -> Any:
            outputs = self.outputs(tensors)

            def backward(*cotangents: Tensor) -> list[Tensor | None]:
                return self.gradients(tensors, cotangents)

            return outputs, backward

        found = forward(*tensors)
        return list(found) if isinstance(found, list | tuple) else [found]

    def outputs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        names = [spec.name for spec in self.inputs]
        return call(
            self.client, tensors, names, self.output_names, self.types, self.shapes, self.config, pure=self.pure
        )

    def gradients(self, tensors: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor | None]:
        """The vector-Jacobian product; None for inputs that have no gradient.

        A model that differentiates nothing is asked all the same: its answer says so by name.
        """
        floats = [i for i, tensor in enumerate(tensors) if tensor.dtype.is_floating]
        wanted = [i for i in floats if self.inputs[i].differentiable] or floats
        given = [i for i, dtype in enumerate(self.types) if dtype.is_floating and cotangents[i] is not None]
        found: list[Tensor | None] = [None] * len(tensors)
        if not wanted or not given:
            return found
        gradients = call(
            self.client,
            [*tensors, *(tf.cast(cotangents[i], self.types[i]) for i in given)],
            [*(spec.name for spec in self.inputs), *(f"cotangent:{self.output_names[i]}" for i in given)],
            [f"gradient:{self.inputs[i].name}" for i in wanted],
            [tensors[i].dtype for i in wanted],
            [tensors[i].shape for i in wanted],
            self.config,
            pure=self.pure,
        )
        for index, gradient in zip(wanted, gradients, strict=True):
            found[index] = gradient
        return found


def _same_length(name: str, given: Sequence[Any] | None, other: Sequence[Any] | None, what: str) -> None:
    if given is not None and other is not None and len(given) != len(other):
        raise SpecError(f"expected as many as {what}, {len(other)}: got {len(given)}", path=name)
