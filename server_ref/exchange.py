"""One request of a client as a protocol sees it, what a protocol needs of the front, and the answers that all give.

It knows no protocol's messages. All of it happens on the loop's thread.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from remote_ops import http1, oip
from remote_ops.deadline import Deadline
from remote_ops.errors import InvalidRequest, RemoteOpsError
from remote_ops.signature import Array, TensorSpec
from server_ref.answer import JSON, Answer
from server_ref.catalog import Catalog
from server_ref.connection import Connection
from server_ref.model import Run, Version
from server_ref.repository import Entry

__all__ = [
    "Exchange",
    "Host",
    "ModelControl",
    "checked",
    "deadline_of",
    "json_answer",
    "not_offered",
    "refusal",
    "wrong_method",
]


class Exchange(NamedTuple):
    """One request and where its answer goes; `path` is unquoted and without its query."""

    method: str
    path: str
    head: http1.Head
    body: memoryview | bytes
    connection: Connection


class ModelControl(Protocol):
    """Who loads and unloads models while the server runs."""

    async def load(self, name: str, *, version: str = "") -> Any:
        """Serve a model, or serve it anew; returns once it answers."""

    async def unload(self, name: str, *, version: str = "") -> Any:
        """Serve it no more."""


class Host(Protocol):
    """What a protocol needs of the front.

    `control` is there where a client may load and unload, `index` where more models are known than are served.
    """

    catalog: Catalog
    ready: bool
    draining: bool
    control: ModelControl | None
    index: Callable[[], Iterable[Entry]] | None

    def begin(self, run: Run, connection: Connection, copy_to: Version | None = None) -> Answer | None:
        """Set out on a run whose answer goes to a connection; its answer, if that is there at once."""

    def later(self, work: Callable[[], Any], then: Callable[[Any], Answer | None], connection: Connection) -> None:
        """Do `work` on another thread and go on with what it gives, on the loop: `then` answers as a route does."""

    def wait_for(self, awaited: Awaitable[Any], then: Callable[[Any], Answer], connection: Connection) -> None:
        """Wait for something and go on with what it gives."""


def deadline_of(head: http1.Head, arrived_at: float) -> Deadline:
    """By when the client of a request that is here since `arrived_at` wants its answer; never, unless it says.

    Raises:
        InvalidRequest: the header is no number of milliseconds.
    """
    left = head.headers.get("x-request-timeout-ms")
    if left is None:
        return Deadline.never()
    if not (left.isascii() and left.isdigit() and len(left) <= 12):
        raise InvalidRequest(f"X-Request-Timeout-Ms: expected a number of milliseconds, got {left[:32]!r}")
    return Deadline(arrived_at + int(left) / 1000)


def checked(
    version: Version, arrays: Mapping[str, Array], names: Sequence[str]
) -> tuple[dict[str, Array], tuple[TensorSpec, ...]]:
    """The inputs of a request and the outputs it wants (none: all) as the signature has them.

    Raises:
        SignatureError, NotDifferentiable: they do not fit; that is counted.
    """
    try:
        inputs = version.signature.view_inputs(arrays, at=version.name)
        return inputs, version.signature.select_outputs(names or None, at=version.name)
    except RemoteOpsError as error:
        version.refused(error)
        raise


def json_answer(value: Any, status: int = 200) -> Answer:
    """A value as JSON."""
    return Answer(status, JSON, (json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(),))


def refusal(status: int, message: str, *headers: tuple[str, str]) -> Answer:
    """An error with a status of its own, as JSON."""
    return Answer(status, JSON, (oip.encode_error(message),), headers)


def wrong_method(method: str, allowed: str) -> Answer:
    """What to say to a method that a path does not have."""
    return refusal(405, f"no {method} here: expected {allowed}", ("Allow", f"{allowed}, OPTIONS"))


def not_offered(what: str) -> Answer:
    """What to say to what other servers do and this one does not."""
    return refusal(501, f"{what}: this server does not offer that")
