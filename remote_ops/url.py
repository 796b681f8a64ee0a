"""Where a request goes, and whom https trusts on the way.

It reads URLs and certificate files; it opens no connection.
"""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from remote_ops.environment import filled, names_variables
from remote_ops.errors import SpecError

__all__ = ["TLS", "USER_AGENT", "Url"]

USER_AGENT = "remote-ops/0.1"
_PLACE = re.compile(r"[^:]*://([^/?#]*)")


class Url(NamedTuple):
    """Where a request goes, and how. `host` and `port` are empty for a unix socket, `unix_path` for all others.

    `text` is for messages: a query, which may hold a secret, is left out of it; `full` is what was given. `address` is
    the one of the host's that is meant; empty for any of them.
    """

    text: str
    full: str
    scheme: str
    host: str
    port: int
    unix_path: str
    target: str
    prefix: bytes
    address: str = ""
    method: str = "POST"
    content_type: str = "application/octet-stream"

    def at(self, address: str) -> Url:
        """The same URL at one address of its host."""
        return self._replace(text=f"{self.text} [{address}]", address=address)

    def __repr__(self) -> str:
        return f"Url({self.text!r})"

    @classmethod
    def parse(cls, text: str) -> Url:
        """Read `http://host[:port]/path`, `https://...` or `http+unix://%2Fpath.sock/path`.

        Raises:
            SpecError: no such URL, or one that carries a user name or a password.
        """
        if not isinstance(text, str):
            raise SpecError(f"expected a URL, got a {type(text).__name__}", path="url")
        full = text
        try:
            parts = urlsplit(full)
        except ValueError:  # its text may hold what the URL holds
            raise SpecError("no URL of a model: it is malformed", path="url") from None
        if "@" in parts.netloc:
            raise SpecError(
                "a URL with a user name or password: pass headers={'Authorization': ...} instead", path="url"
            )
        text = full.split("?")[0] + ("?..." if parts.query else "")
        if parts.scheme not in ("http", "https", "http+unix"):
            raise SpecError(f"no URL of a model: expected http://, https:// or http+unix://, got {text!r}", path="url")
        if any(ord(char) <= 32 or ord(char) == 127 for char in full):
            raise SpecError(f"a URL with a space or a control character: {text!r}", path="url")
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if parts.scheme == "http+unix":
            unix_path = unquote(parts.netloc)
            if not unix_path.startswith("/"):
                raise SpecError(f"expected http+unix://%2Fpath.sock/model, got {text!r}", path="url")
            return cls(text, full, parts.scheme, "", 0, unix_path, target, _prefix(target, "localhost"))
        try:
            port = (443 if parts.scheme == "https" else 80) if parts.port is None else parts.port
            if not port:
                raise ValueError("port 0")
        except ValueError as error:
            raise SpecError(f"a port that is no number below 65536: {text!r}", path="url") from error
        if not parts.hostname:
            raise SpecError(f"a URL without a host: {text!r}", path="url")
        return cls(text, full, parts.scheme, parts.hostname, port, "", target, _prefix(target, parts.netloc))

    def below(self, suffix: str, method: str, content_type: str) -> Url:
        """The same server with something after the path, for another method and type of body (none: no body).

        Messages call it what they call this one.
        """
        path, mark, query = self.target.partition("?")
        target = f"{path.rstrip('/')}{suffix}{mark}{query}"
        place = _PLACE.match(self.full)
        before, host = (place[0], place[1]) if place else ("", self.host)
        prefix = _prefix(target, "localhost" if self.unix_path else host, method, content_type)
        return self._replace(
            full=before + target, target=target, prefix=prefix, method=method, content_type=content_type
        )


def _prefix(target: str, host: str, method: str = "POST", content_type: str = "application/octet-stream") -> bytes:
    kind = f"Content-Type: {content_type}\r\n" if content_type else ""
    try:
        return f"{method} {target} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: {USER_AGENT}\r\n{kind}".encode("ascii")
    except UnicodeEncodeError as error:
        raise SpecError(f"a URL is ASCII: quote {target!r} or {host!r} first", path="url") from error


@dataclass(frozen=True)
class TLS:
    """How https is trusted and who we are. Certificates are checked, host name included, unless `verify` is False.

    Args:
        ca: path of a file of CA certificates (PEM) to trust instead of the system's.
        cert, key: paths of the client certificate and its key (PEM), for servers that ask who calls.
        password: of the key. It may name environment variables as `${NAME}`, which are read at the first connection;
            otherwise it is not shown, and not pickled.
        verify: False trusts anybody; for tests.

    Raises:
        SpecError: a file is missing or is no such certificate; at the first connection.
    """

    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    password: str | None = field(default=None, repr=False)
    verify: bool = True

    def context(self) -> ssl.SSLContext:
        """Build the context; reads the files."""
        try:
            context = ssl.create_default_context(cafile=self.ca)
            if self.cert:
                context.load_cert_chain(self.cert, self.key, filled(self.password or "", "the password", "tls"))
        except (OSError, ssl.SSLError) as error:
            hint = "" if self.password or not self.key else "; a password is never pickled"
            files = ", ".join(filter(None, (self.ca, self.cert, self.key)))
            raise SpecError(f"these certificates do not load: {error}{hint}", path=f"tls, {files}") from error
        if not self.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "password": self.password if names_variables(self.password) else None}
