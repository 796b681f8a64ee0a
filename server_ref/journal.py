"""What a server writes down of requests: a line for each that failed, for every one if asked, and the latest errors.

No tensor, query or word of a model goes into a line, and nothing that strangers send ends a line or steers a terminal.

Changing, on the loop only: the latest errors, and how many lines there were in this second.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TextIO

from server_ref.mishaps import Mishap, Mishaps
from server_ref.names import OneLine, one_line

__all__ = ["Ended", "Journal", "JsonLines", "TextLines", "log_handler"]

log = logging.getLogger("server_ref.requests")
_LINES_PER_S = 100


class Ended(NamedTuple):
    """One request that has ended: of which model, how, and what it took; times in seconds.

    `request_id` and `trace_id` are as in `correlation`. `error` is what it failed with, if it did.
    """

    model: str
    version: str
    status: int
    request_id: str
    trace_id: str
    queue_s: float
    compute_s: float
    total_s: float
    rows: int
    bytes_in: int
    bytes_out: int
    error: BaseException | None = None

    def fields(self) -> dict[str, Any]:
        """What a line says of it, by name; of its error that goes by itself."""
        return {
            "model": one_line(self.model, 100), "version": one_line(self.version, 100), "status": self.status,
            "request_id": self.request_id, "trace_id": self.trace_id, "queue_ms": _ms(self.queue_s),
            "compute_ms": _ms(self.compute_s), "total_ms": _ms(self.total_s), "rows": self.rows,
            "bytes_in": self.bytes_in, "bytes_out": self.bytes_out,
        }  # fmt: skip


class Journal:
    """Writes a line for each request that is to have one, and keeps the latest errors.

    Args:
        requests: whether every request gets a line (level INFO). One that ended in an error always does: ERROR where
            the fault is this server's, WARNING where it is its client's; without `requests` at most 100 a second, and
            the next line says how many were left out.
        clock: seconds, for tests.
    """

    def __init__(self, *, requests: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self.requests = requests
        self._clock = clock
        self._mishaps = Mishaps()
        self._second = 0
        self._lines = self._left_out = 0

    def ended(self, request: Ended) -> None:
        """Take note of a request; costs some 5 us, and 30 us with a write if it gets a line."""
        error = request.error
        if error is None:
            if self.requests:
                self._write(logging.INFO, request, {})
            return
        told = self._mishaps.add(
            error, at=time.time(), model=request.model, request_id=request.request_id, version=request.version
        )
        level = logging.ERROR if request.status >= 500 else logging.WARNING
        self._write(level, request, {"error": told.kind, "message": told.message})

    def errors(self) -> list[Mishap]:
        """The latest 50 requests that ended in an error, the last one first; may be called on any thread."""
        return list(self._mishaps)

    def _write(self, level: int, request: Ended, more: dict[str, Any]) -> None:
        if not log.isEnabledFor(level) or not (self.requests or self._has_room()):
            return
        fields = {**request.fields(), **more}
        if self._left_out:
            fields["left_out"], self._left_out = self._left_out, 0
        log.log(level, "%s", _Line(fields), extra={"fields": fields})

    def _has_room(self) -> bool:
        """Whether another line may be written in this second: a flood of errors must not become one of lines."""
        second = int(self._clock())
        if second != self._second:
            self._second, self._lines = second, 0
        self._lines += 1
        self._left_out += self._lines > _LINES_PER_S
        return self._lines <= _LINES_PER_S


class _Line:
    """Fields as one line of `name=value`, made only if it is written."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self._fields = fields

    def __str__(self) -> str:
        return " ".join(f"{name}={_value(value)}" for name, value in self._fields.items() if value != "")


def _value(value: Any) -> str:
    text = str(value)
    return text if text and not set(text) & set(' "=') else json.dumps(text, ensure_ascii=False)


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)


# --------------------------------------------------------------------------- the form of lines


class TextLines(OneLine):
    """Lines for people: time, level, logger and message."""

    converter = staticmethod(time.gmtime)

    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")


class JsonLines(logging.Formatter):
    """An object of JSON on each line, for programs: time, level and logger, then the fields, or the message."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        at = f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')}.{int(record.msecs):03d}Z"
        told = {"time": at, "level": record.levelname.lower(), "logger": record.name}
        told |= getattr(record, "fields", None) or {"message": record.getMessage()}
        if record.exc_info:
            told["traceback"] = self.formatException(record.exc_info)
        return json.dumps(told, default=str)


def log_handler(stream: TextIO, form: str = "") -> logging.Handler:
    """What writes records to a stream.

    Args:
        stream: where.
        form: `text` or `json`; unless given, text on a terminal and JSON elsewhere.
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter(TextLines() if (form or _form_for(stream)) == "text" else JsonLines())
    return handler


def _form_for(stream: TextIO) -> str:
    return "text" if stream.isatty() else "json"
