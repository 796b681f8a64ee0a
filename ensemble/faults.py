"""What is wrong with a graph, or with another document: every fault with its code and place, all of them at once.

It collects and words faults; what is a fault is decided in `spec`, `graph` and `nodes`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeAlias

from remote_ops.errors import SpecError

__all__ = ["CODES", "Fault", "FaultList", "Faults", "GraphFaults", "Path", "Place", "meant"]

Path: TypeAlias = "tuple[str | int, ...]"  # ("nodes", "vote", "inputs", "a") in the document

CODES: Mapping[str, str] = {
    "E101": "the document is not of the format: an unknown key, a missing one, or a value of the wrong kind",
    "E102": "a name is used twice, reserved, or no name",
    "E103": "a reference to something that is not there",
    "E104": "a cycle",
    "E105": "a model lacks an input, or is given one that it does not have",
    "E106": "a dtype that does not fit",
    "E107": "a shape that does not fit: a rank, a size, or a symbol bound twice",
    "E108": "a tensor that has no form on the wire",
    "E109": "a node or an output that nothing uses",
    "E110": "alternatives that differ, or lack a default",
    "E111": "a map over tensors that do not share their first axis",
    "E112": "a combination that is not defined: weights, labels or members",
    "E113": "an optional input where a value is needed",
    "E114": "a timeout beyond the deadline",
    "E115": "a node of another one that is used directly",
    "E116": "a model that cannot be asked or opened",
    "E117": "YAML that reads otherwise than it looks: a key twice, or a key that is no text",
}


class Place(NamedTuple):
    """Where in a file, from 1."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


class Fault(NamedTuple):
    """One thing that is wrong: its code, where, the path in the document, and in words what, and what to do."""

    code: str
    place: Place
    path: Path
    text: str
    warning: bool = False

    def __str__(self) -> str:
        path = ".".join(map(str, self.path))
        return f"{self.code.replace('E', 'W') if self.warning else self.code} {self.place} {self.text}" + (
            f" - at {path}" if path else ""
        )


class Faults(SpecError):
    """A document that is not valid; `.faults` has every fault, warnings included, in the order of the file."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = tuple(sorted(faults, key=lambda fault: fault.place))
        errors = [fault for fault in self.faults if not fault.warning]
        text = "\n".join(map(str, self.faults))
        super().__init__(text if len(self.faults) == 1 else f"{len(errors)} fault{'s' * (len(errors) != 1)}\n{text}")
        self.path = ".".join(map(str, errors[0].path)) if errors else ""


class GraphFaults(Faults):
    """A graph that is not valid."""


class FaultList:
    """Collects faults of one document, whose `places` say where each path stands."""

    def __init__(self, file: str, places: Mapping[Path, Place]) -> None:
        self.file = file
        self._places = places
        self.all: list[Fault] = []

    def add(self, code: str, path: Path, text: str, *, warning: bool = False) -> None:
        """Note a fault at a path, or at the nearest thing above it that stands in the file."""
        fault = Fault(code, self.place(path), path, text, warning)
        if fault not in self.all:
            self.all.append(fault)

    def place(self, path: Path) -> Place:
        """Where a path stands: its value; of an indented block, its key; of what is not there, what lacks it."""
        while path and path not in self._places:
            path = path[:-1]
        return self._places.get(path, Place(self.file, 1, 1))

    @property
    def errors(self) -> list[Fault]:
        """Those that are no warnings."""
        return [fault for fault in self.all if not fault.warning]

    def raise_if_any(self) -> None:
        """Raise them all, if one is no warning."""
        if self.errors:
            raise GraphFaults(self.all)


_MOST_SHOWN = 12


def meant(name: str, known: Iterable[str]) -> str:
    """What was perhaps meant by a name that is not there: `; did you mean 'probs'?`, or what there is."""
    known = list(known)
    near = difflib.get_close_matches(name, known, 1)
    if near:
        return f"; did you mean '{near[0]}'?"
    shown = ", ".join(map(repr, known[:_MOST_SHOWN])) or "none"
    return f": there is {shown}{f' and {len(known) - _MOST_SHOWN} more' if len(known) > _MOST_SHOWN else ''}"
