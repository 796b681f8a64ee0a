"""What do a queue, batches and instances cost, and what do batches bring? (figures A to C)"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import models
import numpy as np
from timing import HERE, ROOT, in_turn, median, row, server

import server_ref
from remote_ops import Endpoint, FunctionServable, Retry, TensorSpec
from remote_ops.onnx import OnnxModel
from server_ref.batching import Batching
from server_ref.model import Version

_CLIENTS = 32
_ROUNDS = 7
_SECONDS = 3.0

# Clients in a process of their own: each sends its next row as soon as it has its last answer.
_LOAD = """
import asyncio, sys, time
import numpy as np
from remote_ops import Endpoint, Retry
from remote_ops.connection import new_loop
url, clients, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
window = np.random.default_rng(0).integers(0, 256, (1, 2048), np.int32)
async def client(endpoint, end, counts, index):
    while time.perf_counter() < end:
        await endpoint.ainfer({"bytes": window})
        counts[index] += 1
async def main():
    endpoint = Endpoint(url, retry=Retry(attempts=1))
    await endpoint.ainfer({"bytes": window})
    print("ready", flush=True)
    for _ in sys.stdin:
        counts, end = [0] * clients, time.perf_counter() + seconds
        await asyncio.gather(*[client(endpoint, end, counts, index) for index in range(clients)])
        print(sum(counts) / seconds, flush=True)
loop = new_loop()
loop.run_until_complete(main())
"""


def magika(threads: int) -> OnnxModel:
    """The trained file-type model."""
    from importlib.resources import files

    return OnnxModel(files("magika") / "models/standard_v3_3/model.onnx", threads=threads)


def batches() -> None:
    """Print figure A: rows a second of 32 clients that send one row each, beside the best fixed batch in process."""
    cores = os.cpu_count() or 1
    local = magika(cores)
    windows = {
        size: np.random.default_rng(0).integers(0, 256, (size, 2048), np.int32) for size in (1, 4, 8, 16, 32, 64)
    }

    def rate(size: int, seconds: float) -> float:
        count, end, feed = 0, time.perf_counter() + seconds, {"bytes": windows[size]}
        while time.perf_counter() < end:
            local.infer(feed)
            count += size
        return count / seconds

    best = max(windows, key=lambda size: median([rate(size, 0.5) for _ in range(3)]))
    model = Path(models.__file__).parent
    with _served_file(["--max-rows", "8"]) as url:
        env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}"}
        load = subprocess.Popen(
            [sys.executable, "-c", _LOAD, url, str(_CLIENTS), str(_SECONDS)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=model,
        )  # fmt: skip
        assert load.stdin is not None
        assert load.stdout is not None
        assert load.stdout.readline() == "ready\n"
        ratios = []
        for _ in range(_ROUNDS):
            theirs = rate(best, _SECONDS)
            load.stdin.write("\n")
            load.stdin.flush()
            ours = float(load.stdout.readline())
            ratios.append((ours / theirs, ours, theirs))
        load.stdin.close()
        load.wait()
    ratio, ours, theirs = sorted(ratios)[len(ratios) // 2]
    what = f"A  magika rows/s, {_CLIENTS} clients of a row / batches of {best} in process"
    print(f"{what:58} {ours:>12.0f}/s {theirs:>12.0f}/s {ratio:8.2f}  (at least 0.9)", flush=True)


class _served_file:
    """`python -m server_ref --model magika.onnx` with flags, in a process of its own."""

    def __init__(self, flags: list[str]) -> None:
        from importlib.resources import files

        path = str(files("magika") / "models/standard_v3_3/model.onnx")
        command = [sys.executable, "-m", "server_ref", "--model", f"magika={path}", "--listen", "127.0.0.1:0"]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [*command, "--drain-grace-s", "0", *flags], env=env, stderr=subprocess.PIPE, text=True
        )

    def __enter__(self) -> str:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if " at http" in line:
                return line.split(" at ")[1].split(" on ")[0]
        raise RuntimeError("the server said nothing")

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()


def alone() -> None:
    """Print figure B: what serving adds to a model without batches; f says it of a larger one, beside bare sockets."""
    local = models.double()
    (spec,) = local.signature.inputs
    one = np.ones([1 if size < 0 else size for size in spec.shape or ()], np.float32)
    with server("double", "echo") as (url, _), Endpoint(url + "double") as endpoint:

        def bare() -> object:
            return local.infer({spec.name: one})

        def served() -> object:
            return endpoint(one)

        in_turn([bare, served], 500)
        for how, (bare_s, served_s) in (
            ("in turn", [median(times) for times in in_turn([bare, served], 5000)]),
            ("each alone", [median(in_turn([call], 5000)[0]) for call in (bare, served)]),
        ):
            row(f"B  small ONNX model, added to it in process, {how}", f"{(served_s - bare_s) * 1e6:.0f} us",
                f"{bare_s * 1e6:.0f} us", served_s / bare_s, "150 us added")  # fmt: skip


class OneAtATime(FunctionServable):
    """A model that takes one call at a time."""

    concurrency = 1


def added() -> None:
    """Print figure C: what batches add to a request that is alone."""
    x, y = TensorSpec("x", "float32", (-1, 16)), TensorSpec("y", "float32", (-1, 16))

    def double(x: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        return 2 * x

    plain = Version("plain", [OneAtATime(double, [x], [y])])
    batched = Version("batched", [OneAtATime(double, [x], [y])], batching=Batching(max_rows=32))
    one = np.ones((1, 16), np.float32)
    with server_ref.running({"plain": plain, "batched": batched}) as url:
        endpoints = [Endpoint(f"{url}{name}", retry=Retry(attempts=1)) for name in ("plain", "batched")]
        calls: list[Callable[[], object]] = [lambda endpoint=endpoint: endpoint(one) for endpoint in endpoints]  # type: ignore[misc]
        in_turn(calls, 200)
        plain_s, batched_s = (median(times) for times in in_turn(calls, 3000))
        for endpoint in endpoints:
            endpoint.close()
    row("C  a request alone, with batches / without", f"{batched_s * 1e6:.0f} us", f"{plain_s * 1e6:.0f} us",
        batched_s / plain_s, "60 us added")  # fmt: skip


def main() -> None:
    """Print figures A to C."""
    batches()
    alone()
    added()


if __name__ == "__main__":
    main()
