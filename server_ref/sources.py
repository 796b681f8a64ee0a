"""Which model files may be fetched from the web: none, unless their address begins with one that is allowed.

It decides what is asked for and which address is connected to; `remote_ops.download` receives, compares and keeps.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias
from urllib.parse import unquote, urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import NewConnectionError
from urllib3.util.connection import create_connection

from remote_ops.download import MAX_BYTES, fetch
from remote_ops.errors import SpecError

__all__ = ["Sources", "is_public"]

Resolve: TypeAlias = "Callable[[str, int], Sequence[str]]"
_PORTS = {"http": 80, "https": 443}
_NUMERIC = re.compile(r"(0x[0-9a-f]*|\d+)(\.(0x[0-9a-f]*|\d+))*\.?", re.ASCII)
_HOST = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?", re.ASCII)
# What the standard library takes to be public, in some of its versions: metadata of the clouds of Oracle and Azure,
# networks of a site, and translation within one.
_SPECIAL = [ipaddress.ip_network(text) for text in ("192.0.0.0/24", "168.63.129.16/32", "fec0::/10", "64:ff9b:1::/48")]
_EMBEDDING = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("::/96"))


class Sources:
    """The addresses that model files may come from.

    Args:
        allowed: beginnings of http and https URLs, such as `https://models.example.org/prod/`; a path counts by whole
            segments. Without any, every URL is refused.
        allow_private: whether hosts may have private, loopback and link-local addresses; for tests.
        ca_file: certificates to trust instead of the usual ones. No variable of the environment counts: neither proxies
            nor certificates nor passwords are taken from there.
        max_bytes: the most that one file may have.
        resolve: gives the IP addresses of a host and port.

    Raises:
        SpecError: a beginning that is none.
    """

    def __init__(
        self,
        allowed: Iterable[str] = (),
        *,
        allow_private: bool = False,
        ca_file: str | None = None,
        max_bytes: int = MAX_BYTES,
        resolve: Resolve | None = None,
    ) -> None:
        self._allowed = tuple([_prefix(text) for text in allowed])
        self._allow_private = allow_private
        self._ca_file = ca_file
        self._max_bytes = max_bytes
        self._resolve = resolve or _addresses

    def check(self, url: str) -> None:
        """Check an address by its text alone; nothing is resolved or asked.

        Raises:
            SpecError: it is not on the list, or one of the many ways to write an address so that it seems to be.
        """
        address = _address(url)
        if not self._allowed:
            raise SpecError(
                f"model URLs are refused here, {address} too: expected --allow-model-url with its beginning"
            )
        if not any(address.is_below(prefix) for prefix in self._allowed):
            raise SpecError(f"{address} is not on the list of model URLs: expected one that --allow-model-url allows")

    def fetch(self, url: str, sha256: str | None = None) -> Path:
        """Give the path of a model file, downloading it unless it is kept already.

        Args:
            url: http or https; `#sha256=<hex>` at its end is the same as `sha256`.
            sha256: 64 hex digits that the file must have; there is no download without.

        Raises:
            SpecError: the address, or one that it redirects to, is not allowed or is a private one, or the file has
                another digest.
            TransportError: it could not be had; see `remote_ops.download.fetch`.

        Each host is resolved once for each connection, and the address that was checked is the one connected to.
        What is refused is not connected to, and nothing of it is kept.
        """
        page, _, fragment = url.partition("#")
        self.check(page)
        if sha256 is None and not fragment.startswith("sha256="):
            raise SpecError(
                f"{_address(page)} has no digest: expected sha256, or '#sha256=<hex>' at the end of the URL"
            )
        with requests.Session() as session:
            session.trust_env = False
            session.verify = self._ca_file or True
            adapter = _Adapter(self.check, self._connect)
            session.mount("http://", adapter)
            session.mount("https://", adapter)
            return fetch(url, sha256=sha256, max_bytes=self._max_bytes, session=session)

    def _connect(self, connection: HTTPConnection) -> socket.socket:
        """Connect to what the host of a connection resolves to now, if all of it may be connected to."""
        host, port = connection.host.strip("[]").lower(), connection.port
        if (host, port) not in [(prefix.host, prefix.port) for prefix in self._allowed]:
            raise SpecError(f"'{host}:{port}' is not on the list of model URLs")  # however its URL was read
        try:
            addresses = self._resolve(host, port)
            self._check_addresses(host, addresses)
            return _first(addresses, connection)
        except OSError as error:
            raise NewConnectionError(connection, str(error)) from error

    def _check_addresses(self, host: str, addresses: Sequence[str]) -> None:
        if not addresses:
            raise OSError(f"{host} has no address")
        if not self._allow_private and not all(map(is_public, addresses)):
            raise SpecError(
                f"'{host}' is a private, local or reserved address: expected a public one; nothing was sent"
            )


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public network, and so are the IPv4 addresses that it carries in it."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        carried = _carried(ip)
        if carried:
            return all(is_public(str(one)) for one in carried)
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or any(ip in one for one in _SPECIAL))


def _carried(ip: ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """The IPv4 addresses in an IPv6 address: mapped, translated, tunnelled."""
    found = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
    if any(ip in network for network in _EMBEDDING) and int(ip) > 1:
        found.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
    return [one for one in found if one is not None]


def _addresses(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _first(addresses: Sequence[str], connection: HTTPConnection) -> socket.socket:
    """A socket to the first address that answers."""
    for address in addresses[:-1]:
        try:
            return _open(address, connection)
        except OSError:
            continue
    return _open(addresses[-1], connection)


def _open(address: str, connection: HTTPConnection) -> socket.socket:
    return create_connection(
        (address, connection.port),
        connection.timeout,
        source_address=connection.source_address,
        socket_options=connection.socket_options,
    )


# --------------------------------------------------------------------------- how a URL is written


class _Address(NamedTuple):
    """What of a URL decides whether it is allowed."""

    scheme: str
    host: str
    port: int
    path: str

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == _PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{host}{port}{self.path}"

    def is_below(self, prefix: _Address) -> bool:
        whole = prefix.path.rstrip("/")
        is_in = self.path == whole or self.path.startswith(f"{whole}/")
        return self[:3] == prefix[:3] and is_in


def _prefix(text: str) -> _Address:
    if re.search(r"[?#*]", text):
        raise SpecError(f"expected the beginning of a URL, without ? # and *, got {text!r}", path="--allow-model-url")
    try:
        return _address(text)
    except SpecError as error:
        raise SpecError(error.message, path="--allow-model-url") from error


def _address(url: str) -> _Address:
    """Take a URL apart, and refuse what different readers may read differently."""
    if re.search(r"[^\x21-\x7e]|\\", url):
        raise SpecError("the URL of a model has a space, a backslash or a character beyond ASCII: expected it encoded")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:  # its text may hold what the URL holds
        raise SpecError("the URL of a model is malformed") from None
    if parts.scheme not in _PORTS or not host or port == 0:
        raise SpecError(f"expected an http or https URL with a host, got scheme '{parts.scheme}'")
    if "@" in parts.netloc:
        raise SpecError("the URL of a model has a user in it: expected none")
    _check_path(parts.path)
    return _Address(parts.scheme, _plain_host(host), port or _PORTS[parts.scheme], parts.path or "/")


def _plain_host(host: str) -> str:
    """A host in its one form."""
    if ":" in host:
        try:
            return str(ipaddress.IPv6Address(host if "%" not in host else ""))
        except ValueError:
            raise SpecError(f"expected an IPv6 address between brackets, got '{host}'") from None
    if _NUMERIC.fullmatch(host):
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError:
            raise SpecError(f"expected an IPv4 address of four decimal numbers, got '{host}'") from None
    if not _HOST.fullmatch(host):
        raise SpecError(f"expected the name of a host, got '{host}'")
    return host


def _check_path(path: str) -> None:
    """Refuse a path that leads up, however often it is encoded."""
    while True:
        if any(part.partition(";")[0] in (".", "..") for part in re.split(r"[/\\]", path)):
            raise SpecError("the path of a model's URL has '.' or '..' in it: expected it written out")
        if path == (path := unquote(path)):
            return


# --------------------------------------------------------------------------- how it is connected to


class _Adapter(HTTPAdapter):
    """Checks every request, those that redirects lead to included, and opens connections in one way only."""

    def __init__(self, check: Callable[[str], None], connect: Callable[[HTTPConnection], socket.socket]) -> None:
        self._check = check
        self._connect = connect
        super().__init__()

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        """Have every pool open its connections by `connect`."""
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = _pools(self._connect)

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        """Send a request whose URL passes the check."""
        self._check(str(request.url))
        return super().send(request, *args, **kwargs)


def _pools(connect: Callable[[HTTPConnection], socket.socket]) -> Mapping[str, type[HTTPConnectionPool]]:
    class Plain(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            return connect(self)

    class Secure(HTTPSConnection):
        def _new_conn(self) -> socket.socket:
            return connect(self)

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class SecurePool(HTTPSConnectionPool):
        ConnectionCls = Secure

    return {"http": PlainPool, "https": SecurePool}
