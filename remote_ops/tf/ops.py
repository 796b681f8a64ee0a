"""`remote_op` and `remote_op_multi`: a remote model as an op, in eager mode, `tf.function`, SavedModel and `tf.data`.

They are the faces: `client` says who is called, `callsite` makes the ops, `kernel/` sends.

State: the call sites last used, for half a minute each, in `_SITES`, which has its own lock.
"""

from __future__ import annotations

import math
import os
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from remote_ops.deadline import Deadline, within
from remote_ops.errors import SignatureError, SpecError
from remote_ops.policy import Retry
from remote_ops.tf.callsite import CallSite, Status, by_kernel, call, dtype_of, shape_of
from remote_ops.tf.client import Client, Kept, check_length
from remote_ops.tf.rawop import load_ops
from remote_ops.tf.unwrapped import unwrapped
from remote_ops.url import TLS

__all__ = ["Client", "Status", "call", "dtype_of", "load_ops", "remote_op", "remote_op_multi", "shape_of"]

Tensor = Any  # tf.Tensor: tensorflow has no types that mypy reads
_SITES: Kept[CallSite] = Kept(256, age_s=30.0)


def remote_op(
    uri: str | Sequence[str] | None,
    inp: Any,
    input_name: str | None = None,
    output_name: str | None = None,
    output_type: Any = None,
    output_shape: Any = None,
    config: str | bytes = "",
    *,
    endpoint: str | None = None,
    timeout_s: Any = 30.0,
    headers: Mapping[str, str] | None = None,
    tls: TLS | None = None,
    retry: Retry = Retry(),  # noqa: B008 (immutable)
    pure: bool = True,
    on_error: str = "raise",
) -> Any:
    """Call a model that has, or for which you name, one input and one output.

    Args:
        uri: `http://`, `https://` or `http+unix://%2Fpath.sock/model`; a list of them for replicas. None if `endpoint`
            is given.
        inp: a tensor, or what tensorflow makes one of.
        input_name, output_name: the model's only input and only output unless said.
        output_type, output_shape: what the model's metadata says unless said; sizes may be None. With names and dtype
            given, the server is not asked for metadata, and the shape is unknown unless said.
        config: handed to the model.
        endpoint: the environment variable that holds the URL, several separated by spaces. It is read at each call, so
            that no URL stands in a graph.
        timeout_s: seconds that a call may take in all, retries included; a number, or a scalar tensor. In eager mode an
            enclosing `with deadline(...)` shortens it.
        headers: sent with every request; a value must name environment variables as `${NAME}`.
        tls: whom https trusts, and who we are. Paths go into the graph, a password must be `${NAME}`.
        retry: how often a call that failed for a passing reason is sent again, to another replica if there is one.
        pure: False has TensorFlow run the call even where nobody uses its output.
        on_error: `raise`, or `status`: then a call that fails gives an output all the same, and says so beside it.

    Returns:
        The output, differentiable with respect to `inp` as far as the model is. With `status` `(output, Status)`; where
        the call failed the output is NaN, 0, False or "" throughout, of the declared shape: an open axis 0 is as long
        as that of the first input that has one, other open axes are 0, an unknown shape is a scalar; its gradients are
        zeros, and no request is made for them.

    Raises:
        SpecError, SignatureError: an argument is wrong; at once.
        RemoteOpsError: the metadata cannot be had; at once.
        tf.errors.OpError: the call failed; when it runs. With `status` only where the function was cancelled, or where
            the request for a gradient failed.
    """
    outputs, status = _ask(
        uri, [inp],
        None if input_name is None else [input_name],
        None if output_name is None else [output_name],
        None if output_type is None else [output_type],
        None if output_shape is None else [output_shape],
        config, endpoint, timeout_s, headers, tls, retry, pure, on_error, single=True,
    )  # fmt: skip
    return outputs[0] if on_error == "raise" else (outputs[0], status)


