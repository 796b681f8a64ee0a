"""Who is called, and how: what a graph or a layer holds of an endpoint, and what its server says of the model.

It calls nobody but for metadata, and knows no framework; `callsite` makes the ops.

State: the last signatures, for half a minute each, in `_SIGNATURES`, which has its own lock.
"""

from __future__ import annotations

import functools
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from remote_ops.client import Endpoint
from remote_ops.deadline import Deadline
from remote_ops.environment import names_variables
from remote_ops.errors import RemoteOpsError, SpecError
from remote_ops.policy import Retry
from remote_ops.signature import Signature
from remote_ops.url import TLS, Url
from remote_ops.wire import speaks_oip

__all__ = ["Client", "Kept", "check_length"]

_Value = TypeVar("_Value")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Kept(Generic[_Value]):
    """The values last used, each for a while; safe to use from several threads.

    Args:
        most: how many; the one not used for longest goes first.
        age_s: how long a value is fresh, in seconds.
        clock: tells the time.
    """

    def __init__(self, most: int, age_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._age_s, self.clock = most, age_s, clock
        self._lock = threading.Lock()
        self._values: OrderedDict[Hashable, tuple[float, _Value]] = OrderedDict()

    def get(self, key: Hashable, *, stale: bool = False) -> _Value | None:
        """The value kept under a key; one that is no longer fresh only if it may be `stale`."""
        with self._lock:
            found = self._values.get(key)
            if found is None or not (stale or self.clock() - found[0] < self._age_s):
                return None
            self._values.move_to_end(key)
            return found[1]

    def put(self, key: Hashable, value: _Value) -> _Value:
        """Keep a value from now on."""
        with self._lock:
            self._values[key] = (self.clock(), value)
            self._values.move_to_end(key)
            while len(self._values) > self._most:
                self._values.popitem(last=False)
        return value

    def drop(self, key: Hashable, *, older_than_s: float) -> bool:
        """Forget a value that has been there for longer; whether there was one."""
        with self._lock:
            found = self._values.get(key)
            if found is None or self.clock() - found[0] < older_than_s:
                return False
            del self._values[key]
            return True


_SIGNATURES: Kept[Signature] = Kept(256, age_s=30.0)


@dataclass(frozen=True)
class Client:
    """Who is called, and how: what a graph or a layer holds of an endpoint.

    Args:
        urls: of the replicas; none if `endpoint` is given.
        headers: names and values; a value names environment variables as `${NAME}`, which are read at each call.
        tls: whom https trusts, and who we are.
        timeout_s: seconds that asking for metadata may take in all, retries included; a layer's calls too.
        connect_timeout_s, attempt_timeout_s: seconds that connecting and one sending may take; None for no own limit.
        retry: how often a call that failed for a passing reason is sent again.
        endpoint: an environment variable that holds the URLs, separated by spaces; it is read at each call.
        ipv6: whether an address may be an IPv6 one: it may not for the ops of TensorFlow.

    Raises:
        SpecError: an argument is wrong, or a header has a literal value, which everybody could read in what is saved.
    """

    urls: tuple[str, ...] = ()
    headers: tuple[tuple[str, str], ...] = ()
    tls: TLS | None = None
    timeout_s: float = 30.0
    connect_timeout_s: float | None = None
    attempt_timeout_s: float | None = None
    retry: Retry = Retry()  # noqa: RUF009 (immutable)
    endpoint: str | None = None
    ipv6: bool = False

    def __post_init__(self) -> None:
        self._check_place()
        self._check_as_endpoint()
        for name, length in (
            ("timeout_s", self.timeout_s),
            ("connect_timeout_s", self.connect_timeout_s),
            ("attempt_timeout_s", self.attempt_timeout_s),
        ):
            check_length(name, length)
        self._check_secrets()

    def _check_place(self) -> None:
        if bool(self.urls) == (self.endpoint is not None):
            got = "both" if self.urls else "neither"
            raise SpecError(f"expected a URL, or endpoint='NAME' of a variable that holds it: got {got}", path="uri")
        if self.endpoint is not None and not (isinstance(self.endpoint, str) and _NAME.fullmatch(self.endpoint)):
            raise SpecError(f"expected the name of an environment variable, got {self.endpoint!r}", path="endpoint")
        self._check_urls(self.urls)

    def _check_urls(self, urls: Sequence[str]) -> None:
        for url in urls:
            parsed = Url.parse(url)
            if ":" in parsed.host and not self.ipv6:
                raise SpecError(
                    "the ops use TensorFlow's own libcurl, which has no IPv6: expected the name of a host or an IPv4 "
                    f"address, got '{parsed.text}'",
                    path="uri",
                )

    def _check_as_endpoint(self) -> None:
        """What an `Endpoint` refuses, an op refuses; making one touches no network."""
        usual = "https://localhost" if self.tls else "http://localhost"
        Endpoint(list(self.urls) or usual, headers=dict(self.headers), tls=self.tls, retry=self.retry)

    def _check_secrets(self) -> None:
        for name, value in self.headers:
            if not isinstance(value, str) or not names_variables(value):
                raise SpecError(
                    f"header '{name}' has a literal value, which everybody could read in a saved model: write it as "
                    "'${NAME}', to be read from the environment at each call",
                    path="headers",
                )
        if self.tls is not None and self.tls.password and not names_variables(self.tls.password):
            raise SpecError("the password of a key would stand in a saved model: write it as '${NAME}'", path="tls")

    @classmethod
    def of(
        cls, uri: str | Sequence[str] | None, headers: Mapping[str, str] | None, retry: Retry, **options: Any
    ) -> Client:
        """A client from what `remote_op` and `RemoteLayer` take."""
        urls = () if uri is None else tuple(uri) if isinstance(uri, list | tuple) else (uri,)
        if headers is not None and not isinstance(headers, Mapping):
            raise SpecError(f"expected a dict of names and values, got a {type(headers).__name__}", path="headers")
        return cls(urls, tuple((headers or {}).items()), retry=retry, **options)

    @property
    def places(self) -> tuple[str, ...]:
        """The URLs as they are now.

        Raises:
            SpecError: the variable that is to hold them does not.
        """
        if self.endpoint is None:
            return self.urls
        urls = tuple(os.environ.get(self.endpoint, "").split())
        if not urls:
            raise SpecError(
                f"the environment variable {self.endpoint}, which is to hold the URL of the model, is not set: set it, "
                "or give names and dtypes, so that it is needed only when the model is called",
                path="endpoint",
            )
        try:
            self._check_urls(urls)
        except SpecError as error:
            raise SpecError(f"the environment variable {self.endpoint} holds {error}") from None
        return urls

    @property
    def text(self) -> str:
        """What messages call it: the first address, without its query, or the variable that holds it."""
        return Url.parse(self.urls[0]).text if self.endpoint is None else f"${self.endpoint}"

    @property
    def speaks_oip(self) -> bool:
        """Whether the model is spoken to by the Open Inference Protocol, as far as the URLs are known now."""
        return _speaks_oip(self.urls if self.endpoint is None else tuple(os.environ.get(self.endpoint, "").split()))

    @property
    def signature(self) -> Signature:
        """What the model takes and gives; asked of the server, and kept for half a minute.

        An answer of before stands in where the server cannot be reached: the call itself will say so.
        """
        key = self._key
        found = _SIGNATURES.get(key)
        if found is not None:
            return found
        try:
            return _SIGNATURES.put(key, self.ask())
        except RemoteOpsError as error:
            known = _SIGNATURES.get(key, stale=True)
            if known is None or not error.retryable:
                raise
            return known

    def forget(self) -> bool:
        """Have the server asked again, if it was not in the last second: whether it will be."""
        return _SIGNATURES.drop(self._key, older_than_s=1.0)

    @property
    def _key(self) -> Hashable:
        return self.places, self.headers, self.tls

    def ask(self) -> Signature:
        """What the model takes and gives, asked of the server now.

        Raises:
            RemoteOpsError: it cannot be had.
        """
        with self.as_endpoint() as endpoint:
            return endpoint.signature

    def as_endpoint(self) -> Endpoint:
        """An endpoint at the URLs as they are now; the network is not touched."""
        return Endpoint(list(self.places), self.timeout_s, dict(self.headers), self.tls, self.retry)


@functools.lru_cache(maxsize=256)
def _speaks_oip(urls: tuple[str, ...]) -> bool:
    try:
        return any(speaks_oip(Url.parse(url)) for url in urls)
    except SpecError:  # a variable may hold anything now, and a URL when the model is called
        return False


def check_length(name: str, length: float | None) -> None:
    """Raise `SpecError` unless it is a number of seconds above 0, or None."""
    if length is None:
        return
    Deadline.after(length)
    if not length > 0:
        raise SpecError(f"expected a number of seconds above 0, got {length!r}", path=name)
