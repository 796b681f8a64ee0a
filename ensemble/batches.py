"""Runs that are at one node at the same time, served by one call of its model: stacked on axis 0, cut apart again.

It knows no graph. Changing, on the loop only: the batches that still take rows.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ensemble.nodes.node import Batching
from ensemble.steps import Array
from ensemble.trace import bytes_of
from remote_ops.deadline import Deadline
from remote_ops.errors import InternalError, SignatureError
from remote_ops.telemetry import Record, recorded

__all__ = ["Batches"]

_Model = Callable[[Mapping[str, Array], Sequence[str], Deadline], Awaitable[Mapping[str, Array]]]


class _Batch:
    """Calls that go together."""

    def __init__(self, bound: Deadline) -> None:
        self.rows: list[int] = []
        self.inputs: list[Mapping[str, Array]] = []
        self.answers: list[asyncio.Future[dict[str, Array]]] = []
        self.bound = bound
        self.timer: asyncio.TimerHandle | None = None
        self.sent: list[Record] = []


class Batches:
    """Gathers calls of one model.

    Args:
        batching: how many rows at most, and how long a call may wait for others.
        model: makes a call of the stacked inputs.
    """

    def __init__(self, batching: Batching, model: _Model) -> None:
        self._batching = batching
        self._model = model
        self._open: dict[Any, _Batch] = {}
        self._running: set[asyncio.Future[Any]] = set()

    async def infer(
        self,
        inputs: Mapping[str, Array],
        wanted: Sequence[str],
        bound: Deadline,
        sent: list[Record] | None = None,
    ) -> dict[str, Array]:
        """The outputs for these rows, each `(rows, *item)`; waits for others, but never beyond its deadline.

        To `sent` are added the requests of the call that served them: of each run that has a part in it, the whole. One
        of a model of this process counts as a request, whose time is all wait for the model.

        Raises:
            SignatureError: the inputs do not share axis 0.
        """
        rows = _rows_of(inputs)
        if rows > self._batching.max_size:
            return dict(await self._model(inputs, wanted, bound))
        key = (tuple(wanted), tuple([(name, array.dtype, array.shape[1:]) for name, array in inputs.items()]))
        batch = self._open.get(key)
        if batch is not None and sum(batch.rows) + rows > self._batching.max_size:
            self._go(key, wanted)
            batch = None
        if batch is None:
            batch = self._open[key] = _Batch(bound)
        answer = self._joined(batch, rows, inputs, bound)
        if sum(batch.rows) >= self._batching.max_size:
            self._go(key, wanted)
        else:
            self._time(batch, key, wanted, bound)
        try:
            return await answer
        finally:
            if sent is not None:
                sent += batch.sent

    def _time(self, batch: _Batch, key: Any, wanted: Sequence[str], bound: Deadline) -> None:
        """See to it that a batch goes when the first of its calls, or the one with the least time left, says so."""
        loop = asyncio.get_running_loop()
        due = loop.time() + min(self._batching.max_delay, max(0.0, bound.remaining() / 2))
        if batch.timer is not None and batch.timer.when() <= due:
            return
        if batch.timer is not None:
            batch.timer.cancel()
        batch.timer = loop.call_at(due, self._go, key, wanted)

    def _joined(
        self, batch: _Batch, rows: int, inputs: Mapping[str, Array], bound: Deadline
    ) -> asyncio.Future[dict[str, Array]]:
        answer: asyncio.Future[dict[str, Array]] = asyncio.get_running_loop().create_future()
        batch.rows.append(rows)
        batch.inputs.append(inputs)
        batch.answers.append(answer)
        batch.bound = max(batch.bound, bound, key=lambda bound: bound.at)  # each call gives up by itself
        return answer

    def _go(self, key: Any, wanted: Sequence[str]) -> None:
        batch = self._open.pop(key)
        if batch.timer is not None:
            batch.timer.cancel()
        if all(answer.cancelled() for answer in batch.answers):
            return
        task = asyncio.ensure_future(self._run(batch, wanted))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _run(self, batch: _Batch, wanted: Sequence[str]) -> None:
        try:
            found = await self._called(batch, _stacked(batch.inputs), wanted)
            parts = _cut(found, batch.rows)
        except BaseException as error:
            failed = InternalError("it was cancelled") if isinstance(error, asyncio.CancelledError) else error
            for answer in batch.answers:
                if not answer.done():
                    answer.set_exception(failed)
            return
        for answer, part in zip(batch.answers, parts, strict=True):
            if not answer.done():
                answer.set_result(part)

    async def _called(self, batch: _Batch, inputs: Mapping[str, Array], wanted: Sequence[str]) -> Mapping[str, Array]:
        began, outcome = time.monotonic(), "answered"
        found: Mapping[str, Array] = {}
        with recorded() as batch.sent:
            try:
                found = await self._model(inputs, wanted, batch.bound)
            except BaseException as error:
                outcome = type(error).__name__
                raise
            finally:
                if not batch.sent:
                    what, took_s = f"a call of {sum(batch.rows)} rows", time.monotonic() - began
                    sizes = bytes_of(inputs.values()), bytes_of(found.values())
                    batch.sent.append(Record(what, 1, outcome, began, took_s, *sizes, waiting_s=took_s))
        return found


def _rows_of(inputs: Mapping[str, Array]) -> int:
    rows = {array.shape[0] if array.ndim else -1 for array in inputs.values()}
    if len(rows) != 1 or -1 in rows:
        shapes = ", ".join(f"'{name}' {list(array.shape)}" for name, array in inputs.items())
        raise SignatureError(f"a node with batching takes inputs that share axis 0: got {shapes}")
    return rows.pop()


def _stacked(inputs: Sequence[Mapping[str, Array]]) -> Mapping[str, Array]:
    if len(inputs) == 1:
        return inputs[0]
    return {name: np.concatenate([one[name] for one in inputs]) for name in inputs[0]}


def _cut(found: Mapping[str, Array], rows: Sequence[int]) -> list[dict[str, Array]]:
    total, parts, at = sum(rows), [], 0
    for name, array in found.items():
        if not array.ndim or array.shape[0] != total:
            raise InternalError(
                f"output '{name}' of a batch of {total} rows: got {list(array.shape)}, expected {total} first"
            )
    for count in rows:
        parts.append({name: array[at : at + count] for name, array in found.items()})
        at += count
    return parts
