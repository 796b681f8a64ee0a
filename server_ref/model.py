"""One served version of a model: what it says of itself, and its way from a checked request to an answer.

It does not know connections or routes. Everything but the runs themselves happens on the loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy.typing as npt

from remote_ops import graphpipe
from remote_ops.deadline import Deadline
from remote_ops.errors import (
    CodecError,
    ConnectError,
    ConnectionLost,
    EncodeError,
    FramingError,
    InternalError,
    ModelUnavailable,
    Overloaded,
    SignatureError,
    SpecError,
)
from remote_ops.servable import Servable
from remote_ops.signature import DTYPES, Signature, TensorSpec
from remote_ops.telemetry import carry
from server_ref.answer import Answer
from server_ref.batching import Batching
from server_ref.cache import CacheStats
from server_ref.instances import Instances, Request
from server_ref.lanes import QueueLimits
from server_ref.stacking import Call
from server_ref.stats import Stats, reason_of

__all__ = ["Run", "Version", "close_all", "name_inputs"]

Array = npt.NDArray[Any]
_QUICK_S = 100e-6
_QUICK_BYTES = 1 << 16


class Version:
    """One version of a model, with what it answers about itself, built once.

    Args:
        name: of the model, which is its path.
        servables: one or more copies of it, equal in signature.
        version: its name among the versions of the model; that of the signature unless given.
        batching, limits, response_timeout_s: as in `Instances`.
        least_healthy: how many of the copies must be up for the version to be ready.
        awaited: a servable with `ainfer` to call instead of the copies, such as a cache around them; unless given, a
            lone copy that has `ainfer` is awaited itself, if it is not batched.
    """

    def __init__(
        self,
        name: str,
        servables: Sequence[Servable],
        *,
        version: str = "",
        batching: Batching = Batching(),  # noqa: B008 (immutable)
        limits: QueueLimits = QueueLimits(),  # noqa: B008 (immutable)
        response_timeout_s: float = math.inf,
        least_healthy: int = 1,
        awaited: Callable[[Instances], Servable] | None = None,
    ) -> None:
        self.name = name
        self.servable = servables[0]
        self.signature = _served_signature(name, self.servable.signature)
        self.version = version or self.signature.version
        self.limits = limits
        self.least_healthy = least_healthy
        self.owned: Sequence[object] = ()  # what is closed with it
        self.source: object = None  # what it was opened from, so that it can be opened again; whoever opens it says
        self.stats = Stats()
        self.metadata = graphpipe.encode_metadata(self.signature)
        self.metadata_json = json.dumps(_json_metadata(self.signature), indent=4).encode()
        self.instances = Instances(
            servables, name=name, batching=batching, limits=limits, response_timeout_s=response_timeout_s,
            deliver=None if awaited else self._deliver, stats=self.stats,
        )  # fmt: skip
        # What answers: a cache around the copies, or the copy itself.
        self.outer: Any = awaited(self.instances) if awaited else self.servable
        self.cache_stats: Callable[[], CacheStats] | None = getattr(self.outer, "cache_stats", None)
        alone = len(servables) == 1 and not batching.max_rows
        self.ainfer: Callable[..., Awaitable[dict[str, Array]]] | None = (
            getattr(self.outer, "ainfer", None) if awaited or alone else None
        )
        self._threads = awaited is not None or self.ainfer is None
        self._never_waits = bool(getattr(self.servable, "never_waits", False)) and alone
        # An endpoint, or a graph: what is awaited waits for others, perhaps for models of this very server.
        self.calls_others = self.ainfer is not None and awaited is None
        self.closed = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take requests from now on; answers are told on `loop`."""
        self._loop = loop
        if self._threads:
            self.instances.start()

    def stop(self) -> None:
        """Take none any more; those that wait are told so, those that run are let go."""
        self.instances.stop()
        for task in tuple(self._tasks):
            task.cancel()

    def sweep(self) -> None:
        """Give up what has waited or run too long; call it now and then."""
        self.instances.sweep()

    @property
    def ready(self) -> bool:
        """Whether enough of its copies are up to take requests."""
        return self.instances.healthy >= self.least_healthy

    @property
    def pending(self) -> int:
        """How many requests wait or run."""
        return self.stats.pending

    @property
    def at_once(self) -> str:
        """How many it serves at a time, in words."""
        return "awaited on the loop" if not self._threads else f"{self.instances.lanes.concurrency} at a time"

    def begin(self, run: Run) -> Answer | None:
        """Set out on a run; its answer, if that is there at once, and else None: its `done` will be told.

        Raises:
            Overloaded, ModelUnavailable: it cannot wait here.
        """
        assert self._loop is not None
        run.arrived_at = time.monotonic()
        self.stats.began(run.payload_bytes)
        try:
            self._check(run)
            if self.ainfer is not None:
                self._await(run, self._loop)
                return None
            if self._fits_on_loop(run):
                return self._now(run)
            self.instances.submit(run, run.wanted)
        except Exception as error:
            self._count(run, error)
            raise
        return None

    def _check(self, run: Run) -> None:
        if self.closed:
            raise ModelUnavailable(f"model '{self.name}' takes no more requests: the server is about to stop")
        most = self.limits.max_request_bytes
        if most and run.payload_bytes > most:
            raise FramingError(
                f"the inputs take {run.payload_bytes} bytes: expected at most {most} for model '{self.name}'",
                status=413,
            )

    def _now(self, run: Run) -> Answer:
        outcome: Answer | BaseException = self.instances.run_here(run)
        if isinstance(outcome, BaseException):
            raise outcome
        self._count(run, outcome)
        return outcome

    def refused(self, error: BaseException) -> None:
        """Count a request that was wrong before it could wait."""
        self.stats.began(0)
        self.stats.ended(0.0, failed=reason_of(error))

    def cancel(self, run: Run) -> None:
        """Give a run up: its caller has gone."""
        if run.ended:
            return
        run.ended = run.cancelled = True
        self.instances.cancel(run)
        if run.task is not None:
            run.task.cancel()
        self.stats.ended(time.monotonic() - run.arrived_at, failed="canceled")

    def _fits_on_loop(self, run: Run) -> bool:
        """Whether handing the run to a thread would cost more than the run: it only computes, and is known as quick."""
        quick = self._never_waits and self.instances.recent_infer_s < _QUICK_S
        return quick and run.payload_bytes < _QUICK_BYTES and not run.slow_write

    def _await(self, run: Run, loop: asyncio.AbstractEventLoop) -> None:
        awaited, most = len(self._tasks), self.limits.max_requests
        if awaited >= most:
            raise Overloaded(f"{awaited} requests wait already: expected at most {most}")
        run.task = task = loop.create_task(self._finish(run))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _finish(self, run: Run) -> None:
        assert self.ainfer is not None
        call, began = run.call, time.perf_counter()
        outcome: Any
        if run.carried:
            carry(run.carried)
        try:
            run.deadline.require(f"model '{self.name}'")
            outcome = await self.ainfer(call.arrays, call.names, config=call.config, deadline=run.deadline)
        except BaseException as error:
            outcome = error
        run.compute_s = infer_s = time.perf_counter() - began
        aside = run.slow_write and not isinstance(outcome, BaseException)
        settled = await asyncio.to_thread(run.settle, outcome) if aside else run.settle(outcome)
        if not self._threads:
            self.stats.ran(
                run.rows, waited_s=[0.0], input_s=0.0, infer_s=infer_s,
                output_s=time.perf_counter() - began - infer_s, ended_at=time.time(),
            )  # fmt: skip
        self._tell([run], [settled])

    def _deliver(self, requests: Sequence[Request], settled: Sequence[Any]) -> None:
        """Tell the callers of a batch, on the loop and with one wake-up."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._tell, requests, settled)

    def _tell(self, runs: Sequence[Any], settled: Sequence[Any]) -> None:
        for run, outcome in zip(runs, settled, strict=True):
            if not run.ended:
                self._count(run, outcome)
                run.done(outcome)

    def _count(self, run: Run, outcome: Any) -> None:
        run.ended = True
        took_s = (now := time.monotonic()) - run.arrived_at
        if isinstance(outcome, BaseException):
            self.stats.ended(took_s, failed=reason_of(outcome))
        else:
            self.stats.ended(took_s, bytes_out=sum(map(len, outcome.body)), at=now, rows=run.rows)

    def blamed(self, error: BaseException) -> BaseException:
        """What a model failed with, as its caller should see it: bytes that it could not read were not the caller's."""
        if isinstance(error, CodecError | FramingError):
            return InternalError(f"model '{self.name}' got an answer it cannot read: {error}")
        if isinstance(error, ConnectError | ConnectionLost):
            return ModelUnavailable(f"model '{self.name}' is out of reach: {error}")
        if isinstance(error, SpecError):
            return InternalError(f"model '{self.name}' is not set up to run: {error}")
        return error


