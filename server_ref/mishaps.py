"""The last requests that went wrong, for whoever looks after a server; without a byte of what they sent or got.

It is told; it asks nobody, and looks at no clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from remote_ops.errors import NodeError, RemoteError, RemoteOpsError, brief
from server_ref.names import one_line, without_places

__all__ = ["Mishap", "Mishaps", "told_of"]

_KEPT = 50


class Mishap(NamedTuple):
    """One request that went wrong: when (seconds since 1970), of which model, and the class and words of its error.

    `version` is that of the model, where one had been chosen.
    """

    at: float
    model: str
    request_id: str
    kind: str
    message: str
    version: str = ""


class Mishaps:
    """The latest of them; how many there were in all is for the counters of each model."""

    def __init__(self, most: int = _KEPT) -> None:
        self._kept: deque[Mishap] = deque(maxlen=most)

    def add(self, error: BaseException, *, at: float, model: str, request_id: str = "", version: str = "") -> Mishap:
        """Take note of one, and give it as it is told; costs some 5 us."""
        told = Mishap(at, model, one_line(request_id, 64), type(error).__name__, told_of(error), version)
        self._kept.append(told)
        return told

    def __iter__(self) -> Iterator[Mishap]:
        """The latest first."""
        return iter(tuple(self._kept)[::-1])

    def __len__(self) -> int:
        return len(self._kept)


def told_of(error: BaseException) -> str:
    """What may be kept of an error: our own words as one line, never those of a model or a peer, which may be data."""
    if isinstance(error, NodeError):
        cause = brief(error.__cause__) if error.__cause__ is not None else "an error"
        return one_line(f"node '{error.node}' of '{error.graph}' failed: {cause}")
    theirs = isinstance(error, RemoteError) and str(error) != error.message  # an endpoint said it
    if theirs or not isinstance(error, RemoteOpsError):
        return f"the model raised {brief(error)}"
    return one_line(without_places(str(error)))
