"""`Ensemble`: a graph of models that is called like one model; a servable like those it is made of.

It checks what comes in, lets runs in by its door, and has the engine run them; it decides nothing about nodes.

Changing: `_now`, the graph that answers, set as a whole; what its engine and door hold, on the background loop only.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple

from ensemble.door import Door
from ensemble.engine import Engine
from ensemble.faults import GraphFaults
from ensemble.gradients import Record, pull, undifferentiable
from ensemble.graph import build
from ensemble.plan import Plan
from ensemble.spec import Admission, parse, text_of
from ensemble.steps import Array, Missing, Value
from ensemble.trace import Account, Trace, attach, bytes_of
from remote_ops.background import Background, on_background_loop, result_of
from remote_ops.deadline import Deadline, ambient
from remote_ops.errors import NodeError, SpecError
from remote_ops.servable import split_cotangents
from remote_ops.signature import Signature

__all__ = ["Ensemble", "EnsembleStats", "Result", "load"]


def load(
    source: str | PathLike[str], *, file: str | None = None, threads: int | None = None, timeout_s: float = 30.0
) -> Ensemble:
    """Read a graph, check it, and open its models.

    Args:
        source: the path of its YAML; or the YAML itself, if it has a line end.
        file: what messages call YAML that was given itself; relative paths in it are relative to this.
        threads: models of this process and Python nodes that run at a time; unless given, twice the cores, 4 to 32.
        timeout_s: seconds that a run may take at most, unless the graph, the caller or the surroundings say less.

    Raises:
        GraphFaults: the graph has faults: all of them, each with its place and what to do.
        SpecError: there is no such file, or an argument is wrong.

    Asks every remote model for its signature, at the same time, unless the graph says `metadata: file:PATH`.
    """
    return Ensemble(_plan(source, file), threads, timeout_s)


def _plan(source: str | PathLike[str], file: str | None) -> Plan:
    is_text = isinstance(source, str) and (file is not None or "\n" in source)
    text = str(source) if is_text else text_of(source)
    document, faults = parse(text, file or ("<text>" if is_text else str(source)))
    if document is None:
        raise GraphFaults(faults.all)
    return build(document, faults)


class Result(dict[str, Array]):
    """The outputs of a run by name; and how it was run.

    Args:
        trace: what each node did; None unless asked for.
        digest: the SHA-256 of the graph that answered, in hex.
        missing: of each combination that did without some of its members (`quorum`), their names in order; empty where
            all have answered. Those in a graph in a graph are not told.
    """

    def __init__(
        self,
        outputs: Mapping[str, Array] | None = None,
        trace: Trace | None = None,
        digest: str = "",
        missing: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        super().__init__(outputs or {})
        self.trace = trace
        self.digest = digest
        self.missing = dict(missing or {})


class _Loaded(NamedTuple):
    """A graph, and what runs it: a run holds on to the one it began with."""

    plan: Plan
    engine: Engine
    door: Door
    signature: Signature

    @classmethod
    def of(cls, plan: Plan, threads: int) -> _Loaded:
        admission, stops = plan.admission or Admission(), undifferentiable(plan)
        signature = Signature(
            tuple([spec.form.spec(name, differentiable=name not in stops) for name, spec in plan.inputs.items()]),
            tuple([form.spec(name) for name, form in plan.output_forms.items()]),
            name=plan.name,
            version=plan.digest[:12],
        )
        door = Door(admission.max_inflight, admission.max_queued, admission.max_bytes)
        return cls(plan, Engine(threads), door, signature)


class EnsembleStats(NamedTuple):
    """How an ensemble does: runs inside, runs that wait, runs refused, and nodes whose run had ended before them."""

    inflight: int
    queued: int
    refused: int
    dropped: int


class Ensemble:
    """A graph of models.

    Args:
        plan: the graph, checked.
        threads: models of this process and Python nodes that run at a time; unless given, twice the cores, 4 to 32.
        timeout_s: seconds that a run may take at most, unless the graph, the caller or the surroundings say less.

    Raises:
        SpecError: an argument is wrong.
    """

    def __init__(self, plan: Plan, threads: int | None = None, timeout_s: float = 30.0) -> None:
        if threads is not None and threads < 1:
            raise SpecError(f"expected 1 thread or more, got {threads}", path="threads")
        self._threads = threads or min(32, max(4, 2 * (os.cpu_count() or 1)))
        self._timeout_s = timeout_s
        self._now = _Loaded.of(plan, self._threads)
        self._partial: dict[frozenset[str], Signature] = {}

    @property
    def plan(self) -> Plan:
        """The graph, checked."""
        return self._now.plan

    @property
    def timeout_s(self) -> float:
        """Seconds that a run may take at most."""
        return min(self._timeout_s, self.plan.deadline_s or self._timeout_s)

    @property
    def signature(self) -> Signature:
        """What the graph takes and gives; its version is the beginning of the digest of its document."""
        return self._now.signature

    def __repr__(self) -> str:
        return f"Ensemble({self.plan.name}{self.signature})"

    def reload(self, source: str | PathLike[str] | None = None) -> None:
        """Read the graph again, from its file unless another source is given, and answer by the new one from now on.

        A run is answered by one of the two as a whole: those in flight end by the old one, whose models then go.

        Raises:
            GraphFaults: the new one has faults; the old one stays.
            SpecError: its inputs or outputs are others, which callers rely on; or there is no file. The old one stays.
        """
        file = self.plan.file
        if source is None and file == "<text>":
            raise SpecError("this graph was given as a text, not as a file: say the new one", path="source")
        plan = _plan(file if source is None else source, None if source is None or "\n" not in str(source) else file)
        new, old = _Loaded.of(plan, self._threads), self.signature
        if (new.signature.inputs, new.signature.outputs) != (old.inputs, old.outputs):
            new.engine.close()
            raise SpecError(f"expected the inputs and outputs {old}, got {new.signature}", path="source")
        self._now = new

    def __call__(self, *values: Any, deadline: Deadline | None = None) -> Any:
        """Run the graph with its inputs in order; the output, or a tuple where there are several."""
        results = tuple(self.infer(self.signature.bind(values, at=self.plan.name), deadline=deadline).values())
        return results[0] if len(results) == 1 else results

    def infer(
        self,
        inputs: Mapping[str, Any],
        outputs: Sequence[str] | None = None,
        *,
        config: bytes = b"",
        deadline: Deadline | None = None,
    ) -> dict[str, Array]:
        """Run the nodes that the outputs need (None: all outputs). `config` is for models, and so not used.

        Raises:
            SignatureError: the inputs or names do not fit; nothing ran.
            NodeError: a node failed; `.node` says which, and `__cause__` why.
            DeadlineExceeded: it took too long; says which nodes were at it.
            Overloaded: too many runs wait already.

        Runs on the background loop, while this thread waits: about 0.1 ms, and 20 us for each node.
        """
        return result_of(Background(self._arun(inputs, outputs, self._bound(deadline), None)))

    async def ainfer(
        self,
        inputs: Mapping[str, Any],
        outputs: Sequence[str] | None = None,
        *,
        config: bytes = b"",
        deadline: Deadline | None = None,
    ) -> dict[str, Array]:
        """The same, awaited; cancelling it cancels what its nodes wait for."""
        run = self._arun(inputs, outputs, self._bound(deadline), None)
        return await (run if on_background_loop() else asyncio.wrap_future(Background(run)))

    def run(
        self,
        inputs: Mapping[str, Any],
        outputs: Sequence[str] | None = None,
        *,
        trace: bool = False,
        deadline: Deadline | None = None,
    ) -> Result:
        """The same as `infer`, with what each node did if `trace`; `trace_of(error)` has it where the run fails."""
        return result_of(Background(self._arun(inputs, outputs, self._bound(deadline), self._trace(trace))))

    async def arun(
        self,
        inputs: Mapping[str, Any],
        outputs: Sequence[str] | None = None,
        *,
        trace: bool = False,
        deadline: Deadline | None = None,
    ) -> Result:
        """The same, awaited."""
        run = self._arun(inputs, outputs, self._bound(deadline), self._trace(trace))
        return await (run if on_background_loop() else asyncio.wrap_future(Background(run)))

    def submit(
        self,
        inputs: Mapping[str, Any],
        outputs: Sequence[str] | None = None,
        *,
        trace: bool = False,
        deadline: Deadline | None = None,
    ) -> concurrent.futures.Future[Result]:
        """The same in the background; cancel or drop the future to give it up."""
        return Background(self._arun(inputs, outputs, self._bound(deadline), self._trace(trace)))

    def stats(self) -> EnsembleStats:
        """How many runs there are, and how many came in vain."""
        door, engine = self._now.door, self._now.engine
        return EnsembleStats(door.inflight, door.queued, door.refused, engine.dropped)

    def close(self) -> None:
        """Let the threads go. Runs in flight are given up."""
        self._now.engine.close()

    def __enter__(self) -> Ensemble:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # how it is done

    def _bound(self, deadline: Deadline | None) -> Deadline:
        return Deadline.after(self.timeout_s).earlier(deadline).earlier(ambient())

    def _trace(self, wanted: bool) -> Trace | None:
        return Trace(self.plan.name, self.plan.digest, time.monotonic()) if wanted else None

    async def _arun(
        self, inputs: Mapping[str, Any], outputs: Sequence[str] | None, bound: Deadline, trace: Trace | None
    ) -> Result:
        now = self._now
        given, cotangents = split_cotangents(self._fitted(inputs, now))
        account = Account(trace)
        names = [spec.name for spec in now.signature.select_outputs(outputs, at=now.plan.name)]
        with _traced(trace):
            async with now.door.entered(bytes_of(given.values()), bound, now.plan.name):
                found = await _found(now, given, cotangents, names, bound, account)
        return Result(found, trace, now.plan.digest, account.missing)

    def _fitted(self, inputs: Mapping[str, Any], now: _Loaded) -> dict[str, Array]:
        """The inputs as arrays; optional ones may be left out."""
        left_out = frozenset(name for name, spec in now.plan.inputs.items() if spec.optional and name not in inputs)
        signature = now.signature
        if left_out:
            kept = tuple([spec for spec in signature.inputs if spec.name not in left_out])
            signature = self._partial.setdefault(left_out, Signature(kept, signature.outputs, name=signature.name))
        return signature.fit_inputs(inputs, at=now.plan.name)


@contextlib.contextmanager
def _traced(trace: Trace | None) -> Iterator[None]:
    """Note when a run ends; what it ends with carries the trace, if it is an error."""
    try:
        yield
    except Exception as error:
        if trace is not None:
            attach(trace, error)
        raise
    finally:
        if trace is not None:
            trace.ended = time.monotonic()


async def _found(
    now: _Loaded,
    given: Mapping[str, Array],
    cotangents: Mapping[str, Array],
    names: Sequence[str],
    bound: Deadline,
    account: Account,
) -> dict[str, Array]:
    """Outputs and gradients by name, in the order asked for."""
    plan, engine = now.plan, now.engine
    gradients = [name for name in names if name.startswith("gradient:")]
    forward = [name for name in names if name not in gradients]
    if not gradients:
        return _there(plan, await engine.run(plan, given, forward, bound, account))
    record = Record()
    reached = list(dict.fromkeys([*forward, *cotangents]))
    values = await engine.run(plan, given, reached, bound, account, record=record)
    wanted = [name.removeprefix("gradient:") for name in gradients]
    pulled = await pull(plan, record, cotangents, wanted, bound, engine, account)
    found = _there(plan, {name: values[name] for name in forward})
    return {name: found[name] if name in found else pulled[name.removeprefix("gradient:")] for name in names}


def _there(plan: Plan, values: Mapping[str, Value]) -> dict[str, Array]:
    """The outputs, none of which may be missing."""
    for name, value in values.items():
        if isinstance(value, Missing):
            raise NodeError(
                f"output '{name}' of '{plan.name}' is missing: '{value.node}' was skipped ({value.why})",
                node=value.node,
                graph=plan.name,
            )
    return dict(values)  # type: ignore[arg-type]
