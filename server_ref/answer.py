"""What goes back to a client: an answer as buffers, and the one that says what went wrong.

It knows no connections and no models.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from remote_ops import graphpipe, http1, oip
from remote_ops.errors import FramingError, RemoteError, RemoteOpsError, answer_of
from server_ref.access import AccessDenied
from server_ref.names import without_places

__all__ = [
    "BINARY",
    "JSON",
    "TEXT",
    "Answer",
    "Failure",
    "error_form",
    "failure_of",
    "graphpipe_error",
    "json_error",
    "text_error",
]

Buffer: TypeAlias = "bytes | bytearray | memoryview"
log = logging.getLogger("server_ref")

BINARY = "application/octet-stream"
JSON = "application/json"
TEXT = "text/plain; charset=utf-8"


class Answer(NamedTuple):
    """What goes back: status, content type, and the body as buffers."""

    status: int
    content_type: str
    body: Sequence[Buffer]
    headers: Sequence[tuple[str, str]] = ()


class Failure(NamedTuple):
    """What a client is told of an error: the words, the code of our table, the status, and headers."""

    message: str
    code: int
    status: int
    headers: Sequence[tuple[str, str]]


def failure_of(error: BaseException) -> Failure:
    """What to tell of an error: a message that says why, without traces or paths of ours."""
    if isinstance(error, RemoteOpsError):
        message = error.message if isinstance(error, RemoteError) else str(error)
    else:
        message = f"the model raised {type(error).__name__}{_first_line(error)}"
        log.error("a model raised", exc_info=error)
    if isinstance(error, AccessDenied):
        challenge = [("WWW-Authenticate", error.challenge)] if error.challenge else []
        return Failure(message, error.code, error.status, challenge)
    _, code, status = answer_of(error)
    status = error.status if isinstance(error, FramingError) else status
    # What a client asked wrongly is told in its own words; what went wrong here may speak of files.
    message = without_places(message) if status >= 500 else message
    return Failure(message, code, status, [("Retry-After", "1")] if status in (429, 503) else [])


def _first_line(error: BaseException) -> str:
    try:
        return f": {(str(error).splitlines() or [''])[0][:300]}"
    except Exception:  # it cannot even say what it is
        return ""


def graphpipe_error(error: BaseException) -> Answer:
    """An error as a GraphPipe message with its code and words."""
    failure = failure_of(error)
    body = graphpipe.encode_error(failure.code, failure.message)
    return Answer(failure.status, BINARY, (body,), failure.headers)


def text_error(error: BaseException) -> Answer:
    """An error as a line of text, as the servers of 2018 answer."""
    failure = failure_of(error)
    return Answer(failure.status, TEXT, (f"{failure.message}\n".encode(),), failure.headers)


def json_error(error: BaseException) -> Answer:
    """An error as `{"error": words}`, as the Open Inference Protocol and TensorFlow Serving answer."""
    failure = failure_of(error)
    return Answer(failure.status, JSON, (oip.encode_error(failure.message),), failure.headers)


_IN_JSON = ("/v2/", "/v2?", "/v1/models/")


def error_form(head: http1.Head) -> Callable[[BaseException], Answer]:
    """How a client is told of errors: in the words of the protocol that its path means."""
    if head.target.startswith(_IN_JSON) or head.target == "/v2":
        return json_error
    return text_error if head.headers.get("accept", "").startswith("text/plain") else graphpipe_error
