"""What tells a request from others, here and where it goes on to: its id, and the trace that it is part of.

It reads headers that strangers wrote, and gives only what may stand in a log and in a header. It sends nothing.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping

__all__ = ["given_id", "new_id", "trace_headers", "trace_id"]

_ID = re.compile(r"[!-~]{1,128}")
_TRACE = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_STATE = re.compile(r"[ -~]{1,512}")


def new_id() -> str:
    """An id that no other request has; costs some 1 us."""
    return secrets.token_hex(8)


def given_id(headers: Mapping[str, str]) -> str:
    """The `X-Request-Id` of a request; empty where there is none, or where it is no word of at most 128 letters."""
    said = headers.get("x-request-id", "")
    return said if _ID.fullmatch(said) else ""


def trace_id(headers: Mapping[str, str]) -> str:
    """The id of the trace that `traceparent` names; empty where that is absent or not valid."""
    found = _TRACE.fullmatch(headers.get("traceparent", ""))
    return found[1] if found else ""


def trace_headers(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    """`traceparent` and `tracestate` as they are passed on; nothing where the first is absent or not valid."""
    if not trace_id(headers):
        return []
    state = headers.get("tracestate", "")
    found = [("traceparent", headers["traceparent"])]
    return [*found, ("tracestate", state)] if _STATE.fullmatch(state) else found
