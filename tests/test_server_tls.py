"""TLS of the server: who is trusted in either direction, and certificates that change while requests are served."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import trustme
from rawpeer import WAIT_S, until

import server_ref
from remote_ops import TLS, Endpoint, FunctionServable, Retry, SpecError, TensorSpec
from remote_ops.errors import ConnectError, TransportError
from server_ref import Access, Certificates
from server_ref.__main__ import main

ROOT = Path(__file__).parents[1]
X, Y = TensorSpec("x", "float32", (-1, 2)), TensorSpec("y", "float32", (-1, 2))
ONES = np.ones((3, 2), np.float32)
NO_RETRY = Retry(attempts=1)
TOKEN = "infer-token-0123456789"


def doubling() -> FunctionServable:
    return FunctionServable(lambda x: 2 * x, [X], [Y])


class Folder:
    """Files of certificates: the server's, its authority's, and those of two clients, one of a stranger."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ca, self.strange_ca = trustme.CA(), trustme.CA()
        self.ca.cert_pem.write_to_path(str(path / "ca.pem"))
        self.strange_ca.cert_pem.write_to_path(str(path / "strange.pem"))
        self.issue("127.0.0.1")
        for name, ca in (("me", self.ca), ("stranger", self.strange_ca)):
            ca.issue_cert("me@example.org").private_key_and_cert_chain_pem.write_to_path(str(path / f"{name}.pem"))

    def __getitem__(self, name: str) -> str:
        return str(self.path / name)

    def issue(self, *hosts: str) -> int:
        """Write a new certificate of the server; its serial number."""
        issued = self.ca.issue_cert(*hosts)
        issued.private_key_pem.write_to_path(self["server.key"])
        for index, blob in enumerate(issued.cert_chain_pems):
            blob.write_to_path(self["server.pem"], append=index > 0)
        info = ssl._ssl._test_decode_cert(self["server.pem"])  # type: ignore[attr-defined]
        return int(info["serialNumber"], 16)

    def certificates(self, client_ca: str | None = None) -> Certificates:
        return Certificates(self["server.pem"], self["server.key"], client_ca and self[client_ca])

    def endpoint(self, url: str, cert: str | None = None) -> Endpoint:
        tls = TLS(ca=self["ca.pem"], cert=cert and self[f"{cert}.pem"])
        return Endpoint(url, 10, tls=tls, retry=NO_RETRY)

    def serial(self, url: str) -> int:
        """The serial number that a new connection is shown."""
        place = urlsplit(url)
        context = ssl.create_default_context(cafile=self["ca.pem"])
        with socket.create_connection((place.hostname, place.port), WAIT_S) as sock:
            with context.wrap_socket(sock, server_hostname=place.hostname) as tls:
                shown = tls.getpeercert()
                assert shown
                return int(str(shown["serialNumber"]), 16)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


# --------------------------------------------------------------------------- who is trusted


def test_s12_a_client_that_trusts_the_authority_gets_answers_and_another_does_not(folder: Folder) -> None:
    with server_ref.running({"m": doubling()}, tls=folder.certificates()) as url:
        assert url.startswith("https://")
        with folder.endpoint(url) as endpoint:
            np.testing.assert_array_equal(endpoint(ONES), 2 * ONES)
        with Endpoint(url, tls=TLS(ca=folder["strange.pem"]), retry=NO_RETRY) as endpoint:
            with pytest.raises(ConnectError, match=r"(?i)certificate"):
                endpoint(ONES)


def test_s12_our_client_wants_the_name_of_the_host_in_the_certificate(folder: Folder) -> None:
    folder.issue("models.example.org")
    with server_ref.running({"m": doubling()}, tls=folder.certificates()) as url:
        with folder.endpoint(url) as endpoint, pytest.raises(ConnectError, match=r"(?i)127\.0\.0\.1|hostname|mismatch"):
            endpoint(ONES)
        with Endpoint(url, tls=TLS(verify=False)) as endpoint:
            np.testing.assert_array_equal(endpoint(ONES), 2 * ONES)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
