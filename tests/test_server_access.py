"""Who may do what: which class of token each route wants, how it is refused, and what replies and logs never say."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from rawpeer import WAIT_S, Message, read_message, until

import server_ref
from remote_ops import Endpoint, FunctionServable, Retry, SpecError, TensorSpec, graphpipe
from remote_ops.errors import InternalError, ModelNotFound, NodeError, RemoteOpsError
from server_ref.__main__ import main
from server_ref.access import Access, classify
from server_ref.mishaps import Mishaps, told_of
from server_ref.names import UNKNOWN, OneLine, label_of, one_line, without_places

ROOT = Path(__file__).parents[1]
X, Y = TensorSpec("x", "float32", (-1, 2)), TensorSpec("y", "float32", (-1, 2))
ONES = np.ones((3, 2), np.float32)
INFER, OTHER_INFER, ADMIN = "infer-token-0123456789", "infer-token-9876543210", "admin-token-0123456789"
REQUEST = b"".join(bytes(part) for part in graphpipe.encode_request(("x",), [ONES], ("y",)))
NO_RETRY = Retry(attempts=1)


def doubling() -> FunctionServable:
    return FunctionServable(lambda x: 2 * x, [X], [Y])


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def access() -> Access:
    return Access([INFER, OTHER_INFER], [ADMIN])


class Reply:
    """What came back for one request."""

    def __init__(self, url: str, method: str, path: str, headers: dict[str, str], body: bytes = b"") -> None:
        parts = urlsplit(url)
        assert parts.hostname
        connection = HTTPConnection(parts.hostname, parts.port, timeout=WAIT_S)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            self.status, self.headers, self.body = answer.status, answer.headers, answer.read()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server with tokens of both classes."""
    with server_ref.running({"double": doubling(), "other": doubling()}, access=access()) as running:
        yield running


# --------------------------------------------------------------------------- which class


@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [
        ("GET", "/control/is_ready", "open"),
        ("HEAD", "/control/is_alive", "open"),
        ("GET", "/v2/health/ready", "open"),
        ("GET", "/v2/health/live", "open"),
        ("GET", "/v2/models/m/ready", "open"),
        ("GET", "/v2/models/m/versions/3/ready", "open"),
        ("OPTIONS", "/m", "open"),
        ("OPTIONS", "/control/shutdown", "open"),
        ("GET", "/", "infer"),
        ("GET", "/m", "infer"),
        ("POST", "/m/3", "infer"),
        ("GET", "/control/client_count", "infer"),
        ("GET", "/v2", "infer"),
        ("GET", "/v2/models/m", "infer"),
        ("GET", "/v2/models/m/stats", "infer"),
        ("POST", "/v2/models/m/infer", "infer"),
        ("POST", "/v1/models/m:predict", "infer"),
        ("POST", "/v2/repository/index", "infer"),
        ("POST", "/v2/health/ready", "infer"),
        ("POST", "/v2/models/m/ready", "infer"),
        ("POST", "/control/is_ready", "admin"),
        ("POST", "/control/shutdown", "admin"),
        ("GET", "/control/shutdown", "admin"),
        ("GET", "/control/anything", "admin"),
        ("POST", "/v2/repository/models/m/load", "admin"),
        ("POST", "/v2/repository/models/m/unload", "admin"),
        ("POST", "/v2/repository/models/index", "admin"),
        ("POST", "/v2/systemsharedmemory/region/r/register", "admin"),
        ("POST", "/v2/cudasharedmemory/unregister", "admin"),
        ("POST", "/v2/logging", "admin"),
        ("POST", "/v2/trace/setting", "admin"),
        ("POST", "/v2/models/m/trace/setting", "admin"),
        ("POST", "/v2/models/ready/infer", "infer"),
    ],
)
def test_s10_every_route_has_a_class(method: str, path: str, kind: str) -> None:
    assert classify(method, path) == kind


