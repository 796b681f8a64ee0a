"""Remote modules among processes and threads, for long, and interrupted: nothing is shared, mixed up or left behind."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

import server_ref  # noqa: E402
from remote_ops import FunctionServable, SpecError, TensorSpec  # noqa: E402
from remote_ops.torch import Parallel, RemoteModule, started  # noqa: E402

ROOT = Path(__file__).parents[1]
PATIENCE_S = 60.0
HELD = threading.Semaphore(0)
HOLD = threading.Event()


def hold(x: Any) -> Any:
    """Let the test know that a call is here, and keep it until the test is over."""
    HELD.release()
    HOLD.wait(PATIENCE_S)
    return x


def held_gradient(primals: Any, cotangents: Any) -> Any:
    return {"x": hold(cotangents["y"])}


def servable(run: Any, vjp: Any = None, columns: int = 4) -> FunctionServable:
    made = FunctionServable(
        run,
        [TensorSpec("x", "float32", (-1, columns), differentiable=vjp is not None)],
        [TensorSpec("y", "float32", (-1, columns))],
        vjp=vjp,
    )
    made.concurrency = 16  # type: ignore[attr-defined]
    return made


def gradient_of_square(primals: Any, cotangents: Any) -> Any:
    return {"x": 2 * primals["x"] * cotangents["y"]}


MODELS = {
    "square": servable(lambda x: x * x, gradient_of_square),
    "wide": servable(lambda x: x * x, gradient_of_square, columns=4096),
    "hold": servable(hold),
    "hold-wide": servable(hold, columns=4096),
    "hold-backward": servable(lambda x: x, held_gradient),
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A real server of all `MODELS`; each at `<url><name>`."""
    with server_ref.running(MODELS) as url:
        yield url


