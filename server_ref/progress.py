"""How far loading is: a bar on a terminal, a line of JSON for each step elsewhere.

It only shows; it loads nothing.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

if TYPE_CHECKING:
    from server_ref.repository import Entry

__all__ = ["progress_on"]

_STEPS = {"load": "opening", "warm": "warming up"}


def progress_on(stream: TextIO = sys.stderr) -> Callable[[Entry, str, int, int], None]:
    """What a repository may tell its steps to, shown on `stream`."""
    return _Bars(stream).told if stream.isatty() else _Lines(stream).told


class _Bars:
    """One bar at a time: the step that is under way."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar: Any = None

    def told(self, entry: Entry, step: str, done: int, of: int) -> None:
        """Draw the bar anew."""
        bar = self._bar
        if bar is None:
            bar = self._bar = tqdm(desc=f"{_STEPS.get(step, step)} {_named(entry)}", total=of, file=self._stream)
        bar.update(done - bar.n)
        if done == of:
            bar.close()
            self._bar = None


class _Lines:
    """Lines that a log collector reads."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def told(self, entry: Entry, step: str, done: int, of: int) -> None:
        """Write one line."""
        line = json.dumps({"model": entry.name, "version": entry.version, "step": step, "done": done, "of": of})
        with self._lock:
            print(line, file=self._stream, flush=True)


def _named(entry: Entry) -> str:
    return f"{entry.name} {entry.version}".strip()
