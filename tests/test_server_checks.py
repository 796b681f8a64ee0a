"""What the server promises of reliability and safety, against processes of their own, and where each number's test is.

`PROMISED` says for each of R1 to R12, R19, R20 and S4 to S16 which tests hold it, here or in another file.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import io
import os
import pickle
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import onnx
import psutil
import pytest
from rawpeer import WAIT_S, Message, until
from test_lifecycle import Command, Kept, command
from test_server_repository import factor_at, write_model

import server_ref
from remote_ops import Endpoint, FunctionServable, Retry, SpecError, TensorSpec, graphpipe, load
from remote_ops.errors import ConnectError, ModelUnavailable, RemoteOpsError
from server_ref import Timeouts

PROMISED = """
R1  here::test_r1_fifty_clients_see_no_failure_while_two_replicas_are_restarted_in_turn
R1  here::test_r1_a_graph_in_flight_that_calls_its_own_server_is_finished_during_the_drain
R1  test_lifecycle::test_r1_sigterm_says_not_ready_at_once_and_serves_on_until_the_grace_ends
R1  test_server_repository::test_r1_a_graph_in_flight_that_calls_a_model_of_the_same_server_ends_before_the_server_does
R2  test_server_batching::test_r2_one_slow_worker_and_a_queue_of_four_serve_five_of_twenty_and_refuse_the_others
R2  test_server_batching::test_r2_the_queue_is_bounded_by_bytes_too
R3  test_server_batching::test_r3_a_request_that_expires_in_the_queue_is_504_and_the_model_is_not_called
R3  test_front::test_the_deadline_shrinks_along_a_chain
R3  test_server_oip::test_r3_a_request_that_expires_in_the_queue_never_runs
R4  test_server_batching::test_r4_clients_that_vanish_take_their_requests_with_them
R5  test_server_batching::test_r5_a_row_that_makes_the_model_raise_fails_alone_of_eight
R5  test_server_batching::test_r5_fifty_requests_of_wrong_shapes_among_good_ones_fail_none_of_those
R6  test_server_isolation::test_r6_kill_9_in_the_middle_of_a_batch_is_503_for_those_in_it_and_for_nobody_else
R6  test_server_isolation::test_r6_a_process_that_dies_is_replaced_and_its_caller_told_how_it_ended
R7  test_server_isolation::test_r7_a_process_that_hangs_is_killed_and_the_others_are_not_affected
R7  test_server_batching::test_r7_a_run_that_hangs_is_503_and_the_next_one_is_served
R8  here::test_r8_twenty_reloads_and_a_corrupt_one_under_load_fail_nothing_and_are_told_once
R8  test_server_repository::test_r8_a_file_that_is_still_being_copied_is_not_loaded
R9  here::test_r9_r19_a_server_says_ready_once_it_is_warm_and_never_answers_otherwise
R9  test_server_repository::test_r9_a_server_is_not_ready_before_its_models_are_warm
R10 test_server_soak::test_r10_ten_thousand_requests_take_less_than_a_kilobyte_each
R10 test_server_soak::test_r10_fifty_models_loaded_served_and_unloaded_leave_nothing_behind
R11 test_server_soak::test_r11_all_kinds_of_clients_at_once_get_what_is_theirs_and_every_counter_adds_up
R12 test_front::test_r12_200_slow_connections_do_not_slow_a_real_client
R12 test_front::test_r12_an_idle_connection_is_closed_and_our_client_does_not_notice
R12 here::test_r12_a_body_below_the_least_rate_is_408_while_others_are_served
R12 here::test_r12_empty_lines_do_not_keep_a_connection
R19 here::test_r9_r19_a_server_says_ready_once_it_is_warm_and_never_answers_otherwise
R19 test_server_oip::test_r19_a_draining_server_is_live_and_not_ready_and_neither_are_its_models
R19 test_server_oip::test_r19_a_model_that_was_removed_is_not_ready
R20 test_server_metrics::test_r20_numbers_add_up_after_successes_rejections_cancels_timeouts_and_errors
R20 test_server_oip::test_r20_statistics_add_up
R20 test_server_oip::test_r20_statistics_tell_what_the_cache_answered
S4  here::test_s4_what_is_over_a_cap_is_refused_in_little_memory
S4  here::test_s4_bodies_that_are_announced_and_do_not_come_take_no_memory
S4  test_front::test_s4_a_body_over_the_cap_is_413_before_it_is_read_and_while_the_client_still_sends
S4  test_server_oip::test_s4_a_text_nested_deeper_than_100_is_refused_and_one_of_100_is_not
S5  test_server_oip::test_s5_ten_megabytes_that_become_ten_gigabytes_are_413_in_no_memory
S5  test_server_oip::test_s5_an_unknown_coding_is_415
S6  test_front::test_s6_what_two_parsers_could_read_in_two_ways_is_refused_and_the_connection_closed
S7  test_server_sources::test_private_addresses_are_refused_however_they_are_written_and_nothing_is_connected_to
S7  test_server_sources::test_the_address_that_was_checked_is_the_one_that_is_connected_to
S7  test_server_sources::test_a_redirect_off_the_list_is_refused_and_not_connected_to
S8  here::test_s8_nothing_of_an_archive_is_unpacked
S8  test_server_folder::test_s8_archives_are_refused_by_name_with_what_to_do
S9  here::test_s9_what_a_file_would_run_or_read_is_named_and_does_not_happen
S9  test_torch_load::test_a_pickle_runs_no_code_as_a_model_or_as_weights
S9  test_torch_load::test_a_program_runs_no_code_of_the_pickles_in_it
S9  test_tf_model::test_a_lambda_is_refused_with_the_reason_and_its_code_does_not_run
S9  test_onnx::test_external_data_outside_the_models_folder_is_never_read
S10 test_server_access::test_s10_each_token_opens_the_routes_of_its_class_and_no_other
S10 test_server_access::test_s10_it_refuses_to_listen_beyond_this_machine_and_says_what_to_type
S10 test_server_control::test_s10_changes_want_the_flag_and_the_admin_token
S11 test_server_access::test_s11_replies_have_no_traces_no_paths_and_no_variables
S11 test_server_oip::test_s11_errors_tell_no_traces_and_no_places
S12 test_server_tls::test_s12_old_versions_of_tls_are_refused
S12 test_server_tls::test_s12_our_client_wants_the_name_of_the_host_in_the_certificate
S12 test_server_tls::test_s12_with_an_authority_of_clients_only_its_clients_get_in
S13 test_server_access::test_s13_a_name_cannot_end_a_line
S14 test_server_metrics::test_s14_requests_for_models_that_are_not_there_have_one_label
S14 test_server_access::test_s14_names_that_are_unknown_share_one_label
S15 test_server_oip::test_s15_no_page_of_another_site_may_read_an_answer_unless_said
S16 here::test_s16_it_serves_without_a_home_from_a_folder_that_nobody_can_write_to
"""

ROOT = Path(__file__).parents[1]
X = TensorSpec("x", "float32", (-1, 2))
Y = TensorSpec("y", "float32", (-1, 2))
ONES = np.ones((3, 2), np.float32)
REQUEST = b"".join(graphpipe.encode_request(("x",), [ONES], (), b"5"))
NO_RETRY = Retry(attempts=1)
START_S = 60.0  # another process, on a machine that does other things too

MODELS = """
import pathlib, time
import numpy as np
from remote_ops import FunctionServable, TensorSpec
X, Y = TensorSpec("x", "float32", (-1, 2)), TensorSpec("y", "float32", (-1, 2))
HERE = pathlib.Path(__file__).parent

