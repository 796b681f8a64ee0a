"""A graph in a file, checked as the command line says: every fault of it, and its plan if there is none.

What is a fault is decided in `spec` and `graph`; here they are asked, in the way that was wanted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ensemble.faults import Fault, GraphFaults
from ensemble.graph import build
from ensemble.nodes.model import open_servable
from ensemble.nodes.node import NodeSpec
from ensemble.plan import Plan, PlanNode
from ensemble.spec import Document, parse, text_of
from ensemble.steps import ModelStep
from remote_ops.cli import text
from remote_ops.errors import SpecError
from remote_ops.servable import Servable
from remote_ops.signature import Signature

__all__ = ["Checked", "check", "record", "remote_signatures"]


class Checked(NamedTuple):
    """What came of a check: a plan, unless a fault is no warning."""

    file: str
    plan: Plan | None
    faults: tuple[Fault, ...]

    @property
    def errors(self) -> int:
        """How many faults are no warnings."""
        return sum(not fault.warning for fault in self.faults)

    @property
    def summary(self) -> str:
        """One line that says how it went."""
        warnings = len(self.faults) - self.errors
        said = [_count(self.errors, "fault"), *([_count(warnings, "warning")] if warnings else [])]
        if self.plan is None:
            return f"{self.file}: {', '.join(said)}"
        nodes = _count(sum(1 for _ in _nodes(self.plan)), "node")
        return f"{self.file}: valid, {', '.join([nodes, *said[1:]])}"


def check(path: str, *, strict: bool = False, metadata: str | None = None, offline: bool = False) -> Checked:
    """Read a graph and check all of it.

    Args:
        path: of the YAML file.
        strict: whether what nothing uses is a fault, besides what the document says.
        metadata: instead of what the document says; the path in `file:PATH` is relative to here, not to the document.
        offline: ask no remote model: what a file of metadata does not say of it is not known.

    What is said of metadata holds for graphs that are nodes, too, unless they say `metadata: file:PATH` themselves.


    Raises:
        SpecError: there is no such file, or it is no text.

    Opens every model and runs none.
    """
    source = text_of(path)
    document, faults = parse(source, path)
    if document is None:
        return Checked(path, None, tuple(sorted(faults.all, key=lambda fault: fault.place)))
    document = _as_said(document, strict, metadata, offline)
    try:
        plan = build(document, faults, open=_unless_remote if offline else open_servable)
    except GraphFaults as error:
        return Checked(path, None, error.faults)
    return Checked(path, plan, tuple(sorted(plan.warnings, key=lambda fault: fault.place)))


def _as_said(document: Document, strict: bool, metadata: str | None, offline: bool) -> Document:
    mode, _, file = (metadata or document.metadata).partition(":")
    if metadata and mode == "file":
        metadata = f"file:{os.path.abspath(file)}"
    if offline and mode != "file":
        metadata = "warn"
    said = {"strict": document.strict or strict, "metadata": metadata or document.metadata}
    return document.model_copy(update=said)


def _unless_remote(spec: NodeSpec, file: str) -> Servable:
    servable = open_servable(spec, file)
    return _Unasked(servable) if spec.MODEL == "remote" else servable


class _Unasked:
    """A remote model that is not asked anything."""

    def __init__(self, servable: Servable) -> None:
        self.infer = servable.infer

    @property
    def signature(self) -> Signature:
        raise SpecError("it is not asked, because of --offline")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


# --------------------------------------------------------------------------- what remote models say of themselves


def record(plan: Plan, path: str) -> int:
    """Save the signatures of all remote models, as `metadata: file:PATH` reads them; how many there are.

    Raises:
        SpecError: the file cannot be written.
    """
    told = {name: json.loads(text.as_json(signature)) for name, signature in remote_signatures(plan).items()}
    try:
        Path(path).write_text(json.dumps(told, indent=2) + "\n", "utf-8")
    except OSError as error:
        raise SpecError(f"cannot write '{path}' ({error.strerror})", path="--record") from error
    return len(told)


def remote_signatures(plan: Plan) -> dict[str, Signature]:
    """The signatures of the remote models of a graph, by the names of their nodes; `NODE/NODE` in a graph in it."""
    found: dict[str, Signature] = {}
    for node in _nodes(plan):
        if isinstance(node.step, ModelStep) and node.spec.MODEL == "remote":
            found[node.name] = node.step.servable.signature
        elif isinstance(node.step, ModelStep) and node.spec.kind == "graph":
            inner: Any = node.step.servable
            found |= {f"{node.name}/{name}": one for name, one in remote_signatures(inner.plan).items()}
    return found


def _nodes(plan: Plan) -> Iterator[PlanNode]:
    """Every node, owned ones and those of bodies included."""
    waiting: list[PlanNode | Plan] = [plan]
    for one in waiting:
        if isinstance(one, Plan):
            waiting += one.nodes
        else:
            yield one
            waiting += one.children.values()