SERVER = """
import sys
import server_ref
from remote_ops import FunctionServable, TensorSpec

x, y = TensorSpec("x", "float32", (-1, 4), differentiable=True), TensorSpec("y", "float32", (-1, 4))
square = FunctionServable(lambda x: x * x, [x], [y], vjp=lambda given, back: {"x": 2 * given["x"] * back["y"]})
with server_ref.running({"square": square}) as url:
    print(url, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[str]:
    """A server in a process of its own, so that the sockets of this one are the client's."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield f"{process.stdout.readline().strip()}square"
        process.communicate()


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Whatever a test does, no call stays behind."""
    HOLD.clear()
    while HELD.acquire(blocking=False):
        pass
    yield
    HOLD.set()
    assert until(lambda: started.in_flight() == 0 or in_flight() == 0), f"{started.in_flight()} calls are left"


def until(condition: Callable[[], bool]) -> bool:
    """Whether it comes true; looked at until it does."""
    give_up_at = time.monotonic() + 5
    while not condition():
        if time.monotonic() > give_up_at:
            return False
        time.sleep(0.01)
    return True


def in_flight() -> int:
    gc.collect()
    return started.in_flight()


def ports(url: str) -> set[int]:
    """Our side of the connections that this process has to a server."""
    port = urlsplit(url).port
    return {
        connection.laddr.port
        for connection in psutil.Process().net_connections("tcp")
        if connection.raddr and connection.raddr.port == port and connection.status == psutil.CONN_ESTABLISHED
    }


# processes


class Rows(Dataset):
    """Rows that pass through a module, in whichever process they are asked for, with all that a module does."""

    def __init__(self, module: Any, url: str) -> None:
        self.module = module
        self.url = url
        self.of_parent = ports(url)

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        x = torch.full((1, 4), float(index), requires_grad=True)
        called = self.module(x)
        in_flight = self.module.start(x)
        first, _ = Parallel(self.module, nn.Sequential(self.module, nn.Tanh()))(x)
        waited = in_flight.wait()
        (called + first + waited).sum().backward()
        opened = ports(self.url) - self.of_parent
        return torch.cat([called[0, :1], first[0, :1], waited[0, :1], x.grad[0, :1]]).detach(), os.getpid(), len(opened)


def check_workers(module: RemoteModule, url: str, how: str) -> None:
    loader = DataLoader(Rows(module, url), batch_size=3, num_workers=2, multiprocessing_context=how, timeout=PATIENCE_S)
    values, pids, opened = (torch.cat(column) for column in zip(*loader, strict=True))
    squares = torch.arange(12.0) ** 2
    torch.testing.assert_close(values, torch.stack([squares, squares, squares, 6 * torch.arange(12.0)], dim=1))
    assert len(set(pids.tolist()) - {os.getpid()}) == 2
    # One for calls that block and one or more for those in the background; none that the parent had.
    assert all(count >= 2 for count in opened.tolist())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_workers_use_a_module_whose_parent_has_a_call_in_flight(how: str, elsewhere: str, url: str) -> None:
    module = RemoteModule(elsewhere)
    x = torch.full((2, 4), 3.0, requires_grad=True)
    module(x).sum().backward()
    module.start(x).wait()
    # To a server of this process, so that it stays; workers may take long to start.
    waiting = RemoteModule(f"{url}hold", timeout_s=PATIENCE_S).start(torch.ones(1, 4))
    assert HELD.acquire(timeout=PATIENCE_S)
    answered = module.start(x)
    mine = ports(elsewhere)
    for _ in range(2):
        check_workers(module, elsewhere, how)
        assert ports(elsewhere) >= mine
    HOLD.set()
    assert waiting.wait().tolist() == [[1.0] * 4]
    assert answered.wait().tolist() == [[9.0] * 4] * 2
    assert module.start(x).wait().tolist() == [[9.0] * 4] * 2


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_fork_leaves_the_calls_of_the_parent_to_the_parent(url: str) -> None:
    call = RemoteModule(f"{url}hold", timeout_s=PATIENCE_S).start(torch.ones(1, 4))
    assert HELD.acquire(timeout=PATIENCE_S)
    child = os.fork()
    if not child:
        status = 1
        with contextlib.suppress(BaseException):
            assert started.in_flight() == 0
            try:
                call.wait()
            except SpecError:
                del call
                gc.collect()
                status = 0
        os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    HOLD.set()
    assert call.wait().tolist() == [[1.0] * 4]


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_fork_while_other_threads_call_leaves_a_child_that_can(elsewhere: str) -> None:
    """Locks that were held at the fork are held by nobody in the child."""
    module = RemoteModule(elsewhere)
    stop = threading.Event()

    def call() -> None:
        while not stop.is_set():
            x = torch.ones(1, 4, requires_grad=True)
            sum(Parallel(module, module)(x)).sum().backward()
            module(x)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            child = os.fork()
            if not child:
                status = 1
                with contextlib.suppress(BaseException), torch.no_grad():
                    torch.set_num_threads(1)
                    answers = [module(torch.full((1, 4), 3.0)), module.start(torch.full((1, 4), 3.0)).wait()]
                    status = 0 if all(answer.tolist() == [[9.0] * 4] for answer in answers) else 2
                os._exit(status)
            assert waited(child) == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def waited(child: int) -> int | None:
    """How a child ended; None if it did not."""
    status: list[int] = []

    def ended() -> bool:
        pid, code = os.waitpid(child, os.WNOHANG)
        if pid:
            status.append(code)
        return bool(pid)

    if until(ended):
        return status[0]
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def test_pickled_modules_call_on_their_own_connections(elsewhere: str) -> None:
    module = RemoteModule(elsewhere, max_rows=2, config=b"c", outputs=["y"], pure=False)
    x = torch.rand(5, 4, requires_grad=True)
    module(x)
    before = ports(elsewhere)
    twin = pickle.loads(pickle.dumps(Parallel(module, nn.Linear(4, 4))))
    y, _ = twin(x)
    y.sum().backward()
    torch.testing.assert_close((y, x.grad), (x * x, 2 * x.detach()))
    assert ports(elsewhere) - before
    assert twin.get_submodule("0").pure is False


# interrupted

INTERRUPTED = """
import gc
import signal
import sys
import torch
from remote_ops.torch import Parallel, RemoteModule, started

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started the tests with it ignored
url = sys.argv[1]
hold, held_gradient = (RemoteModule(url + name, timeout_s=600) for name in ("hold", "hold-backward"))
many = RemoteModule(url + "hold", timeout_s=600, max_rows=1)
x = torch.ones(2, 4, requires_grad=True)


def backward(module):
    result = module(x)
    result = sum(result) if isinstance(result, tuple) else result
    result.sum().backward()


WAYS = {
    "call": lambda: hold(x),
    "wait": lambda: hold.start(x).wait(),
    "parallel": lambda: Parallel(hold, hold)(x),
    "pieces": lambda: many(x),
    "backward": lambda: backward(held_gradient),
    "parallel backward": lambda: backward(Parallel(held_gradient, held_gradient)),
}
for name in sys.argv[2:]:
    print("calling", flush=True)
    try:
        WAYS[name]()
    except KeyboardInterrupt:
        pass
    else:
        break
    gc.collect()
    print("interrupted", started.in_flight(), flush=True)
