"""Downloads: what is kept, what is refused, and that nothing half done or secret is left behind."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import io
import os
import pty
import socket
import stat
import struct
import subprocess
import sys
import termios
import threading
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests

from remote_ops.download import cache_folder, check_sha256, fetch
from remote_ops.errors import BadStatus, ConnectError, ConnectionLost, SpecError, TransportError

BODY = bytes(range(256)) * 9000  # 2.3 MB: more than one piece
DIGEST = hashlib.sha256(BODY).hexdigest()
Route = Callable[[BaseHTTPRequestHandler], None]


class Web:
    """A real server: what it does for each path, and the paths it was asked for."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.routes: dict[str, Route] = {}
        self.asked: list[str] = []


def answer(
    body: bytes, *, status: int = 200, promised: int | None = None, headers: dict[str, str] | None = None
) -> Route:
    """A route that sends a body, with another Content-Length than its own if one is `promised`."""

    def route(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body) if promised is None else promised))
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.wfile.write(body)
        handler.close_connection = True

    return route


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REMOTE_OPS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def web(cache: Path) -> Iterator[Web]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            site.asked.append(self.path)
            site.routes[self.path.split("?")[0]](self)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        site = Web(f"http://127.0.0.1:{server.server_port}")
        site.routes["/m.onnx"] = answer(BODY)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield site
        server.shutdown()
        thread.join()


def test_a_file_is_downloaded_once_and_kept(web: Web, cache: Path) -> None:
    path = fetch(f"{web.url}/m.onnx")
    assert path.read_bytes() == BODY
    assert path.name.endswith("-m.onnx")
    assert list(cache.iterdir()) == [path]
    assert fetch(f"{web.url}/m.onnx") == path
    assert web.asked == ["/m.onnx"]


def test_two_addresses_never_share_a_file(web: Web) -> None:
    paths = {fetch(f"{web.url}/m.onnx{query}") for query in ("", "?v=1", "?v=2")}
    assert len(paths) == 3


