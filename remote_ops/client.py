"""`Endpoint`: a model that lives at a URL, called like a function; blocking, awaited, or handed to the background.

It joins signature, wire, policy and transport, and writes none of them: names, dtypes and shapes are checked before a
byte is sent, and every reply is checked before anybody sees it.

Constant: addresses, headers, timeout, policies. Changing: the signature, fetched once under `_lock`; the numbers of the
replicas, which `Replicas` keeps; the transport's idle connections.

A plain call stays on the caller's thread. One that may be hedged needs two exchanges at once, so a blocking one runs on
the background loop while its thread waits: there the loser is cancelled, and so closes its connection, like any task.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import os
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt

from remote_ops.addresses import awaited
from remote_ops.background import Background, on_background_loop, result_of
from remote_ops.deadline import Deadline, ambient
from remote_ops.errors import (
    DeadlineExceeded,
    RemoteOpsError,
    SpecError,
)
from remote_ops.headers import Headers
from remote_ops.policy import Breaker, Hedge, Retry
from remote_ops.replicas import Replicas, ReplicaStats
from remote_ops.sendings import Attempts, Failed, Sending, first_answer
from remote_ops.signature import Signature
from remote_ops.telemetry import call_span, tracing
from remote_ops.transport import HttpTransport, Transport
from remote_ops.url import TLS, Url
from remote_ops.wire import Ask, wire_of

__all__ = ["Endpoint"]

Array = npt.NDArray[Any]


class Endpoint:
    """A model at a URL, or at several URLs that answer alike.

    Args:
        url: `http://`, `https://` or `http+unix://%2Fpath.sock/model`; a list of them for replicas. A host name with
            several addresses stands for as many replicas, unless the transport is yours. A path that ends in
            `/v2/models/NAME` or `/v2/models/NAME/versions/V` is spoken to by the Open Inference Protocol.
        timeout_s: seconds that a call may take in all, retries included, unless it or its surroundings say less.
        headers: sent with every request. A value may name environment variables as `${NAME}`; they are read at each
            call. A literal value is taken for a secret: it is neither shown nor pickled.
        tls: whom https trusts, and who we are.
        retry: how often a call that failed for a passing reason is sent again.
        transport: what carries the bytes; our own HTTP unless said.
        hedge: when a call that is late is sent a second time; never unless said.
        breaker: when a replica that fails is left alone.

    Raises:
        SpecError: an argument is wrong. The network is not touched before the first call.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        timeout_s: float = 30.0,
        headers: Mapping[str, str] | None = None,
        tls: TLS | None = None,
        retry: Retry = Retry(),  # noqa: B008 (immutable)
        transport: Transport | None = None,
        hedge: Hedge | None = None,
        breaker: Breaker = Breaker(),  # noqa: B008 (immutable)
    ) -> None:
        urls = tuple(url) if isinstance(url, list | tuple) else (url,)
        if not urls:
            raise SpecError("an endpoint needs at least one URL: got an empty list", path="url")
        Deadline.after(timeout_s)
        self._urls = tuple(Url.parse(text) for text in urls)
        _check_arguments(self._urls, headers, tls, transport, retry, hedge, breaker)
        self._wire = wire_of(self._urls)
        self.timeout_s = timeout_s
        self._headers = Headers(headers or {})
        self._retry = retry
        self._hedge = hedge
        self._breaker = breaker
        self._tls = tls
        self._has_own_transport = transport is not None
        self._transport: Transport = transport or HttpTransport(tls)
        self._signature: Signature | None = None
        self._start()

    def _start(self) -> None:
        expand = isinstance(self._transport, HttpTransport)
        self._replicas = Replicas(self._urls, self._retry, self._hedge, self._breaker, expand=expand)
        self._lock = threading.Lock()
        _ENDPOINTS.add(self)

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
        self._replicas.after_fork()

    @property
    def url(self) -> str:
        """The first address, without its query."""
        return self._urls[0].text

    @property
    def signature(self) -> Signature:
        """What the model takes and gives; asked of the server at the first use, and kept."""
        return self._signature or self._fetch_signature(self._bound(None))

    def __call__(self, *values: Any, config: bytes = b"", deadline: Deadline | None = None) -> Any:
        """Call the model with its inputs in order.

        Args:
            values: one array `(*dims)` per input, or what numpy makes one of.
            config: bytes handed to the model.
            deadline: the call ends by then, or by `timeout_s` from now if that is sooner.

        Returns:
            The output, or a tuple where the model has several. Arrays are views of the reply, yours to write to.

        Raises:
            SignatureError: a value does not fit; nothing was sent.
            TransportError: the bytes did not make the round trip in time.
            RemoteError: the server answered with an error.
        """
        bound = self._bound(deadline)
        signature = self._signature or self._fetch_signature(bound)
        results = self.infer(signature.bind(values, at=self.url), config=config, deadline=bound)
        return _unwrap(results)

    def infer(
        self,
        inputs: Mapping[str, Any],
        outputs: Sequence[str] | None = None,
        *,
        config: bytes = b"",
        deadline: Deadline | None = None,
    ) -> dict[str, Array]:
        """Call the model by names: the outputs asked for (all for None), in that order. Raises as calling does.

        Runs on the caller's thread. Costs one round trip, and a second one the first time, for the signature.
        """
        bound = self._bound(deadline)
        if not tracing():
            return self._infer(inputs, outputs, config, bound)
        with call_span("infer", self._urls[0]):
            return self._infer(inputs, outputs, config, bound)

    def _infer(
        self, inputs: Mapping[str, Any], outputs: Sequence[str] | None, config: bytes, bound: Deadline
    ) -> dict[str, Array]:
        signature = self._signature or self._fetch_signature(bound)
        ask = self._prepare(signature, inputs, outputs, config)
        results: dict[str, Array]
        try:
            results = self._exchange(ask, bound)
        except RemoteOpsError as error:
            results = self._exchange(ask.plainer(error), bound)
        return results

    async def ainfer(
        self,
        inputs: Mapping[str, Any],
        outputs: Sequence[str] | None = None,
        *,
        config: bytes = b"",
        deadline: Deadline | None = None,
    ) -> dict[str, Array]:
        """The same on the running loop; cancelling it closes the connection it waits on."""
        bound = self._bound(deadline)
        if not tracing():
            return await self._ainfer(inputs, outputs, config, bound)
        with call_span("infer", self._urls[0]):
            return await self._ainfer(inputs, outputs, config, bound)

    async def _ainfer(
        self, inputs: Mapping[str, Any], outputs: Sequence[str] | None, config: bytes, bound: Deadline
    ) -> dict[str, Array]:
        if self._signature is None:  # several at once may ask; the answers are alike
            self._signature = await self._aexchange(self._wire.metadata(), bound)
        ask = self._prepare(self._signature, inputs, outputs, config)
        results: dict[str, Array]
        try:
            results = await self._aexchange(ask, bound)
        except RemoteOpsError as error:
            results = await self._aexchange(ask.plainer(error), bound)
        return results

    def submit(
        self,
        inputs: Mapping[str, Any],
        outputs: Sequence[str] | None = None,
        *,
        config: bytes = b"",
        deadline: Deadline | None = None,
    ) -> concurrent.futures.Future[dict[str, Array]]:
        """The same in the background; the arrays must not be written to until it is done.

        Cancel the future to give the call up; so does dropping it, unless it has a callback.
        """
        bound = self._bound(deadline)
        return Background(self.ainfer(inputs, outputs, config=config, deadline=bound))

    def stats(self) -> tuple[ReplicaStats, ...]:
        """How each replica does: its state, requests in flight, failures, and how long its answers take."""
        return self._replicas.stats()

    def close(self) -> None:
        """Close the idle connections; the endpoint stays usable."""
        self._transport.close()

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        urls = self.url if len(self._urls) == 1 else [url.text for url in self._urls]
        headers = f", headers={self._headers.names}" if self._headers else ""
        return f"Endpoint({urls!r}, timeout_s={self.timeout_s}{headers})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Endpoint:
        return self  # nothing of it is the caller's to change

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in _KEPT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._wire = wire_of(self._urls)
        self._start()

    def describe(self) -> dict[str, Any] | None:
        """Say what `from_description` makes an equal endpoint of, in what JSON can hold; None if nothing can.

        That is so for a transport of the caller's. Secrets, the literal values of headers and the password of a key,
        are left out.
        """
        if self._has_own_transport:
            return None
        return {
            "url": [url.full for url in self._urls],
            "timeout_s": self.timeout_s,
            "headers": self._headers.describe(),
            "tls": self._tls.__getstate__() if self._tls else None,
            "retry": dataclasses.asdict(self._retry),
            "hedge": dataclasses.asdict(self._hedge) if self._hedge else None,
            "breaker": dataclasses.asdict(self._breaker),
        }

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> Endpoint:
        """Make an endpoint from what `describe` gave; one that had literal headers says so when it is called."""
        tls, hedge = description["tls"], description.get("hedge")
        made = cls(
            description["url"],
            description["timeout_s"],
            tls=TLS(**tls) if tls else None,
            retry=Retry(**description["retry"]),
            hedge=Hedge(**hedge) if hedge else None,
            breaker=Breaker(**description.get("breaker", {})),
        )
        made._headers = Headers.from_description(description["headers"])
        return made

    # how it is done

    def _bound(self, deadline: Deadline | None) -> Deadline:
        return Deadline.after(self.timeout_s).earlier(deadline).earlier(ambient())

    def _fetch_signature(self, bound: Deadline) -> Signature:
        left_s = max(0.0, min(bound.remaining(), threading.TIMEOUT_MAX))
        if not self._lock.acquire(timeout=left_s):
            raise DeadlineExceeded(f"no signature from {self.url} in time: another thread still waits for it")
        try:
            if self._signature is None:
                self._signature = self._exchange(self._wire.metadata(), bound)
            return self._signature
        finally:
            self._lock.release()

    def _prepare(
        self, signature: Signature, inputs: Mapping[str, Any], outputs: Sequence[str] | None, config: bytes
    ) -> Ask:
        arrays = signature.fit_inputs(inputs, at=self.url)
        ask = self._wire.infer(arrays, signature.select_outputs(outputs, at=self.url), config)
        return ask if self._retry.idempotent else ask._replace(otherwise=None)

    def _attempts(self, ask: Ask, bound: Deadline) -> Attempts:
        return Attempts(ask, bound, self._replicas, self._retry, self._headers)

    def _exchange(self, ask: Ask, bound: Deadline) -> Any:
        if self._hedge is not None and not on_background_loop():
            return result_of(Background[Any](self._aexchange(ask, bound)))
        attempts = self._attempts(ask, bound)
        if self._replicas.unsettled:
            concurrent.futures.wait(self._replicas.look_up(), _most(bound.remaining()))
        sending = attempts.first()
        while True:
            sending.begin()
            try:
                result = sending.read(self._transport.exchange(sending.call, bound))
            except RemoteOpsError as error:
                sending.failed(error)
                wait_s = attempts.wait_s(sending, error)
            except BaseException:
                sending.abandoned()
                raise
            else:
                sending.answered()
                return result
            time.sleep(wait_s)
            sending = attempts.again()

    async def _aexchange(self, ask: Ask, bound: Deadline) -> Any:
        attempts = self._attempts(ask, bound)
        if self._replicas.unsettled:
            lookups = asyncio.gather(*map(awaited, self._replicas.look_up()), return_exceptions=True)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(lookups, _most(bound.remaining()))
        sending = attempts.first()
        while True:
            try:
                return await self._asend(attempts, sending)
            except Failed as caught:
                failed = caught  # what is raised now is not raised while handling it
            try:
                wait_s = attempts.wait_s(failed.sending, failed.error)
            finally:
                del failed
            await asyncio.sleep(wait_s)
            sending = attempts.again()

    async def _asend(self, attempts: Attempts, sending: Sending) -> Any:
        after_s = self._replicas.delay_s if self._hedge is not None else None
        if after_s is None or not attempts.ask.runs:
            return await self._asend_one(attempts, sending)
        tasks = [asyncio.ensure_future(self._asend_one(attempts, sending))]
        try:
            since, left_s = time.monotonic(), after_s
            while left_s >= 0 and not tasks[0].done():  # uvloop counts whole milliseconds, and so may be early
                await asyncio.wait(tasks, timeout=_most(left_s))
                left_s = since + after_s - time.monotonic()
            second = None if tasks[0].done() else attempts.second()
            if second is None:
                return await tasks[0]
            tasks.append(asyncio.ensure_future(self._asend_one(attempts, second)))
            winner = await first_answer(tasks)
            if winner is tasks[1]:
                sending.outrun = True
            return winner.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _asend_one(self, attempts: Attempts, sending: Sending) -> Any:
        sending.begin()
        try:
            result = sending.read(await self._transport.aexchange(sending.call, attempts.bound))
        except RemoteOpsError as error:
            sending.failed(error)
            raise Failed(sending, error) from error
        except BaseException:
            sending.abandoned()
            raise
        sending.answered()
        return result