# What each token gets of each class of route: 0 stands for what the route says once it is reached.
TABLE = {
    "nothing": (0, 401, 401),
    "unknown": (0, 401, 401),
    "basic": (0, 401, 401),
    "infer": (0, 0, 403),
    "other infer": (0, 0, 403),
    "admin": (0, 0, 0),
}
HEADERS = {
    "nothing": {},
    "unknown": bearer("no-such-token-0123456789"),
    "basic": {"Authorization": "Basic aW5mZXItdG9rZW4tMDEyMzQ1Njc4OQ=="},
    "infer": bearer(INFER),
    "other infer": {"Authorization": f"bearer  {OTHER_INFER}"},
    "admin": bearer(ADMIN),
}
ROUTES: dict[str, tuple[tuple[str, str, bytes, int], ...]] = {
    "open": (
        ("GET", "/control/is_ready", b"", 200),
        ("GET", "/control/is_alive", b"", 200),
        ("OPTIONS", "/double", b"", 204),
    ),
    "infer": (
        ("GET", "/", b"", 200),
        ("GET", "/double", b"", 200),
        ("POST", "/double", REQUEST, 200),
        ("GET", "/control/client_count", b"", 200),
        ("POST", "/nothing", REQUEST, 404),
        ("DELETE", "/double", b"", 405),
    ),
    "admin": (
        ("GET", "/control/reboot", b"", 404),
        ("POST", "/control/reboot", REQUEST, 404),
        ("PUT", "/v2/repository/models/double/load", REQUEST, 405),
    ),
}


@pytest.mark.parametrize("who", TABLE)
@pytest.mark.parametrize("kind", ROUTES)
def test_s10_each_token_opens_the_routes_of_its_class_and_no_other(url: str, who: str, kind: str) -> None:
    expected = TABLE[who][list(ROUTES).index(kind)]
    for method, path, body, reached in ROUTES[kind]:
        reply = Reply(url, method, path, HEADERS[who], body)
        assert reply.status == (expected or reached), (method, path)
        assert ("WWW-Authenticate" in reply.headers) == (reply.status in (401, 403)), (method, path)


def test_the_challenge_says_what_is_wrong_with_a_token(url: str) -> None:
    def challenge(**headers: str) -> str:
        return Reply(url, "GET", "/control/reboot", headers).headers["WWW-Authenticate"]

    assert challenge() == 'Bearer realm="remote-ops"'
    assert challenge(**bearer("no-such-token-0123456789")) == 'Bearer realm="remote-ops", error="invalid_token"'
    assert challenge(**bearer(INFER)) == 'Bearer realm="remote-ops", error="insufficient_scope"'


@pytest.mark.parametrize(
    "value",
    ["Bearer", "Bearer ", INFER, f"Bearer{INFER}", f"Bearer {INFER}x", f"Bearer {INFER[:-1]}", f"Bearer {INFER}, B",
     "Bearer \xe9\xe9", f"Digest {INFER}"],
)  # fmt: skip
def test_what_is_nearly_a_token_is_none(url: str, value: str) -> None:
    assert Reply(url, "GET", "/double", {"Authorization": value}).status == 401


def test_a_refusal_has_the_form_of_its_protocol(url: str) -> None:
    plain = Reply(url, "POST", "/double", {"Accept": "text/plain"}, REQUEST)
    assert plain.body.startswith(b"this needs a token: expected 'Authorization: Bearer TOKEN' of class infer, got none")
    oip = Reply(url, "POST", "/v2/models/double/infer", {}, b"{}")
    assert json.loads(oip.body) == {"error": plain.body.decode().strip()}
    (error,) = graphpipe.decode_response(Reply(url, "POST", "/double", {}, REQUEST).body).errors
    assert error == (16, plain.body.decode().strip())
    (error,) = graphpipe.decode_response(Reply(url, "GET", "/control/x", bearer(INFER)).body).errors
    assert error.code == 7


