"""From launch to exit: `running` in this process, `python -m server_ref` in another, signals, drains and exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np
import psutil
import pytest
import trustme
from rawpeer import WAIT_S, Message, read_message, until

import server_ref
from remote_ops import TLS, Endpoint, FunctionServable, Retry, SpecError, TensorSpec, graphpipe
from remote_ops.errors import ConnectError, RemoteOpsError
from server_ref.__main__ import main
from server_ref.listen import Listen

ROOT = Path(__file__).parents[1]
X = TensorSpec("x", "float32", (-1, 2))
Y = TensorSpec("y", "float32", (-1, 2))
ONES = np.ones((3, 2), np.float32)
NO_RETRY = Retry(attempts=1)

MODELS = """
import os, threading
import numpy as np
from remote_ops import FunctionServable, TensorSpec
X, Y = TensorSpec("x", "float32", (-1, 2)), TensorSpec("y", "float32", (-1, 2))

def slow():
    "Doubles, after as many milliseconds as `config` says."
    def run(x, config):
        threading.Event().wait(int(config or b"0") / 1000)
        return 2 * x
    return FunctionServable(run, [X], [Y], name="slow", version="3")

def triple():
    return FunctionServable(lambda x: 3 * x, [X], [Y])
"""


def doubling() -> FunctionServable:
    return FunctionServable(lambda x: 2 * x, [X], [Y])


@pytest.mark.parametrize(
    ("text", "loopback"),
    [
        ("127.0.0.1:9000", True), ("127.8.0.1:9000", True), ("localhost:9000", True), ("[::1]:9000", True),
        ("unix:/run/m.sock", True), (":9000", False), ("0.0.0.0:9000", False), ("[::]:9000", False),
        ("10.0.0.5:9000", False), ("127.example.com:9000", False), ("gpu1:9000", False),
    ],
)  # fmt: skip
def test_only_addresses_that_other_machines_cannot_reach_count_as_loopback(text: str, loopback: bool) -> None:
    assert Listen.parse(text).loopback is loopback


# --------------------------------------------------------------------------- running, in this process


@pytest.mark.slow
def test_serving_what_is_handed_over_needs_none_of_the_libraries_of_folders_and_control() -> None:
    code = """
import sys
sys.modules.update(dict.fromkeys(["pydantic", "yaml", "networkx", "starlette", "uvicorn", "lmdb", "prometheus_client"]))
import server_ref
from remote_ops import Endpoint, FunctionServable, TensorSpec
x, y = TensorSpec("x", "float32", (-1,)), TensorSpec("y", "float32", (-1,))
with server_ref.running({"double": FunctionServable(lambda x: 2 * x, [x], [y])}) as url:
    print(Endpoint(url)([3.0]).tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[6.0]\n", "")


def threads_of_servers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("server_ref", "model", "m-"))]


def test_running_gives_back_its_port_and_its_threads() -> None:
    fds = psutil.Process().num_fds()
    for _ in range(3):
        with server_ref.running({"m": doubling()}) as url, Endpoint(url) as endpoint:
            np.testing.assert_array_equal(endpoint(ONES), 2 * ONES)
            port = urlsplit(url).port
            assert threads_of_servers()
        with pytest.raises(ConnectError):
            Endpoint(url, retry=NO_RETRY)(ONES)
        with server_ref.running({"m": doubling()}, f"127.0.0.1:{port}") as again:
            assert urlsplit(again).port == port
    assert until(lambda: not threads_of_servers())
    assert until(lambda: psutil.Process().num_fds() <= fds + 3)


def test_an_exception_inside_the_block_comes_out_and_the_server_is_gone() -> None:
    with pytest.raises(ZeroDivisionError), server_ref.running({"m": doubling()}) as url:
        raise ZeroDivisionError
    with pytest.raises(ConnectError):
        Endpoint(url, retry=NO_RETRY)(ONES)
    assert until(lambda: not threads_of_servers())


def test_running_ends_with_clients_connected_and_a_model_at_work() -> None:
    started, release = threading.Event(), threading.Event()

    def run(x: Any) -> Any:
        started.set()
        release.wait(WAIT_S)
        return x

    endpoint: Endpoint
    with server_ref.running({"m": FunctionServable(run, [X], [Y])}) as url:
        endpoint = Endpoint(url, 5, retry=NO_RETRY)
        future = endpoint.submit({"x": ONES})
        assert started.wait(WAIT_S)
        since = time.monotonic()
    assert time.monotonic() - since < 1
    with pytest.raises(RemoteOpsError):
        future.result(WAIT_S)
    release.set()
    assert until(lambda: not threads_of_servers())