class Run(Request):
    """One checked request of a version.

    Args:
        version: whose.
        arrays: its inputs by name, as the signature wants them.
        wanted: the outputs asked for, in order.
        config, deadline, priority: its own.
        write: makes the answer of the outputs by name; on an instance's thread.
        done: is told the answer, or what went wrong, on the loop.
        slow_write: whether `write` takes so long that the loop must not wait for it: text, or compression.
    """

    def __init__(
        self,
        version: Version,
        arrays: Mapping[str, Array],
        wanted: tuple[TensorSpec, ...],
        *,
        config: bytes = b"",
        deadline: Deadline,
        priority: int = 0,
        write: Callable[[dict[str, Array]], Answer],
        done: Callable[[Any], None],
        slow_write: bool = False,
    ) -> None:
        call = Call(arrays, [spec.name for spec in wanted], config)
        super().__init__(call, deadline, done=done, priority=priority)
        self.version = version
        self.wanted = wanted
        self.slow_write = slow_write
        self.ended = False
        self.task: asyncio.Task[None] | None = None
        self.carried: Sequence[tuple[str, str]] = ()  # headers of its own that an awaited servable passes on
        self._write = write

    def settle(self, outcome: Any) -> Any:
        """The answer, or what went wrong; whatever a model gives or raises, its thread and its caller go on."""
        if isinstance(outcome, BaseException):
            return self.version.blamed(outcome)
        try:
            return self._written(outcome)
        except BaseException as error:
            return self.version.blamed(error)

    def _written(self, results: Any) -> Answer:
        if not isinstance(results, Mapping):
            got = type(results).__name__
            raise InternalError(
                f"model '{self.version.name}' breaks its own signature: expected a dict by name, got a {got}"
            )
        try:
            return self._write(self.version.signature.fit_outputs(results, self.wanted))
        except (SignatureError, EncodeError) as error:
            raise InternalError(f"model '{self.version.name}' breaks its own signature: {error}") from error


