"""The Python nodes of the graphs in `graphs.py`, which a graph imports by name."""

from __future__ import annotations

import threading
import time
import weakref
from typing import Any

ALIVE: list[weakref.ref[Any]] = []
MOST = [0]
SLOW_S = 0.01
LASTS_S = [0.0]
_LOCK = threading.Lock()


def same(x: Any) -> Any:
    """A model that does nothing."""
    return x


def grown(x: Any) -> Any:
    """A model whose output is as large as its input, and which counts those that are alive."""
    made = x + 1
    ALIVE.append(weakref.ref(made))
    MOST[0] = max(MOST[0], sum(one() is not None for one in ALIVE))
    return made


def slow(x: Any) -> Any:
    """A model that takes 10 ms, one call at a time."""
    with _LOCK:
        time.sleep(SLOW_S)
    return x


def sleeping(x: Any) -> Any:
    """A model that takes `LASTS_S`, any number of calls at a time."""
    time.sleep(LASTS_S[0])
    return x
