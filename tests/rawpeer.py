"""A scripted peer for tests: a real listening socket whose every connection is handled by a function of the test."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

from remote_ops import graphpipe
from remote_ops.signature import Signature

WAIT_S = 10.0


class Message(NamedTuple):
    """A request or a response as it was read off a socket, without any code of ours."""

    first_line: str
    headers: dict[str, str]
    body: bytes

    @property
    def status(self) -> int:
        return int(self.first_line.split()[1])


def read_head(file: BinaryIO) -> tuple[str, dict[str, str]] | None:
    """Read a header block; None at the end of the stream."""
    first = file.readline()
    if not first:
        return None
    headers = {}
    while (line := file.readline().rstrip(b"\r\n")) != b"":
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip()
    return first.decode("latin-1").rstrip("\r\n"), headers


def read_message(file: BinaryIO) -> Message | None:
    """Read one message whose body has a Content-Length, or none; None at the end of the stream."""
    head = read_head(file)
    if head is None:
        return None
    return Message(*head, file.read(int(head[1].get("content-length", 0))))


def until(condition: Callable[[], bool], within_s: float = WAIT_S) -> bool:
    """Poll until `condition` holds; whether it did in time."""
    give_up = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > give_up:
            return False
        time.sleep(0.002)
    return True


class Conversation:
    """The peer's end of one connection."""

    def __init__(self, sock: socket.socket, number: int) -> None:
        self.sock = sock
        self.number = number
        self.file = sock.makefile("rb")

    def read(self) -> Message | None:
        """The next request; None if the caller hung up."""
        return read_message(self.file)

    def send(self, *parts: bytes) -> None:
        self.sock.sendall(b"".join(parts))

    def answer(self, body: bytes = b"", status: str = "200 OK", *headers: str) -> None:
        lines = "".join(f"{header}\r\n" for header in headers)
        self.send(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{lines}\r\n".encode(), body)

    def reset(self) -> None:
        """Hang up with a TCP reset."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.hang_up()

    def hang_up(self) -> None:
        self.file.close()
        self.sock.close()


Script = Callable[[Conversation], None]


class Peer:
    """A listening socket; `connections` counts those accepted, `open` those that live."""

    def __init__(self, script: Script, tls: ssl.SSLContext | None, host: str) -> None:
        self.over = threading.Event()
        self.connections = 0
        self.open = 0
        self._script = script
        self._tls = tls
        self._lock = threading.Lock()
        self._conversations: list[Conversation] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server((host, 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}/m"
        self._acceptor = threading.Thread(target=self._accept)
        self._acceptor.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._converse, args=(sock,))
            self._threads.append(thread)
            thread.start()

    def _converse(self, sock: socket.socket) -> None:
        with self._lock:
            self.connections += 1
            self.open += 1
            number = self.connections
        with contextlib.suppress(OSError, ValueError):
            try:
                sock = self._tls.wrap_socket(sock, server_side=True) if self._tls else sock
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                conversation = Conversation(sock, number)
                self._conversations.append(conversation)
                self._script(conversation)
                conversation.hang_up()
            finally:
                sock.close()
        with self._lock:
            self.open -= 1

    def close(self) -> None:
        self.over.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._acceptor.join(WAIT_S)
        for conversation in self._conversations:
            with contextlib.suppress(OSError):
                conversation.sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(WAIT_S)
            assert not thread.is_alive(), "a scripted conversation does not end"
        for conversation in self._conversations:
            with contextlib.suppress(OSError, ValueError):
                conversation.hang_up()


@contextlib.contextmanager
def peer(script: Script, *, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> Iterator[Peer]:
    """Run a peer that hands each connection to `script`, on a thread of its own."""
    running = Peer(script, tls, host)
    try:
        yield running
    finally:
        running.close()


def echoing(conversation: Conversation) -> None:
    """Answer every request with its own body."""
    while (request := conversation.read()) is not None:
        conversation.answer(request.body)


def serving(signature: Signature, answer: Callable[[Conversation, Message], None]) -> Script:
    """A script that answers metadata requests with `signature`, and leaves the others to `answer`."""
    metadata = graphpipe.encode_metadata(signature)

    def script(conversation: Conversation) -> None:
        while (request := conversation.read()) is not None:
            if request.body == graphpipe.METADATA_REQUEST:
                conversation.answer(metadata)
            else:
                answer(conversation, request)

    return script


@contextlib.contextmanager
def unreachable() -> Iterator[str]:
    """An address that does not answer a SYN: a listener whose backlog is full. Yields its URL."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(8):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/m"
