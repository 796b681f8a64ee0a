"""JSON that a stranger wrote: how large and how deep it may be before anybody makes values of it.

A text becomes up to twenty times its size in memory, so its lists and commas are counted first. It is pure.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

import numpy as np

from remote_ops.errors import DecodeError, FramingError
from remote_ops.oip import number_readers

__all__ = ["check_json", "depth_of", "load_json"]

MAX_BYTES = 1 << 26
MAX_DEPTH = 100
MAX_COMMAS = 1 << 24
MAX_LISTS = 1 << 22
_BLOCK_BYTES = 1 << 20
_QUOTE = 2
_MARKS = np.zeros(256, np.int8)
_MARKS[list(b"[{")], _MARKS[list(b"]}")], _MARKS[ord('"')] = 1, -1, _QUOTE


def check_json(text: bytes) -> None:
    """Refuse a text that is too large, too deep or too many things to be read.

    Raises:
        FramingError: over 64 MiB; the status is 413.
        DecodeError: lists and objects nested deeper than 100, more than 4,194,304 of them, or 16,777,216 commas.

    Costs about 1 us for a small text, and a fifth of what reading it costs for a large one.
    """
    if len(text) > MAX_BYTES:
        raise FramingError(f"a JSON text of {len(text)} bytes: expected at most {MAX_BYTES}; send binary", status=413)
    lists = text.count(b"[") + text.count(b"{")
    if lists <= MAX_DEPTH and len(text) <= MAX_COMMAS:
        return
    if lists > MAX_LISTS:
        raise DecodeError(f"a JSON text with {lists} lists and objects; send binary tensors", limit=MAX_LISTS)
    if (commas := text.count(b",")) > MAX_COMMAS:
        raise DecodeError(f"a JSON text with {commas} commas; send binary tensors", limit=MAX_COMMAS)
    if lists > MAX_DEPTH and (depth := depth_of(text)) > MAX_DEPTH:
        raise DecodeError(f"a JSON text nested {depth} deep", limit=MAX_DEPTH)


def depth_of(text: bytes) -> int:
    """How deep lists and objects nest in a text; brackets in strings do not count."""
    plain = text.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in text else text
    marks = np.frombuffer(plain, np.uint8)
    deepest = depth = quotes = 0
    for start in range(0, len(marks), _BLOCK_BYTES):
        found = _MARKS[marks[start : start + _BLOCK_BYTES]]
        found = found[found != 0]
        if not len(found):
            continue
        seen = quotes + np.cumsum(found == _QUOTE)
        levels = depth + np.cumsum(np.where((found == _QUOTE) | (seen % 2 == 1), 0, found))
        deepest, depth, quotes = max(deepest, int(levels.max())), int(levels[-1]), int(seen[-1])
    return deepest


def _no_constant(token: str) -> NoReturn:
    raise DecodeError(f"{token} is not JSON")


def load_json(text: bytes) -> Any:
    """What a text says, within the bounds of `check_json`.

    Raises:
        FramingError, DecodeError: it is not JSON in UTF-8, or goes beyond them.
    """
    check_json(text)
    try:
        read_float, read_int = number_readers(len(text))
        plain = str(text, "utf-8")
        return json.loads(plain, parse_constant=_no_constant, parse_float=read_float, parse_int=read_int)
    except UnicodeDecodeError as error:
        raise DecodeError(f"a text that is not UTF-8 ({error.reason})", offset=error.start) from None
    except json.JSONDecodeError as error:
        raise DecodeError(f"a text that is not JSON ({error.msg})", offset=error.pos) from None
    except RecursionError:
        raise DecodeError("a text nested too deeply") from None
    except ValueError as error:  # an integer of thousands of digits
        if isinstance(error, DecodeError):
            raise
        raise DecodeError(f"a text with a number that nobody could mean ({error})"[:160]) from None
