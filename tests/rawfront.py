"""A front on a loop of its own, and an HTTP client of the standard library, for tests of what the server answers."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from rawpeer import WAIT_S

from remote_ops.servable import Servable
from server_ref.front import Front
from server_ref.model import Version


class Reply(NamedTuple):
    """What came back; header names in small letters."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The words of an error that is JSON and holds nothing else."""
        assert self.headers["content-type"] == "application/json", self
        (key,) = self.json
        assert key == "error", self
        return str(self.json["error"])


class Client:
    """One connection, kept from request to request; `local_port` tells whether it is still the first."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=WAIT_S)
        self._connection.connect()
        self.local_port: int = self._connection.sock.getsockname()[1]

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        data = json.dumps(body).encode() if isinstance(body, dict | list) else body
        self.send(method, path, data, **headers)
        return self.read()

    def get(self, path: str, **headers: str) -> Reply:
        return self.ask("GET", path, **headers)

    def post(self, path: str, body: Any = b"", **headers: str) -> Reply:
        return self.ask("POST", path, body, **headers)

    def send(self, method: str, path: str, data: bytes | None = None, **headers: str) -> None:
        self._connection.request(method, path, data, {name.replace("_", "-"): text for name, text in headers.items()})

    def read(self) -> Reply:
        answer = self._connection.getresponse()
        body = answer.read()
        return Reply(answer.status, {name.lower(): text for name, text in answer.getheaders()}, body)

    def still(self) -> bool:
        """Whether it is the same connection still."""
        sock = self._connection.sock
        return sock is not None and sock.getsockname()[1] == self.local_port

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def front_of(models: Mapping[str, Servable | Version], **options: Any) -> Iterator[tuple[str, Front]]:
    """Serve models by a front with options of its own; gives its URL and itself."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    front = Front(models, **options)

    async def start() -> asyncio.AbstractServer:
        front.start(loop)
        return await loop.create_server(front.connection, "127.0.0.1", 0)

    async def stop() -> None:
        listener.close()
        front.stop()
        for _ in range(5):
            await asyncio.sleep(0)

    listener = asyncio.run_coroutine_threadsafe(start(), loop).result(WAIT_S)
    try:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/", front
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result(WAIT_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(WAIT_S)
        loop.close()