def test_two_servers_run_side_by_side() -> None:
    triple = FunctionServable(lambda x: 3 * x, [X], [Y])
    with server_ref.running({"m": doubling()}) as one, server_ref.running({"m": triple}) as two:
        np.testing.assert_array_equal(Endpoint(one)(ONES), 2 * ONES)
        np.testing.assert_array_equal(Endpoint(two)(ONES), 3 * ONES)


def test_a_port_that_is_taken_is_named_and_leaves_nothing_behind() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with (
            pytest.raises(SpecError, match=rf"cannot listen on {address}: Address already in use"),
            server_ref.running({"m": doubling()}, address),
        ):
            pass
    assert until(lambda: not threads_of_servers())


@pytest.mark.parametrize("listen", ["", "h", "h:", "h:x", "h:99999", "127.0.0.1"])
def test_an_address_that_is_none_is_refused(listen: str) -> None:
    with pytest.raises(SpecError, match="expected host:port"), server_ref.running({"m": doubling()}, listen):
        pass


def test_no_models_are_refused() -> None:
    with pytest.raises(SpecError, match="at least one model"), server_ref.running({}):
        pass


def test_running_serves_https_to_those_who_trust_it(tmp_path: Path) -> None:
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("127.0.0.1").configure_cert(context)
    with server_ref.running({"m": doubling()}, tls=context) as url:
        assert url.startswith("https://")
        large = np.ones((500_000, 2), np.float32)
        with Endpoint(url, tls=TLS(ca=str(tmp_path / "ca.pem"))) as endpoint:
            np.testing.assert_array_equal(endpoint(large), 2 * large)
            np.testing.assert_array_equal(endpoint.submit({"x": ONES}).result(WAIT_S)["y"], 2 * ONES)
        with pytest.raises(ConnectError, match=r"(?i)certificate"):
            Endpoint(url, retry=NO_RETRY)(ONES)


def unix_url(path: Path) -> str:
    return f"http+unix://{quote(str(path), safe='')}/"


def test_c24_a_unix_socket_is_served_and_its_file_removed(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    for _ in range(2):
        with server_ref.running({"m": doubling()}, f"unix:{path}") as url:
            assert url == unix_url(path)
            np.testing.assert_array_equal(Endpoint(url)(ONES), 2 * ONES)
        assert not path.exists()


def test_c24_a_stale_unix_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    assert path.exists()
    with server_ref.running({"m": doubling()}, f"unix:{path}") as url:
        np.testing.assert_array_equal(Endpoint(url)(ONES), 2 * ONES)


def test_c24_a_live_unix_socket_is_refused_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    with server_ref.running({"m": doubling()}, f"unix:{path}") as url:
        with (
            pytest.raises(SpecError, match=r"s\.sock: Address already in use"),
            server_ref.running({"other": doubling()}, f"unix:{path}"),
        ):
            pass
        np.testing.assert_array_equal(Endpoint(url)(ONES), 2 * ONES)


def test_c24_a_file_that_is_no_socket_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "thesis.txt"
    path.write_text("years of work")
    with pytest.raises(SpecError, match=r"thesis\.txt"), server_ref.running({"m": doubling()}, f"unix:{path}"):
        pass
    assert path.read_text() == "years of work"


def test_c24_a_unix_socket_in_no_folder_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(SpecError, match=r"No such file"),
        server_ref.running({"m": doubling()}, f"unix:{tmp_path}/no/s.sock"),
    ):
        pass


