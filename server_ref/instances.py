"""Copies of a model behind one queue, as one servable: many callers in, batches out to whichever copy is idle.

It does not know sockets or messages. The queue and the threads are `lanes`', the rules `batching`'s, the rows
`stacking`'s; here they meet a model.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeAlias

import numpy.typing as npt

from remote_ops.deadline import Deadline
from remote_ops.errors import DeadlineExceeded, ModelUnavailable
from remote_ops.servable import Servable
from remote_ops.signature import Signature, TensorSpec
from server_ref.batching import Batching
from server_ref.lanes import Lanes, Pending, QueueLimits, room_for
from server_ref.stacking import Call, group_of, infer_apart, infer_together, rows_of
from server_ref.stats import Stats

__all__ = ["Instances", "Request"]

Array = npt.NDArray[Any]
Deliver: TypeAlias = "Callable[[list[Request], list[Any]], None]"


class Request(Pending):
    """One checked call on its way through the queue.

    `done` is called with what `settle` gives, where `deliver` says, unless it is cancelled.
    """

    def __init__(
        self,
        call: Call,
        deadline: Deadline,
        *,
        done: Callable[[Any], None],
        priority: int = 0,
    ) -> None:
        self.call = call
        self.deadline = deadline
        self.due_at = deadline.at
        self.done = done
        self.priority = priority
        self.payload_bytes = sum(array.nbytes for array in call.arrays.values())
        self.rows = rows_of(call.arrays) or 1
        self.queue_s = self.compute_s = 0.0  # known once it has run

    def settle(self, outcome: Any) -> Any:
        """What its caller gets of the outputs, or of what went wrong; on the instance's thread, where time is cheap."""
        return outcome


