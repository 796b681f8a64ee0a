"""What a reply says: arrays, a signature, or the error that it tells of.

It sends nothing. Nothing of a reply is believed before it is checked.
"""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy.typing as npt

from remote_ops import graphpipe
from remote_ops.errors import (
    BadStatus,
    DeadlineExceeded,
    DecodeError,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    ModelUnavailable,
    Overloaded,
    RemoteOpsError,
    SignatureError,
    from_answer,
)
from remote_ops.signature import Signature, TensorSpec
from remote_ops.transport import Reply

__all__ = ["metadata_of", "results_of"]

Array = npt.NDArray[Any]
Buffer: TypeAlias = "bytes | bytearray | memoryview"
_T = TypeVar("_T")


def results_of(reply: Reply, url: str, wanted: Sequence[TensorSpec]) -> dict[str, Array]:
    """The outputs that were asked for, by name; raises what the reply from `url` tells of."""
    response = _read(reply, url, graphpipe.decode_response)
    if response.errors:
        raise from_answer(*response.errors[0], endpoint=url)
    if len(response.tensors) != len(wanted):
        raise InternalError(f"expected {len(wanted)} outputs, got {len(response.tensors)}", endpoint=url)
    try:
        return {
            spec.name: spec.view(array, kind="output")
            for spec, array in zip(wanted, response.tensors, strict=True)
        }  # fmt: skip
    except SignatureError as error:
        raise InternalError(f"the answer breaks the model's own signature: {error}", endpoint=url) from error


def metadata_of(reply: Reply, url: str) -> Signature:
    """The signature that was asked for; raises what the reply from `url` tells of."""
    return _read(reply, url, graphpipe.decode_metadata)


def _read(reply: Reply, url: str, decode: Callable[[Buffer], _T]) -> _T:
    if not 200 <= reply.status < 300:
        error = _error_of(reply, url)
        error.retry_after_s = _retry_after_s(reply.headers.get("retry-after", ""))
        raise error
    try:
        return decode(reply.body)
    except DecodeError as error:
        if not reply.body:
            raise BadStatus(
                f"{url} answered {reply.status} with an empty body: expected a GraphPipe message", status=reply.status
            ) from error
        if _is_text(reply):
            raise BadStatus(f"{_said(reply, url)}: expected a GraphPipe message", status=reply.status) from error
        raise DecodeError(
            f"the answer from {url} is no GraphPipe message: {error.message}", offset=error.offset, limit=error.limit
        ) from error


_BY_STATUS = {429: Overloaded, 502: ModelUnavailable, 503: ModelUnavailable}
_BY_STATUS_OF_PLAIN_TEXT = {400: InvalidRequest, 404: ModelNotFound, 500: InternalError}


def _error_of(reply: Reply, url: str) -> RemoteOpsError:
    """The exception for a status that is not 2xx: what our servers say in the body, what others say with the status."""
    try:
        errors = graphpipe.decode_response(reply.body).errors
    except DecodeError:
        errors = []
    if errors:
        return from_answer(*errors[0], endpoint=url)
    said = _said(reply, url)
    known = _BY_STATUS.get(reply.status)
    if known is None and reply.headers.get("content-type", "").startswith("text/plain"):
        known = _BY_STATUS_OF_PLAIN_TEXT.get(reply.status)
    if known is not None:
        return known(said, endpoint="")
    if reply.status == 504:
        return DeadlineExceeded(said)
    return BadStatus(said, status=reply.status)


def _retry_after_s(text: str) -> float | None:
    """Seconds from now that a `Retry-After` asks for, which is a number or a date; None without one that is either."""
    if text.isascii() and text.isdigit():
        return float(text[:12])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError, TypeError):
        return None


def _said(reply: Reply, url: str) -> str:
    if 300 <= reply.status < 400:
        location = reply.headers.get("location", "somewhere").partition("?")[0]
        return f"{url} answered {reply.status}: it moved to {location!r}; call that"
    if reply.status in (401, 403):
        return f"{url} answered {reply.status}: it wants to know who calls; pass headers={{'Authorization': ...}}"
    text = bytes(reply.body[:400]).decode(errors="replace")
    words = " ".join(re.sub(r"<[^>]*>", " ", text).split())[:160] if text.isprintable() or _is_text(reply) else ""
    return f"{url} answered {reply.status}" + (f": {words}" if words else "")


def _is_text(reply: Reply) -> bool:
    content_type = reply.headers.get("content-type", "")
    return content_type.startswith("text/") or "json" in content_type or "xml" in content_type