assert RemoteModule(url + "square")(x).tolist() == [[1.0] * 4] * 2
assert RemoteModule(url + "square").start(x).wait().tolist() == [[1.0] * 4] * 2
print("done", flush=True)
"""


def interrupt(url: str, ways: dict[str, int]) -> list[str]:
    """What a process says that is interrupted in each way, once its calls (so many) are with the server."""
    said = []
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, url, *ways], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            for calls in ways.values():
                assert process.stdout.readline() == "calling\n"
                for _ in range(calls):
                    assert HELD.acquire(timeout=PATIENCE_S)
                # Python blocks in spite of a signal that comes right before a system call that does: wait for that.
                assert until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_SLEEPING)
                process.send_signal(signal.SIGINT)
                said.append(process.stdout.readline().strip())  # the models still hold their calls
            said.append(process.stdout.readline().strip())
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()
    return said


@pytest.mark.slow
def test_an_interrupt_ends_a_call_at_once(url: str) -> None:
    ways = {"call": 1, "wait": 1, "pieces": 2, "backward": 1}
    assert interrupt(url, ways) == [*["interrupted 0"] * len(ways), "done"]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["parallel", "parallel backward"])
def test_an_interrupt_ends_a_parallel_and_gives_all_its_calls_up(way: str, url: str) -> None:
    assert interrupt(url, {way: 2}) == ["interrupted 0", "done"]


# threads


@pytest.mark.parametrize("how", ["call", "start", pytest.param("parallel", marks=pytest.mark.slow)])
def test_threads_share_a_module_and_each_gets_its_own_answer(how: str, elsewhere: str) -> None:
    module = RemoteModule(elsewhere)
    parallel = Parallel(module, nn.Sequential(module, nn.Identity()))

    def call(x: Any) -> Any:
        if how == "parallel":
            return sum(parallel(x)) / 2
        return module(x) if how == "call" else module.start(x).wait()

    def work(thread: int) -> int:
        right = 0
        for number in range(100):
            x = torch.full((1 + number % 3, 4), float(100 * thread + number), requires_grad=True)
            y = call(x)
            y.sum().backward()
            right += bool((y == x * x).all() and (x.grad == 2 * x.detach()).all())
        return right

    with ThreadPoolExecutor(16) as pool:
        assert [*pool.map(work, range(16))] == [100] * 16
    assert len(ports(elsewhere)) <= 2 * 32 + 8


@pytest.mark.parametrize("how", ["call", "start"])
def test_calls_one_after_the_other_share_a_connection(how: str, elsewhere: str) -> None:
    before, seen = ports(elsewhere), set()
    module = RemoteModule(elsewhere)
    for number in range(1000):
        x = torch.full((1, 4), float(number), requires_grad=number % 10 == 0)
        y = module(x) if how == "call" else module.start(x).wait()
        if x.requires_grad:
            y.sum().backward()
        if number % 20 == 0:
            seen |= ports(elsewhere) - before
    assert 1 <= len(seen | (ports(elsewhere) - before)) <= 2


# for long


class Mix:
    """All that can be done with a call, in turn."""

    def __init__(self, url: str, held: str) -> None:
        self.module = RemoteModule(url)
        self.held = RemoteModule(held)
        self.pieces = RemoteModule(url, max_rows=2)
        self.parallel = Parallel(self.module, nn.Sequential(self.module, nn.Tanh()), self.pieces)
        self.x = torch.rand(4, 4096)
        self.wants = self.x.clone().requires_grad_()
        self.ways = [self.call, self.backward, self.wait, self.drop, self.cancel, self.together]

    def run(self, calls: int) -> None:
        for number in range(calls):
            self.ways[number % len(self.ways)]()
            self.wants.grad = None

    def call(self) -> None:
        self.module(self.x)

    def backward(self) -> None:
        self.module(self.wants).sum().backward()

    def wait(self) -> None:
        self.module.start(self.x).wait()

    def drop(self) -> None:
        self.module.start(self.x)

    def cancel(self) -> None:
        call = self.held.start(self.x)
        assert HELD.acquire(timeout=PATIENCE_S)
        del call

    def together(self) -> None:
        sum(self.parallel(self.wants)).sum().backward()


@pytest.mark.slow
def test_ten_thousand_calls_leave_nothing_behind(url: str) -> None:
    """64 KiB each way: 8,000 that stayed would be half a gigabyte."""
    HOLD.set()  # the server is done with them at once; whoever started them drops them all the same
    mix = Mix(f"{url}wide", f"{url}hold-wide")
    process = psutil.Process()
    mix.run(2000)
    gc.collect()
    after_2000 = process.memory_info().rss
    mix.run(8000)
    assert until(lambda: in_flight() == 0)
    grown = process.memory_info().rss - after_2000
    assert grown < 48 << 20, f"{grown >> 20} MiB more after 8,000 further calls"
    # 32 idle ones a pool: for blocking calls and for the background, for each of the three endpoints.
    assert len(ports(url)) <= 3 * 2 * 32


def test_a_pool_keeps_no_more_than_it_may(elsewhere: str) -> None:
    before = len(ports(elsewhere))
    module = RemoteModule(elsewhere)
    calls = [module.start(torch.full((1, 4), float(index))) for index in range(100)]
    assert [call.wait()[0, 0].item() for call in calls] == [index**2 for index in np.arange(100.0)]
    # 32 in the background, and the one on which the signature was asked for.
    assert until(lambda: len(ports(elsewhere)) - before <= 32 + 1)
