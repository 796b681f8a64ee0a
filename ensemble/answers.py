"""What a model answers, by the names that a graph has for its outputs; on this thread, or awaited.

It checks that there is an answer, for any code may be a servable; what is in it the model has checked, or its reader.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ensemble.steps import Array, ModelStep
from remote_ops.deadline import Deadline
from remote_ops.errors import InternalError

__all__ = ["ainfer", "infer"]


def infer(step: ModelStep, inputs: Mapping[str, Array], wanted: Sequence[str], bound: Deadline) -> dict[str, Array]:
    """The outputs of a model, by our names, on this thread."""
    renames = step.renames
    theirs = tuple([renames.get(name, name) for name in wanted])
    try:
        results = step.servable.infer(inputs, theirs, config=step.config, deadline=bound)
    except Exception:
        raise
    except BaseException as error:  # sys.exit() in a model would end the loop, and with it every run
        raise InternalError(f"{type(error).__name__}: {error}") from error
    return _named(results, wanted, theirs)


async def ainfer(
    step: ModelStep, inputs: Mapping[str, Array], wanted: Sequence[str], bound: Deadline
) -> dict[str, Array]:
    """The same of a model that can be awaited."""
    model: Any = step.servable
    theirs = tuple([step.renames.get(name, name) for name in wanted])
    return _named(await model.ainfer(inputs, theirs, config=step.config, deadline=bound), wanted, theirs)


def _named(results: Any, wanted: Sequence[str], theirs: Sequence[str]) -> dict[str, Array]:
    """What a model gave by our names, once that it is: most check it themselves, but any code may be a servable."""
    found: dict[str, Array] = {}
    for name, there in zip(wanted, theirs, strict=True):
        value = results.get(there) if isinstance(results, dict) else results
        if not isinstance(value, np.ndarray):
            got = f"a dict of {', '.join(map(repr, results)) or 'nothing'}" if isinstance(results, dict) else ""
            got = got if value is None and got else f"a {type(value).__name__}"
            raise InternalError(f"expected an array as output '{there}', got {got}")
        found[name] = value
    return found
