"""Runs plans on an event loop: each node as soon as what it reads is there, the one with the longest way to go first.

Cheap Python nodes and combinations run right on the loop; models of this process on a bounded pool of threads; remote
ones are awaited. What runs of a graph share is here, and how many may have it at a time; one run is a `Run`.

`Engine`: constant is the pool; slots, batches, mirrors and runs change, on the loop only.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
import os
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ensemble.answers import ainfer, infer
from ensemble.batches import Batches
from ensemble.gradients import Record
from ensemble.plan import Plan, PlanNode
from ensemble.route import Route, route_of
from ensemble.run import Run
from ensemble.slots import Slot, Slots
from ensemble.steps import Array, ModelStep, Value
from ensemble.trace import Account
from ensemble.values import bind
from remote_ops.background import background_loop
from remote_ops.deadline import Deadline
from remote_ops.errors import SpecError
from remote_ops.telemetry import tracing

__all__ = ["Engine"]

log = logging.getLogger("ensemble")

_MOST_ROUTES = 256  # kept, of all graphs and bodies that it runs
_MOST_MIRRORS = 64  # under way at a time, so that a slow one does not pile up tensors

_IS_MIRROR: contextvars.ContextVar[bool] = contextvars.ContextVar("ensemble_is_mirror", default=False)


class Engine:
    """Runs plans, and holds what their runs share.

    Args:
        threads: models of this process and Python nodes that run at a time.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._routes = functools.lru_cache(_MOST_ROUTES)(route_of)
        self._closed = False
        self.dropped = 0  # nodes that were still on a thread when their run had ended
        self._begin()
        _ENGINES.add(self)

    def _begin(self) -> None:
        """Start with nothing under way; a forked child does so anew, since its parent's threads are not there."""
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="ensemble")
        self._aside: ThreadPoolExecutor | None = None  # of mirrors, which take no thread from what is waited for
        self._slots: dict[PlanNode, Slots] = {}
        self._batches: dict[PlanNode, Batches] = {}
        self._mirrors: set[asyncio.Future[Any]] = set()
        self._runs: set[Run] = set()

    async def run(
        self,
        plan: Plan,
        inputs: Mapping[str, Array],
        wanted: Sequence[str] | None,
        bound: Deadline,
        account: Account | None = None,
        prefix: str = "",
        record: Record | None = None,
    ) -> dict[str, Value]:
        """The outputs wanted of a plan (None: all); one that is `Missing` stays so. `record` is for a reverse pass."""
        values, sizes = bind(plan, inputs)
        run = Run(self, plan, self.route(plan, wanted), values, sizes, bound, account or Account(), prefix, record)
        self._runs.add(run)
        try:
            found = await run.outputs()
        finally:
            self._runs.discard(run)
        return found if wanted is None else {name: found[name] for name in wanted}

    def route(self, plan: Plan, wanted: Sequence[str] | None) -> Route:
        """The route to some outputs, whatever their order; found once, while it is among those last asked for."""
        if wanted is None or len(wanted) == len(plan.outputs) == 1:
            return self._routes(plan, None)
        return self._routes(plan, tuple([wire.name for wire in plan.outputs if wire.name in wanted]))

    def close(self) -> None:
        """Give up what runs, and let the threads go; what runs there is not waited for."""
        if self._closed:
            return
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._aside is not None:
            self._aside.shutdown(wait=False, cancel_futures=True)
        background_loop().call_soon_threadsafe(self._give_up)

    def _give_up(self) -> None:
        for run in list(self._runs):
            run.give_up(_closed())
        for mirror in list(self._mirrors):
            mirror.cancel()

    # what runs share

    def submit(self, work: Callable[..., None], *arguments: Any) -> None:
        """Run something on a thread of the pool."""
        pool = self._open_pool()
        if tracing():  # the span that is current here is the parent of what begins there
            pool.submit(contextvars.copy_context().run, work, *arguments)
        else:
            pool.submit(work, *arguments)

    async def in_thread(self, work: Callable[[], Any], slot: Slot | None = None) -> Any:
        """The same, awaited."""
        future = self._open_pool().submit(contextvars.copy_context().run, work)
        if slot is not None:
            slot.thread = future
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if self._closed and future.cancelled():
                raise _closed() from None
            self.dropped += future.running()
            raise

    def _open_pool(self) -> ThreadPoolExecutor:
        if self._closed:
            raise _closed()
        if not _IS_MIRROR.get():
            return self._pool
        if self._aside is None:
            self._aside = ThreadPoolExecutor(self._threads, thread_name_prefix="ensemble-mirror")
        return self._aside

    def is_shared(self, node: PlanNode) -> bool:
        """Whether runs wait for each other at a node."""
        return node.spec.max_inflight is not None or node.spec.batching is not None

    def slots(self, node: PlanNode) -> Slots | None:
        """The places at a node; None where there are any number."""
        if node.spec.max_inflight is None:
            return None
        found = self._slots.get(node)
        if found is None:
            found = self._slots[node] = Slots(node.name, node.spec.max_inflight, node.spec.max_queued)
        return found

    def batches(self, node: PlanNode) -> Batches:
        """Where the runs that are at a node meet."""
        assert node.spec.batching is not None
        found = self._batches.get(node)
        if found is None:
            found = self._batches[node] = Batches(node.spec.batching, lambda *call: self.model(node, *call))
        return found

    async def model(
        self,
        node: PlanNode,
        inputs: Mapping[str, Array],
        wanted: Sequence[str],
        bound: Deadline,
        slot: Slot | None = None,
    ) -> Any:
        """The outputs of a model, by our names, awaited wherever it runs."""
        step = node.step
        assert isinstance(step, ModelStep)
        if step.place != "loop" or not hasattr(step.servable, "ainfer"):
            if step.place == "inline":
                return infer(step, inputs, wanted, bound)
            return await self.in_thread(lambda: infer(step, inputs, wanted, bound), slot)
        return await ainfer(step, inputs, wanted, bound)

    def unminded(self, coroutine: Coroutine[Any, Any, Any], name: str) -> None:
        """Run a mirror: nobody waits for it, and its errors are a line in the log."""

        def ended(task: asyncio.Future[Any]) -> None:
            self._mirrors.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                log.info("mirror '%s' failed: %s", name, type(error).__name__)

        if len(self._mirrors) >= _MOST_MIRRORS:
            coroutine.close()
            return log.info("mirror '%s' was left out: %d are under way", name, len(self._mirrors))
        context = contextvars.copy_context()
        context.run(_IS_MIRROR.set, True)
        task = context.run(asyncio.ensure_future, coroutine)
        self._mirrors.add(task)
        task.add_done_callback(ended)
        return None


def _closed() -> SpecError:
    return SpecError("this ensemble is closed")


_ENGINES: weakref.WeakSet[Engine] = weakref.WeakSet()


def _after_fork() -> None:
    for engine in list(_ENGINES):
        engine._begin()


os.register_at_fork(after_in_child=_after_fork)
