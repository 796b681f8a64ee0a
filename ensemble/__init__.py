"""Compose remote and local models as a typed graph written in YAML, and call it like one model.

The front door; importing it imports nothing until a name is asked for, least of all a framework.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ensemble.ensemble import Ensemble, EnsembleStats, Result, load
    from ensemble.faults import Fault, GraphFaults
    from ensemble.trace import Trace, trace_of

__all__ = ["Ensemble", "EnsembleStats", "Fault", "GraphFaults", "Result", "Trace", "load", "trace_of"]

_HOMES = {
    **dict.fromkeys(("Ensemble", "EnsembleStats", "Result", "load"), "ensemble"),
    **dict.fromkeys(("Fault", "GraphFaults"), "faults"),
    **dict.fromkeys(("Trace", "trace_of"), "trace"),
}


_PARTS = {"yaml": "pyyaml", "pydantic": "pydantic", "networkx": "networkx"}


def lacking(error: ImportError) -> ImportError:
    """The error that says what to type, if a part is not installed that graphs need; else the same."""
    part = _PARTS.get((error.name or "").partition(".")[0])
    return ImportError(f"ensemble needs {part}: pip install 'remote-ops[ensemble]'") if part else error


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    try:
        found = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    except ModuleNotFoundError as error:
        raise lacking(error) from error
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