def test_the_folder_is_only_for_its_owner(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == cache
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    monkeypatch.delenv("REMOTE_OPS_CACHE")
    monkeypatch.setenv("HOME", str(cache / "home"))
    assert cache_folder() == cache / "home/.cache/remote-ops/models"


def test_a_name_from_the_web_stays_inside_the_folder(web: Web, cache: Path) -> None:
    web.routes["/..%2F..%2F%2Fetc%2Fa%20b%00.onnx"] = answer(b"x")
    path = fetch(f"{web.url}/..%2F..%2F%2Fetc%2Fa%20b%00.onnx")
    assert path.parent == cache
    assert list(cache.iterdir()) == [path]


def test_a_right_digest_is_accepted_as_argument_and_as_fragment(web: Web) -> None:
    assert fetch(f"{web.url}/m.onnx", sha256=DIGEST.upper()) == fetch(f"{web.url}/m.onnx#sha256={DIGEST}")
    assert web.asked == ["/m.onnx"]


def test_a_wrong_digest_names_both_and_keeps_nothing(web: Web, cache: Path) -> None:
    with pytest.raises(SpecError) as caught:
        fetch(f"{web.url}/m.onnx", sha256="0" * 64)
    assert f"expected sha256 {'0' * 64}, got {DIGEST}" in str(caught.value)
    assert list(cache.iterdir()) == []


def test_a_kept_file_that_was_changed_is_fetched_again_when_a_digest_is_given(web: Web) -> None:
    path = fetch(f"{web.url}/m.onnx", sha256=DIGEST)
    path.write_bytes(b"tampered")
    assert fetch(f"{web.url}/m.onnx", sha256=DIGEST).read_bytes() == BODY
    path.write_bytes(b"tampered")
    web.routes["/m.onnx"] = answer(b"tampered too")
    with pytest.raises(SpecError, match="nothing was kept"):
        fetch(f"{web.url}/m.onnx", sha256=DIGEST)
    assert not path.exists()


@pytest.mark.parametrize("pin", ["", "12", "g" * 64, "0" * 63, "0" * 65])
def test_a_digest_that_is_none_is_refused_before_any_network(web: Web, pin: str) -> None:
    with pytest.raises(SpecError, match="64 hex digits"):
        fetch(f"{web.url}/m.onnx", sha256=pin)
    with pytest.raises(SpecError):
        fetch(f"{web.url}/m.onnx#sha256={pin}")
    assert web.asked == []


def test_a_fragment_that_is_no_digest_is_refused(web: Web) -> None:
    with pytest.raises(SpecError, match="something other than"):
        fetch(f"{web.url}/m.onnx#md5=12")
    assert web.asked == []


def test_a_local_file_is_compared_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(BODY)
    check_sha256(path, DIGEST)
    with pytest.raises(SpecError, match=f"got {DIGEST}"):
        check_sha256(path, "0" * 64)
    assert path.exists()


@pytest.mark.parametrize("sent", [0, 1, 1000, len(BODY) - 1])
def test_a_download_cut_short_is_an_error_and_leaves_nothing(web: Web, cache: Path, sent: int) -> None:
    web.routes["/m.onnx"] = answer(BODY[:sent], promised=len(BODY))
    with pytest.raises(ConnectionLost):
        fetch(f"{web.url}/m.onnx")
    assert list(cache.iterdir()) == []


def test_a_chunked_download_cut_short_is_an_error_and_leaves_nothing(web: Web, cache: Path) -> None:
    def route(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"5\r\nhello\r\n")
        handler.close_connection = True

    web.routes["/m.onnx"] = route
    with pytest.raises(ConnectionLost):
        fetch(f"{web.url}/m.onnx")
    assert list(cache.iterdir()) == []


def test_a_server_that_falls_silent_is_given_up(web: Web, cache: Path) -> None:
    done = threading.Event()

    def route(handler: BaseHTTPRequestHandler) -> None:
        answer(BODY[:10], promised=len(BODY))(handler)
        handler.wfile.flush()
        done.wait(30)

    web.routes["/m.onnx"] = route
    with pytest.raises(ConnectionLost):
        fetch(f"{web.url}/m.onnx", read_timeout_s=0.1)
    done.set()
    assert list(cache.iterdir()) == []


def test_nobody_at_the_address_is_a_connect_error(cache: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/m.onnx"
        with pytest.raises(ConnectError, match="Connection refused"):
            fetch(url)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("status", [204, 401, 404, 500])
def test_another_status_than_200_is_a_bad_status(web: Web, cache: Path, status: int) -> None:
    web.routes["/m.onnx"] = answer(b"" if status == 204 else b"<html>", status=status)
    with pytest.raises(BadStatus, match=f"answered {status}") as caught:
        fetch(f"{web.url}/m.onnx")
    assert caught.value.status == status
    assert list(cache.iterdir()) == []


def test_a_file_above_the_cap_is_refused_whether_or_not_its_length_is_told(web: Web, cache: Path) -> None:
    def chunked(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY))

    packed = gzip.compress(BODY)
    for route in (answer(BODY), chunked, answer(packed, headers={"Content-Encoding": "gzip"})):
        web.routes["/m.onnx"] = route
        with pytest.raises(TransportError, match="expected at most 100000 bytes"):
            fetch(f"{web.url}/m.onnx", max_bytes=100_000)
    assert list(cache.iterdir()) == []
    assert fetch(f"{web.url}/m.onnx", max_bytes=len(BODY)).read_bytes() == BODY


def test_a_redirect_is_followed_and_kept_under_the_first_address(web: Web) -> None:
    web.routes["/old.onnx"] = answer(b"", status=302, headers={"Location": "/m.onnx"})
    assert fetch(f"{web.url}/old.onnx").read_bytes() == BODY
    assert fetch(f"{web.url}/old.onnx").name.endswith("-old.onnx")
    assert web.asked == ["/old.onnx", "/m.onnx"]


def test_a_session_that_is_given_sends_every_request_and_may_refuse_one(web: Web, cache: Path) -> None:
    class Refused(Exception):
        pass

    class Adapter(requests.adapters.HTTPAdapter):
        def send(self, request: requests.PreparedRequest, **given: object) -> requests.Response:  # type: ignore[override]
            sent.append(str(request.path_url))
            if request.path_url == "/secret":
                raise Refused
            return super().send(request, **given)  # type: ignore[arg-type]

    sent: list[str] = []
    web.routes["/moved"] = answer(b"", status=302, headers={"Location": "/secret"})
    with requests.Session() as session:
        session.mount("http://", Adapter())
        fetch(f"{web.url}/m.onnx", session=session)
        with pytest.raises(Refused):
            fetch(f"{web.url}/moved", session=session)
    assert sent == ["/m.onnx", "/moved", "/secret"]
    assert web.asked == ["/m.onnx", "/moved"]
    assert len(list(cache.iterdir())) == 1


def test_a_redirect_to_a_file_or_another_scheme_is_an_error(web: Web, cache: Path) -> None:
    for location in ("file:///etc/passwd", "ftp://127.0.0.1/x"):
        web.routes["/m.onnx"] = answer(b"", status=302, headers={"Location": location})
        with pytest.raises(TransportError):
            fetch(f"{web.url}/m.onnx")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://h/x", "m.onnx", ""])
def test_another_scheme_than_http_is_refused(cache: Path, url: str) -> None:
    with pytest.raises(SpecError, match="expected an http or https URL"):
        fetch(url)


def test_no_message_shows_the_query_or_the_user_of_a_url(web: Web) -> None:
    host = web.url.removeprefix("http://")
    routes: dict[str, tuple[Route, dict[str, object]]] = {
        "/gone": (answer(b"", status=404), {}),
        "/short": (answer(b"a", promised=9), {}),
        "/large": (answer(BODY), {"max_bytes": 9}),
        "/other": (answer(BODY), {"sha256": "0" * 64}),
        "/loop": (answer(b"", status=302, headers={"Location": "/loop?token=hush"}), {}),
        "/ftp": (answer(b"", status=302, headers={"Location": "ftp://hush@h/?token=hush"}), {}),
    }
    web.routes = {path: route for path, (route, _) in routes.items()}
    attempts: list[tuple[str, dict[str, object]]] = [
        (f"http://hush:hush@{host}{path}?token=hush", options) for path, (_, options) in routes.items()
    ]
    attempts += [
        ("http://hush:hush@127.0.0.1:1/m.onnx?token=hush", {}),
        ("ftp://hush:hush@127.0.0.1/m.onnx?token=hush", {}),
        ("http://hush:hush@127.0.0.1/m.onnx?token=hush#hush", {}),
        ("http://hush:hush@127.0.0.1:99999/m.onnx?token=hush", {}),
        ("http://hush:hush@[bad/m.onnx?token=hush", {}),
    ]
    for url, options in attempts:
        with pytest.raises((SpecError, TransportError)) as caught:
            fetch(url, **options)  # type: ignore[arg-type]
        text = "".join(traceback.format_exception_only(caught.value))
        assert "hush" not in text, text
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_several_processes_may_download_at_once(web: Web, cache: Path) -> None:
    code = f"from remote_ops.download import fetch; print(fetch({web.url + '/m.onnx'!r}, sha256={DIGEST!r}))"
    together = threading.Barrier(3, timeout=60)

    def route(handler: BaseHTTPRequestHandler) -> None:
        together.wait()
        answer(BODY)(handler)

    web.routes["/m.onnx"] = route
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {process.communicate()[0].strip() for process in started}
    assert [process.returncode for process in started] == [0, 0, 0]
    assert [str(path) for path in cache.iterdir()] == list(paths)
    assert Path(paths.pop()).read_bytes() == BODY


def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("REMOTE_OPS_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(SpecError, match="file/below"):
        fetch("http://127.0.0.1:1/m.onnx")


def test_progress_is_shown_on_a_terminal_only(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = io.StringIO()
    monkeypatch.setattr(sys, "stderr", silent)
    fetch(f"{web.url}/m.onnx?1")
    assert silent.getvalue() == ""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    with open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        fetch(f"{web.url}/m.onnx?2")
        shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert "m.onnx" in shown
    assert "100%" in shown
