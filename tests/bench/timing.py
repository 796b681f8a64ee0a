"""How the benchmarks time: calls taken in turn, medians, ratios to a bare twin in the same run."""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def hardware() -> str:
    """One line: processor, cores, Python, commit."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    dirty = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=False)
    at = commit.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")
    return (
        f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {at}"
    )


def per_call_us(call: Callable[[], object], calls: int) -> float:
    """Mean microseconds of a call over a tight loop."""
    since = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - since) / calls * 1e6


def in_turn(calls: list[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Seconds of each call, the calls taken in turn, so that whatever else the machine does hits them alike."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, times in zip(calls, seconds, strict=True):
            since = time.perf_counter()
            call()
            times.append(time.perf_counter() - since)
    return seconds


def median(values: list[float]) -> float:
    """The median."""
    return statistics.median(values)


def row(what: str, ours: str, bare: str, ratio: float, bound: str) -> None:
    """Print one line of the table."""
    print(f"{what:58} {ours:>14} {bare:>14} {ratio:8.2f}  (at most {bound})" if bound else
          f"{what:58} {ours:>14} {bare:>14} {ratio:8.2f}", flush=True)  # fmt: skip


@contextlib.contextmanager
def server(*models: str, listen: str = "") -> Iterator[tuple[str, int]]:
    """`python -m server_ref` in a process of its own, serving factories of `models.py`; yields its URL and pid."""
    port = 0
    if not listen:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        listen = f"127.0.0.1:{port}"
    flags = [part for name in models for part in ("--model", f"models:{name}")]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}"}
    command = [sys.executable, "-m", "server_ref", *flags, "--listen", listen, "--drain-grace-s", "0"]
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()  # it says where it serves once it does
        if " at http" not in line:
            raise RuntimeError(line + process.stderr.read())
        yield line.split(" at ")[1].split(" on ")[0].removesuffix(models[0]), process.pid
    finally:
        process.terminate()
        process.wait()


# `answer(up)` gives what goes back; `prepare` is code that defines it.
_BARE = """
import socket, sys
exec(sys.argv[5])
listener = socket.socket(int(sys.argv[1])); listener.bind(sys.argv[2] if sys.argv[2] else ("127.0.0.1", 0))
listener.listen(); print(listener.getsockname()[1], flush=True)
peer, _ = listener.accept()
if not sys.argv[2]: peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
up = memoryview(bytearray(int(sys.argv[3])))
while True:
    got = 0
    while got < len(up):
        size = peer.recv_into(up[got:])
        if not size: sys.exit()
        got += size
    peer.sendall(answer(up))
"""


@contextlib.contextmanager
def bare_exchange(
    up_bytes: int,
    down_bytes: int,
    *,
    unix: bool = False,
    prepare: str = "down = bytes(int(sys.argv[4])); answer = lambda up: down",
) -> Iterator[Callable[[], None]]:
    """Two sockets in two processes that move the same bytes into kept buffers, and nothing else."""
    family = socket.AF_UNIX if unix else socket.AF_INET
    path = tempfile.mktemp(suffix=".sock") if unix else ""
    command = [sys.executable, "-c", _BARE, str(int(family)), path, str(up_bytes), str(down_bytes), prepare]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    try:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        with socket.socket(family) as peer:
            peer.connect(path or ("127.0.0.1", int(port)))
            if not unix:
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            up, down = bytes(up_bytes), memoryview(bytearray(down_bytes))

            def exchange() -> None:
                peer.sendall(up)
                got = 0
                while got < down_bytes:
                    got += peer.recv_into(down[got:])

            yield exchange
    finally:
        process.kill()
        process.wait()
        if path:
            os.unlink(path)


def wait_ready(url: str) -> None:
    """Ask until the server says that it is ready."""
    with urllib.request.urlopen(f"{url.rstrip('/')}/control/is_ready") as answer:
        assert answer.status == 200
