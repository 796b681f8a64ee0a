"""`kind: graph`: another graph, in a file of its own."""

from __future__ import annotations

from typing import ClassVar, Literal

from ensemble.nodes.model import ServableSpec, beside
from remote_ops.servable import Servable

__all__ = ["GraphSpec"]


class GraphSpec(ServableSpec):
    """Another graph, in a file of its own."""

    kind: Literal["graph"]
    ref: str
    """Its YAML file, relative to this one."""

    OPENED_BY: ClassVar = ("ref",)
    PLACE: ClassVar = "loop"

    @property
    def what(self) -> str:
        """The path as it is written."""
        return self.ref

    def open(self, file: str) -> Servable:
        """Load the graph.

        Raises:
            SpecError: it has faults, or holds itself.
        """
        from ensemble.ensemble import load  # not at the top: it is made of the nodes

        return load(beside(file, self.ref))