def close_all(things: Sequence[Any]) -> None:
    """Close those that can be closed."""
    for thing in things:
        close = getattr(thing, "close", None)
        if close is not None:
            close()


def _served_signature(name: str, signature: Signature) -> Signature:
    features = signature.features
    if "vjp" not in features and any(spec.differentiable for spec in signature.inputs):
        features = (*features, "vjp")
    return replace(signature, name=signature.name or name, server="remote-ops server_ref", features=features)


def _json_metadata(signature: Signature) -> dict[str, Any]:
    """Metadata under the keys that the 2018 servers use; types are numbers."""

    def ios(specs: Iterable[TensorSpec]) -> list[dict[str, Any]]:
        return [
            {
                "Name": spec.name,
                "Description": spec.description,
                "Shape": None if spec.shape is None else list(spec.shape),
                "Type": DTYPES[spec.dtype].wire_type if spec.dtype in DTYPES else 0,
            }
            for spec in specs
        ]

    return {
        "Name": signature.name,
        "Version": signature.version,
        "Server": signature.server,
        "Description": signature.description,
        "Inputs": ios(signature.inputs),
        "Outputs": ios(signature.outputs),
    }


def name_inputs(signature: Signature, request: graphpipe.InferRequest) -> dict[str, Array]:
    """Give each tensor of a request its name: the one it goes by, else that of the input at its place.

    Raises:
        SignatureError: more names or tensors than can be told apart.
    """
    names, tensors = request.input_names, request.tensors
    if len(names) > len(tensors):
        # The Go batcher names every tensor twice.
        if names[: len(tensors)] * 2 != names:
            raise SignatureError(f"expected a name per tensor: got {len(names)} names for {len(tensors)} tensors")
        names = names[: len(tensors)]
    names = (*names, *[""] * (len(tensors) - len(names)))
    if not all(names[len(signature.inputs) :]):
        expected = ", ".join(spec.name for spec in signature.inputs)
        raise SignatureError(f"expected {len(signature.inputs)} inputs ({expected}), got {len(tensors)}")
    given = [name or signature.inputs[index].name for index, name in enumerate(names)]
    if len(set(given)) != len(given):
        raise SignatureError(f"an input is given twice: {', '.join(given)}")
    return dict(zip(given, tensors, strict=True))
