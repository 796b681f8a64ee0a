"""Looking a host name up: within the deadline whatever the name service does, and once for all who ask."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from rawpeer import WAIT_S, echoing, peer, unreachable

from remote_ops.addresses import is_name, look_up, replicas_among
from remote_ops.deadline import Deadline
from remote_ops.errors import ConnectError, DeadlineExceeded
from remote_ops.transport import Call, HttpTransport, Reply
from remote_ops.url import Url

real = socket.getaddrinfo
WAYS: dict[str, Callable[[Url, Deadline], Reply]] = {
    "exchange": lambda url, bound: HttpTransport().exchange(Call(url, (), [b"x"]), bound),
    "aexchange": lambda url, bound: asyncio.run(HttpTransport().aexchange(Call(url, (), [b"x"]), bound)),
}


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[], list[str]]]:
    """A name service of the test's: what each name is answered with."""
    table: dict[str, Callable[[], list[str]]] = {}

    def getaddrinfo(host: str, port: int, *args: Any, flags: int = 0, **options: Any) -> list[Any]:
        if host not in table or flags & socket.AI_NUMERICHOST:
            return real(host, port, *args, flags=flags, **options)
        return [found for address in table[host]() for found in real(address, port, *args, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return table


@pytest.fixture
def over() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize("way", WAYS)
def test_a_name_service_that_does_not_answer_is_given_up_at_the_deadline(
    way: str, names: dict[str, Any], over: threading.Event
) -> None:
    names[f"hole.{way}"] = lambda: over.wait(WAIT_S) and []
    since = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="connecting"):
        WAYS[way](Url.parse(f"http://hole.{way}/m"), Deadline.after(0.2))
    assert time.monotonic() - since < 0.6


@pytest.mark.parametrize("way", WAYS)
def test_a_name_is_called_at_an_address_that_answers(way: str, names: dict[str, Any]) -> None:
    with peer(echoing) as there:
        names[f"two.{way}"] = lambda: ["127.0.0.9", "127.0.0.1"]
        url = Url.parse(f"http://two.{way}:{there.port}/m")
        assert bytes(WAYS[way](url, Deadline.after(5)).body) == b"x"


@pytest.mark.parametrize("way", WAYS)
def test_a_url_with_an_address_is_called_there_and_nowhere_else(way: str, names: dict[str, Any]) -> None:
    with peer(echoing) as there:
        names[f"at.{way}"] = lambda: ["127.0.0.1"]
        url = Url.parse(f"http://at.{way}:{there.port}/m")
        assert bytes(WAYS[way](url.at("127.0.0.1"), Deadline.after(5)).body) == b"x"
        with pytest.raises(ConnectError, match=r"\[127\.0\.0\.9\]"):
            WAYS[way](url.at("127.0.0.9"), Deadline.after(5))


def test_threads_that_ask_for_one_name_share_a_look_up(names: dict[str, Any], over: threading.Event) -> None:
    asked = []

    def answer() -> list[str]:
        asked.append(1)
        over.wait(WAIT_S)
        return ["127.0.0.1"]

    names["shared"] = answer
    lookups = [look_up(Url.parse("http://shared:7/")) for _ in range(10)]
    assert not lookups[0].cancel()
    over.set()
    assert {lookup.result(WAIT_S)[0].place for lookup in lookups} == {("127.0.0.1", 7)}
    assert len(asked) == 1


def test_a_look_up_that_failed_is_made_again(names: dict[str, Any]) -> None:
    answers: list[Any] = [OSError("try later"), ["127.0.0.1"]]

    def answer() -> list[str]:
        found = answers.pop(0)
        if isinstance(found, OSError):
            raise found
        return list(found)

    names["flaky"] = answer
    url = Url.parse("http://flaky/")
    with pytest.raises(OSError, match="try later"):
        look_up(url).result(WAIT_S)
    assert look_up(url).result(WAIT_S)[0].place == ("127.0.0.1", 80)


@pytest.mark.parametrize(
    ("text", "named"),
    [("http://h/", True), ("http://127.0.0.1/", False), ("http://[::1]/", False), ("http+unix://%2Fa/", False)],
)
def test_only_a_host_name_is_one(text: str, named: bool) -> None:
    assert is_name(Url.parse(text)) is named


def test_the_addresses_of_a_second_family_are_the_same_machines_again(names: dict[str, Any]) -> None:
    names["both"] = lambda: ["::1", "127.0.0.1"]
    names["three"] = lambda: ["127.0.0.1", "127.0.0.2", "127.0.0.1"]
    assert replicas_among(look_up(Url.parse("http://both/")).result(WAIT_S)) == ["::1"]
    assert replicas_among(look_up(Url.parse("http://three/")).result(WAIT_S)) == ["127.0.0.1", "127.0.0.2"]


@pytest.mark.parametrize("way", WAYS)
def test_a_handshake_that_drips_is_given_up_at_the_deadline(way: str) -> None:
    """A record that never ends, a byte at a time: each byte would start a socket's own timeout anew."""
    stop = threading.Event()

    def drip() -> None:
        conversation, _ = listener.accept()
        with conversation:
            conversation.sendall(b"\x16\x03\x03\x40\x00\x02\x00\x3f\xf0")
            while not stop.wait(0.05):
                try:
                    conversation.sendall(b"\0")
                except OSError:
                    return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip)
        thread.start()
        since = time.monotonic()
        try:
            with pytest.raises(DeadlineExceeded, match="connecting"):
                WAYS[way](Url.parse(f"https://127.0.0.1:{listener.getsockname()[1]}/"), Deadline.after(0.4))
            assert time.monotonic() - since < 0.8
        finally:
            stop.set()
            thread.join(WAIT_S)


def test_a_connection_that_is_not_made_in_time_ends_at_the_deadline() -> None:
    with unreachable() as text, pytest.raises(DeadlineExceeded, match="connecting"):
        WAYS["aexchange"](Url.parse(text), Deadline.after(0.2))
