"""A servable that is left alone for a while after it failed several times in a row: a circuit breaker.

An endpoint does so with one of several replicas, and asks the last one come what may. A node is told at once, so that a
fallback need not wait for what is down. What is decided is `remote_ops.policy.Breaker`'s; this keeps its numbers.

Constant: the servable and the policy. Changing, under `_lock`: how it has done, and whether a call probes it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from remote_ops.client import Endpoint
from remote_ops.deadline import Deadline
from remote_ops.errors import ConnectError, RemoteOpsError
from remote_ops.policy import PROBING, UP, Breaker, Health, is_fault
from remote_ops.signature import Array, Signature

__all__ = ["Guarded"]


class Guarded:
    """An endpoint behind a circuit breaker.

    Args:
        endpoint: what is asked.
        breaker: after how many failures in a row it is left alone, and for how long; then one call at a time probes it.
        clock: seconds that do not go back.
    """

    def __init__(self, endpoint: Endpoint, breaker: Breaker, clock: Callable[[], float] = time.monotonic) -> None:
        self.endpoint = endpoint
        self._breaker = breaker
        self._clock = clock
        self._lock = threading.Lock()
        self._health = Health()
        self._probed = False

    @property
    def signature(self) -> Signature:
        """That of the endpoint; asked for even while calls are refused."""
        return self.endpoint.signature

    def infer(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        *,
        config: bytes = b"",
        deadline: Deadline | None = None,
    ) -> dict[str, Array]:
        """Infer as the endpoint does.

        Raises:
            ConnectError: it is left alone; nothing was sent.
        """
        with self._watched():
            return self.endpoint.infer(inputs, outputs, config=config, deadline=deadline)

    async def ainfer(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        *,
        config: bytes = b"",
        deadline: Deadline | None = None,
    ) -> dict[str, Array]:
        """The same, awaited."""
        with self._watched():
            return await self.endpoint.ainfer(inputs, outputs, config=config, deadline=deadline)

    def close(self) -> None:
        """Close the idle connections; it stays usable."""
        self.endpoint.close()

    def __repr__(self) -> str:
        return f"Guarded({self.endpoint!r}, {self._breaker})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Guarded, (self.endpoint, self._breaker, self._clock)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Refuse a call, or see what comes of it: neither an answer nor a failure if it is cancelled."""
        probes, since = self._admit(), self._clock()
        try:
            yield
        except RemoteOpsError as error:
            self._note(error, since)
            raise
        else:
            self._note(None, since)
        finally:
            if probes:
                self._probed = False

    def _note(self, error: RemoteOpsError | None, since: float) -> None:
        with self._lock:
            now = self._clock()
            if error is not None and is_fault(error, now - since):
                self._health = self._breaker.after_fault(self._health, now, others=1)
            else:
                self._health = self._breaker.after_answer(self._health)

    def _admit(self) -> bool:
        """Let a call pass, and say whether it probes."""
        with self._lock:
            now = self._clock()
            state = self._breaker.state(self._health, now)
            if state == UP:
                return False
            if state == PROBING and not self._probed:
                self._probed = True
                return True
            left_s = max(0.0, self._health.until - now)
        faults = f"{self._health.faults} failures in a row"
        when = f"it is asked again in {left_s:.3g} s" if left_s else "a call is probing it"
        raise ConnectError(f"{self.endpoint.url} was not asked: {faults}, {when}")