def gated():
    "Writes down each run, and finishes none before there is a file called `open`."
    def run(x):
        with (HERE / "runs").open("a") as file:
            file.write(f"{len(x)}\\n")
        while not (HERE / "open").exists():
            time.sleep(0.01)
        return 2 * x
    return FunctionServable(run, [X], [Y])
"""


def free_port() -> int:
    """A port that no client of this machine is given by itself while nobody listens there."""
    while True:
        port = random.randrange(20000, 32000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def ask(url: str, path: str) -> Message:
    with Kept(url) as kept:
        return kept.ask(path)


def status(url: str, path: str = "/control/is_ready") -> int:
    """0 where nobody listens."""
    try:
        return ask(url, path).status
    except ConnectionRefusedError:
        return 0


def rss(server: Command) -> int:
    return int(psutil.Process(server.process.pid).memory_info().rss)


def announced(server: Command) -> str:
    assert until(lambda: " at http" in server.said or server.process.poll() is not None, START_S)
    return server.url()


# --------------------------------------------------------------------------- R1: restarts


def start_replica(stack: contextlib.ExitStack, folder: Path, port: int) -> Command:
    return stack.enter_context(
        command(folder, "-m", "made_models:slow", "-l", f"127.0.0.1:{port}", "--drain-grace-s", "0.5")
    )


class Clients:
    """Fifty clients on one loop and ten with nothing but `http.client`; what they have been given and what failed."""

    def __init__(self, urls: Sequence[str]) -> None:
        self.urls = urls
        self.over = threading.Event()
        self.failures: list[BaseException] = []
        self.served = [0] * 60
        self._threads = [threading.Thread(target=lambda: asyncio.run(self._ours()))]
        self._threads += [threading.Thread(target=self._plain, args=(index,)) for index in range(50, 60)]
        for thread in self._threads:
            thread.start()

    def all_served_again(self) -> bool:
        before = list(self.served)
        return until(lambda: all(now > then + 2 for now, then in zip(self.served, before, strict=True)), 30)

    async def _ours(self) -> None:
        with Endpoint(self.urls, 10) as endpoint:
            await asyncio.gather(*(self._call(endpoint, index) for index in range(50)))

    async def _call(self, endpoint: Endpoint, index: int) -> None:
        while not self.over.is_set():
            try:
                answer = await endpoint.ainfer({"x": ONES}, config=b"5")
                assert answer["y"].tolist() == (2 * ONES).tolist()
                self.served[index] += 1
            except BaseException as error:
                self.failures.append(error)

    def _plain(self, index: int) -> None:
        """Keeps its connection until it is told `Connection: close`, and then goes to the other replica."""
        at, connection = index % 2, http.client.HTTPConnection(urlsplit(self.urls[index % 2]).netloc, timeout=WAIT_S)
        while not self.over.is_set():
            try:
                connection.request("POST", "/", REQUEST)
                answer = connection.getresponse()
                body = answer.read()
                assert (answer.status, graphpipe.decode_response(body).tensors[0].tolist()) == (
                    200,
                    (2 * ONES).tolist(),
                )
                self.served[index] += 1
                if answer.getheader("Connection") != "close":
                    continue
            except ConnectionRefusedError:  # that one is down
                pass
            except BaseException as error:
                self.failures.append(error)
            connection.close()
            at = 1 - at
            connection = http.client.HTTPConnection(urlsplit(self.urls[at]).netloc, timeout=WAIT_S)
        connection.close()

    def close(self) -> None:
        self.over.set()
        for thread in self._threads:
            thread.join(30)


@pytest.mark.slow
def test_r1_fifty_clients_see_no_failure_while_two_replicas_are_restarted_in_turn(tmp_path: Path) -> None:
    ports = [free_port(), free_port()]
    folders = [tmp_path / "one", tmp_path / "two"]
    drains = []
    with contextlib.ExitStack() as stack:
        for folder in folders:
            folder.mkdir()
        replicas = [start_replica(stack, *pair) for pair in zip(folders, ports, strict=True)]
        urls = [announced(replica) for replica in replicas]
        clients = Clients(urls)
        stack.callback(clients.close)
        assert clients.all_served_again()
        for turn in range(4):
            at = turn % 2
            with Kept(urls[at]) as idle, Kept(urls[at]) as asking:
                assert idle.ask("/control/is_ready").status == asking.ask("/control/is_ready").status == 200
                since = time.monotonic()
                replicas[at].signal(signal.SIGTERM)
                assert until(lambda at=at: "draining after SIGTERM" in replicas[at].said)
                # It is not ready from its very next answer on, and yet it goes on to listen and to serve.
                answer = ask(urls[at], "/control/is_ready")
                assert (answer.status, answer.headers["connection"]) == (503, "close")
                assert status(urls[at], "/control/is_alive") == 200
                last = asking.ask("/control/is_ready")
                assert (last.status, last.headers["connection"]) == (503, "close")
                assert asking.file.read() == b""
                assert idle.file.read() == b""  # nobody asked on it: it is closed when the grace ends
            assert replicas[at].wait(30) == 0
            drains.append(time.monotonic() - since)
            assert clients.all_served_again()
            replicas[at] = start_replica(stack, folders[at], ports[at])
            assert announced(replicas[at]) == urls[at]
            assert clients.all_served_again()
        clients.close()
        memory = [rss(replica) >> 20 for replica in replicas]
    shown = ", ".join(f"{drain:.2f} s" for drain in drains)
    print(f"{sum(clients.served)} requests over 4 restarts; drains of {shown} with 0.5 s of grace; {memory} MiB")
    assert clients.failures == []


@pytest.mark.slow
def test_r1_a_graph_in_flight_that_calls_its_own_server_is_finished_during_the_drain(tmp_path: Path) -> None:
    (tmp_path / "gated_models.py").write_text(MODELS)
    port = free_port()
    base = f"http://127.0.0.1:{port}/"
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "twice.yaml").write_text(
        "ensemble: 1\nname: twice\ninputs: {x: {dtype: float32, shape: [N, 2]}}\nnodes:\n"
        f"  first: {{kind: remote, url: {base}gated, inputs: {{x: $inputs.x}}}}\n"
        f"  second: {{kind: remote, url: {base}gated, inputs: {{x: first.y}}}}\n"
        "outputs: {y: second.y}\n"
    )
    listen = ("-l", f"127.0.0.1:{port}", "--drain-grace-s", "0")
    with command(tmp_path, "models", "-m", "gated_models:gated", *listen) as server:
        announced(server)
        with Endpoint(f"{base}twice", 20, retry=NO_RETRY) as endpoint:
            held = endpoint.submit({"x": ONES})
            assert until((tmp_path / "runs").exists)
            server.signal(signal.SIGTERM)
            assert until(lambda: "draining after SIGTERM: 0 s of grace, 2 in flight" in server.said)
            (tmp_path / "open").touch()  # the second node is only called now
            np.testing.assert_array_equal(held.result(WAIT_S)["y"], 4 * ONES)
        assert server.wait() == 0
        assert (tmp_path / "runs").read_text().split() == ["3", "3"]


# --------------------------------------------------------------------------- R8: reloads


@contextlib.contextmanager
def load_on(url: str, clients: int = 4) -> Iterator[list[BaseException | float]]:
    """Clients that call in a loop; a list of what they failed with, and another end of it for how many were served."""
    seen: list[BaseException | float] = []
    over = threading.Event()

    def call() -> None:
        with Endpoint(url, 10, retry=NO_RETRY) as endpoint:
            while not over.is_set():
                try:
                    seen.append(float(endpoint(ONES)[0, 0]))
                except BaseException as error:
                    seen.append(error)

    threads = [threading.Thread(target=call) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        over.set()
        for thread in threads:
            thread.join(WAIT_S)


@pytest.mark.slow
def test_r8_twenty_reloads_and_a_corrupt_one_under_load_fail_nothing_and_are_told_once(tmp_path: Path) -> None:
    path = tmp_path / "models" / "m.onnx"
    write_model(path, 1)
    write_model(path.parent / "other.onnx", 4)
    with command(tmp_path, "models", "--watch", "0.2", "-l", "127.0.0.1:0", "--drain-grace-s", "0") as server:
        announced(server)
        base = re.findall(r"m at (http\S+/)m on", server.said)[0]
        url = f"{base}m"
        with load_on(url) as seen:
            for factor in range(2, 22):
                write_model(path, factor)
                assert until(lambda factor=factor: factor_at(url) == factor, 20)
            (path.parent / ".corrupt").write_bytes(b"corrupt")
            os.replace(path.parent / ".corrupt", path)
            assert until(lambda: "the one before it is still served" in server.said, 20)
            write_model(path.parent / "other.onnx", 5)  # two looks later, and then another
            assert until(lambda: factor_at(f"{base}other") == 5, 20)
            write_model(path.parent / "other.onnx", 6)
            assert until(lambda: factor_at(f"{base}other") == 6, 20)
            assert (status(base), factor_at(url)) == (200, 21)
        assert server.said.count("was not loaded") == 1, server.said
        assert server.said.count('"level": "error"') == 1
        write_model(path, 22)
        assert until(lambda: factor_at(url) == 22, 20)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    failures = [one for one in seen if isinstance(one, BaseException)]
    print(f"{len(seen)} requests over 20 reloads and a corrupt one")
    assert failures == []
    assert {one for one in seen if isinstance(one, float)} <= {float(factor) for factor in range(1, 22)}


# --------------------------------------------------------------------------- R9, R19: warm, live and ready


def lay_gated(tmp_path: Path) -> None:
    """A folder with a model that takes as long to warm as the test wants, and two that do not."""
    (tmp_path / "gated_models.py").write_text(MODELS)
    write_model(tmp_path / "models" / "quick.onnx", 3)
    write_model(tmp_path / "models" / "third.onnx", 4)
    folder = tmp_path / "models" / "warm"
    folder.mkdir()
    (folder / "graph.yaml").write_text(
        "ensemble: 1\nname: warm\ninputs: {x: {dtype: float32, shape: [N, 2]}}\nnodes:\n"
        "  only: {kind: python, call: 'gated_models:gated', inputs: {x: $inputs.x}}\noutputs: {y: only.y}\n"
    )
    (folder / "model.yaml").write_text("warmup: {rows: [1, 4]}\n")


OIP = ("/v2/health/live", "/v2/health/ready", "/v2/models/warm/ready")


def never_contradicts(base: str, over: threading.Event, wrong: list[str]) -> None:
    """Until it is over: note each time that the server says ready, and a model then that it is not."""
    while not over.is_set():
        if status(base) == 200:
            with Endpoint(f"{base}warm", retry=NO_RETRY) as endpoint, contextlib.suppress(ConnectError):
                try:
                    endpoint(ONES)
                except RemoteOpsError as error:
                    wrong.append(str(error))
        over.wait(0.01)


def latencies(url: str) -> str:
    with Endpoint(url, retry=NO_RETRY) as endpoint:
        assert endpoint.signature.inputs
        took = []
        for _ in range(51):
            since = time.perf_counter()
            endpoint(ONES)
            took.append(time.perf_counter() - since)
    return f"the first request took {took[0] * 1e3:.2f} ms, {took[0] / statistics.median(took):.1f} x the median"


@pytest.mark.slow
def test_r9_r19_a_server_says_ready_once_it_is_warm_and_never_answers_otherwise(tmp_path: Path) -> None:
    lay_gated(tmp_path)
    port, over, wrong = free_port(), threading.Event(), list[str]()
    base = f"http://127.0.0.1:{port}/"
    watcher = threading.Thread(target=never_contradicts, args=(base, over, wrong))
    listen = ("--watch", "0.2", "-l", f"127.0.0.1:{port}", "--drain-grace-s", "1")
    with command(tmp_path, "models", *listen) as server:
        watcher.start()
        try:
            # It is being warmed: it lives, it is not ready, and says so of the model too.
            assert until((tmp_path / "runs").exists, START_S)
            assert (status(base, "/control/is_alive"), status(base)) == (200, 503)
            assert ask(base, "/warm").status == 503
            assert [status(base, path) == 200 for path in OIP] == [True, False, False]
            with pytest.raises(ModelUnavailable, match="not ready"):
                factor_at(f"{base}warm")
            (tmp_path / "open").touch()
            assert until(lambda: status(base) == 200, START_S)
            assert (tmp_path / "runs").read_text().split()[:2] == ["1", "4"]
            assert [status(base, path) for path in OIP] == [200, 200, 200]
            print(latencies(f"{base}warm"))
            # A load that fails leaves the model as it was, and the server ready.
            (tmp_path / "models" / ".bad").write_bytes(b"no model")
            os.replace(tmp_path / "models" / ".bad", tmp_path / "models" / "quick.onnx")
            assert until(lambda: "the one before it is still served" in server.said, 20)
            assert (status(base), status(base, "/quick"), factor_at(f"{base}quick")) == (200, 200, 3)
            # A model that goes is not there; the server is ready for the others.
            (tmp_path / "models" / "quick.onnx").unlink()
            assert until(lambda: status(base, "/nothing") == 404 and "quick" not in ask(base, "/nothing").body.decode())
            assert (status(base), status(base, "/warm"), factor_at(f"{base}warm")) == (200, 200, 2)
            assert status(base, "/v2/models/quick/ready") != 200
            # It drains: alive, not ready, and serving.
            server.signal(signal.SIGTERM)
            assert until(lambda: "draining" in server.said)
            assert (status(base), status(base, "/control/is_alive"), factor_at(f"{base}warm")) == (503, 200, 2)
            assert [status(base, path) == 200 for path in OIP] == [True, False, False]
            assert server.wait() == 0
        finally:
            (tmp_path / "open").touch()
            over.set()
            watcher.join(WAIT_S)
    assert wrong == []


# --------------------------------------------------------------------------- R12: slow peers


@contextlib.contextmanager
def hurried(**timeouts: Any) -> Iterator[str]:
    double = FunctionServable(lambda x: 2 * x, [X], [Y])
    with server_ref.running({"double": double}, timeouts=Timeouts(head_s=0.5, idle_s=0.5, **timeouts)) as url:
        yield url


def test_r12_a_body_below_the_least_rate_is_408_while_others_are_served() -> None:
    with hurried(body_s=0.2, min_rate=10_000) as url, Kept(url) as slow, Endpoint(url, retry=NO_RETRY) as endpoint:
        slow.send(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000\r\n\r\n")
        slow.sock.settimeout(0.02)
        answer, since = b"", time.monotonic()
        while not answer and time.monotonic() - since < WAIT_S:
            slow.send(b"20 bytes, which is 1 kB/s"[:20])
            np.testing.assert_array_equal(endpoint(ONES), 2 * ONES)
            with contextlib.suppress(TimeoutError):
                answer = slow.sock.recv(1 << 16)
        assert answer.startswith(b"HTTP/1.1 408 ")


def test_r12_empty_lines_do_not_keep_a_connection() -> None:
    with hurried() as url, Kept(url) as kept:
        kept.sock.settimeout(0.1)
        answer, lines = b"", 0
        while not answer and lines < 50:
            kept.send(b"\r\n")
            lines += 1
            with contextlib.suppress(TimeoutError):
                answer = kept.sock.recv(1 << 16)
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert lines == 9
        with Kept(url) as other:
            other.send(b"\r\n" * 8)
            assert other.ask("/control/is_ready").status == 200


# --------------------------------------------------------------------------- S4: caps


def sent_until_refused(url: str, head: bytes, pieces: Callable[[int], bytes], most: int) -> int:
    """Send without an end, whatever the server says, and give the status that it says."""
    with Kept(url) as kept:
        with contextlib.suppress(OSError):
            kept.send(head)
            for index in range(most):
                kept.send(pieces(index))
        with contextlib.suppress(ConnectionResetError):
            return int(kept.file.readline().split()[1])
        return 0  # it was reset while we still sent


@pytest.mark.slow
def test_s4_what_is_over_a_cap_is_refused_in_little_memory(tmp_path: Path) -> None:
    post = b"POST / HTTP/1.1\r\nHost: h\r\n"
    chunked = post + b"Transfer-Encoding: chunked\r\n\r\n"
    megabyte = bytes(1 << 20)
    long = [
        (413, post + b"Content-Length: 2000000000\r\n\r\n", lambda index: megabyte, 64),
        (413, chunked, lambda index: b"40000\r\n" + megabyte[: 1 << 18] + b"\r\n", 256),
        (413, chunked, lambda index: b"1\r\nx\r\n" * 1000, 100),
        (413, chunked + b"fffffffffffffff\r\n", lambda index: megabyte, 64),
        (431, post + b"X: ", lambda index: b"y" * (1 << 20), 16),
        (431, post, lambda index: b"X: y\r\n" * 10_000, 16),
        (431, chunked + b"0\r\n", lambda index: b"X: y\r\n" * 10_000, 16),
        (400, b"", lambda index: b"\r\n" * 10_000, 16),
    ]
    listen = ("-l", "127.0.0.1:0", "--drain-grace-s", "0", "--max-body-mb", "1")
    with command(tmp_path, "-m", "made_models:slow", *listen) as server:
        url = announced(server)
        np.testing.assert_array_equal(Endpoint(url)(ONES), 2 * ONES)
        before = rss(server)
        for expected, head, pieces, most in long:
            assert sent_until_refused(url, head, pieces, most) in (expected, 0)
        grown = rss(server) - before
        np.testing.assert_array_equal(Endpoint(url)(ONES), 2 * ONES)
    print(f"{grown >> 10} KiB more after {len(long)} kinds of requests over the caps")
    assert grown < 16 << 20


@pytest.mark.slow
def test_s4_bodies_that_are_announced_and_do_not_come_take_no_memory(tmp_path: Path) -> None:
    listen = ("-l", "127.0.0.1:0", "--drain-grace-s", "0")
    with command(tmp_path, "-m", "made_models:slow", *listen) as server, contextlib.ExitStack() as stack:
        url = announced(server)
        np.testing.assert_array_equal(Endpoint(url)(ONES), 2 * ONES)
        before = rss(server)
        for _ in range(50):
            kept = stack.enter_context(Kept(url))
            kept.send(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1073741824\r\n\r\n" + bytes(1000))
        with Kept(url) as asking:
            assert until(lambda: int(asking.ask("/control/client_count").body) >= 51)
            grown = rss(server) - before
        np.testing.assert_array_equal(Endpoint(url)(ONES), 2 * ONES)
    print(f"{grown >> 10} KiB more for 50 GiB that are announced")
    assert grown < 32 << 20


# --------------------------------------------------------------------------- S8, S9: files of strangers


def crafted(path: Path, names: Sequence[str], canary: bytes) -> Path:
    """An archive with entries of these names."""
    if path.suffix in (".mar", ".zip"):
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, canary)
        return path
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = len(canary)
            archive.addfile(entry, io.BytesIO(canary))
    return path


@pytest.mark.parametrize("kind", [".mar", ".zip", ".tar.gz"])
def test_s8_nothing_of_an_archive_is_unpacked(tmp_path: Path, kind: str) -> None:
    inside = tmp_path / "models" / "m"
    inside.mkdir(parents=True)
    (tmp_path / "models-evil").mkdir()
    names = [
        *("MAR-INF/MANIFEST.json", "m.onnx", "../canary", "../../canary", "../../models-evil/canary"),
        *(f"{tmp_path}/canary", "M.ONNX", "..\\canary", "sub/../../canary"),
    ]
    archive = crafted(inside / f"m{kind}", names, b"canary" * 1000)
    before = sorted(tmp_path.rglob("*"))
    for opened in (lambda: load(archive), lambda: server_ref.running(tmp_path / "models").__enter__()):
        with pytest.raises(SpecError, match=rf"nothing is unpacked here: unpack m{re.escape(kind)} yourself"):
            opened()
    assert sorted(tmp_path.rglob("*")) == before


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


def with_external_data(path: Path, location: str) -> None:
    """An ONNX file whose only weight is said to be in another file."""
    write_model(path, 1)
    model = onnx.load(path)
    (weight,) = model.graph.initializer
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "4")):
        weight.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())


def told_as_refused(tmp_path: Path, *argv: str) -> str:
    with command(tmp_path, *argv, "-l", "127.0.0.1:0") as server:
        assert server.wait(START_S) == 2
        return server.said


@pytest.mark.slow
def test_s9_what_a_file_would_run_or_read_is_named_and_does_not_happen(tmp_path: Path) -> None:
    models, canary, secret = tmp_path / "models", tmp_path / "canary", tmp_path / "secret"
    secret.write_bytes(np.float32(42).tobytes())
    tag = f"!!python/object/apply:os.mkdir ['{canary}']"
    write_model(models / "a" / "model.onnx", 1)
    (models / "a" / "model.yaml").write_text(f"swap: {tag}\n")
    said = told_as_refused(tmp_path, "models")
    assert "a/model.yaml:1:7 tag '!!python/object/apply:os.mkdir' means nothing here" in said, said
    assert not canary.exists()

    models = tmp_path / "others"
    write_model(models / "npy" / "model.onnx", 1)
    np.save(models / "npy" / "x.npy", np.array([Bomb(canary)], object), allow_pickle=True)
    (models / "npy" / "model.yaml").write_text("warmup: {inputs: {x: x.npy}}\n")
    (models / "graph.yaml").write_text(f"ensemble: 1\nnodes: {tag}\n")
    (models / "torch.pt").write_bytes(pickle.dumps(Bomb(canary)))
    (models / "link").mkdir()
    (models / "up").mkdir()
    with_external_data(models / "up" / "model.onnx", "../../secret")
    with_external_data(models / "absolute.onnx", str(secret))
    with_external_data(models / "link" / "model.onnx", "weights.bin")
    said = told_as_refused(tmp_path, "others")
    reasons = {
        "graph": "tag '!!python/object/apply:os.mkdir' means nothing here",
        "npy": "Object arrays cannot be loaded",
        "torch": "unpickling that runs code|refused",
        **dict.fromkeys(("up", "absolute", "link"), "onnxruntime cannot load this model"),
    }
    for name, words in reasons.items():
        assert re.search(rf"model '{name}': (.|\n)*?({words})", said), said
    assert not canary.exists()

    (models / "link" / "weights.bin").symlink_to(secret)
    said = told_as_refused(tmp_path, "others")
    assert re.search(r"a symbolic link that leads out of the folder", said), said
    said = told_as_refused(tmp_path, "-m", str(models / "link" / "model.onnx"))
    assert "onnxruntime cannot load this model" in said


# --------------------------------------------------------------------------- S16: little that it may do


@pytest.mark.slow
def test_s16_it_serves_without_a_home_from_a_folder_that_nobody_can_write_to(tmp_path: Path) -> None:
    write_model(tmp_path / "models" / "m" / "model.onnx", 3)
    (tmp_path / "models" / "m" / "model.yaml").write_text("cache: {}\nbatching: {max_rows: 8}\nwarmup: {rows: [8]}\n")
    base = f"http://127.0.0.1:{free_port()}/"
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LD_LIBRARY_PATH", "LANG")}
    before = sorted(tmp_path.rglob("*"))
    process = subprocess.Popen(
        [
            *(sys.executable, "-W", "error", "-m", "server_ref", str(tmp_path / "models"), "-l", urlsplit(base).netloc),
            *("--watch", "0.2", "--drain-grace-s", "0"),
        ],
        cwd="/proc",  # even root makes no file there
        env={**kept, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert until(lambda: status(base) == 200 or process.poll() is not None, START_S)
            assert factor_at(f"{base}m") == 3
            write_model(tmp_path / "models" / "m" / "model.onnx", 4)
            assert until(lambda: factor_at(f"{base}m") == 4, 20)
            process.send_signal(signal.SIGTERM)
            said = process.communicate(timeout=20)[1]
            assert (process.returncode, "Traceback" in said, "WARNING" in said) == (0, False, False), said
        finally:
            process.kill()
    assert sorted(tmp_path.rglob("*")) == before


# --------------------------------------------------------------------------- the table


def test_every_test_that_the_table_names_is_there() -> None:
    numbers = {f"R{number}" for number in (*range(1, 13), 19, 20)} | {f"S{number}" for number in range(4, 17)}
    rows = [line.split() for line in PROMISED.split("\n") if line]
    assert {number for number, _ in rows} == numbers
    missing = []
    for number, test in rows:
        file, name = test.split("::")
        path = Path(__file__) if file == "here" else ROOT / "tests" / f"{file}.py"
        if not path.exists() or f"\ndef {name}(" not in path.read_text():
            missing.append(f"{number} {test}")
    assert missing == []