def test_s12_old_versions_of_tls_are_refused(folder: Folder, newest: ssl.TLSVersion) -> None:
    old = ssl.create_default_context(cafile=folder["ca.pem"])
    old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, newest
    old.set_ciphers("ALL:@SECLEVEL=0")
    with server_ref.running({"m": doubling()}, tls=folder.certificates()) as url:
        with socket.create_connection(("127.0.0.1", urlsplit(url).port or 0), WAIT_S) as sock:
            with pytest.raises((ssl.SSLError, ConnectionError)):
                old.wrap_socket(sock, server_hostname="127.0.0.1")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_s12_with_an_authority_of_clients_only_its_clients_get_in(folder: Folder, version: ssl.TLSVersion) -> None:
    certificates = folder.certificates("ca.pem")
    for context in (certificates.context, certificates._newest):
        context.maximum_version = version
    with server_ref.running({"m": doubling()}, tls=certificates) as url:
        with folder.endpoint(url, "me") as endpoint:
            np.testing.assert_array_equal(endpoint(ONES), 2 * ONES)
        for cert in (None, "stranger"):
            with folder.endpoint(url, cert) as endpoint, pytest.raises(TransportError):
                endpoint(ONES)
        with folder.endpoint(url, "me") as endpoint:
            np.testing.assert_array_equal(endpoint(ONES), 2 * ONES)


def test_a_certificate_and_a_token_are_both_asked_for(folder: Folder) -> None:
    with server_ref.running({"m": doubling()}, tls=folder.certificates("ca.pem"), access=Access([TOKEN])) as url:
        with folder.endpoint(url, "me") as endpoint, pytest.raises(Exception, match="this needs a token"):
            endpoint(ONES)
        tls = TLS(ca=folder["ca.pem"], cert=folder["me.pem"])
        with Endpoint(url, tls=tls, headers={"Authorization": f"Bearer {TOKEN}"}) as endpoint:
            np.testing.assert_array_equal(endpoint(ONES), 2 * ONES)


def test_who_speaks_no_tls_is_hung_up_on_and_others_are_served(folder: Folder) -> None:
    with server_ref.running({"m": doubling()}, tls=folder.certificates()) as url, folder.endpoint(url) as endpoint:
        np.testing.assert_array_equal(endpoint(ONES), 2 * ONES)
        with socket.create_connection(("127.0.0.1", urlsplit(url).port or 0), WAIT_S) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                assert b"HTTP" not in sock.recv(1000)
        np.testing.assert_array_equal(endpoint(ONES), 2 * ONES)


def test_a_handshake_that_never_ends_is_given_up(folder: Folder) -> None:
    timeouts = server_ref.Timeouts(head_s=0.3)
    with server_ref.running({"m": doubling()}, tls=folder.certificates(), timeouts=timeouts) as url:
        with socket.create_connection(("127.0.0.1", urlsplit(url).port or 0), WAIT_S) as sock:
            with contextlib.suppress(ConnectionError):
                assert sock.recv(1) == b""


# --------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("server.pem", None, "this certificate and key do not load: No such file"),
        ("server.key", None, "this certificate and key do not load: No such file"),
        ("server.pem", "no PEM", "this certificate and key do not load"),
        ("server.key", "no PEM", "this certificate and key do not load"),
        ("server.key", "another's", "this certificate and key do not load: (?i:.*mismatch)"),
        ("ca.pem", None, "these authorities do not load: No such file"),
        ("ca.pem", "no PEM", "these authorities do not load"),
    ],
)
def test_files_that_do_not_load_are_named(folder: Folder, name: str, text: str | None, words: str) -> None:
    path = Path(folder[name])
    if text is None:
        path.unlink()
    else:
        other = trustme.CA().issue_cert("127.0.0.1").private_key_pem.bytes()
        path.write_bytes(other if text == "another's" else text.encode())
    with pytest.raises(SpecError, match=words) as caught:
        folder.certificates("ca.pem")
    assert name in str(caught.value)


def test_a_key_with_a_password_is_refused_and_not_asked_for(folder: Folder) -> None:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(Path(folder["server.key"]).read_bytes(), None)
    locked = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.BestAvailableEncryption(b"secret"),
    )
    Path(folder["server.key"]).write_bytes(locked)
    with pytest.raises(SpecError, match="this certificate and key do not load"):
        folder.certificates()


@pytest.mark.parametrize("flag", ["--keyfile", "--client-ca"])
def test_a_flag_of_tls_without_a_certificate_is_refused(
    folder: Folder, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["-m", "made:up", flag, folder["ca.pem"]]) == 2
    assert f"expected --certfile FILE with it: TLS begins with a certificate - at {flag}" in capsys.readouterr().err


# --------------------------------------------------------------------------- reload


def test_s12_reload_shows_new_connections_the_new_certificate_and_keeps_the_old_ones(folder: Folder) -> None:
    certificates = folder.certificates()
    with server_ref.running({"m": doubling()}, tls=certificates) as url, folder.endpoint(url) as endpoint:
        np.testing.assert_array_equal(endpoint(ONES), 2 * ONES)
        before = folder.serial(url)
        new = folder.issue("127.0.0.1")
        assert folder.serial(url) == before != new
        assert certificates.reload()
        assert folder.serial(url) == new
        np.testing.assert_array_equal(endpoint(ONES), 2 * ONES)  # on the connection of before