# --------------------------------------------------------------------------- the command line, refusing


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No `GP_*` variable, and a folder with the models above on the path."""
    for name in list(os.environ):
        if name.startswith("GP_"):
            monkeypatch.delenv(name)
    (tmp_path / "made_models.py").write_text(MODELS)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command line that must be refused with exit code 2, and give the one line that it says."""
    try:
        code: Any = main(argv)
    except SystemExit as error:
        code = error.code
    captured = capsys.readouterr()
    assert code == 2, captured
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model", "resnet.onx"], "no such model 'resnet.onx'"),
        (["--model", "no_such_module:thing"], "cannot import 'no_such_module'"),
        (["--model", "made_models:slwo"], "did you mean 'slow'"),
        ([], "no model: expected a FOLDER, --model WHAT, or GP_MODEL"),
        (["-m", "made_models:slow", "-m", "made_models:slow"], "two models are called 'slow'"),
        (["-m", "made_models:slow", "--listen", "nowhere"], "expected host:port"),
        (["-m", "made_models:slow", "--init-net", "net.pb"], "export the model to ONNX"),
        (["-m", "made_models:slow", "--predict-net", "net.pb"], "export the model to ONNX"),
        (["-m", "made_models:slow", "--engine-count", "33"], "expected 0 to 32, got 33"),
        (["-m", "made_models:slow", "--engine-count", "many"], "invalid int"),
        (["-m", "made_models:slow", "--instances", "0"], "expected 1 to 64, got 0 - at --instances"),
        (["-m", "made_models:slow", "--max-rows", "0"], "expected 1 to 65536, got 0 - at --max-rows"),
        (["-m", "made_models:slow", "--watch"], "expected a FOLDER with it"),
        (["models", "--max-rows", "8"], "those of a folder say it in a model.yaml - at --max-rows"),
        (["models", "--watch", "-1"], "expected 0 seconds or more, got -1 - at --watch"),
        (["models"], "cannot serve 'models': expected a folder of models, got nothing"),
        (["-m", "made_models:slow", "--max-delay-ms", "5"], "expected --max-rows with it"),
        (
            ["-m", "made_models:slow", "--max-rows", "8", "--max-delay-ms", "-1"],
            "expected 0 to 60000, got -1.0 - at --max-delay-ms",
        ),
        (["-m", "made_models:slow", "--device", "tpu"], "only for model files"),
        (["-m", "made_models:slow", "--no-such-flag"], "unrecognized arguments"),
    ],
)
def test_a_command_line_that_is_wrong_exits_with_2_and_one_clear_line(
    clean: Path, capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    assert words in refused(capsys, "--listen", "127.0.0.1:0", *argv)


def test_a_typo_in_a_path_names_what_is_near(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (clean / "resnet50.onnx").write_bytes(b"")
    assert "did you mean" in refused(capsys, "--model", str(clean / "resnet5.onnx"))


def test_a_port_that_is_taken_exits_with_2(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert f"cannot listen on {address}" in refused(capsys, "-m", "made_models:slow", "-l", address)


@pytest.mark.parametrize("name", ["GP_INIT_NET", "GP_PREDICT_NET"])
def test_the_variables_for_caffe2_nets_are_refused(
    clean: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "net.pb")
    assert "export the model to ONNX" in refused(capsys, "-m", "made_models:slow")


def test_an_engine_count_variable_that_is_no_number_exits_with_2(
    clean: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GP_ENGINE_COUNT", "many")
    assert "expected a number, got 'many' - at GP_ENGINE_COUNT" in refused(capsys, "-m", "made_models:slow")


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        ({"z": [1, [3, 2]]}, "input 'z' of slow"),
        ({"x": [13, [3, 2]]}, "float64 [3, 2]"),
        ({"x": [1, [3, 5]]}, "float32 [3, 5]"),
        ({"x": [99, [3, 2]]}, 'expected {"name": [dtype, [dims]]}'),
        (["x"], 'expected {"name": [dtype, [dims]]}'),
        ("not JSON", 'expected {"name": [dtype, [dims]]}'),
    ],
)
def test_value_inputs_that_do_not_fit_the_model_exit_with_2(
    clean: Path, capsys: pytest.CaptureFixture[str], declared: Any, words: str
) -> None:
    path = clean / "value_inputs.json"
    path.write_text(declared if isinstance(declared, str) else json.dumps(declared))
    line = refused(capsys, "-m", "made_models:slow", "-l", "127.0.0.1:0", "--value-inputs", str(path))
    assert words in line
    assert str(path) in line


def test_version_says_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--version", "-V"):
        with pytest.raises(SystemExit) as caught:
            main([flag])
        assert caught.value.code == 0
        assert re.fullmatch(r"remote-ops \d+\.\d+\.\d+\n", capsys.readouterr().out)


# --------------------------------------------------------------------------- the command, in a process of its own


class Command:
    """A running `python -m server_ref`; what it says on stderr is collected."""

    def __init__(self, folder: Path, *argv: str, **env: str) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("GP_")}
        (folder / "made_models.py").write_text(MODELS)
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "server_ref", *argv],
            cwd=folder,
            env={**inherited, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", **env},
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    @property
    def said(self) -> str:
        return "".join(self.lines)

    def url(self) -> str:
        """Where it serves, once it says so."""
        found: list[str] = []

        def announced() -> bool:
            found[:] = re.findall(r" at (http\S+) on ", self.said)
            return bool(found) or self.process.poll() is not None

        assert until(announced, 30)
        assert found, self.said
        return found[0]

    def wait(self, within_s: float = 20.0) -> int:
        code = self.process.wait(within_s)
        self._reader.join(WAIT_S)
        return code

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(WAIT_S)
        self._reader.join(WAIT_S)
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.process.stdout.close()
        self.process.stderr.close()


@contextlib.contextmanager
def command(folder: Path, *argv: str, **env: str) -> Iterator[Command]:
    started = Command(folder, *argv, **env)
    try:
        yield started
        assert "Traceback" not in started.said, started.said
        assert "Task was destroyed" not in started.said, started.said
    finally:
        started.close()


def serving(folder: Path, *argv: str, grace_s: float = 0.0, **env: str) -> contextlib.AbstractContextManager[Command]:
    return command(
        folder, "-m", "made_models:slow", "-l", "127.0.0.1:0", "--drain-grace-s", str(grace_s), *argv, **env
    )  # fmt: skip


class Kept:
    """A client connection kept open."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.sock = socket.create_connection((parts.hostname, parts.port), WAIT_S)
        self.file = self.sock.makefile("rb")

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def ask(self, path: str, method: str = "GET") -> Message:
        self.send(f"{method} {path} HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n".encode())
        message = read_message(self.file)
        assert message is not None
        return message

    def close(self) -> None:
        self.file.close()
        self.sock.close()

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def test_the_command_says_url_signature_and_device_serves_and_exits_with_0_on_sigterm(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        url = server.url()
        assert until(lambda: "(x: float32 [-1, 2]) -> (y: float32 [-1, 2])" in server.said)
        assert f"slow at {url} on cpu" in server.said
        np.testing.assert_array_equal(Endpoint(url)(ONES), 2 * ONES)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert "draining after SIGTERM" in server.said
        assert server.process.stdout is not None
        assert server.process.stdout.read() == ""


@pytest.mark.slow
def test_gp_model_names_the_model_and_a_flag_wins_over_it(tmp_path: Path) -> None:
    listen = ("-l", "127.0.0.1:0", "--drain-grace-s", "0")
    with command(tmp_path, *listen, GP_MODEL="made_models:slow") as server:
        np.testing.assert_array_equal(Endpoint(server.url())(ONES), 2 * ONES)
    with command(tmp_path, *listen, "--model", "made_models:triple", GP_MODEL="made_models:slow") as server:
        np.testing.assert_array_equal(Endpoint(server.url())(ONES), 3 * ONES)


@pytest.mark.slow
def test_several_models_are_each_at_their_name(tmp_path: Path) -> None:
    with serving(tmp_path, "-m", "thrice=made_models:triple") as server:
        base = server.url().removesuffix("slow")
        np.testing.assert_array_equal(Endpoint(base + "slow")(ONES), 2 * ONES)
        np.testing.assert_array_equal(Endpoint(base + "thrice")(ONES), 3 * ONES)


def onnx_model(path: Path) -> Path:
    import onnx
    from onnx import TensorProto, helper

    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "double", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    return path


@pytest.mark.slow
def test_the_flags_of_graphpipe_onnx_keep_working(tmp_path: Path) -> None:
    model = onnx_model(tmp_path / "double.onnx")
    (tmp_path / "value_inputs.json").write_text(json.dumps({"x": [1, [8, 2]]}))
    with command(
        tmp_path, "--model", str(model), "--listen", "127.0.0.1:0", "--value-inputs", "value_inputs.json",
        "--engine-count", "3", "--disable-cuda", "--cache", "--cache-dir", str(tmp_path / "cache"), "-v",
        "--drain-grace-s", "0",
    ) as server:  # fmt: skip
        url = server.url()
        np.testing.assert_array_equal(Endpoint(url)(ONES), 2 * ONES)
        assert "double at" in server.said
        assert "on cpu, 3 at a time" in server.said
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


@pytest.mark.slow
def test_the_variables_of_graphpipe_onnx_keep_working(tmp_path: Path) -> None:
    model = onnx_model(tmp_path / "double.onnx")
    (tmp_path / "value_inputs.json").write_text(json.dumps({"x": [1, [8, 2]]}))
    env = {
        "GP_MODEL": str(model),
        "GP_VALUE_INPUTS": "value_inputs.json",
        "GP_ENGINE_COUNT": "2",
        "GP_CACHE": "TRUE",
    }
    with command(tmp_path, "-l", "127.0.0.1:0", **env) as server:
        np.testing.assert_array_equal(Endpoint(server.url())(ONES), 2 * ONES)
        assert "2 at a time" in server.said


@pytest.mark.slow
def test_insecure_lets_it_listen_beyond_this_machine_with_a_warning(tmp_path: Path) -> None:
    with command(tmp_path, "-m", "made_models:slow", "-l", "0.0.0.0:0", "--insecure") as server:
        np.testing.assert_array_equal(Endpoint(server.url())(ONES), 2 * ONES)
        assert "can be reached from other machines" in server.said


@pytest.mark.slow
def test_r1_sigterm_says_not_ready_at_once_and_serves_on_until_the_grace_ends(tmp_path: Path) -> None:
    with serving(tmp_path, grace_s=2.0) as server, Kept(server.url()) as idle, Kept(server.url()) as kept:
        url = server.url()
        assert idle.ask("/control/is_ready").status == 200
        assert kept.ask("/control/is_ready").status == 200
        with Endpoint(url, 10, retry=NO_RETRY) as endpoint:
            assert endpoint.signature.inputs
            in_flight = endpoint.submit({"x": ONES}, config=b"3000")
            assert until(lambda: int(kept.ask("/control/client_count").body) == 4)
            since = time.monotonic()
            server.signal(signal.SIGTERM)

            def not_ready() -> bool:
                with Kept(url) as fresh:
                    return fresh.ask("/control/is_ready").status == 503

            assert until(not_ready, 1.0)
            assert time.monotonic() - since < 0.5
            with Kept(url) as fresh:
                assert fresh.ask("/control/is_alive").status == 200
            while time.monotonic() - since < 1.0:
                np.testing.assert_array_equal(endpoint(ONES), 2 * ONES)
            answer = kept.ask("/control/is_ready")
            assert (answer.status, answer.headers["connection"]) == (503, "close")
            assert kept.file.read() == b""
            assert idle.file.read() == b""
            assert time.monotonic() - since < 3.0
            with pytest.raises(ConnectError):
                Endpoint(url, retry=NO_RETRY)(ONES)
            np.testing.assert_array_equal(in_flight.result(WAIT_S)["y"], 2 * ONES)
        assert server.wait() == 0


@pytest.mark.slow
def test_r1_a_request_half_received_at_the_end_of_the_grace_is_answered(tmp_path: Path) -> None:
    body = b"".join(graphpipe.encode_request(("x",), [ONES]))
    with serving(tmp_path) as server, Kept(server.url()) as half:
        half.send(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % len(body) + body[:50])
        with Kept(server.url()) as other:
            assert other.ask("/control/client_count").body == b"2\n"
        server.signal(signal.SIGTERM)
        assert until(lambda: "draining" in server.said)
        half.send(body[50:])
        message = read_message(half.file)
        assert message is not None
        np.testing.assert_array_equal(graphpipe.decode_response(message.body).tensors[0], 2 * ONES)
        assert server.wait() == 0


@pytest.mark.slow
def test_r1_no_request_fails_while_one_of_two_replicas_is_drained(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    over = threading.Event()
    failures: list[BaseException] = []
    counts = [0] * 8
    with serving(tmp_path / "one", grace_s=0.5) as one, serving(tmp_path / "two") as two:
        with Endpoint([one.url(), two.url()], 10) as endpoint:

            def calls(index: int) -> None:
                while not over.is_set():
                    try:
                        endpoint.infer({"x": ONES}, config=b"5")
                        counts[index] += 1
                    except RemoteOpsError as error:
                        failures.append(error)

            threads = [threading.Thread(target=calls, args=(index,)) for index in range(8)]
            for thread in threads:
                thread.start()
            assert until(lambda: min(counts) > 10)
            one.signal(signal.SIGTERM)
            assert one.wait() == 0
            before = list(counts)
            assert until(lambda: all(now > then + 10 for now, then in zip(counts, before, strict=True)))
            over.set()
            for thread in threads:
                thread.join(WAIT_S)
        assert failures == []


@pytest.mark.slow
def test_sigint_drains_without_grace(tmp_path: Path) -> None:
    with serving(tmp_path, grace_s=30.0) as server:
        endpoint = Endpoint(server.url(), 10, retry=NO_RETRY)
        assert endpoint.signature.inputs  # so that the first thing submitted is the call itself
        in_flight = endpoint.submit({"x": ONES}, config=b"500")
        with Kept(server.url()) as kept:
            assert until(lambda: int(kept.ask("/control/client_count").body) == 3)
        server.signal(signal.SIGINT)
        np.testing.assert_array_equal(in_flight.result(WAIT_S)["y"], 2 * ONES)
        assert server.wait(5) == 0
        assert "draining after SIGINT" in server.said


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_drain_with_1(tmp_path: Path, number: signal.Signals) -> None:
    with serving(tmp_path, grace_s=30.0) as server:
        server.url()
        server.signal(signal.SIGTERM)
        assert until(lambda: "draining" in server.said)
        server.signal(number)
        assert server.wait(5) == 1


@pytest.mark.slow
def test_a_model_that_does_not_end_is_given_up_with_1_after_the_exit_timeout(tmp_path: Path) -> None:
    with serving(tmp_path, "--exit-timeout-s", "0.5") as server:
        endpoint = Endpoint(server.url(), 30, retry=NO_RETRY)
        assert endpoint.signature.inputs
        future = endpoint.submit({"x": ONES}, config=b"60000")
        with Kept(server.url()) as kept:
            assert until(lambda: int(kept.ask("/control/client_count").body) == 3)
            server.signal(signal.SIGTERM)
            assert server.wait(20) == 1  # of the 60 s that the model takes
        with pytest.raises(RemoteOpsError):
            future.result(WAIT_S)


@pytest.mark.slow
def test_c29_a_local_shutdown_drains_and_exits_with_0(tmp_path: Path) -> None:
    with serving(tmp_path) as server, Kept(server.url()) as kept:
        assert kept.ask("/control/shutdown", "GET").status == 405
        answer = kept.ask("/control/shutdown", "POST")
        assert (answer.status, answer.body) == (200, b"shutdown\n")
        assert server.wait(10) == 0
        assert "draining after shutdown" in server.said


@pytest.mark.slow
def test_c24_the_command_serves_a_unix_socket_and_removes_its_file(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    with command(tmp_path, "-m", "made_models:slow", "-l", f"unix:{path}", "--drain-grace-s", "0") as server:
        assert server.url() == unix_url(path)
        np.testing.assert_array_equal(Endpoint(unix_url(path))(ONES), 2 * ONES)
        with command(tmp_path, "-m", "made_models:slow", "-l", f"unix:{path}") as second:
            assert second.wait() == 2
            assert "Address already in use" in second.said
        np.testing.assert_array_equal(Endpoint(unix_url(path))(ONES), 2 * ONES)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    assert not path.exists()


@pytest.mark.slow
def test_a_process_that_was_killed_leaves_a_socket_that_the_next_one_replaces(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    argv = ("-m", "made_models:slow", "-l", f"unix:{path}", "--drain-grace-s", "0")
    with command(tmp_path, *argv) as server:
        server.url()
        server.signal(signal.SIGKILL)
        server.wait()
    assert path.exists()
    with command(tmp_path, *argv) as server:
        np.testing.assert_array_equal(Endpoint(server.url())(ONES), 2 * ONES)


@pytest.mark.slow
def test_an_engine_count_holds_for_python_models_too(tmp_path: Path) -> None:
    with serving(tmp_path, "--engine-count", "5") as server:
        server.url()
        assert "5 at a time" in server.said


@pytest.mark.slow
@pytest.mark.parametrize("end", ["", "raise SystemExit(3)"])
def test_a_block_that_a_program_never_leaves_does_not_outlive_it(end: str) -> None:
    program = f"""
import numpy as np
import server_ref
from remote_ops import Endpoint, FunctionServable, TensorSpec
io = [TensorSpec("x", "float32", (-1,))], [TensorSpec("y", "float32", (-1,))]
block = server_ref.running({{"same": FunctionServable(lambda x: x, *io)}})
print(Endpoint(block.__enter__())(np.ones(2, np.float32)), flush=True)
{end}
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (3 if end else 0, "[1. 1.]\n", "")
