"""What people and programs read of a signature or an array, as text. It prints nothing."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt

from remote_ops.signature import Signature, TensorSpec

__all__ = ["as_json", "as_text", "of_array", "printable", "title"]

Array = npt.NDArray[Any]


def printable(text: str) -> str:
    """The text as one line that does nothing to a terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def title(signature: Signature) -> str:
    """Name and version of a model."""
    return " ".join(filter(None, (signature.name or "(no name)", signature.version)))


def as_text(signature: Signature) -> str:
    """A signature for people, one thing a line."""
    lines = [" ".join(filter(None, (title(signature), signature.description)))]
    lines += [f"  in   {spec.name}: {spec}" for spec in signature.inputs]
    lines += [f"  out  {spec.name}: {spec}" for spec in signature.outputs]
    lines += [f"  can  {feature}" for feature in signature.features]
    return "\n".join(map(printable, lines))


def as_json(signature: Signature) -> str:
    """A signature for programs: one JSON object."""
    told = {key: getattr(signature, key) for key in ("name", "version", "server", "description")}
    sides = {"inputs": [*map(_row, signature.inputs)], "outputs": [*map(_row, signature.outputs)]}
    return json.dumps({**told, **sides, "features": signature.features}, indent=2)


def _row(spec: TensorSpec) -> dict[str, Any]:
    keys = ("name", "dtype", "shape", "description", "differentiable")
    return {key: getattr(spec, key) for key in keys}


_LONGEST = 60


def of_array(array: Array) -> str:
    """An array as numpy shows it; a large one, and a long string, in short."""
    return np.array2string(array, threshold=200, formatter={"object": _text} if array.dtype == object else None)


def _text(item: Any) -> str:
    return repr(item) if len(item) <= _LONGEST else f"{item[:_LONGEST]!r}... ({len(item):,} bytes)"