@pytest.mark.parametrize("broken", ["no PEM", "another's key", "nothing"])
def test_s12_reload_of_broken_files_keeps_what_is_in_use(
    folder: Folder, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    certificates = folder.certificates()
    with server_ref.running({"m": doubling()}, tls=certificates) as url:
        before = folder.serial(url)
        key = Path(folder["server.key"])
        if broken == "nothing":
            key.unlink()
        else:
            folder.issue("127.0.0.1")
            other = trustme.CA().issue_cert("127.0.0.1").private_key_pem.bytes()
            key.write_bytes(other if broken == "another's key" else b"no PEM")
        with caplog.at_level(logging.ERROR):
            assert not certificates.reload()
        assert "the certificate in use stays" in caplog.text
        assert folder.serial(url) == before
        with folder.endpoint(url) as endpoint:
            np.testing.assert_array_equal(endpoint(ONES), 2 * ONES)


def test_s12_reload_changes_which_clients_get_in(folder: Folder) -> None:
    certificates = folder.certificates("ca.pem")
    with server_ref.running({"m": doubling()}, tls=certificates) as url:
        with folder.endpoint(url, "me") as endpoint:
            np.testing.assert_array_equal(endpoint(ONES), 2 * ONES)
        Path(folder["ca.pem"]).rename(folder["trusted.pem"])
        Path(folder["ca.pem"]).write_bytes(Path(folder["strange.pem"]).read_bytes())
        assert certificates.reload()
        Path(folder["trusted.pem"]).rename(folder["ca.pem"])  # whom our clients trust
        with folder.endpoint(url, "me") as endpoint, pytest.raises(TransportError):
            endpoint(ONES)
        with folder.endpoint(url, "stranger") as endpoint:
            np.testing.assert_array_equal(endpoint(ONES), 2 * ONES)


class Load:
    """Threads that call a server until told to stop, one on a connection it keeps, the others on new ones."""

    def __init__(self, folder: Folder, url: str) -> None:
        self.answers = 0
        self.errors: list[BaseException] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(folder, url, kept)) for kept in (True, False, False)]
        for thread in self._threads:
            thread.start()

    def _run(self, folder: Folder, url: str, kept: bool) -> None:
        while not self._over.is_set():
            with folder.endpoint(url) as endpoint:
                while not self._over.is_set():
                    try:
                        np.testing.assert_array_equal(endpoint(ONES), 2 * ONES)
                        self.answers += 1
                    except BaseException as error:
                        self.errors.append(error)
                    if not kept:
                        break

    def more(self, answers: int = 20) -> bool:
        """Wait for as many answers more."""
        goal = self.answers + answers
        return until(lambda: self.answers >= goal or bool(self.errors))

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(WAIT_S)


@pytest.mark.slow
def test_s12_sighup_changes_the_certificate_under_load_without_an_error(folder: Folder) -> None:
    (folder.path / "tls_models.py").write_text(
        "from remote_ops import FunctionServable, TensorSpec\n"
        "X, Y = TensorSpec('x', 'float32', (-1, 2)), TensorSpec('y', 'float32', (-1, 2))\n"
        "def double(): return FunctionServable(lambda x: 2 * x, [X], [Y])\n"
    )
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("GP_", "REMOTE_OPS_"))}
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "server_ref", "-m", "tls_models:double", "-l", "127.0.0.1:0",
         "--certfile", "server.pem", "--keyfile", "server.key", "--drain-grace-s", "0"],
        cwd=folder.path, env={**inherited, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder.path}"},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    lines: list[str] = []
    assert process.stderr is not None
    reader = threading.Thread(target=lambda: lines.extend(iter(process.stderr.readline, "")))  # type: ignore[union-attr]
    reader.start()
    try:
        assert until(lambda: " at https" in "".join(lines) or process.poll() is not None, 30)
        found = re.search(r" at (https\S+) on ", "".join(lines))
        assert found, lines
        url = found[1]
        load = Load(folder, url)
        try:
            for _ in range(3):
                serial = folder.issue("127.0.0.1")
                process.send_signal(signal.SIGHUP)
                assert until(lambda serial=serial: folder.serial(url) == serial)  # type: ignore[misc]
                assert load.more()
            Path(folder["server.key"]).write_text("broken")
            process.send_signal(signal.SIGHUP)
            assert until(lambda: "the certificate in use stays" in "".join(lines))
            assert load.more()
            assert folder.serial(url) == serial
        finally:
            load.stop()
        assert load.errors == []
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 0
        assert "Traceback" not in "".join(lines)
    finally:
        process.kill()
        process.wait(WAIT_S)
        reader.join(WAIT_S)
        process.stderr.close()