def test_an_endpoint_sends_its_token_and_is_told_when_it_is_wrong(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_TOKEN", INFER)
    with Endpoint(f"{url}double", headers={"Authorization": "Bearer ${MODEL_TOKEN}"}) as endpoint:
        np.testing.assert_array_equal(endpoint(ONES), 2 * ONES)
        np.testing.assert_array_equal(endpoint.submit({"x": ONES}).result(WAIT_S)["y"], 2 * ONES)
    with Endpoint(f"{url}double", retry=NO_RETRY) as endpoint:
        with pytest.raises(RemoteOpsError, match=r"this needs a token: .*pass headers=\{'Authorization'"):
            endpoint(ONES)


def read_raw(url: str, *parts: bytes) -> tuple[Message | None, bytes]:
    """Send bytes; the answer, and what comes behind it until the server hangs up."""
    place = urlsplit(url)
    with socket.create_connection((place.hostname, place.port), WAIT_S) as sock, sock.makefile("rb") as file:
        for part in parts:
            sock.sendall(part)
        message = read_message(file)
        sock.shutdown(socket.SHUT_WR)
        return message, file.read()


def test_s10_nobody_sends_a_body_before_being_let_in(url: str) -> None:
    head = b"POST /double HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000000\r\nExpect: 100-continue\r\n\r\n"
    answer, rest = read_raw(url, head)
    assert answer is not None
    assert answer.status == 401  # and no 100 before it
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert answer.headers["connection"] == "close"
    assert rest == b""


def test_a_pipelined_request_is_asked_for_its_own_token(url: str) -> None:
    first = f"GET /control/client_count HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {INFER}\r\n\r\n".encode()
    place = urlsplit(url)
    with socket.create_connection((place.hostname, place.port), WAIT_S) as sock, sock.makefile("rb") as file:
        sock.sendall(first + b"GET /double HTTP/1.1\r\nHost: h\r\n\r\n" + first)
        answers = [read_message(file) for _ in range(3)]
    assert [answer.status for answer in answers if answer] == [200, 401, 200]


# --------------------------------------------------------------------------- classes without tokens


def test_with_admin_tokens_alone_anybody_may_call_models() -> None:
    with server_ref.running({"m": doubling()}, access=Access(admin=[ADMIN])) as url:
        np.testing.assert_array_equal(Endpoint(url)(ONES), 2 * ONES)
        assert Reply(url, "GET", "/control/reboot", {}).status == 401
        assert Reply(url, "GET", "/control/reboot", bearer(ADMIN)).status == 404


def test_with_infer_tokens_alone_nobody_is_admin() -> None:
    with server_ref.running({"m": doubling()}, access=Access([INFER])) as url:
        assert Reply(url, "GET", "/control/reboot", {}).status == 403
        assert Reply(url, "GET", "/control/reboot", bearer(INFER)).status == 403


def test_without_tokens_nothing_is_asked() -> None:
    with server_ref.running({"m": doubling()}) as url:
        assert Reply(url, "GET", "/m", {}).status == 200
        assert Reply(url, "GET", "/control/reboot", {}).status == 404


# --------------------------------------------------------------------------- where tokens come from


def token_file(folder: Path, text: str, mode: int = 0o600) -> str:
    path = folder / "tokens"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_a_file_has_a_token_a_line_and_comments(tmp_path: Path) -> None:
    path = token_file(tmp_path, f"# the web shop\n{INFER}\n\n  {OTHER_INFER}\r\n")
    read = Access.read(path, env={"REMOTE_OPS_ADMIN_TOKEN": f"{ADMIN}\n"})
    assert read is not None
    for token in (INFER, OTHER_INFER, ADMIN):
        assert read.allows("infer", f"Bearer {token}")
        assert read.allows("admin", f"Bearer {token}") == (token == ADMIN)
    assert not read.allows("infer", "Bearer #")


def test_no_file_and_no_variable_is_no_access() -> None:
    assert Access.read(env={}) is None
    assert Access.read(env={"REMOTE_OPS_INFER_TOKEN": ""}) is None


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620])
def test_a_file_that_others_can_open_is_refused_and_what_to_type_is_said(tmp_path: Path, mode: int) -> None:
    path = token_file(tmp_path, INFER, mode)
    with pytest.raises(SpecError, match=rf"got mode {mode:04o}; type: chmod 600 {path}"):
        Access.read(path, env={})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected a token a line, got none; make one: python -c"),
        ("# only this\n", "got none"),
        ("short\n", "expected 16 to 512 letters.*got 5 letters"),
        ("with a blank in the middle\n", "digits or any of"),
    ],
)
def test_a_file_without_good_tokens_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(SpecError, match=words) as caught:
        Access.read(token_file(tmp_path, text), env={})
    assert "short" not in str(caught.value)


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"cannot read this file of tokens: No such file.*none"):
        Access.read(str(tmp_path / "none"), env={})
    path = token_file(tmp_path, "")
    Path(path).write_bytes(b"\xff\xfe" * 20)
    with pytest.raises(SpecError, match="it is no text"):
        Access.read(path, env={})