def remote_op_multi(
    uri: str | Sequence[str] | None,
    inputs: Sequence[Any],
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    output_types: Sequence[Any] | None = None,
    output_shapes: Sequence[Any] | None = None,
    config: str | bytes = "",
    *,
    endpoint: str | None = None,
    timeout_s: Any = 30.0,
    headers: Mapping[str, str] | None = None,
    tls: TLS | None = None,
    retry: Retry = Retry(),  # noqa: B008 (immutable)
    pure: bool = True,
    on_error: str = "raise",
) -> Any:
    """Call a model by names: a list of the outputs asked for (all unless said), in that order.

    With `on_error="status"` it gives `(outputs, Status)`. The rest is as for `remote_op`.
    """
    outputs, status = _ask(
        uri, inputs, input_names, output_names, output_types, output_shapes,
        config, endpoint, timeout_s, headers, tls, retry, pure, on_error, single=False,
    )  # fmt: skip
    return outputs if on_error == "raise" else (outputs, status)


@tf.autograph.experimental.do_not_convert  # type: ignore[untyped-decorator]
@unwrapped()
def _ask(
    uri: Any, inputs: Sequence[Any], input_names: Any, output_names: Any, types: Any, shapes: Any,
    config: str | bytes, endpoint: str | None, timeout_s: Any, headers: Any, tls: TLS | None, retry: Retry, pure: bool,
    on_error: str, *, single: bool,
) -> tuple[list[Tensor], Status]:  # fmt: skip
    timeout_s = _timeout(timeout_s)
    if on_error not in ("raise", "status"):
        raise SpecError(f"expected 'raise' or 'status', got {on_error!r}", path="on_error")
    if not isinstance(inputs, list | tuple):
        raise SpecError(f"expected a list of tensors, got a {type(inputs).__name__}", path="inputs")
    key = _key(
        uri, (endpoint, os.environ.get(endpoint) if isinstance(endpoint, str) else None), len(inputs), input_names,
        output_names, types, shapes, config, headers, tls, retry, bool(pure), on_error, single,
    )  # fmt: skip
    site = _SITES.get(key)
    if site is not None:
        try:
            return site(inputs, timeout_s)
        except SignatureError:
            if not site.client.forget():  # else the model may be another by now
                raise
    # What a call takes in all bounds the request for metadata: call sites are alike whatever that is.
    client = Client.of(uri, headers, retry, tls=tls, timeout_s=math.inf, endpoint=endpoint)
    by_kernel(client)  # builds it, which takes nothing of the call's time

    def made() -> CallSite:
        site = CallSite.of(
            client, len(inputs), input_names, output_names, types, shapes,
            single=single, config=config, pure=bool(pure), on_error=on_error,
        )  # fmt: skip
        return _SITES.put(key, site)

    with within(Deadline.after(_seconds(timeout_s))):
        try:
            return made()(inputs, timeout_s)
        except SignatureError:
            if not client.forget():
                raise
            return made()(inputs, timeout_s)


def _timeout(timeout_s: Any) -> Any:
    """A number above 0, or a scalar tensor of float32."""
    if isinstance(timeout_s, int | float) or not tf.is_tensor(timeout_s):
        check_length("timeout_s", timeout_s)
        return timeout_s
    if not timeout_s.shape.is_compatible_with([]) or not (timeout_s.dtype.is_floating or timeout_s.dtype.is_integer):
        raise SpecError(f"expected a scalar tensor, got {timeout_s.dtype.name} {timeout_s.shape}", path="timeout_s")
    return tf.cast(timeout_s, tf.float32)


def _seconds(timeout_s: Any) -> float:
    """What the request for metadata may take: a tensor of a graph has no value yet."""
    if not tf.is_tensor(timeout_s):
        return float(timeout_s)
    return max(0.0, float(timeout_s)) if tf.executing_eagerly() else 30.0


def _key(*arguments: Any) -> Hashable:
    """What call sites that are alike have in common; what has no hash is like nothing else."""
    key = tuple(map(_frozen, arguments))
    try:
        hash(key)
    except TypeError:
        return object()
    return key


def _frozen(value: Any) -> Any:
    if value is None or isinstance(value, str | bool):  # most are
        return value
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    return tuple(value.items()) if isinstance(value, Mapping) else value
