"""What a served graph looks like, and how long its nodes took of late.

It draws nothing, and changes no answer: of some runs it asks for the trace.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from remote_ops.deadline import Deadline
from remote_ops.servable import Servable
from remote_ops.signature import Signature

if TYPE_CHECKING:
    from ensemble.diagram import Diagram
    from ensemble.ensemble import Ensemble, Result
    from ensemble.latency import Latency

__all__ = ["Watched", "is_graph", "pictured", "watched"]

Array = npt.NDArray[Any]
_KEPT = 256


class Watched:
    """A graph whose nodes' times are noted in some of its runs.

    Args:
        ensemble: the graph.
        every_s: seconds between two runs that are traced; a trace costs a few microseconds a node.
        clock: seconds, for tests.

    Changing, guarded by `_lock`: the times, and of which graph they are.
    """

    def __init__(
        self, ensemble: Ensemble, *, every_s: float = 0.05, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._ensemble = ensemble
        self._every_s = every_s
        self._clock = clock
        self._due_at = 0.0
        self._lock = threading.Lock()
        self._digest = ""
        self._times_s: dict[str, deque[float]] = {}
        self._calls: Counter[str] = Counter()

    @property
    def signature(self) -> Signature:
        """What the graph takes and gives."""
        return self._ensemble.signature

    def infer(
        self,
        inputs: Mapping[str, Any],
        outputs: Sequence[str] | None = None,
        *,
        config: bytes = b"",
        deadline: Deadline | None = None,
    ) -> dict[str, Array]:
        """As the graph does."""
        return self._noted(self._ensemble.run(inputs, outputs, trace=self._due(), deadline=deadline))

    async def ainfer(
        self,
        inputs: Mapping[str, Any],
        outputs: Sequence[str] | None = None,
        *,
        config: bytes = b"",
        deadline: Deadline | None = None,
    ) -> dict[str, Array]:
        """The same, awaited."""
        return self._noted(await self._ensemble.arun(inputs, outputs, trace=self._due(), deadline=deadline))

    def close(self) -> None:
        """Let the threads of the graph go."""
        self._ensemble.close()

    def diagram(self) -> Diagram:
        """The boxes and arrows of the graph."""
        from ensemble.diagram import diagram_of

        return diagram_of(self._ensemble.plan)

    def latencies(self) -> dict[str, Latency]:
        """How often each node ran in traced runs, and the median of its latest times, by the keys of its box."""
        from ensemble.latency import Latency

        with self._lock:
            times = {node: tuple(taken) for node, taken in self._times_s.items()}
            calls = dict(self._calls)
        return {node: Latency(calls[node], 1e3 * median(taken)) for node, taken in times.items()}

    def _due(self) -> bool:
        now = self._clock()
        if now < self._due_at:
            return False
        self._due_at = now + self._every_s
        return True

    def _noted(self, result: Result) -> Result:
        if result.trace is None:
            return result
        with self._lock:
            if result.digest != self._digest:  # the graph was read again, and is another
                self._digest = result.digest
                self._times_s.clear()
                self._calls.clear()
            for span in result.trace.spans:
                self._times_s.setdefault(span.node, deque(maxlen=_KEPT)).append(span.ended - span.ready)
                self._calls[span.node] += 1
        return result


def is_graph(servable: Any) -> bool:
    """Whether it is a graph of models, watched or not."""
    return isinstance(servable, Watched) or type(servable).__module__.partition(".")[0] == "ensemble"


def watched(servable: Servable) -> Servable:
    """The same servable, with its nodes' times noted if it is a graph."""
    if isinstance(servable, Watched) or not is_graph(servable):
        return servable
    return Watched(servable)  # type: ignore[arg-type]


def pictured(graph: Any) -> tuple[Diagram, Mapping[str, Latency]]:
    """The boxes and arrows of a graph, and how long its nodes took, if it is watched."""
    from ensemble.diagram import diagram_of

    if isinstance(graph, Watched):
        return graph.diagram(), graph.latencies()
    return diagram_of(graph.plan), {}