def test_a_token_of_both_classes_is_refused() -> None:
    with pytest.raises(SpecError, match="in both classes"):
        Access([INFER, ADMIN], [ADMIN])
    with pytest.raises(SpecError, match="expected a token or more"):
        Access()


def test_reload_takes_new_tokens_and_keeps_the_old_when_the_file_is_broken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = token_file(tmp_path, INFER)
    read = Access(infer_file=path)
    token_file(tmp_path, OTHER_INFER)
    assert read.reload()
    assert read.allows("infer", f"Bearer {OTHER_INFER}")
    assert not read.allows("infer", f"Bearer {INFER}")
    token_file(tmp_path, INFER, 0o644)
    assert not read.reload()
    assert read.allows("infer", f"Bearer {OTHER_INFER}")
    assert "the tokens in use stay" in caplog.text
    assert INFER not in caplog.text


# --------------------------------------------------------------------------- the command line


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No variable of ours, and a folder with a model on the path."""
    for name in list(os.environ):
        if name.startswith(("GP_", "REMOTE_OPS_")):
            monkeypatch.delenv(name)
    (tmp_path / "guarded_models.py").write_text(
        "from remote_ops import FunctionServable, TensorSpec\n"
        "X, Y = TensorSpec('x', 'float32', (-1, 2)), TensorSpec('y', 'float32', (-1, 2))\n"
        "def double(): return FunctionServable(lambda x: 2 * x, [X], [Y])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize("listen", ["0.0.0.0:0", ":0", "[::]:0", "192.0.2.1:0"])
@pytest.mark.parametrize("given", ["nothing", "admin alone"])
def test_s10_it_refuses_to_listen_beyond_this_machine_and_says_what_to_type(
    clean: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, listen: str, given: str
) -> None:
    if given == "admin alone":
        monkeypatch.setenv("REMOTE_OPS_ADMIN_TOKEN", ADMIN)
    assert main(["-m", "guarded_models:double", "-l", listen]) == 2
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0
    assert f"{listen} can be reached from other machines, and nothing asks who calls" in said
    for flag in ("--infer-token-file FILE", "--client-ca FILE", "--insecure"):
        assert flag in said


def test_a_bad_token_file_exits_with_2(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = token_file(clean, INFER, 0o644)
    assert main(["-m", "guarded_models:double", "--infer-token-file", path]) == 2
    assert f"chmod 600 {path}" in capsys.readouterr().err


@contextlib.contextmanager
def command(folder: Path, *argv: str, **env: str) -> Iterator[tuple[str, subprocess.Popen[str], list[str]]]:
    """A server in its own process: its URL, the process, and the lines that it says."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("GP_", "REMOTE_OPS_"))}
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "server_ref", "-m", "guarded_models:double", "--drain-grace-s=0", *argv],
        cwd=folder, env={**inherited, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", **env},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    lines: list[str] = []
    assert process.stderr is not None
    reader = threading.Thread(target=lambda: lines.extend(iter(process.stderr.readline, "")))  # type: ignore[union-attr]
    reader.start()
    try:
        assert until(lambda: " at http" in "".join(lines) or process.poll() is not None, 30)
        found = re.search(r" at (http\S+) on ", "".join(lines))
        assert found, lines
        yield found[1], process, lines
    finally:
        process.kill()
        process.wait(WAIT_S)
        reader.join(WAIT_S)
        process.stderr.close()


def other_address() -> str | None:
    """An address of this machine that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
        sock.connect(("192.0.2.1", 9))
        address: str = sock.getsockname()[0]
        return None if address.startswith("127.") else address
    return None


@pytest.mark.slow
def test_a_guarded_server_of_its_own_rotates_tokens_on_sighup_and_ends_for_an_admin_elsewhere(clean: Path) -> None:
    path = token_file(clean, INFER)
    with command(clean, "-l", "0.0.0.0:0", "--infer-token-file", path, REMOTE_OPS_ADMIN_TOKEN=ADMIN) as (
        url, process, lines,
    ):  # fmt: skip
        np.testing.assert_array_equal(Endpoint(url, headers=bearer(INFER))(ONES), 2 * ONES)
        token_file(clean, OTHER_INFER)
        process.send_signal(signal.SIGHUP)
        assert until(lambda: Reply(url, "GET", "/", bearer(OTHER_INFER)).status == 200)
        assert Reply(url, "GET", "/", bearer(INFER)).status == 401
        Path(path).chmod(0o644)
        process.send_signal(signal.SIGHUP)
        assert until(lambda: "the tokens in use stay" in "".join(lines))
        assert Reply(url, "GET", "/", bearer(OTHER_INFER)).status == 200
        elsewhere = url.replace("127.0.0.1", other_address() or "127.0.0.1")
        if elsewhere != url:
            assert Reply(elsewhere, "POST", "/control/shutdown", {}).status == 401
            assert Reply(elsewhere, "POST", "/control/shutdown", bearer(OTHER_INFER)).status == 403
        assert Reply(elsewhere, "POST", "/control/shutdown", bearer(ADMIN)).status == 200
        assert process.wait(WAIT_S) == 0
        assert not {INFER, OTHER_INFER, ADMIN} & set(re.findall(r"[\w-]+", "".join(lines)))


@pytest.mark.slow
def test_shutdown_from_this_machine_wants_no_token_but_no_origin_either(clean: Path) -> None:
    with command(clean, "-l", "127.0.0.1:0", REMOTE_OPS_INFER_TOKEN=INFER) as (url, process, _):
        assert Reply(url, "POST", "/control/shutdown", {"Origin": "http://evil"}).status == 403
        assert process.poll() is None
        assert Reply(url, "POST", "/control/shutdown", {}).status == 200
        assert process.wait(WAIT_S) == 0


# --------------------------------------------------------------------------- what replies and logs never say


class Telltale:
    """A model that raises with all that it should not say."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.signature = doubling().signature

    def infer(self, *_: Any, **__: Any) -> dict[str, Any]:
        raise self.error


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (FileNotFoundError(2, "No such file or directory", "/srv/models/secret/weights.bin"), "No such file"),
        (ValueError("cannot read '/home/jo/model.onnx': bad magic"), "bad magic"),
        (RuntimeError("the key hunter2hunter2 is wrong"), "is wrong"),
        (SpecError("expected a model", path="/etc/models/fraud.yaml:14"), "expected a model"),
        (RuntimeError("line one\nTraceback (most recent call last)\n  File x"), "line one"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_s11_replies_have_no_traces_no_paths_and_no_variables(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, kept: str
) -> None:
    monkeypatch.setenv("MY_API_KEY", "hunter2hunter2")
    with server_ref.running({"m": Telltale(error)}) as url:
        for accept in ("*/*", "text/plain"):
            reply = Reply(url, "POST", "/m", {"Accept": accept}, REQUEST)
            assert reply.status == 500
            text = reply.body.decode("utf-8", "replace")
            assert kept in text
            assert not re.search(r"Traceback|File |/srv|/home|/etc|weights|model\.onnx|fraud\.yaml|hunter2|\.py", text)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("no file /a/b/c.bin here", "no file [path] here"),
        ("'/usr/lib/python3/x.py', line 3", "'[path]', line 3"),
        ("~/models/x/y", "[path]"),
        (r"C:\models\x.onnx is gone", "[path] is gone"),
        ("no answer from http://gpu1:9000/resnet/3 in 1 s", "no answer from http://gpu1:9000/resnet/3 in 1 s"),
        ("no model '/double': there are /triple", "no model '/double': there are /triple"),
        ("expected float32 [-1, 3], got 1/2 of application/octet-stream", None),
    ],
)
def test_s11_paths_are_left_out_and_urls_are_not(text: str, cleaned: str | None) -> None:
    assert without_places(text, {}) == (cleaned or text)


