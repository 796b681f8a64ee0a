"""`server_ref.sources`: what is not allowed is refused before anything is connected to, and leaves nothing behind."""

from __future__ import annotations

import hashlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import trustme

import server_ref.sources
from remote_ops.errors import ConnectError, ConnectionLost, SpecError
from server_ref.sources import Sources, is_public

BODY = bytes(range(256)) * 100
DIGEST = hashlib.sha256(BODY).hexdigest()


class Web:
    """A real server on loopback: where each path redirects to, else `BODY`; and what it was asked."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.moved: dict[str, str] = {}
        self.asked: list[str] = []


def serve(tls: ssl.SSLContext | None = None) -> Iterator[Web]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            site.asked.append(f"{self.headers['Host']}{self.path}")
            target = site.moved.get(self.path)
            self.send_response(302 if target else 200)
            self.send_header("Location", target) if target else None
            self.send_header("Content-Length", "0" if target else str(len(BODY)))
            self.end_headers()
            self.wfile.write(b"" if target else BODY)

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            pass  # a client that does not trust the certificate hangs up

    with Server(("127.0.0.1", 0), Handler) as server:
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        site = Web(server.server_port)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield site
        server.shutdown()
        thread.join()


@pytest.fixture
def web(cache: Path) -> Iterator[Web]:
    yield from serve()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REMOTE_OPS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Untouched:
    """A listener on loopback that nobody should connect to."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self.port: int = listener.getsockname()[1]

    @property
    def is_so(self) -> bool:
        """Whether the first connection since the last look is the one that this makes itself."""
        with socket.create_connection(("127.0.0.1", self.port)) as own:
            first, peer = self._listener.accept()
            first.close()
            return bool(peer == own.getsockname())


