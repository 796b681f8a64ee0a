"""`remote-ops ping`: whether models are there, and how long asking takes."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import NamedTuple, TypeVar

from remote_ops.cli.text import printable, title
from remote_ops.client import Endpoint
from remote_ops.errors import DeadlineExceeded, RemoteOpsError, SpecError
from remote_ops.policy import Retry
from remote_ops.transport import HttpTransport

__all__ = ["Pings", "line", "ping"]

_In = TypeVar("_In")
_Out = TypeVar("_Out")


class Pings(NamedTuple):
    """How an address answered.

    Args:
        url: the address, without its query.
        name: name and version of the model there; empty if it never answered.
        took_s: seconds of each round trip that was answered; the first includes connecting.
        errors: what the others ended with.
    """

    url: str
    name: str
    took_s: Sequence[float]
    errors: Sequence[RemoteOpsError]


def ping(
    urls: Sequence[str], *, headers: Mapping[str, str], count: int, interval_s: float, timeout_s: float
) -> Iterator[Pings]:
    """Ask each address `count` times for its signature, all addresses at once; gives them in the order of `urls`.

    Nothing is tried again, and an address that has let a request time out before it ever answered is not asked again.

    Raises:
        SpecError: a URL or a header is wrong.
    """

    for url in urls:
        Endpoint(url, timeout_s, headers)  # all faults before any request

    def ask(url: str) -> Pings:
        with contextlib.closing(HttpTransport()) as transport:
            once = Retry(attempts=1)
            return _ping(lambda: Endpoint(url, timeout_s, headers, retry=once, transport=transport), count, interval_s)

    return _at_once(ask, urls)


def _ping(made: Callable[[], Endpoint], count: int, interval_s: float) -> Pings:
    took_s: list[float] = []
    errors: list[RemoteOpsError] = []
    name = ""
    for number in range(count):
        time.sleep(interval_s if number else 0.0)
        endpoint = made()  # one would keep its signature and not ask again; the connection is kept by the transport
        since = time.monotonic()
        try:
            name = title(endpoint.signature)
        except SpecError:  # a variable of a header is not set
            raise
        except RemoteOpsError as error:
            errors.append(error)
            if isinstance(error, DeadlineExceeded) and not took_s:
                break
        else:
            took_s.append(time.monotonic() - since)
    return Pings(endpoint.url, name, took_s, errors)


def _at_once(function: Callable[[_In], _Out], items: Sequence[_In]) -> Iterator[_Out]:
    """The results in order, each from a thread of its own that does not keep the process from ending."""

    def run(item: _In, result: Future[_Out]) -> None:
        try:
            result.set_result(function(item))
        except BaseException as error:
            result.set_exception(error)

    results: list[Future[_Out]] = [Future() for _ in items]
    for item, result in zip(items, results, strict=True):
        threading.Thread(target=run, args=(item, result), daemon=True).start()
    return (result.result() for result in results)


def line(pings: Pings) -> str:
    """What to print for an address: `up`, `down` if it never answered, `flaky` if only sometimes."""
    state = "up" if not pings.errors else "flaky" if pings.took_s else "down"
    parts = [f"{state:<5}  {pings.url}"]
    if pings.took_s:
        parts.append(f"{pings.name}  {_times(pings.took_s)}")
    if pings.took_s and pings.errors:
        parts.append(f"{len(pings.errors)} of {len(pings.errors) + len(pings.took_s)} failed")
    if pings.errors:
        parts.append(f"{type(pings.errors[-1]).__name__}: {pings.errors[-1]}")
    return printable("  ".join(parts))


def _times(took_s: Sequence[float]) -> str:
    first_ms, *ms = [one * 1e3 for one in took_s]
    if not ms:
        return f"{first_ms:.1f} ms with connecting"
    rest = f"min {min(ms):.1f} median {statistics.median(ms):.1f} max {max(ms):.1f} ms"
    return f"first {first_ms:.1f} ms with connecting, then {rest}"
