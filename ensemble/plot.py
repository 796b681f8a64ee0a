"""A picture of a graph: what flows from where to where, in which dtype and shape, and how long it took.

It puts a plan through `diagram`, and that through `mermaid` or `svg`; files are its caller's affair.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from ensemble.diagram import diagram_of
from ensemble.latency import Latency
from ensemble.mermaid import mermaid
from ensemble.plan import Plan
from ensemble.svg import svg

__all__ = ["plot"]


def plot(
    plan: Plan, form: Literal["mermaid", "svg"] = "mermaid", latencies: Mapping[str, Latency] | None = None
) -> str:
    """Draw a graph.

    Args:
        plan: the graph, checked; of an `Ensemble`, its `.plan`.
        form: `mermaid`, text for pages that draw it; or `svg`, a picture.
        latencies: how long each node took, by the names in a trace; `latency.latencies_in` reads them from a file.

    Returns:
        The text of the file.
    """
    diagram = diagram_of(plan, latencies)
    return mermaid(diagram) if form == "mermaid" else svg(diagram, plan.name)
