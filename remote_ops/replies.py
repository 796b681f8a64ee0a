"""What a reply says: arrays, a signature, or the error that it tells of; in each protocol that we speak.

It sends nothing. Nothing of a reply is believed before it is checked.
"""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias, TypeVar

import numpy.typing as npt

from remote_ops import graphpipe, oip
from remote_ops.errors import (
    ANSWERS,
    BadStatus,
    DeadlineExceeded,
    DecodeError,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    ModelUnavailable,
    NotDifferentiable,
    Overloaded,
    RemoteOpsError,
    SignatureError,
    SpecError,
    from_answer,
)
from remote_ops.signature import Signature, TensorSpec
from remote_ops.transport import Reply

__all__ = ["metadata_of", "oip_metadata_of", "oip_results_of", "results_of"]

Array = npt.NDArray[Any]
_ErrorOf: TypeAlias = "Callable[[Reply, str], RemoteOpsError]"
_T = TypeVar("_T")


# --------------------------------------------------------------------------- GraphPipe


def results_of(reply: Reply, url: str, wanted: Sequence[TensorSpec]) -> dict[str, Array]:
    """The outputs that were asked for, by name; raises what the reply from `url` tells of."""
    response = _read(reply, url, graphpipe.decode_response, "GraphPipe message", _error_of)
    if response.errors:
        raise from_answer(*response.errors[0], endpoint=url)
    if len(response.tensors) != len(wanted):
        raise InternalError(f"expected {len(wanted)} outputs, got {len(response.tensors)}", endpoint=url)
    return _viewed(wanted, response.tensors, url)


def metadata_of(reply: Reply, url: str) -> Signature:
    """The signature that was asked for; raises what the reply from `url` tells of."""
    return _read(reply, url, graphpipe.decode_metadata, "GraphPipe message", _error_of)


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
    plain_text = reply.headers.get("content-type", "").startswith("text/plain")
    return _error_of_status(reply, url, _BY_STATUS | (_BY_STATUS_OF_PLAIN_TEXT if plain_text else {}))


# --------------------------------------------------------------------------- Open Inference Protocol


def oip_metadata_of(reply: Reply, url: str) -> Signature:
    """The signature that was asked for; raises what the reply from `url` tells of, or that it says nothing."""
    signature = _read(reply, url, oip.decode_metadata, "description of a model", _oip_error)
    if signature.inputs or signature.outputs:
        return signature
    raise SpecError(
        "the server says neither what the model takes nor what it gives: declare inputs and outputs in its settings "
        "there (model-settings.json of MLServer, get_input_types and get_output_types of KServe)",
        path=url,
    )


def oip_results_of(reply: Reply, url: str, wanted: Sequence[TensorSpec]) -> dict[str, Array]:
    """The outputs that were asked for, by name; raises what the reply from `url` tells of."""

    def decode(body: memoryview) -> oip.InferResponse:
        return oip.decode_response(body, oip.parse_json_size(reply.headers.get(oip.JSON_SIZE_HEADER.lower())))

    asks_gradients = any(spec.name.startswith("gradient:") for spec in wanted)
    error_of = partial(_oip_error, unsupported=NotDifferentiable if asks_gradients else InvalidRequest)
    tensors = _read(reply, url, decode, "reply to an inference request", error_of).tensors
    missing = [spec.name for spec in wanted if spec.name not in tensors]
    if missing:
        got = ", ".join(tensors) or "none"
        raise InternalError(f"expected the outputs {', '.join(missing)}, got {got}", endpoint=url)
    return _viewed(wanted, [tensors[spec.name] for spec in wanted], url)  # some servers give all, asked or not


_CODES = {answer.status: answer.code for answer in ANSWERS}
_REFUSED = dict.fromkeys((400, 415, 422), InvalidRequest)


def _oip_error(reply: Reply, url: str, unsupported: type[RemoteOpsError] = InvalidRequest) -> RemoteOpsError:
    """The exception for a status that is not 2xx: its class by the status, its words from the body."""
    words, status = oip.decode_error(reply.body), reply.status
    if words is None or (status not in _CODES and status not in _REFUSED):
        return _error_of_status(reply, url, _BY_STATUS | _REFUSED)
    if status in _REFUSED or (status == 501 and unsupported is InvalidRequest):
        return InvalidRequest(words, endpoint=url)
    return from_answer(_CODES[status], words, endpoint=url)


# --------------------------------------------------------------------------- both


def _viewed(wanted: Sequence[TensorSpec], tensors: Sequence[Array], url: str) -> dict[str, Array]:
    try:
        return {
            spec.name: spec.view(array, kind="output")
            for spec, array in zip(wanted, tensors, strict=True)
        }  # fmt: skip
    except SignatureError as error:
        raise InternalError(f"the answer breaks the model's own signature: {error}", endpoint=url) from error


def _read(
    reply: Reply,
    url: str,
    decode: Callable[[memoryview], _T],
    what: str,
    error_of: _ErrorOf,
) -> _T:
    if not 200 <= reply.status < 300:
        error = error_of(reply, url)
        error.retry_after_s = _retry_after_s(reply.headers.get("retry-after", ""))
        raise error
    try:
        return decode(reply.body)
    except DecodeError as error:
        if not reply.body:
            raise BadStatus(
                f"{url} answered {reply.status} with an empty body: expected a {what}", status=reply.status
            ) from error
        if _is_text(reply):
            raise BadStatus(f"{_said(reply, url)}: expected a {what}", status=reply.status) from error
        raise DecodeError(
            f"the answer from {url} is no {what}: {error.message}", offset=error.offset, limit=error.limit
        ) from error


def _error_of_status(reply: Reply, url: str, by_status: Mapping[int, type[Any]]) -> RemoteOpsError:
    said = _said(reply, url)
    known = by_status.get(reply.status)
    if known is not None:
        error: RemoteOpsError = known(said, endpoint="")
        return error
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
