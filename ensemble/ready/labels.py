"""Classes by their names: the most likely ones of each row.

Use: `{kind: python, call: ensemble.ready.labels:top_k, options: {k: 3, labels: names.txt}, inputs: {probs: net.probs}}`
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from remote_ops.errors import InvalidRequest, SpecError
from remote_ops.servable import FunctionServable
from remote_ops.signature import Array, TensorSpec

__all__ = ["read_labels", "top_k"]


def top_k(*, k: int = 5, labels: Path | str | Sequence[str] | None = None) -> FunctionServable:
    """A servable that names the `k` most likely classes: probs float32 `[N, C]` to labels and scores `[N, k]`.

    Args:
        k: how many, the most likely first, and of equal ones the one with the lower number.
        labels: a text file with a name on each line, in a graph relative to its YAML file; or the names themselves;
            None: their numbers as text.

    Raises:
        SpecError: no such file, or `k` is not from 1 to the number of labels.

    The servable raises InvalidRequest for rows with fewer classes than `k`; NaN comes last.
    """
    names = _names(labels)
    _require_k(k, names)

    def choose(probs: Array) -> tuple[Array, Array]:
        if probs.shape[1] < k:
            raise InvalidRequest(f"expected {k} classes or more, got {list(probs.shape)}")
        best = np.argsort(-probs, axis=1, kind="stable")[:, :k]
        return _named(best, names), np.take_along_axis(probs, best, 1)

    return FunctionServable(
        choose,
        inputs=[TensorSpec("probs", "float32", (-1, -1 if names is None else len(names)))],
        outputs=[TensorSpec("labels", "string", (-1, k)), TensorSpec("scores", "float32", (-1, k))],
        name="top_k",
    )


def _names(labels: Path | str | Sequence[str] | None) -> tuple[str, ...] | None:
    if labels is None:
        return None
    return read_labels(labels) if isinstance(labels, str | Path) else tuple(map(str, labels))


def _require_k(k: int, names: Sequence[str] | None) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or k < 1 or (names is not None and k > len(names)):
        known = "1 or more" if names is None else f"from 1 to {len(names)}, as many as there are labels"
        raise SpecError(f"expected k {known}, got {k!r}", path="k")


def _named(places: Array, names: Sequence[str] | None) -> Array:
    if names is None:
        return places.astype(str).astype(object)
    return np.array(names, object)[places]


def read_labels(file: Path | str) -> tuple[str, ...]:
    """Read a name from each line of a UTF-8 file; raises `SpecError` if there is none."""
    try:
        names = tuple(Path(file).read_text("utf-8-sig").removesuffix("\n").split("\n"))
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read labels: {error}", path=str(file)) from error
    if names == ("",):
        raise SpecError("expected a name on each line, got an empty file", path=str(file))
    return names
