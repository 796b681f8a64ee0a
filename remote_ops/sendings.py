"""The sendings of one call: which replica is asked next, when, and what the caller is told in the end.

It decides by `policy` and keeps the books in `Replicas`; it sends nothing itself.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import math
import random
import time
from collections.abc import Sequence
from typing import Any

from remote_ops.deadline import Deadline
from remote_ops.errors import DeadlineExceeded, RemoteOpsError, brief
from remote_ops.headers import Headers
from remote_ops.policy import Retry
from remote_ops.replicas import Replica, Replicas
from remote_ops.telemetry import SendingSpan, carried, log, note, tracing
from remote_ops.transport import Call, Reply
from remote_ops.wire import Ask

__all__ = ["Attempts", "Failed", "Sending", "first_answer"]

_LONGEST_MS = 10**12 - 1  # what a server reads


class Failed(Exception):
    """A sending ended with an error; never reaches a caller."""

    def __init__(self, sending: Sending, error: RemoteOpsError) -> None:
        super().__init__()
        self.sending = sending
        self.error = error


class Sending:
    """One request of a call to one replica: it begins, and then ends in one of three ways."""

    __slots__ = ("_attempts", "_copy", "_number", "_reply", "_since", "_span", "call", "outrun", "replica")

    def __init__(self, attempts: Attempts, replica: Replica, call: Call, number: int, *, copy: bool) -> None:
        self._attempts = attempts
        self._number = number
        self._copy = copy
        self._since = 0.0
        self._span: SendingSpan | None = None
        self._reply: Reply | None = None
        self.replica = replica
        self.call = call
        self.outrun = False

    def begin(self) -> None:
        attempts = self._attempts
        self._since = attempts.replicas.begin(self.replica, first=self._number == 1 and not self._copy)
        if tracing():
            self._span = SendingSpan(
                self.call,
                attempt=self._number,
                copy=self._copy,
                runs=attempts.ask.runs,
                unless=attempts.headers.lowered,
            )
            self.call = self.call._replace(headers=(*self.call.headers, *self._span.headers))
        if passed_on := carried(unless=attempts.headers.lowered, but=self._span.headers if self._span else ()):
            self.call = self.call._replace(headers=(*self.call.headers, *passed_on))

    def read(self, reply: Reply) -> Any:
        """What the reply says; raises the error that it tells of."""
        self._reply = reply
        return self._attempts.ask.read(reply, self.call.url.text)

    def answered(self) -> None:
        self._attempts.replicas.answered(self.replica, self._since, measured=self._attempts.ask.runs)
        self._told("answered")

    def failed(self, error: RemoteOpsError) -> None:
        self._attempts.replicas.failed(self.replica, self._since, error)
        self._told("failed", error)

    def abandoned(self) -> None:
        self._attempts.replicas.abandoned(self.replica, self._since, outrun=self.outrun)
        self._told("outrun" if self.outrun else "given up")

    def _told(self, how: str, error: RemoteOpsError | None = None) -> None:
        if self._span is not None:
            self._span.end(how, self._reply, error)
        note(self.call, self._number, brief(error) if error else how, self._since, self._reply)
        if log.isEnabledFor(logging.DEBUG):
            log.debug(
                "%s %s, attempt %d%s: %s after %.3f s; %d bytes sent, %s",
                self.call.url.method,
                self.call.url.text,
                self._number,
                " (a copy)" if self._copy else "",
                brief(error) if error else how,
                time.monotonic() - self._since,
                sum(map(len, self.call.body)),
                "none received" if self._reply is None else f"{len(self._reply.body)} received",
            )


class Attempts:
    """The sendings of one call: which replica next, when, and what an error means for it."""

    __slots__ = ("_next", "_retry", "_since", "_told", "_tried", "ask", "bound", "headers", "number", "replicas")

    def __init__(self, ask: Ask, bound: Deadline, replicas: Replicas, retry: Retry, headers: Headers) -> None:
        self.ask = ask
        self.bound = bound
        self.number = 0
        self.replicas = replicas
        self.headers = headers
        self._retry = retry
        self._tried: list[Replica] = []
        self._told: dict[Replica, str] = {}
        self._since = time.monotonic()

    def first(self) -> Sending:
        return self._sending(self.replicas.next(()))

    def again(self) -> Sending:
        return self._sending(self._next)

    def second(self) -> Sending | None:
        """A copy of the sending that is on its way; None if the budgets do not allow it."""
        replicas = self.replicas
        if self.bound.expired() or not replicas.spend(on_copy=True):
            return None
        return self._sending(replicas.next(self._tried), copy=True)

    def _sending(self, replica: Replica, *, copy: bool = False) -> Sending:
        headers = (*self.headers.resolve(), *self.ask.headers)
        left_s = self.bound.remaining()
        if left_s <= 0:
            raise DeadlineExceeded(f"no time left to call {replica.url.text}: the deadline passed {-left_s:.3f} s ago")
        self.number += not copy
        self._tried.append(replica)
        if left_s < math.inf:
            headers = (*headers, ("X-Request-Timeout-Ms", str(max(0, min(int(left_s * 1000), _LONGEST_MS)))))
        once = self._retry.attempts == 1 or not self._retry.idempotent
        call = Call(self.ask.aim(replica.url), headers, self.ask.body, once=once)
        return Sending(self, replica, call, self.number, copy=copy)

    def wait_s(self, sending: Sending, error: RemoteOpsError) -> float:
        """Seconds until the next sending; raises, in full words, if there is none."""
        replicas = self.replicas
        self._told[sending.replica], note = str(error), ""
        if self._retry.repeats(error, self.number):
            self._next = replicas.next(self._tried)
            elsewhere = self._next not in self._tried
            held_s = replicas.held_s(self._next)
            if self._next is sending.replica:
                held_s = max(held_s, error.retry_after_s or 0.0)
            wait_s = self._retry.wait_s(
                error,
                self.number,
                self.bound.remaining(),
                random.random,
                elsewhere=elsewhere,
                held_s=held_s,
            )
            if wait_s is not None:
                if self._retry.is_free(error, elsewhere=elsewhere) or replicas.spend():
                    log.info(
                        "attempt %d of %d at %s failed: %s; the next in %.3f s at %s",
                        self.number,
                        self._retry.attempts,
                        sending.call.url.text,
                        brief(error),
                        wait_s,
                        self._next.url.text,
                    )
                    return wait_s
                note = "; not sent again: retries have used up their share of the calls"
        last = self._last(sending, error, note)
        if last is error:
            raise error
        raise last from error

    def _last(self, sending: Sending, error: RemoteOpsError, note: str) -> RemoteOpsError:
        """The error that the call ends with: of the last sending, and what the other replicas had to say."""
        if isinstance(error, DeadlineExceeded):
            text = (
                f"no answer from {sending.call.url.text} in {time.monotonic() - self._since:.3f} s "
                f"(attempt {self.number} of {self._retry.attempts}, {error.message})"
            )
        else:
            text = str(error)
            if self.number > 1 or (error.retryable and self._retry.attempts > 1):
                text += f" (attempt {self.number} of {self._retry.attempts})"
        others: list[str] = []
        if error.retryable or isinstance(error, DeadlineExceeded):
            unwell = {replica: replica.last_error for replica in self.replicas.unwell()}
            others = [said for replica, said in {**unwell, **self._told}.items() if replica is not sending.replica]
        if others:
            text = f"{text}; {len(others)} more failed: {'; '.join(others)}"
        text += note
        if text == str(error):
            return error
        last = copy.copy(error)
        last.args = (text,)
        return last


async def first_answer(copies: Sequence[asyncio.Future[Any]]) -> asyncio.Future[Any]:
    """The first of two copies that ends well, or with an error that the other would meet too; else the last."""
    pending = set(copies)
    while True:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for one in done:
            error = one.exception()
            if not pending or not (isinstance(error, Failed) and error.error.retryable):
                best: asyncio.Future[Any] = min(done, key=lambda one: one.exception() is not None)
                return best
