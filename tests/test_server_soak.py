"""A server in a process of its own, under everybody at once and for long: its memory, its counters and its manners.

`REMOTE_OPS_SOAK_S` says for how many seconds; 10 unless set.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import psutil
import pytest
from rawpeer import WAIT_S, read_message, until

from remote_ops import Endpoint, Retry, graphpipe
from remote_ops.errors import ModelUnavailable

Array = npt.NDArray[Any]
SOAK_S = float(os.environ.get("REMOTE_OPS_SOAK_S", "10"))
pytestmark = [pytest.mark.slow, pytest.mark.timeout(SOAK_S + 180)]

SERVER = '''
import json, os, sys, threading, time
import numpy as np
import server_ref
from remote_ops import FunctionServable, TensorSpec
from server_ref.batching import Batching
from server_ref.instances import Instances
from server_ref.isolation import Backoff, Isolated
from server_ref.lanes import QueueLimits
from server_ref.model import Version

X, Y = TensorSpec("x", "float32", (-1, 4)), TensorSpec("y", "float32", (-1, 4))


def run(x, config):
    """Doubles, in a millisecond; `config` may ask for a crash."""
    if config == b"crash":
        os._exit(3)
    time.sleep(0.001)
    if np.isnan(x).any():
        raise ValueError("not a number")
    return 2 * x


def make():
    model = FunctionServable(run, [X], [Y], name="m")
    model.concurrency = 1
    return model


if __name__ == "__main__":
    batching, limits = Batching(max_rows=16), QueueLimits(max_requests=3)
    isolated = [Isolated("soaked:make", backoff=Backoff(0.05, 0.2)) for _ in range(2)]
    quick = FunctionServable(lambda x: 2 * x, [X], [Y], name="quick")
    versions = {
        "batched": Version("batched", [make(), make()], batching=batching, limits=limits),
        "isolated": Version("isolated", isolated, limits=limits, response_timeout_s=20.0),
        "quick": Version("quick", [quick]),
    }
    code = server_ref.serve(versions, "127.0.0.1:0", grace_s=0.0)
    for one in isolated:
        one.close()
    def counts(version):
        shot = version.stats.snapshot()
        return {"requests": shot.requests, "success": shot.success.times, "failure": shot.failure.times,
                "failures": shot.failures, "pending": shot.pending, "rows": shot.rows, "executions": shot.executions,
                "batches": {rows: one[0].times for rows, one in shot.batches.items()},
                "queue": shot.queue.times, "histogram": sum(shot.request_s.counts)}
    print(json.dumps({name: counts(version) for name, version in versions.items()}))
    sys.exit(code)
'''


class Server:
    """The process, where it listens, and what it says in the end."""

    def __init__(self, folder: Path) -> None:
        (folder / "soaked.py").write_text(SERVER)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
        self.log = folder / "stderr"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(folder / "soaked.py")], stdout=subprocess.PIPE, stderr=log, env=environment,
                text=True,
            )  # fmt: skip
        found: list[Any] = []
        assert until(lambda: bool(found.append(re.search(r"http://127.0.0.1:\d+/", self.log.read_text())) or found[-1]))
        self.url = found[-1][0]
        self.ps = psutil.Process(self.process.pid)

    @property
    def rss(self) -> int:
        return int(self.ps.memory_info().rss)

    def end(self) -> tuple[int, dict[str, Any]]:
        """Drain it: its exit code, and the counts of its models."""
        self.process.send_signal(signal.SIGTERM)
        told, _ = self.process.communicate(timeout=60)
        return self.process.returncode, json.loads(told)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.communicate()


# --------------------------------------------------------------------------- R10


@pytest.mark.parametrize(("model", "times"), [("quick", 10_000), ("batched", 10_000), ("isolated", 4000)])
def test_r10_ten_thousand_requests_take_less_than_a_kilobyte_each(server: Server, model: str, times: int) -> None:
    x = np.ones((1, 4), np.float32)
    children = {child.pid: child for child in server.ps.children()}

    def call(times: int) -> None:
        with Endpoint(f"{server.url}{model}", 30, retry=Retry(attempts=1)) as endpoint:
            for _ in range(times):
                endpoint(x)

    def calls(times: int) -> int:
        """Memory of the server and its workers after so many more."""
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(call, times // 4) for _ in range(4)]:
                done.result()
        return server.rss + sum(child.memory_info().rss for child in children.values())

    before = calls(2000)
    slope = (calls(times) - before) / times
    print(f"\n{model}: {slope:.1f} bytes a request")
    assert slope < 1000


LOADS = """
import gc, sys
import numpy as np, psutil
import server_ref
from remote_ops import Endpoint, load
from server_ref.batching import Batching
from server_ref.model import Version