@pytest.fixture
def untouched() -> Iterator[Untouched]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield Untouched(listener)


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every address that this process has tried to connect to."""
    addresses: list[object] = []
    real = socket.socket.connect

    def connect(self: socket.socket, address: object) -> None:
        addresses.append(address)
        real(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", connect)
    return addresses


def answering(*answers: Sequence[str]) -> tuple[Callable[[str, int], Sequence[str]], list[str]]:
    """A name server that gives each answer once, and the names that it was asked for."""
    asked: list[str] = []
    left = list(answers)

    def resolve(host: str, port: int) -> Sequence[str]:
        asked.append(host)
        return left.pop(0)

    return resolve, asked


# --------------------------------------------------------------------------- the list


def test_every_url_is_refused_unless_one_is_allowed(web: Web, cache: Path, connected: list[object]) -> None:
    with pytest.raises(SpecError, match=r"model URLs are refused here, .* expected --allow-model-url"):
        Sources().fetch(f"{web.url}/m.onnx", DIGEST)
    assert (connected, web.asked, cache.exists()) == ([], [], False)


def test_an_allowed_file_is_fetched_once_and_kept(web: Web, cache: Path) -> None:
    sources = Sources([f"{web.url}/prod/"], allow_private=True)
    path = sources.fetch(f"{web.url}/prod/m.onnx", DIGEST)
    assert path.read_bytes() == BODY
    assert path == sources.fetch(f"{web.url}/prod/m.onnx#sha256={DIGEST}")
    assert list(cache.iterdir()) == [path]
    assert web.asked == [f"127.0.0.1:{web.port}/prod/m.onnx"]


def test_a_kept_file_is_refused_too_once_its_address_is_not_allowed(web: Web) -> None:
    Sources([web.url], allow_private=True).fetch(f"{web.url}/m.onnx", DIGEST)
    with pytest.raises(SpecError, match="not on the list"):
        Sources(["https://models.example.org/"], allow_private=True).fetch(f"{web.url}/m.onnx", DIGEST)


@pytest.mark.parametrize(
    "url", ["https://h.org/prod/m.onnx", "https://H.org:443/prod/a/b.onnx?x=1", "https://h.org/prod"]
)
def test_a_url_below_an_allowed_beginning_passes(url: str) -> None:
    for prefix in ("https://h.org/prod", "https://h.org/prod/", "HTTPS://H.ORG", "https://h.org:443/"):
        Sources(["http://other.org/", prefix]).check(url)


@pytest.mark.parametrize(
    "url",
    [
        "https://h.org/production/m.onnx",
        "https://h.org/",
        "http://h.org/prod/m.onnx",
        "https://h.org:8443/prod/m.onnx",
        "https://h.org.evil.org/prod/m.onnx",
        "https://evil.org/https://h.org/prod/m.onnx",
        "https://h.org./prod/m.onnx",
        "https://h.org@evil.org/prod/m.onnx",
        "https://user:secret@h.org/prod/m.onnx",
        "https://evil.org#@h.org/prod/m.onnx",
        "https://h.org/prod/../secret/m.onnx",
        "https://h.org/prod/%2e%2e/secret/m.onnx",
        "https://h.org/prod/%252e%252e/secret/m.onnx",
        "https://h.org/prod/x%2f..%2f..%2fsecret",
        "https://h.org/prod/..;/secret/m.onnx",
        "https://h.org/prod/./m.onnx",
        "https://h.org/prod\\..\\m.onnx",
        "https://evil.org\\@h.org/prod/m.onnx",
        "https://h.org/prod/m .onnx",
        "https://h.org/prod/m\n.onnx",
        "https://h.org\t/prod/m.onnx",
        "https://h\u00f6.org/prod/m.onnx",
        "https://h.org:0/prod/m.onnx",
        "https://h.org:x/prod/m.onnx",
        "https:///prod/m.onnx",
        "https://[h.org]/prod/m.onnx",
        "ftp://h.org/prod/m.onnx",
        "file:///prod/m.onnx",
        "h.org/prod/m.onnx",
        "",
    ],
)
def test_a_url_that_only_looks_allowed_is_refused(url: str, connected: list[object], cache: Path) -> None:
    resolve, asked = answering()
    with pytest.raises(SpecError):
        Sources(["https://h.org/prod"], resolve=resolve).fetch(url, DIGEST)
    assert (connected, asked, cache.exists()) == ([], [], False)


@pytest.mark.parametrize(
    "prefix", ["", "*", "h.org", "https://*.h.org/", "https://h.org/?x", "https://h.org/#x", "ftp://h"]
)
def test_a_beginning_that_is_none_is_refused_at_once(prefix: str) -> None:
    with pytest.raises(SpecError, match="at --allow-model-url"):
        Sources([prefix])


def test_no_refusal_shows_the_query_or_the_user_of_a_url() -> None:
    for url in ("https://u:secret@h.org/m.onnx", "https://h.org/m.onnx?token=secret", "https://h.org:secret/m.onnx"):
        with pytest.raises(SpecError) as caught:
            Sources(["https://other.org"]).fetch(url, DIGEST)
        assert "secret" not in str(caught.value)


# --------------------------------------------------------------------------- the digest


def test_a_url_without_a_digest_is_refused_before_any_network(
    untouched: Untouched, cache: Path, connected: list[object]
) -> None:
    url = f"http://127.0.0.1:{untouched.port}/m.onnx"
    sources = Sources([url], allow_private=True)
    for bad in (url, f"{url}#", f"{url}#md5=1", f"{url}#sha256=12"):
        with pytest.raises(SpecError, match="digest"):
            sources.fetch(bad)
    assert connected == []
    assert untouched.is_so
    assert not cache.exists() or list(cache.iterdir()) == []


def test_a_file_with_another_digest_leaves_no_bytes(web: Web, cache: Path) -> None:
    with pytest.raises(SpecError, match="nothing was kept"):
        Sources([web.url], allow_private=True).fetch(f"{web.url}/m.onnx", "0" * 64)
    assert list(cache.iterdir()) == []


def test_a_file_above_the_cap_leaves_no_bytes(web: Web, cache: Path) -> None:
    with pytest.raises(Exception, match="too large"):
        Sources([web.url], allow_private=True, max_bytes=len(BODY) - 1).fetch(f"{web.url}/m.onnx", DIGEST)
    assert list(cache.iterdir()) == []


# --------------------------------------------------------------------------- where it leads


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "224.0.0.1"),
        *("169.254.169.254", "168.63.129.16", "100.100.100.200", "255.255.255.255"),
        *("2130706433", "0x7f000001", "017700000001", "0177.0.0.1", "127.1", "127.0.1", "0x7f.1", "127.0.0.1."),
        *("[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]", "[0:0:0:0:0:0:0:1]"),
        *("[fe80::1]", "[fe80::1%25lo]", "[fd00:ec2::254]", "[ff02::1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]"),
        "localhost",
    ],
)
def test_private_addresses_are_refused_however_they_are_written_and_nothing_is_connected_to(
    host: str, untouched: Untouched, cache: Path, connected: list[object]
) -> None:
    url = f"http://{host}:{untouched.port}/m.onnx"
    with pytest.raises(SpecError):
        Sources([url]).fetch(url, DIGEST)  # even where somebody has allowed them
    assert connected == []
    assert untouched.is_so
    assert not cache.exists() or list(cache.iterdir()) == []


@pytest.mark.parametrize(
    "addresses", [["127.0.0.1"], ["93.184.215.14", "127.0.0.1"], ["::ffff:10.0.0.1"], ["fe80::1%eth0"], ["no address"]]
)
def test_a_name_that_leads_to_a_private_address_is_refused(addresses: list[str], connected: list[object]) -> None:
    resolve, asked = answering(addresses)
    with pytest.raises(SpecError, match=r"'h\.org' is a private, local or reserved address"):
        Sources(["https://h.org"], resolve=resolve).fetch("https://h.org/m.onnx", DIGEST)
    assert asked == ["h.org"]
    assert connected == []


def test_the_address_that_was_checked_is_the_one_that_is_connected_to(
    web: Web, connected: list[object], cache: Path
) -> None:
    """A name that leads elsewhere when it is asked for again: it is not."""
    resolve, asked = answering(["127.0.0.1"], ["127.0.0.2"])
    url = f"http://rebind.test:{web.port}/m.onnx"
    path = Sources([url], allow_private=True, resolve=resolve).fetch(url, DIGEST)
    assert path.read_bytes() == BODY
    assert asked == ["rebind.test"]
    assert connected == [("127.0.0.1", web.port)]
    assert web.asked == [f"rebind.test:{web.port}/m.onnx"]


def test_the_next_address_is_tried_where_one_does_not_answer(web: Web, cache: Path) -> None:
    resolve, _ = answering(["127.0.0.2", "127.0.0.1"])  # nobody listens on the first
    url = f"http://h.test:{web.port}/m.onnx"
    assert Sources([url], allow_private=True, resolve=resolve).fetch(url, DIGEST).read_bytes() == BODY


def test_a_name_that_leads_nowhere_is_a_connect_error(cache: Path) -> None:
    def fails(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    for resolve in (fails, answering([])[0]):
        with pytest.raises(ConnectError, match=r"cannot download http://h\.test/m\.onnx: .*(not known|no address)"):
            Sources(["http://h.test"], resolve=resolve).fetch("http://h.test/m.onnx", DIGEST)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("address", "public"),
    [
        *(("93.184.215.14", True), ("8.8.8.8", True), ("2606:2800:21f:cb07::1", True), ("::ffff:8.8.8.8", True)),
        *(("64:ff9b::808:808", True), ("2002:808:808::", True), ("::ffff:192.168.0.1", False), ("::1", False)),
        *(("2002:a00:1::", False), ("64:ff9b::a00:1", False), ("192.0.0.192", False), ("198.18.0.1", False)),
        *(("fec0::1", False), ("64:ff9b:1::808:808", False), ("::", False), ("0.0.0.0", False)),
        *(("240.0.0.1", False), ("fc00::1", False), ("2001:db8::1", False), ("", False), ("h.org", False)),
    ],
)
def test_an_address_is_public_only_if_all_that_it_carries_is(address: str, public: bool) -> None:
    assert is_public(address) is public


# --------------------------------------------------------------------------- redirects


def test_a_redirect_within_the_list_is_followed(web: Web, cache: Path) -> None:
    web.moved["/prod/latest.onnx"] = "/prod/v2.onnx"
    sources = Sources([f"{web.url}/prod/"], allow_private=True)
    assert sources.fetch(f"{web.url}/prod/latest.onnx", DIGEST).read_bytes() == BODY
    assert [path.partition("/")[2] for path in web.asked] == ["prod/latest.onnx", "prod/v2.onnx"]


@pytest.mark.parametrize(
    "target",
    [
        "http://127.0.0.1:{port}/m.onnx",
        "http://localhost:{port}/m.onnx",
        "http://2130706433:{port}/m.onnx",
        "http://[::1]:{port}/m.onnx",
        "//127.0.0.1:{port}/prod/m.onnx",
        "/secret/m.onnx",
        "/prod/../secret/m.onnx",
        "/prod/%2e%2e/secret/m.onnx",
        "http://169.254.169.254/latest/meta-data/",
    ],
)
def test_a_redirect_off_the_list_is_refused_and_not_connected_to(
    web: Web, untouched: Untouched, cache: Path, connected: list[object], target: str
) -> None:
    web.moved["/prod/m.onnx"] = target.format(port=untouched.port)
    with pytest.raises(SpecError):
        Sources([f"{web.url}/prod/"], allow_private=True).fetch(f"{web.url}/prod/m.onnx", DIGEST)
    assert connected == [("127.0.0.1", web.port)]
    assert web.asked == [f"127.0.0.1:{web.port}/prod/m.onnx"]
    assert untouched.is_so
    assert list(cache.iterdir()) == []


def test_a_redirect_to_an_allowed_name_with_a_private_address_is_refused(
    web: Web, untouched: Untouched, cache: Path, connected: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        server_ref.sources, "is_public", lambda address: address == "127.0.0.1"
    )  # so that one can start
    resolve, asked = answering(["127.0.0.1"], ["127.0.0.2"])
    allowed = [f"http://first.test:{web.port}/", f"http://second.test:{untouched.port}/"]
    web.moved["/m.onnx"] = f"http://second.test:{untouched.port}/m.onnx"
    with pytest.raises(SpecError, match=r"'second\.test' is a private, local or reserved address"):
        Sources(allowed, resolve=resolve).fetch(f"http://first.test:{web.port}/m.onnx", DIGEST)
    assert asked == ["first.test", "second.test"]
    assert connected == [("127.0.0.1", web.port)]
    assert list(cache.iterdir()) == []


# --------------------------------------------------------------------------- TLS and the environment


def test_the_certificate_is_that_of_the_name_and_not_of_the_address(tmp_path: Path, cache: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("models.test").configure_cert(tls)
    secure = serve(tls)
    site = next(secure)
    try:
        for host, trusted in (("models.test", True), ("other.test", False)):
            url = f"https://{host}:{site.port}/m.onnx"
            resolve, _ = answering(["127.0.0.1"])
            sources = Sources([url], allow_private=True, ca_file=str(tmp_path / "ca.pem"), resolve=resolve)
            if trusted:
                assert sources.fetch(url, DIGEST).read_bytes() == BODY
            else:
                with pytest.raises((ConnectError, ConnectionLost)):
                    sources.fetch(url, DIGEST)
        assert site.asked == [f"models.test:{site.port}/m.onnx"]
        assert len(list(cache.iterdir())) == 1
    finally:
        next(secure, None)


def test_a_proxy_of_the_environment_is_not_asked(
    web: Web, untouched: Untouched, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{untouched.port}")
    assert Sources([web.url], allow_private=True).fetch(f"{web.url}/m.onnx", DIGEST).read_bytes() == BODY
    assert untouched.is_so
