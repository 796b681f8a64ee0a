"""Which pages of other sites may call from a browser (CORS): none unless said. It is pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from remote_ops import http1
from remote_ops.errors import SpecError
from server_ref.answer import TEXT, Answer

__all__ = ["check_origins", "origin_headers", "preflight"]

_METHODS = "GET, POST, OPTIONS"
_ASKED = (
    "Accept, Authorization, Content-Encoding, Content-Type, Inference-Header-Content-Length, Traceparent, X-Request-Id,"
    " X-Request-Timeout-Ms"
)
_TOLD = "Inference-Header-Content-Length, Retry-After, X-Request-Id"
_MAX_AGE_S = 600


def check_origins(origins: Sequence[str]) -> frozenset[str]:
    """The origins that may call, such as `https://app.example:8443`, or `*` for all.

    Raises:
        SpecError: one that no browser would send.
    """
    if isinstance(origins, str):
        raise SpecError(f"expected a list of origins, got {origins!r}", path="cors_origins")
    for origin in origins:
        scheme, _, host = origin.partition("://")
        if origin != "*" and (scheme not in ("http", "https") or not host or "/" in host or not origin.isascii()):
            raise SpecError(f"expected an origin such as https://app.example, got {origin!r}", path="cors_origins")
    return frozenset(origins)


def origin_headers(head: http1.Head, origins: Collection[str]) -> tuple[tuple[str, str], ...]:
    """What an answer must say so that the page which asked may read it; nothing where it may not."""
    origin = head.headers.get("origin")
    if "*" in origins and origin is not None:
        return ("Access-Control-Allow-Origin", "*"), ("Access-Control-Expose-Headers", _TOLD)
    vary = ("Vary", "Origin")  # else a cache would hand one page's answer to another
    if origin is None or origin not in origins:
        return (vary,) if origins else ()
    return ("Access-Control-Allow-Origin", origin), ("Access-Control-Expose-Headers", _TOLD), vary


def preflight(*, allowed: bool) -> Answer:
    """The answer to `OPTIONS`: which methods there are, and for a page that may call, which headers."""
    headers = [("Allow", _METHODS)]
    if allowed:
        headers += [
            ("Access-Control-Allow-Methods", _METHODS),
            ("Access-Control-Allow-Headers", _ASKED),
            ("Access-Control-Max-Age", str(_MAX_AGE_S)),
        ]
    return Answer(204, TEXT, (), headers)