_KEPT = (
    *("_urls", "timeout_s", "_headers", "_retry", "_hedge", "_breaker"),
    *("_tls", "_has_own_transport", "_transport", "_signature"),
)


def _check_arguments(
    urls: Sequence[Url], headers: Any, tls: Any, transport: Any, retry: Any, hedge: Any, breaker: Any
) -> None:
    """Say which argument of an `Endpoint` is not what it should be, or would be ignored."""
    for name, value, kind, what in (
        ("headers", headers, Mapping, "a dict of names and values"),
        ("tls", tls, TLS, "a TLS(...)"),
        ("retry", retry, Retry, "a Retry(...)"),
        ("hedge", hedge, Hedge, "a Hedge(...)"),
        ("breaker", breaker, Breaker, "a Breaker(...)"),
    ):
        if not isinstance(value, kind) and (value is not None or name in ("retry", "breaker")):
            raise SpecError(f"expected {what}, got a {type(value).__name__}", path=name)
    if tls is not None and transport is not None:
        raise SpecError("the transport has its own TLS: pass one of the two", path="tls")
    if tls is not None and not any(url.scheme == "https" for url in urls):
        raise SpecError(f"TLS is for https: got {urls[0].text}", path="tls")
    if hedge is not None and not retry.idempotent:
        raise SpecError("a hedged call may be sent twice: it needs Retry(idempotent=True)", path="hedge")


def _most(left_s: float) -> float:
    """What a wait of the standard library can still count."""
    return max(0.0, min(left_s, threading.TIMEOUT_MAX, 1e6))


def _unwrap(results: dict[str, Array]) -> Any:
    values = tuple(results.values())
    return values[0] if len(values) == 1 else values


# --------------------------------------------------------------------------- processes


_ENDPOINTS: weakref.WeakSet[Endpoint] = weakref.WeakSet()


def _after_fork() -> None:
    """A lock held by another thread at the fork stays held in the child, and that thread is gone: start anew."""
    for endpoint in tuple(_ENDPOINTS):
        endpoint._after_fork()


os.register_at_fork(after_in_child=_after_fork)
