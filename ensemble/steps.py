"""What a node does when it runs, said without running it: calls to make, and how their answers are put together.

A step is one of three. A `ModelStep` is a servable. A `PureStep` computes arrays from arrays, at once. A `Controller`
runs other nodes: it is a generator that yields the calls it wants made and is sent what came of them, so that the same
decisions serve the engine (concurrently), `run_serial` (one after the other) and the reverse pass (from a record). No
step does I/O, starts a task or reads a clock.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeGuard

import numpy as np
import numpy.typing as npt

from remote_ops.errors import RemoteOpsError
from remote_ops.servable import Servable

__all__ = [
    "Array",
    "Assembly",
    "Call",
    "Calls",
    "Controller",
    "Missing",
    "ModelStep",
    "Outcome",
    "Piece",
    "PureStep",
    "Rows",
    "Step",
    "Value",
    "is_pure",
]

Array: TypeAlias = "npt.NDArray[Any]"
Rows: TypeAlias = "npt.NDArray[np.intp] | slice | None"  # of axis 0; None: all, as they are


class Missing(NamedTuple):
    """What stands for an output of a node that was skipped (`on_error: skip`), or did not answer before the quorum."""

    node: str
    why: str


Value: TypeAlias = "Array | Missing"
Outcome: TypeAlias = "dict[str, Array] | RemoteOpsError"  # what came of a call: outputs by name, or what it ended with


class Call(NamedTuple):
    """One run of an owned node.

    Args:
        node: its name.
        inputs: its inputs by name, already cut to `rows`.
        wanted: the outputs needed of it; None for all.
        rows: which rows of the controller's row inputs these are, for the reverse pass; None where they are all.
        waits: False if nobody waits for it or minds its errors: a mirror.
        cut: the inputs that were cut to `rows`; the others were given on whole.
        items: whether the rows are items of a map, which lose the axis: one row `(1, *item)` is given as `(*item)`,
            c rows `(c, n, *rest)` are joined to `(c * n, *rest)`.
    """

    node: str
    inputs: Mapping[str, Array]
    wanted: Sequence[str] | None = None
    rows: Rows = None
    waits: bool = True
    cut: Sequence[str] = ()
    items: bool = False


class Calls(NamedTuple):
    """Calls that may run at once, at most `at_most` of them at a time (None: all). `calls` is consumed as they start.

    With `tolerate`, errors come back as outcomes; without, the first one fails the node, and the others are cancelled.
    """

    calls: Iterable[Call]
    at_most: int | None = None
    tolerate: bool = False


class Piece(NamedTuple):
    """A part of the outputs: rows `take` of what call number `call` gave become rows `put` of the controller's.

    Calls are numbered from 0 in the order they were made, over all that was yielded, mirrors included. `names` says
    under which name of its own an output of the call is given on: {ours: theirs}; None where names are equal. With
    `items` the axis of rows is put back into what the call gave, as `Call` says; then `put` is a slice, `take` None.
    """

    call: int
    take: Rows = None
    put: Rows = None
    names: Mapping[str, str] | None = None
    items: bool = False


class Assembly(NamedTuple):
    """What a controller gives: outputs put together from pieces, and `extra` ones that are its own.

    `rows` is the length of axis 0 of the outputs; None where there is one piece and that is the whole. `empty` gives
    outputs that no piece fills, `(0, *item)` arrays: a map over nothing.
    """

    pieces: Sequence[Piece]
    rows: int | None = None
    extra: Mapping[str, Value] = {}
    empty: Mapping[str, Array] = {}


class ModelStep(NamedTuple):
    """A node that is a servable: `renames` maps our output names to the model's, where they differ.

    `place` is where it runs: `loop` (it is awaited), `thread`, or `inline` (cheap, and never waits). `mutates` says of
    code of the user's whether it writes into its inputs: False, it gets views that cannot be written to; True, copies
    where somebody else may still read them. None for models, which are trusted not to.
    """

    servable: Servable
    renames: Mapping[str, str]
    place: str
    config: bytes = b""
    mutates: bool | None = None


class PureStep(Protocol):
    """A node that computes at once, in microseconds to milliseconds."""

    def run(self, inputs: Mapping[str, Value], wanted: Sequence[str]) -> dict[str, Array]:
        """The outputs wanted, of inputs by name; one that is `Missing` only where the node has a quorum."""

    def vjp(
        self, inputs: Mapping[str, Value], outputs: Mapping[str, Array], cotangents: Mapping[str, Array]
    ) -> dict[str, Array]:
        """The gradient with respect to each input that is a float and not missing; `cotangents` lacks zero ones.

        Raises:
            NotDifferentiable: this has no derivative that means something.
        """


class Controller(Protocol):
    """A node that runs others."""

    def steps(self, inputs: Mapping[str, Array], wanted: Sequence[str]) -> Generator[Calls, list[Outcome], Assembly]:
        """Yield calls, be sent their outcomes in the order of the calls (mirrors left out), return the assembly.

        `inputs` has the inputs that are given on to owned nodes by their names, and the controller's own (what a switch
        selects by) under names that begin with `$`.
        """


def is_pure(step: Any) -> TypeGuard[PureStep]:
    """Whether a step computes at once."""
    return hasattr(step, "run")


Step: TypeAlias = "ModelStep | PureStep | Controller"
