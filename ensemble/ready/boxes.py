"""Boxes of detectors: of those that overlap, the best.

Use: `{kind: python, call: ensemble.ready.boxes:non_maximum_suppression, inputs: {boxes: a.boxes, scores: a.scores}}`.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np

from remote_ops.errors import SignatureError
from remote_ops.signature import Array, TensorSpec, describe

__all__ = ["non_maximum_suppression"]


def non_maximum_suppression(
    boxes: Annotated[Array, TensorSpec("boxes", "float32", (-1, 4))],
    scores: Annotated[Array, TensorSpec("scores", "float32", (-1,))],
    classes: Annotated[Array | None, TensorSpec("classes", "int64", (-1,))] = None,
    *,
    overlap: float = 0.5,
    min_score: float = -np.inf,
    at_most: int | None = None,
) -> Annotated[Array, TensorSpec("keep", "int64", (-1,))]:
    """Which boxes to keep, the best first: those that no better one overlaps by more than `overlap`.

    Args:
        boxes: float32 `[K, 4]`: x1, y1, x2, y2 with x1 <= x2 and y1 <= y2; K may be 0.
        scores: float32 `[K]`; of equal ones the first is better.
        classes: int64 `[K]`, where boxes of different classes do not compete.
        overlap: intersection over union, 0 to 1.
        min_score: what scores less is left out.
        at_most: how many to keep at most.

    Returns:
        keep: int64 `[M]`, places in `boxes`.

    Raises:
        SignatureError: boxes, scores and classes are not equally many.

    Takes time in proportion to K times M. Source: `torchvision.ops.nms`.
    """
    for name, array in (("scores", scores), ("classes", classes)):
        if array is not None and len(array) != len(boxes):
            expected = f"one for each of {describe(boxes)}"
            raise SignatureError(
                f"input '{name}': expected {expected}, got {describe(array)}",
                name=name, expected=expected, got=describe(array),
            )  # fmt: skip
    waiting = np.argsort(-scores, kind="stable")
    waiting = waiting[scores[waiting] >= min_score]
    kept: list[int] = []
    while waiting.size and len(kept) != at_most:
        best, waiting = int(waiting[0]), waiting[1:]
        kept.append(best)
        rivals = _overlaps(boxes[best], boxes[waiting]) > overlap
        if classes is not None:
            rivals &= classes[waiting] == classes[best]
        waiting = waiting[~rivals]
    return np.array(kept, np.int64)


def _overlaps(box: Array, others: Array) -> Array:
    """The intersection over union `[K]` of one box with others; NaN where both are empty."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    common = np.prod(np.maximum(high - low, 0), axis=1)
    area, areas = np.prod(box[2:] - box[:2]), np.prod(others[:, 2:] - others[:, :2], axis=1)
    with np.errstate(all="ignore"):
        return np.asarray((common / (area + areas - common)).astype(np.float64))