class Instances:
    """A servable around one or more copies of a model.

    Args:
        servables: the copies, equal in signature; one unless there are several devices or processes. Each bears as
            many calls at a time as its `concurrency` says.
        name: of the model, for messages and threads; the signature's unless given.
        batching, limits: the rules of the queue.
        response_timeout_s: how long a run may take before its callers are told that it hangs.
        deliver: calls `done` of each request with its outcome; on the instance's thread unless said.
        stats: told of what runs.

    `start` before the first call, `stop` after the last.
    """

    def __init__(
        self,
        servables: Sequence[Servable],
        *,
        name: str = "",
        batching: Batching = Batching(),  # noqa: B008 (immutable)
        limits: QueueLimits = QueueLimits(),  # noqa: B008 (immutable)
        response_timeout_s: float = math.inf,
        deliver: Deliver | None = None,
        stats: Stats | None = None,
    ) -> None:
        self.name = name or servables[0].signature.name or "model"
        self.servables = tuple(servables)
        self.stats = stats or Stats()
        self.recent_infer_s = math.inf  # the longest of late counts, and fades
        self._signature = servables[0].signature
        self._deliver = deliver or deliver_here
        threads = [servable for servable in servables for _ in range(room_for(servable))]
        self.lanes: Lanes[Request] = Lanes(
            self.name, threads, self._run, self._tell,
            batching=batching, limits=limits, response_timeout_s=response_timeout_s,
        )  # fmt: skip
        for servable in servables:
            if hasattr(servable, "watch"):
                servable.watch(self.lanes.look_again)

    @property
    def healthy(self) -> int:
        """How many of the copies can take a call: they are up, and do not hang."""
        return self.lanes.healthy_servables

    @property
    def signature(self) -> Signature:
        """What the copies take and give."""
        return self._signature

    def start(self) -> Instances:
        """Start the threads."""
        self.lanes.start()
        return self

    def stop(self) -> None:
        """Let the threads end; what still waits is told so."""
        self._fail(self.lanes.stop(), ModelUnavailable(f"model '{self.name}' is no longer served"))

    def __enter__(self) -> Instances:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def submit(self, request: Request, wanted: Sequence[TensorSpec]) -> None:
        """Let a request wait for its turn; `wanted` are the outputs that it names.

        Raises:
            Overloaded, ModelUnavailable: it cannot wait here.
        """
        if self.lanes.batching.max_rows:
            request.group = group_of(self._signature, request.call, wanted)
        self.lanes.submit(request)

    def run_here(self, request: Request) -> Any:
        """Run a request on this thread, past the queue; for runs that cost less than handing them over."""
        request.arrived_at = time.monotonic()
        return self._run(self.servables[0], [request])[0]

    def cancel(self, request: Request) -> bool:
        """Give a request up; whether it waited still."""
        return self.lanes.cancel(request)

    def sweep(self) -> None:
        """Tell those whose time has passed while they waited, and those whose run hangs; call it now and then."""
        for request in self.lanes.overdue():
            passed = DeadlineExceeded(f"no answer from model '{self.name}' in time: the request was still in the queue")
            self._fail([request], passed)
        if lost := self.lanes.lost():
            limit = f"{self.lanes.response_timeout_s:g} s"
            self._fail(lost, ModelUnavailable(f"no answer from model '{self.name}' in {limit}: its run is given up"))

    def _fail(self, requests: list[Request], error: BaseException) -> None:
        if requests:
            self._deliver(requests, [request.settle(error) for request in requests])

    # as a servable

    def infer(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        *,
        config: bytes = b"",
        deadline: Deadline | None = None,
    ) -> dict[str, Array]:
        """Compute the named outputs (None: all) of the named inputs, perhaps together with those of other callers.

        Raises:
            SignatureError: the inputs or the names asked for do not fit; nobody else is held up.
            Overloaded: too many wait already.
            DeadlineExceeded: the deadline passed before it was its turn.
        """
        answer: Future[dict[str, Array]] = Future()
        self._ask(inputs, outputs, config, deadline, answer.set_result, answer.set_exception)
        return answer.result()

    async def ainfer(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        *,
        config: bytes = b"",
        deadline: Deadline | None = None,
    ) -> dict[str, Array]:
        """The same, awaited; a cancelled call leaves the queue."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[dict[str, Array]] = loop.create_future()

        def end(ended: Callable[[Any], None], value: Any) -> None:
            def finish() -> None:
                if not answer.done():
                    ended(value)

            if threading.get_ident() == home:
                finish()
            else:
                loop.call_soon_threadsafe(finish)

        home = threading.get_ident()
        request = self._ask(
            inputs, outputs, config, deadline,
            lambda results: end(answer.set_result, results), lambda error: end(answer.set_exception, error),
        )  # fmt: skip
        try:
            return await answer
        except asyncio.CancelledError:
            self.cancel(request)
            raise

    def _ask(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None,
        config: bytes,
        deadline: Deadline | None,
        succeed: Callable[[dict[str, Array]], None],
        fail: Callable[[BaseException], None],
    ) -> Request:
        arrays = self._signature.fit_inputs(inputs)
        wanted = self._signature.select_outputs(outputs)

        def done(outcome: Any) -> None:
            if isinstance(outcome, BaseException):
                fail(outcome)
            else:
                succeed(outcome)

        call = Call(arrays, [spec.name for spec in wanted], config)
        request = Request(call, deadline or Deadline.never(), done=done)
        self.submit(request, wanted)
        return request

    # on the threads

    def _run(self, servable: Servable, batch: list[Request]) -> list[Any]:
        """What each request of a batch gets, made ready by its `settle`; never raises."""
        began, started_at, infer_s = time.perf_counter(), time.monotonic(), 0.0
        outcomes: list[Any] = [_not_started(self.name, request, started_at) for request in batch]
        ready = [index for index, outcome in enumerate(outcomes) if outcome is None]
        deadline = max((batch[index].deadline for index in ready), key=lambda deadline: deadline.at, default=None)

        def infer(call: Call) -> Mapping[str, Array]:
            nonlocal infer_s
            since = time.perf_counter()
            try:
                return servable.infer(call.arrays, call.names, config=call.config, deadline=deadline)
            finally:
                infer_s += time.perf_counter() - since

        if ready:
            calls = [batch[index].call for index in ready]
            if batch[0].group is None:
                found = [infer_apart(call, infer) for call in calls]
            else:
                found = infer_together(calls, infer, padded_rows=self.lanes.batching.padded)
            for index, outcome in zip(ready, found, strict=True):
                outcomes[index] = outcome
        computed_s = time.perf_counter() - began
        settled = [request.settle(outcome) for request, outcome in zip(batch, outcomes, strict=True)]
        if ready:
            for index in ready:
                batch[index].queue_s, batch[index].compute_s = started_at - batch[index].arrived_at, infer_s
            self.recent_infer_s = max(infer_s, min(0.9 * self.recent_infer_s, 1.0))
            self.stats.ran(
                sum(batch[index].rows for index in ready),
                waited_s=[started_at - batch[index].arrived_at for index in ready],
                input_s=computed_s - infer_s, infer_s=infer_s, output_s=time.perf_counter() - began - computed_s,
                ended_at=time.time(),
            )  # fmt: skip
        return settled

    def _tell(self, batch: list[Request], settled: list[Any]) -> None:
        self._deliver(batch, settled)


def deliver_here(requests: Sequence[Request], settled: Sequence[Any]) -> None:
    """Tell each request what it came to, on this thread."""
    for request, outcome in zip(requests, settled, strict=True):
        if not request.cancelled:
            request.done(outcome)


def _not_started(name: str, request: Request, now: float) -> BaseException | None:
    """Why a request is not run, if it is not."""
    if request.cancelled:
        return ModelUnavailable(f"nobody waits for this run of model '{name}' any more")
    if request.due_at > now:
        return None
    try:
        request.deadline.require(f"model '{name}'")
    except DeadlineExceeded as error:
        return error
    return DeadlineExceeded(f"no time left to start model '{name}'")
