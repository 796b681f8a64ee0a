"""One run of a plan: which node may start, what it is given, what becomes of what it gives, and how it all ends.

The first error that counts ends a run at once: what is awaited is cancelled, what runs on a thread is dropped when it
ends. Decisions of single nodes are theirs (`steps`); what runs share is the engine's.

`Run`: everything changes, on the loop only; `_work` alone is on a thread.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, Protocol

from ensemble.answers import infer
from ensemble.assembly import assemble
from ensemble.batches import Batches
from ensemble.gradients import Record, Steered
from ensemble.plan import Plan, PlanNode, Source, Wire
from ensemble.route import Quorum, Route
from ensemble.slots import Slot, Slots
from ensemble.steps import Array, Assembly, Call, Calls, Missing, ModelStep, Outcome, Value, is_pure
from ensemble.trace import Account, Span, bytes_of
from ensemble.values import Sizes, Values, given, guarded, node_error, read, read_only, rows_of, stand_in
from remote_ops.deadline import Deadline
from remote_ops.errors import DeadlineExceeded, InternalError, NodeError, RemoteOpsError
from remote_ops.telemetry import Record as Sent
from remote_ops.telemetry import recorded

__all__ = ["Run", "Shared"]

_P = ParamSpec("_P")

_CLEANUP_S = 0.05  # how long what is cancelled may take to notice
_RESERVE_S = 0.02  # how much sooner than the deadline those are given up that somebody makes do without
_SETTLING_S = 0.01  # what decisions may take once all they wait for is over
_LONGEST_S = 1e6  # what a timer of asyncio can still count
_MOST_TOLD = 8  # nodes that an error names


def _ends_the_run(method: Callable[Concatenate[Run, _P], None]) -> Callable[Concatenate[Run, _P], None]:
    """Of what the loop calls: what it raises would end nothing, and leave the run waiting until its deadline."""

    def called(run: Run, /, *args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            method(run, *args, **kwargs)
        except Exception as error:
            run.give_up(error)

    return called


class Shared(Protocol):
    """What the runs of a graph share; the `Engine`."""

    dropped: int

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
        """Run a plan: the body of a map."""

    async def model(
        self,
        node: PlanNode,
        inputs: Mapping[str, Array],
        wanted: Sequence[str],
        bound: Deadline,
        slot: Slot | None = None,
    ) -> Any:
        """The outputs of a model, wherever it runs."""

    def submit(self, work: Callable[..., None], *arguments: Any) -> None:
        """Run something on a thread."""

    def unminded(self, coroutine: Coroutine[Any, Any, Any], name: str) -> None:
        """Run what nobody waits for."""

    def is_shared(self, node: PlanNode) -> bool:
        """Whether runs wait for each other at a node."""

    def slots(self, node: PlanNode) -> Slots | None:
        """The places at a node; None where there are any number."""

    def batches(self, node: PlanNode) -> Batches:
        """Where the runs that are at a node meet."""


class Run:
    """One run of a plan."""

    def __init__(
        self,
        shared: Shared,
        plan: Plan,
        route: Route,
        values: Values,
        sizes: Sizes,
        bound: Deadline,
        account: Account,
        prefix: str,
        record: Record | None,
    ) -> None:
        self._shared = shared
        self._plan = plan
        self._route = route
        self._values = values
        self._sizes = sizes
        self._bound = bound
        self._account = account
        self._trace = account.trace
        self._prefix = prefix
        self._record = record
        self._loop = asyncio.get_running_loop()
        self._since = time.monotonic()
        self._done: asyncio.Future[None] = self._loop.create_future()
        self._waits = list(route.waits)
        self._uses = dict(route.uses)
        self._left = len(route.nodes)
        self._ended_nodes = [False] * len(route.nodes)
        self._began: dict[int, tuple[float, float, int]] = {}  # of a node that runs: ready, begun, bytes
        self._ready_at: dict[int, float] = {}
        self._ready: list[tuple[int, int]] = []
        self._tasks: dict[int, asyncio.Future[Any]] = {}
        self._timers: list[asyncio.TimerHandle] = []
        self._graces: set[int] = set()
        self._sent: dict[str, list[Sent]] = {}  # of a node that is traced: its requests

    async def outputs(self) -> dict[str, Value]:
        """Run it."""
        for index, waits in enumerate(self._waits):
            if not waits:
                self._is_ready(index)
        if self._bound.at < math.inf:
            self._timers.append(self._loop.call_later(min(self._bound.remaining(), _LONGEST_S), self._due))
        try:
            self._advance()
            await self._done
        finally:
            await self._stop()
        if self._record is not None:
            self._record.values = self._values
        return {wire.name: read(wire, self._values) for wire in self._route.outputs}

    def give_up(self, error: BaseException) -> None:
        """End it with an error, unless it has ended."""
        if not self._done.done():
            self._done.set_exception(error)

    async def _stop(self) -> None:
        for timer in self._timers:
            timer.cancel()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_CLEANUP_S)
        for index in list(self._began):
            self._note_given_up(index, "cancelled", time.monotonic())

    # which node, and when

    def _is_ready(self, index: int) -> None:
        heapq.heappush(self._ready, (self._route.haste[index], index))
        if self._trace is not None:
            self._ready_at[index] = time.monotonic()

    def _advance(self) -> None:
        """Start whatever is ready; what runs right here may make more of it ready."""
        while self._ready and not self._done.done():
            self._launch(heapq.heappop(self._ready)[1])
        if not self._left and not self._done.done():
            self._done.set_result(None)

    def _launch(self, index: int) -> None:
        if self._ended_nodes[index] or index in self._began:
            return
        node = self._route.nodes[index]
        if self._bound.expired():
            return self._late(index)
        quorum = self._route.quorums.get(index)
        if quorum is not None and not quorum.is_met(self._values):
            return self._failed(index, _too_few(node, quorum, self._values))
        try:
            inputs = self._inputs(node)
            if isinstance(node.step, ModelStep) and node.step.mutates is not None:
                inputs = {wire.name: self._guarded(inputs[wire.name], wire, node.step.mutates) for wire in node.wires}
        except Exception as error:
            return self._failed(index, error)
        now = time.monotonic()
        self._began[index] = (self._ready_at.get(index, now), now, bytes_of(inputs.values()) if self._trace else 0)
        gone = [value for wire in node.wires if wire.needed and isinstance(value := inputs[wire.name], Missing)]
        if self._record is not None:
            self._record.inputs[node.name] = inputs
        if quorum is not None:
            self._account.note_missing(_traced(self._prefix, node), inputs)
        if gone:
            return self._has(index, dict.fromkeys(self._route.wanted[index], gone[0]))
        try:
            self._start(index, node, inputs)
        except Exception as error:
            self._failed(index, error)
        return None

    def _start(self, index: int, node: PlanNode, inputs: dict[str, Any]) -> None:
        step, wanted, bound = node.step, self._route.wanted[index], _within(node, self._bound)
        if isinstance(step, ModelStep) and not self._shared.is_shared(node):
            if step.place == "inline":
                return self._here(index, lambda: infer(step, inputs, wanted, bound))
            if step.place == "thread":
                return self._on_thread(index, step, inputs, wanted, bound)
        if is_pure(step):
            return self._here(index, lambda: step.run(inputs, wanted))
        self._await(index, self._node(node, inputs, wanted, self._prefix, self._record, bound), bound)
        return None

    def _inputs(self, node: PlanNode) -> dict[str, Value]:
        """What a node reads; a value that nobody else will read is let go."""
        found: dict[str, Value] = {}
        for wire in node.wires:
            if wire.source not in self._values:  # before its quorum's grace was over
                found[wire.name] = Missing(wire.source.name, "no answer in time for the quorum")
                continue
            found[wire.name] = read(wire, self._values)
            self._uses[wire.source] -= self._record is None
            if not self._uses[wire.source]:
                del self._values[wire.source]
        return found

    def _guarded(self, value: Value, wire: Wire, mutates: bool) -> Value:
        """A value for code that may write into it: a copy if it does and others could see that, else a view."""
        if isinstance(value, Missing):
            return value
        if not mutates:
            return read_only(value)
        shared = wire.source in self._values or wire.source.scope == "inputs" or not value.flags.owndata
        return value.copy() if shared else value

    # the ways to run a node

    def _here(self, index: int, work: Callable[[], Mapping[str, Value]]) -> None:
        try:
            results = work()
        except Exception as error:
            self._failed(index, error)
        else:
            self._has(index, results)

    def _on_thread(
        self, index: int, step: ModelStep, inputs: dict[str, Any], wanted: Sequence[str], bound: Deadline
    ) -> None:
        if bound is not self._bound:
            self._timers.append(self._loop.call_later(bound.remaining(), self._timed_out, index))
        self._shared.submit(self._work, index, step, inputs, wanted, bound)

    def _work(self, index: int, step: ModelStep, inputs: Any, wanted: Sequence[str], bound: Deadline) -> None:
        """On a thread of the pool."""
        if self._done.done():
            return
        began = time.monotonic()
        try:
            outcome: Any = infer(step, inputs, wanted, bound)
        except BaseException as error:
            outcome = error
        self._loop.call_soon_threadsafe(self._worked, index, outcome, began)

    @_ends_the_run
    def _worked(self, index: int, outcome: Any, began: float) -> None:
        if self._done.done() or self._ended_nodes[index]:
            self._shared.dropped += 1
            return
        ready, _, size = self._began[index]
        self._began[index] = (ready, began, size)
        if isinstance(outcome, BaseException):
            self._failed(index, outcome)
        else:
            self._has(index, outcome)
        self._advance()

    @_ends_the_run
    def _timed_out(self, index: int) -> None:
        if not self._ended_nodes[index] and not self._done.done():
            timeout_s = self._route.nodes[index].spec.timeout
            self._failed(index, DeadlineExceeded(f"no answer in {timeout_s:.3f} s, its timeout"))
            self._advance()

    def _await(self, index: int, coroutine: Coroutine[Any, Any, Mapping[str, Value]], bound: Deadline) -> None:
        task = self._tasks[index] = self._loop.create_task(coroutine)  # `ensure_future` has to find the loop first
        task.add_done_callback(lambda task: self._awaited(index, task))
        if bound is not self._bound:
            self._timers.append(self._loop.call_later(bound.remaining() + _CLEANUP_S / 5, self._timed_out, index))

    @_ends_the_run
    def _awaited(self, index: int, task: asyncio.Future[Mapping[str, Value]]) -> None:
        self._tasks.pop(index, None)
        if self._done.done() or self._ended_nodes[index]:
            if not task.cancelled():
                task.exception()  # which is now retrieved
            return
        error = InternalError("it was cancelled, and not by this run") if task.cancelled() else task.exception()
        if error is not None:
            self._failed(index, error)
        else:
            self._has(index, task.result())
        self._advance()

    # one node, wherever it stands: in the graph, or owned by another

    async def _node(
        self, node: PlanNode, inputs: Any, wanted: Sequence[str], prefix: str, record: Record | None, bound: Deadline
    ) -> Mapping[str, Value]:
        step = node.step
        if is_pure(step):
            return step.run(inputs, wanted)
        slots = self._shared.slots(node)
        if slots is None:
            return await self._placed(node, inputs, wanted, prefix, record, bound, None)
        async with slots.taken(self._account, bound) as slot:
            return await self._placed(node, inputs, wanted, prefix, record, bound, slot)

    async def _placed(
        self,
        node: PlanNode,
        inputs: Any,
        wanted: Sequence[str],
        prefix: str,
        record: Record | None,
        bound: Deadline,
        slot: Slot | None,
    ) -> Mapping[str, Value]:
        if isinstance(node.step, ModelStep):
            return await self._model(node, inputs, wanted, prefix, bound, slot)
        return await self._control(node, inputs, wanted, f"{_traced(prefix, node)}/", record, bound)

    async def _model(
        self, node: PlanNode, inputs: Any, wanted: Sequence[str], prefix: str, bound: Deadline, slot: Slot | None
    ) -> Mapping[str, Value]:
        if self._trace is None:
            return await self._answer(node, inputs, wanted, bound, slot)
        with recorded() as sent:
            self._sent[_traced(prefix, node)] = sent
            return await self._answer(node, inputs, wanted, bound, slot, sent)

    async def _answer(
        self,
        node: PlanNode,
        inputs: Any,
        wanted: Sequence[str],
        bound: Deadline,
        slot: Slot | None,
        sent: list[Sent] | None = None,
    ) -> Mapping[str, Value]:
        if node.spec.batching is not None:
            return await self._shared.batches(node).infer(inputs, wanted, bound, sent)
        found: Mapping[str, Value] = await self._shared.model(node, inputs, wanted, bound, slot)
        return found

    async def _control(
        self, node: PlanNode, inputs: Any, wanted: Sequence[str], prefix: str, record: Record | None, bound: Deadline
    ) -> Mapping[str, Value]:
        """Make the calls that a controller asks for, until it says what comes of them."""
        step: Any = node.step
        done = Steered([], [], Assembly(()), [])
        generator, heard = step.steps(inputs, wanted), None
        while True:
            try:
                asked: Calls = generator.send(heard)
            except StopIteration as stop:
                if record is not None:
                    record.steered[node.name] = done._replace(assembly=stop.value)
                return assemble(stop.value, done.outcomes, wanted)
            sooner = _sooner(bound) if asked.tolerate else bound
            heard = await self._make(node, asked, prefix, done, record is not None, sooner)

    async def _make(
        self, node: PlanNode, asked: Calls, prefix: str, done: Steered, records: bool, bound: Deadline
    ) -> list[Outcome]:
        """Make calls, some at a time; what came of those that are waited for, in their order."""
        outcomes = done.outcomes
        waited: list[int] = []

        def numbered() -> Iterator[tuple[int, Call]]:
            for call in asked.calls:
                outcomes.append({})
                if records:
                    done.calls.append(call)
                    done.inner.append(Record())
                if call.waits:
                    waited.append(len(outcomes) - 1)
                    yield len(outcomes) - 1, call
                else:
                    self._shared.unminded(self._child(node, call, prefix, None, bound), f"{prefix}{call.node}")

        async def work(calls: Iterator[tuple[int, Call]]) -> None:
            for number, call in calls:
                try:
                    inner = done.inner[number] if records else None
                    outcomes[number] = await self._child(node, call, prefix, inner, bound)
                except RemoteOpsError as error:
                    if not asked.tolerate:
                        raise
                    outcomes[number] = error

        calls = numbered()
        if asked.at_most == 1:
            await work(calls)
        else:
            await _all(work, calls, asked.at_most)
        return [outcomes[number] for number in waited]

    async def _child(self, owner: PlanNode, call: Call, prefix: str, record: Record | None, bound: Deadline) -> Any:
        child = owner.children[call.node]
        bound.require(f"'{prefix}{call.node}'")
        if isinstance(child, Plan):
            return await self._shared.run(child, call.inputs, call.wanted, bound, self._account, prefix, record)
        own = _within(child, bound)
        ready, outcome = time.monotonic(), "ok"
        results: Mapping[str, Value] = {}
        try:
            inputs = guarded(child, given(child, call.inputs))
            made = self._node(child, inputs, call.wanted or tuple(child.outputs), prefix, record, own)
            results = await (made if own is self._bound else _until(made, own))
            return results
        except Exception as error:
            outcome = type(error).__name__
            if _is_late(error, bound):
                raise
            results = self._stand_in(child, call, error, record)
            return results
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        finally:
            if self._trace is not None:
                self._note(child, prefix, (ready, ready, bytes_of(call.inputs.values())), results, outcome)

    def _stand_in(self, child: PlanNode, call: Call, error: Exception, record: Record | None) -> Mapping[str, Value]:
        """What `on_error` of an owned node gives; raises the error of that node if it is `fail`."""
        results = stand_in(child, node_error(child, self._plan.name, error), self._sizes, rows_of(call))
        if record is not None:
            record.is_constant = True
        return results

    # what came of a node

    def _has(self, index: int, results: Mapping[str, Value]) -> None:
        """A node has its outputs: keep those that are read, and see who can go on."""
        node = self._route.nodes[index]
        if self._trace is not None:
            self._note(node, self._prefix, self._began[index], results, "ok")
        if self._record is not None:
            self._record.outputs[node.name] = results
        self._settle(index, {name: results[name] for name in self._route.wanted[index]})

    def _settle(self, index: int, results: Mapping[str, Value]) -> None:
        name = self._route.nodes[index].name
        for tensor, value in results.items():
            source = Source("node", name, tensor)
            if self._uses.get(source):
                self._values[source] = value
        self._ended_nodes[index] = True
        self._began.pop(index, None)
        self._left -= 1
        for reader in self._route.readers[index]:
            self._waits[reader] -= 1
            if not self._waits[reader]:
                self._is_ready(reader)
            elif reader in self._route.quorums:
                self._maybe_enough(reader)

    def _failed(self, index: int, error: BaseException) -> None:
        node = self._route.nodes[index]
        if self._trace is not None:
            now = time.monotonic()
            self._note(node, self._prefix, self._began.get(index, (now, now, 0)), {}, type(error).__name__)
        failed = node_error(node, self._plan.name, error)
        if _is_late(error, self._bound):
            return self._late(index)
        try:
            if index in self._route.forgiven:
                results: Mapping[str, Value] = dict.fromkeys(node.outputs, Missing(node.name, str(error)))
            else:
                results = stand_in(node, failed, self._sizes)
        except RemoteOpsError as final:
            self._began.pop(index, None)
            return self.give_up(final)
        if self._record is not None:
            self._record.inputs.pop(node.name, None)  # what stands in for it has no derivative
        self._settle(index, {name: results[name] for name in self._route.wanted[index]})
        return None

    @_ends_the_run
    def _due(self) -> None:
        """The deadline has passed. Who makes do without an answer was told a little before: if the loop was busy then,
        it is let finish first.
        """
        if any(self._route.nodes[index].children for index in self._began):
            self._timers.append(self._loop.call_later(_SETTLING_S, self._late))
        else:
            self._late()

    @_ends_the_run
    def _late(self, index: int | None = None) -> None:
        """The deadline has passed: say which nodes were at it, and which were still to come."""
        if self._done.done():
            return
        now = time.monotonic()
        to_come = [one for one, ended in enumerate(self._ended_nodes) if not ended]
        left = list(dict.fromkeys([*([index] if index is not None else []), *self._began, *to_come]))
        names = [
            f"'{self._route.nodes[one].name}' ({self._route.nodes[one].spec.kind}, "
            + (f"{now - self._began[one][1]:.3f} s at it)" if one in self._began else "not started)")
            for one in left[:_MOST_TOLD]
        ]
        more = f" and {len(left) - _MOST_TOLD} more" if len(left) > _MOST_TOLD else ""
        what = (", ".join(names) or "nothing") + more
        if index is not None:
            self._began.pop(index, None)
        self.give_up(
            DeadlineExceeded(f"no answer from '{self._plan.name}' in {now - self._since:.3f} s: waiting for {what}")
        )

    # quorums

    def _maybe_enough(self, index: int) -> None:
        """A member of a quorum has answered: go on without the others, now or when the grace is over."""
        quorum = self._route.quorums[index]
        if index in self._graces or not quorum.is_met(self._values):
            return
        self._graces.add(index)
        self._timers.append(self._loop.call_later(quorum.grace_s, self._grace_over, index))

    @_ends_the_run
    def _grace_over(self, index: int) -> None:
        if self._ended_nodes[index] or self._done.done() or not self._waits[index]:
            return
        now = time.monotonic()
        self._is_ready(index)
        self._advance()
        self._drop_unread(now)
        self._advance()

    def _drop_unread(self, now: float) -> None:
        """Give up the nodes that nobody has waited for since `now`."""
        for index in reversed(range(len(self._route.nodes))):
            if self._ended_nodes[index] or index in self._route.outputs_of:
                continue
            readers = self._route.readers[index]
            if all(self._ended_nodes[reader] or reader in self._began for reader in readers):
                if (task := self._tasks.pop(index, None)) is not None:
                    task.cancel()
                self._ended_nodes[index] = True
                self._note_given_up(index, "left out", now)
                self._left -= 1

    # trace

    def _note_given_up(self, index: int, outcome: str, since: float) -> None:
        """A node that began, and that nobody has waited for since the time given."""
        began = self._began.pop(index, None)
        if self._trace is not None and began is not None:
            self._note(self._route.nodes[index], self._prefix, began, {}, outcome, since)

    def _note(
        self,
        node: PlanNode,
        prefix: str,
        began: tuple[float, float, int],
        results: Mapping[str, Value],
        outcome: str,
        ended: float | None = None,
    ) -> None:
        assert self._trace is not None
        ready, start, size = began
        name = _traced(prefix, node)
        sent, out = tuple(self._sent.pop(name, ())), bytes_of(results.values())
        ended = time.monotonic() if ended is None else max(start, ended)
        self._trace.spans.append(Span(name, node.spec.kind, ready, start, ended, size, out, outcome, sent))


def _too_few(node: PlanNode, quorum: Quorum, values: Values) -> RemoteOpsError:
    told = {wire.name: values.get(wire.source) for wire in node.wires}
    failed = [f"'{name}': {value.why}" for name, value in told.items() if isinstance(value, Missing)]
    return InternalError(
        f"expected answers of {quorum.least} members or more, got {len(told) - len(failed)}: {'; '.join(failed)}"
    )


def _within(node: PlanNode, bound: Deadline) -> Deadline:
    """When a node has to be done: its timeout from now, or sooner."""
    return bound if node.spec.timeout is None else Deadline.after(node.spec.timeout).earlier(bound)


def _sooner(bound: Deadline) -> Deadline:
    """A little sooner, so that whoever makes do without an answer has time to."""
    left_s = bound.remaining()
    return bound if left_s == math.inf else Deadline.after(max(0.0, left_s - min(_RESERVE_S, left_s / 10)))


async def _until(made: Coroutine[Any, Any, Mapping[str, Value]], bound: Deadline) -> Mapping[str, Value]:
    """What is made, or `DeadlineExceeded`, even of what looks neither at its deadline nor at being cancelled."""
    since, task = time.monotonic(), asyncio.ensure_future(made)
    try:
        await asyncio.wait([task], timeout=min(max(0.0, bound.remaining()) + _CLEANUP_S / 10, _LONGEST_S))
        if task.done():
            return task.result()
        raise DeadlineExceeded(f"no answer in {time.monotonic() - since:.3f} s")
    finally:
        await _dropped([task])


async def _dropped(tasks: Sequence[asyncio.Future[Any]]) -> None:
    """Cancel tasks, and give them a moment to notice; one that does not is left to itself."""
    left = [task for task in tasks if not task.done()]
    for task in tasks:
        task.cancel()
        task.add_done_callback(_retrieved)
    if left:
        await asyncio.wait(left, timeout=_CLEANUP_S)


def _retrieved(task: asyncio.Future[Any]) -> None:
    if not task.cancelled():
        task.exception()


def _is_late(error: BaseException | None, bound: Deadline) -> bool:
    """Whether an error is that the time of all is over, and not only that of one node."""
    while isinstance(error, NodeError):
        error = error.__cause__
    return isinstance(error, DeadlineExceeded) and bound.remaining() < _CLEANUP_S / 10


async def _all(
    work: Callable[[Iterator[tuple[int, Call]]], Awaitable[None]],
    calls: Iterator[tuple[int, Call]],
    at_most: int | None,
) -> None:
    """Work through the calls, `at_most` at a time; the first error cancels the rest."""
    tasks: list[asyncio.Future[None]] = []
    try:
        if at_most is None:
            tasks = [asyncio.ensure_future(work(iter([call]))) for call in calls]
        else:
            tasks = [asyncio.ensure_future(work(calls)) for _ in range(at_most)]
        for task in asyncio.as_completed(tasks):
            await task
    finally:
        await _dropped(tasks)


def _traced(prefix: str, node: PlanNode) -> str:
    """What a trace calls a node: `prefix` has the names of its owners, that of the map it is in among them."""
    return prefix + node.name.rpartition("/")[2]
