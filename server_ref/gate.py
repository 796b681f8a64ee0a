"""Who gets to the control plane: by token, by the name it is called by, and never from the pages of others.

It answers nothing itself but refusals.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from server_ref.access import Access, AccessDenied, Kind

if TYPE_CHECKING:
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["Gate"]

_OPEN = ("/", "/healthz", "/openapi.json")
_READS = ("GET", "HEAD", "OPTIONS")
_TRIES = re.compile(r"/api/models/.+/versions/.*/infer")


class Gate:
    """Lets in who may; changes, which are all but reads below `/api/`, only where they are allowed.

    A page that somebody has open in a browser of this machine reaches a loopback address too: by a request across
    sites, which says its `Origin`, or under a name that leads here, which then is the `Host`.

    Args:
        app: what is behind it.
        access: the tokens, if there are any. A change, and trying a model, want one of class `admin`; reading wants one
            beyond loopback.
        allow_changes: whether anything may be changed.
        loopback: whether only this machine can reach it.
        refuse: makes an answer of a refusal.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        access: Access | None,
        allow_changes: bool,
        loopback: bool,
        refuse: Callable[[AccessDenied], Response],
    ) -> None:
        self._app = app
        self._access = access
        self._allow_changes = allow_changes
        self._loopback = loopback
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http" and (refusal := self._refusal(scope)) is not None:
            return await self._refuse(refusal)(scope, receive, send)
        return await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> AccessDenied | None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        reads = scope["method"] in _READS
        if reads and scope["path"] in _OPEN:
            return None
        tries = scope["method"] == "POST" and _TRIES.fullmatch(scope["path"]) is not None
        changes = not reads and scope["path"].startswith("/api/") and not tries
        needed = self._needed_to_try() if tries else self._needed(changes)
        if needed == "open" or self._access is None:
            if self._loopback and not _names_loopback(headers.get("host", "")):
                return AccessDenied("expected a Host of this machine, such as localhost", status=403)
        elif (refusal := self._access.refusal_of(needed, headers.get("authorization", ""))) is not None:
            return refusal
        if not reads and _is_from_elsewhere(headers):
            return AccessDenied("pages of other sites may change nothing here", status=403)
        if changes and not self._allow_changes:
            return AccessDenied("nothing can be changed here: start the server with --allow-model-control", status=403)
        return None

    def _needed_to_try(self) -> Kind:
        """A call of a model changes nothing, but is not to be had here by whoever has no token."""
        if self._access is None:
            return "open"
        return "admin" if self._access.has_admin else "infer"

    def _needed(self, changes: bool) -> Kind:
        if self._access is None:
            return "open"
        if changes:
            return "admin"
        if self._loopback:
            return "open"
        return "infer" if self._access.guards_infer else "admin"


def _names_loopback(host: str) -> bool:
    name, colon, port = host.rpartition(":")
    name = name if colon and port.isdigit() else host
    name = name.strip("[]")
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:  # a name that begins with 127 may lead anywhere
        return False


def _is_from_elsewhere(headers: Mapping[str, str]) -> bool:
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2] != headers.get("host", ""):
        return True
    return headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none")