def once():
    version = Version("m", [load(sys.argv[1], device="cpu")], batching=Batching(max_rows=8))
    with server_ref.running({"m": version}) as url, Endpoint(url) as endpoint:
        endpoint(np.ones((1, 1000), np.float32))

def rss(times):
    for _ in range(times):
        once()
    gc.collect()
    return psutil.Process().memory_info().rss

before, fds, threads = rss(10), psutil.Process().num_fds(), psutil.Process().num_threads()
print(rss(50) - before, psutil.Process().num_fds() - fds, psutil.Process().num_threads() - threads)
"""


def test_r10_fifty_models_loaded_served_and_unloaded_leave_nothing_behind(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "m.pt2"
    layer = torch.nn.Linear(1000, 1000)  # 4 MB
    rows = {"input": {0: torch.export.Dim("n", min=1)}}
    torch.export.save(torch.export.export(layer, (torch.ones(2, 1000),), dynamic_shapes=rows), path)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOADS, str(path)], capture_output=True, text=True, timeout=150,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    grown, fds, threads = map(int, done.stdout.split())
    print(f"\n{grown >> 10} kB, {fds} descriptors, {threads} threads")
    assert grown < 50 << 20  # a quarter of the weights that were loaded
    assert fds <= 2
    assert threads <= 2


# --------------------------------------------------------------------------- R11


class Clients:
    """All kinds of them, each in a loop of its own; what those who listen were told is counted by kind and status."""

    def __init__(self, url: str) -> None:
        self.url = url
        parts = urlsplit(url)
        self.address = (parts.hostname, parts.port)
        self.over = threading.Event()
        self.told: Counter[tuple[str, str, int]] = Counter()
        self.vanished: Counter[str] = Counter()
        self.lock = threading.Lock()

    def connect(self) -> socket.socket:
        sock = socket.create_connection(self.address, WAIT_S)
        sock.settimeout(60.0)
        return sock

    def ask(self, kind: str, model: str, array: Array, *headers: str, config: bytes = b"", slowly: bool = False) -> int:
        """Post, and read the answer; a right one is checked."""
        with self.connect() as sock, sock.makefile("rb") as file:
            message = post(model, array, *headers, config=config)
            pieces = [message[at : at + 40] for at in range(0, len(message), 40)] if slowly else [message]
            for piece in pieces:
                sock.sendall(piece)
                if slowly:
                    time.sleep(0.002)
            answer = read_message(file)
        assert answer is not None, f"{kind}: hung up without an answer"
        if answer.status == 200:
            np.testing.assert_array_equal(graphpipe.decode_response(answer.body).tensors[0], 2 * array)
        with self.lock:
            self.told[kind, model, answer.status] += 1
        return answer.status

    # the kinds

    def tiny(self, dice: random.Random) -> None:
        self.ask("tiny", "batched", rows(dice, 1))

    def quick(self, dice: random.Random) -> None:
        self.ask("quick", "quick", rows(dice, 3))

    def huge(self, dice: random.Random) -> None:
        self.ask("huge", "batched", rows(dice, 300_000))  # 4.8 MB

    def slow(self, dice: random.Random) -> None:
        self.ask("slow", "batched", rows(dice, 20), slowly=True)

    def hasty(self, dice: random.Random) -> None:
        self.ask("hasty", "batched", rows(dice, 2), f"X-Request-Timeout-Ms: {dice.randrange(4)}")

    def wrong(self, dice: random.Random) -> None:
        assert self.ask("wrong", "batched", np.ones((1, 5 + dice.randrange(9)), np.float32)) == 400

    def poison(self, dice: random.Random) -> None:
        assert self.ask("poison", "batched", np.full((2, 4), np.nan, np.float32)) in (429, 500)

    def lonely(self, dice: random.Random) -> None:
        assert self.ask("lonely", "isolated", rows(dice, 5)) in (200, 429, 503)

    def killer(self, dice: random.Random) -> None:
        assert self.ask("killer", "isolated", rows(dice, 1), config=b"crash") in (429, 503)
        self.over.wait(1.5)

    def garbage(self, dice: random.Random) -> None:
        with self.connect() as sock, sock.makefile("rb") as file:
            sock.sendall(dice.randbytes(200) + b"\r\n\r\n")
            answer = read_message(file)
            assert answer is None or 400 <= answer.status < 500

    def crashing(self, dice: random.Random) -> None:
        """Posts, all or a part of it, and resets the connection."""
        message = post("batched", rows(dice, dice.randrange(1, 50_000)))
        with self.connect() as sock:
            with contextlib.suppress(OSError):
                sock.sendall(message[: len(message) if dice.random() < 0.7 else dice.randrange(len(message))])
            time.sleep(dice.random() * 0.01)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with self.lock:
            self.vanished["batched"] += 1

    def run(self, kind: Callable[[random.Random], None], seed: int) -> int:
        dice, rounds = random.Random(seed), 0
        while not self.over.is_set():
            kind(dice)
            rounds += 1
        return rounds


def rows(dice: random.Random, count: int) -> Array:
    return np.full((count, 4), dice.randrange(1000), np.float32)


def post(model: str, array: Array, *headers: str, config: bytes = b"") -> bytes:
    body = b"".join(graphpipe.encode_request(("x",), [array], (), config))
    lines = "".join(f"{header}\r\n" for header in headers)
    return f"POST /{model} HTTP/1.1\r\nHost: h\r\nContent-Length: {len(body)}\r\n{lines}\r\n".encode() + body


STATUS = {"rejected": 429, "timeout": 504, "invalid": 400}


def test_r11_all_kinds_of_clients_at_once_get_what_is_theirs_and_every_counter_adds_up(server: Server) -> None:
    clients = Clients(server.url)
    kinds = [clients.tiny] * 3 + [clients.quick, clients.huge, clients.slow, clients.hasty, clients.wrong]
    kinds += [clients.poison, clients.lonely, clients.lonely, clients.killer, clients.garbage]
    kinds += [clients.crashing, clients.crashing]
    clients.ask("first", "batched", np.ones((300_000, 4), np.float32))
    fds, rss = server.ps.num_fds(), []
    with ThreadPoolExecutor(len(kinds)) as pool:
        loops = [pool.submit(clients.run, kind, seed) for seed, kind in enumerate(kinds)]
        give_up = time.monotonic() + SOAK_S
        while time.monotonic() < give_up and not any(loop.done() for loop in loops):
            time.sleep(0.25)
            rss.append(server.rss)
        clients.over.set()
        rounds = [loop.result(60) for loop in loops]
    assert min(rounds) > 0
    assert until(lambda: server.ps.num_fds() <= fds + 4)  # a worker may just be starting
    assert max(rss[len(rss) // 2 :]) - max(rss[: len(rss) // 2]) < 64 << 20  # the second half takes no more
    with Endpoint(f"{server.url}batched", 30) as endpoint:
        np.testing.assert_array_equal(endpoint(np.ones((2, 4), np.float32)), np.full((2, 4), 2, np.float32))
        clients.told["last", "batched", 200] += 1
    with Endpoint(f"{server.url}isolated", 30, retry=Retry(attempts=50, budget=50.0)) as patient:
        assert until(lambda: answers(patient))
    code, counts = server.end()
    assert code == 0
    for model in ("quick", "batched"):
        check_counts(counts[model], clients, model)
    for one in counts.values():
        check_sums(one)
    log = server.log.read_text()
    assert "never retrieved" not in log
    assert "Exception in" not in log
    print(f"\n{sum(rounds)} rounds in {SOAK_S:g} s; {dict(clients.told)}; rss {min(rss) >> 20} to {max(rss) >> 20} MB")


def answers(endpoint: Endpoint) -> bool:
    with contextlib.suppress(ModelUnavailable):
        return bool((endpoint(np.ones((1, 4), np.float32)) == 2).all())
    return False


def check_sums(count: Mapping[str, Any]) -> None:
    """What must hold of the counters by themselves, when nothing is under way."""
    assert count["pending"] == 0
    assert count["requests"] == count["success"] + count["failure"]
    assert count["failure"] == sum(count["failures"].values())
    assert count["histogram"] == count["success"]
    assert count["executions"] == sum(count["batches"].values())
    assert count["rows"] == sum(int(rows) * times for rows, times in count["batches"].items())
    assert count["queue"] >= count["success"]


def check_counts(count: Mapping[str, Any], clients: Clients, model: str) -> None:
    """What clients were told is what the server counted; of those who vanished it may have counted any."""
    told: Counter[int] = Counter()
    for (_, asked, status), times in clients.told.items():
        told[status] += times * (asked == model)
    unknown = clients.vanished[model]
    failures = count["failures"]
    assert told[200] <= count["success"] <= told[200] + unknown
    assert failures["model"] == told[500]
    for reason, status in STATUS.items():
        assert told[status] <= failures[reason] <= told[status] + unknown
    assert failures["canceled"] <= unknown
    assert sum(told.values()) <= count["requests"] <= sum(told.values()) + unknown