def test_s11_only_values_of_variables_that_sound_secret_are_left_out() -> None:
    env = {"DB_PASSWORD": "correct-horse", "HOME_TOWN": "Springfield", "X_TOKEN": "abc"}
    assert without_places("correct-horse of Springfield, abc", env) == "[secret] of Springfield, abc"


@pytest.mark.parametrize("text", ["a\r\nERROR root: forged", "a\x1b[2Jb", "a\u2028b", "a\x85b", "\0"])
def test_s13_a_name_cannot_end_a_line(text: str) -> None:
    assert one_line(text).isprintable()
    assert one_line("plain name, 1") == "plain name, 1"
    assert len(one_line("x" * 1000)) == 300


def test_s13_a_log_line_is_one_line_and_a_traceback_is_set_in() -> None:
    formatter = OneLine("%(levelname)s %(name)s: %(message)s")
    try:
        raise ValueError("x\nERROR root: forged\r\x1b[2J")
    except ValueError:
        record = logging.LogRecord("s", logging.ERROR, "f", 1, "model %s", ("a\nERROR root: forged",), sys.exc_info())
    first, *rest = formatter.format(record).splitlines()
    assert first == r"ERROR s: model a\nERROR root: forged"
    assert rest
    assert all(line.startswith("  | ") for line in rest)
    assert "\x1b" not in formatter.format(record)


def test_s14_names_that_are_unknown_share_one_label() -> None:
    known = {"resnet", "bert"}
    assert {label_of(name, known) for name in ("resnet", "x1", "x2", "../..", "")} == {"resnet", UNKNOWN}


# --------------------------------------------------------------------------- the last mishaps


def test_the_last_errors_are_kept_without_what_was_sent() -> None:
    kept = Mishaps(most=2)
    for index in range(3):
        kept.add(ModelNotFound(f"no model '{index}\n'"), at=float(index), model="m", request_id="id\r\n" * 100)
    assert [mishap.at for mishap in kept] == [2.0, 1.0]
    latest = next(iter(kept))
    assert (latest.kind, latest.message) == ("ModelNotFound", r"no model '2\n'")
    assert len(latest.request_id) <= 160
    assert latest.request_id.isprintable()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("the patient's name is X"), "the model raised ValueError"),
        (InternalError("row 3: the patient's name is X", endpoint="http://h/m"), "the model raised InternalError"),
        (InternalError("model 'm' breaks its own signature"), "model 'm' breaks its own signature"),
    ],
)
def test_words_of_models_and_peers_are_not_kept(error: BaseException, told: str) -> None:
    assert told_of(error) == told


def test_of_a_node_that_failed_its_name_and_the_class_of_the_error_are_kept() -> None:
    error = NodeError("node 'n': ValueError: X", node="n", graph="g")
    error.__cause__ = ValueError("X")
    assert told_of(error) == "node 'n' of 'g' failed: ValueError"
