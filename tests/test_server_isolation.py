"""Models in processes of their own, that crash, hang, are killed and come back, behind real servers."""

from __future__ import annotations

import contextlib
import glob
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import numpy.typing as npt
import psutil
import pytest
from rawpeer import WAIT_S, until

import server_ref
from remote_ops import Endpoint, FunctionServable, Retry, TensorSpec
from remote_ops.deadline import Deadline
from remote_ops.errors import (
    DeadlineExceeded,
    InternalError,
    ModelUnavailable,
    RemoteOpsError,
    SpecError,
)
from server_ref.batching import Batching
from server_ref.instances import Instances
from server_ref.isolation import Backoff, Isolated
from server_ref.model import Version

Array = npt.NDArray[Any]
ONES = np.ones((3, 2), np.float32)
NO_RETRY = Retry(attempts=1)
QUICK = Backoff(0.02, 0.1)

MODELS = '''
import ctypes, os, signal, sys, threading, time
import numpy as np
from remote_ops import FunctionServable, TensorSpec

X, Y = TensorSpec("x", "float32", (-1, 2)), TensorSpec("y", "float32", (-1, 2))


def run(x, config):
    """Doubles; `config` says what goes wrong on the way."""
    verb, _, rest = config.decode().partition(" ")
    if verb == "raise":
        raise ValueError("no good")
    if verb == "wait":  # writes a file when it is there, and waits until another is
        at = rest
        open(at + ".began", "w").close()
        while not os.path.exists(at + ".go"):
            time.sleep(0.005)
    if verb == "die":
        ctypes.string_at(0)
    if verb == "exit":
        os._exit(7)
    if verb == "hang":
        threading.Event().wait()
    if verb == "hold":  # with the lock of the interpreter, as a bad extension does
        ctypes.PyDLL(None).sleep(1000)
    if verb == "memory":
        raise MemoryError("out of memory")
    if (x == 13).any():
        raise ValueError("13")
    return 2 * x


def make():
    return FunctionServable(run, [X], [Y], name="m", version="4")


def one():
    found = make()
    found.concurrency = 1
    return found


def two():
    found = make()
    found.concurrency = 2
    return found


def rich():
    specs = [TensorSpec(n, d, (-1,), differentiable=d == "float32") for n, d in
             [("f", "float32"), ("b", "bool"), ("s", "string"), ("h", "bfloat16"), ("i", "int64")]]
    return FunctionServable(lambda f, b, s, h, i: (f, b, s, h, i), specs,
        [TensorSpec("o" + s.name, s.dtype, s.shape) for s in specs], name="rich",
        vjp=lambda inputs, cotangents: {"f": 3 * cotangents["of"]})


def dies_in_load():
    os.kill(os.getpid(), signal.SIGKILL)


def fails_in_load():
    raise ValueError("no weights")


def slow_to_load():
    time.sleep(60)


def dies_next_time():
    at = os.environ["MARK"]
    if os.path.exists(at):
        raise ValueError("not again")
    open(at, "w").close()
    return make()
'''


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The models, where children find them; and a folder for sockets that no other test writes to."""
    (tmp_path / "isolated_models.py").write_text(MODELS)
    monkeypatch.syspath_prepend(tmp_path)
    with tempfile.TemporaryDirectory(prefix="iso", dir="/tmp") as short:
        monkeypatch.setenv("TMPDIR", short)
        monkeypatch.setattr(tempfile, "tempdir", short)
        yield


@contextlib.contextmanager
def isolated(thing: str = "make", **options: Any) -> Iterator[Isolated]:
    with Isolated(f"isolated_models:{thing}", **{"backoff": QUICK, **options}) as servable:
        yield servable


def call(servable: Isolated, config: bytes = b"", x: Array = ONES, **more: Any) -> Array:
    return servable.infer({"x": x}, config=config, **more)["y"]


def folders() -> set[str]:
    return set(glob.glob(f"{tempfile.gettempdir()}/server_ref-*"))


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "server_ref.worker" in " ".join(child.cmdline() or ["z"])]


# --------------------------------------------------------------------------- back-off


@pytest.mark.parametrize(
    ("deaths", "wait_s"), [(1, 0.1), (2, 0.2), (3, 0.4), (8, 12.8), (9, 25.6), (10, 30.0), (5000, 30.0)]
)
def test_the_wait_before_a_start_doubles_from_a_tenth_of_a_second_to_thirty(deaths: int, wait_s: float) -> None:
    assert Backoff().wait_s(deaths) == pytest.approx(wait_s)


def test_a_process_that_lived_for_long_starts_anew_at_the_shortest_wait() -> None:
    backoff = Backoff(steady_s=10.0)
    assert [backoff.deaths(5, lived_s) for lived_s in (0.0, 9.9, 10.0)] == [6, 6, 1]


# --------------------------------------------------------------------------- as a servable


@pytest.mark.slow
def test_an_isolated_model_says_and_does_what_it_would_in_this_process() -> None:
    import isolated_models  # type: ignore[import-not-found]

    fds, before = psutil.Process().num_fds(), folders()
    here = isolated_models.rich()
    inputs = {
        "f": np.float32([1, 2]), "b": np.array([True, False]), "s": np.array([b"a", b"\xff" * 300], object),
        "h": np.zeros(2, here.signature.inputs[3]._numpy), "i": np.array([-(2**62), 5]),
    }  # fmt: skip
    with isolated("rich") as there:
        assert there.signature == here.signature
        assert there.available
        assert there.healthy
        assert there.device == "cpu"
        found, expected = there.infer(inputs), here.infer(inputs)
        assert list(found) == list(expected)
        for name in expected:
            assert found[name].dtype == expected[name].dtype
            assert found[name].tolist() == expected[name].tolist()
        with_cotangent = {**inputs, "cotangent:of": np.float32([1, 10])}
        assert there.infer(with_cotangent, ["gradient:f"])["gradient:f"].tolist() == [3, 30]
        (child,) = children()
        mode = os.stat(next(iter(folders() - before))).st_mode
        assert mode & 0o777 == 0o700
    assert not child.is_running()
    assert folders() == before
    assert until(lambda: psutil.Process().num_fds() <= fds + 1)
    assert children() == []


@pytest.mark.slow
def test_a_long_path_of_temporary_files_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with isolated() as servable:
        np.testing.assert_array_equal(call(servable), 2 * ONES)


@pytest.mark.slow
def test_an_isolated_model_takes_as_many_calls_at_a_time_as_the_model_does(tmp_path: Path) -> None:
    with isolated("two") as servable, Instances([servable]) as instances, ThreadPoolExecutor(2) as pool:
        assert servable.concurrency == 2
        futures = [
            pool.submit(instances.infer, {"x": ONES}, config=b"wait %s" % str(tmp_path / name).encode())
            for name in ("a", "b")
        ]
        assert until(lambda: all((tmp_path / f"{name}.began").exists() for name in ("a", "b")))
        for name in ("a", "b"):
            (tmp_path / f"{name}.go").touch()
        assert [future.result(WAIT_S)["y"].tolist() for future in futures] == [(2 * ONES).tolist()] * 2


@pytest.mark.slow
def test_what_a_model_raises_reaches_the_caller_and_the_process_lives() -> None:
    with isolated() as servable:
        pid = servable.pid
        with pytest.raises(InternalError, match="ValueError: no good"):
            call(servable, b"raise")
        with pytest.raises(DeadlineExceeded):
            call(servable, deadline=Deadline.after(0.0))
        with pytest.raises(ValueError, match="expected float32"):
            call(servable, x=np.ones((3, 5), np.float32))
        np.testing.assert_array_equal(call(servable), 2 * ONES)
        assert servable.pid == pid


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "error", "words"),
    [
        ("isolated_models:fails_in_load", InternalError, "cannot be loaded: ValueError: no weights"),
        ("isolated_models:dies_in_load", ModelUnavailable, "ended while it loaded: it was ended by SIGKILL"),
        ("isolated_models:slow_to_load", ModelUnavailable, "was not loaded in 1.5 s"),
        ("isolated_models:nope", SpecError, "has no 'nope'"),
        ("nowhere.onnx", SpecError, "no such model 'nowhere.onnx'"),
    ],
)
def test_a_model_that_cannot_be_loaded_raises_here_what_it_raised_there(
    what: str, error: type[RemoteOpsError], words: str
) -> None:
    before = folders()
    with pytest.raises(error, match=words) as caught:
        Isolated(what, start_timeout_s=1.5 if "slow" in what else 60.0)
    if what.endswith("nope"):
        assert isinstance(caught.value, SpecError)
        assert caught.value.path == what
    assert folders() == before
    assert children() == []


def test_options_that_no_process_can_be_told_are_refused() -> None:
    with pytest.raises(SpecError, match="what JSON can hold"):
        Isolated("m.onnx", options={"device": object()})


# --------------------------------------------------------------------------- R6, R7


@pytest.mark.slow
@pytest.mark.parametrize(("config", "words"), [(b"die", "SIGSEGV"), (b"exit", "exited with code 7")])
def test_r6_a_process_that_dies_is_replaced_and_its_caller_told_how_it_ended(config: bytes, words: str) -> None:
    with isolated() as servable:
        pid = servable.pid
        with pytest.raises(ModelUnavailable, match=words) as caught:
            call(servable, config)
        assert caught.value.retryable
        assert until(lambda: servable.available)
        assert servable.pid != pid
        np.testing.assert_array_equal(call(servable), 2 * ONES)
        assert servable.starts == 2
        assert len(children()) == 1


@pytest.mark.slow
def test_r6_kill_9_in_the_middle_of_a_batch_is_503_for_those_in_it_and_for_nobody_else(tmp_path: Path) -> None:
    """Two instances: one is killed while it computes; the other serves; readiness follows; the dead one comes back."""
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(isolated(backoff=Backoff(0.5, 0.5))) for _ in range(2)]
        version = Version("m", slow, batching=Batching(max_rows=64), least_healthy=2)
        url = stack.enter_context(server_ref.running({"m": version}))
        endpoint = stack.enter_context(Endpoint(url, 20, retry=NO_RETRY))
        np.testing.assert_array_equal(endpoint(ONES), 2 * ONES)
        assert ready(url)
        at = tmp_path / "a"
        caught = endpoint.submit({"x": ONES}, config=f"wait {at}".encode())
        assert until(Path(f"{at}.began").exists)
        working = next(one for one in slow if one.pid is not None and _works(one, version))
        os.kill(working.pid or 0, signal.SIGKILL)
        with pytest.raises(ModelUnavailable, match="SIGKILL") as error:
            caught.result(WAIT_S)
        assert error.value.code == 14
        assert error.value.retry_after_s == 1.0
        assert not ready(url)
        for _ in range(20):  # the other serves, and the dead one gets nothing
            np.testing.assert_array_equal(endpoint(ONES), 2 * ONES)
        assert until(lambda: ready(url))
        assert sorted(one.starts for one in slow) == [1, 2]
        counts = version.stats.snapshot()
        assert (counts.requests, counts.failures["model"], counts.pending) == (22, 1, 0)


def _works(one: Isolated, version: Version) -> bool:
    """Whether this one computes: its lane is not idle."""
    return any(lane.batch and lane.seat.servable is one for lane in version.instances.lanes._lanes)


def ready(url: str) -> bool:
    try:
        with urlopen(f"{url}control/is_ready") as answer:
            return bool(answer.status == 200)
    except OSError as error:  # an HTTPError, whose connection must be closed
        with contextlib.suppress(AttributeError):
            error.close()  # type: ignore[attr-defined]
        return False


@pytest.mark.slow
def test_r6_a_lone_instance_that_is_down_answers_503_at_once_and_serves_again_later() -> None:
    with isolated(backoff=Backoff(1.0, 1.0)) as servable, server_ref.running({"m": servable}) as url:
        with Endpoint(url, 20, retry=NO_RETRY) as endpoint, pytest.raises(ModelUnavailable):
            endpoint(ONES, config=b"die")
        assert not ready(url)
        with Endpoint(url, 20, retry=NO_RETRY) as endpoint, pytest.raises(ModelUnavailable, match="starts again soon"):
            endpoint(ONES)
        with Endpoint(url, 20, retry=Retry(attempts=20)) as patient:
            np.testing.assert_array_equal(patient(ONES), 2 * ONES)
        assert ready(url)


@pytest.mark.slow
@pytest.mark.parametrize("config", [b"hang", b"hold"])
def test_r7_a_process_that_hangs_is_killed_and_the_others_are_not_affected(config: bytes) -> None:
    with contextlib.ExitStack() as stack:
        both = [stack.enter_context(isolated("one", response_timeout_s=1.0)) for _ in range(2)]
        url = stack.enter_context(server_ref.running({"m": Version("m", both)}))
        endpoint = stack.enter_context(Endpoint(url, 20, retry=NO_RETRY))
        hung = endpoint.submit({"x": ONES}, config=config)
        served = 0
        while not hung.done():
            np.testing.assert_array_equal(endpoint(ONES), 2 * ONES)
            served += 1
        with pytest.raises(ModelUnavailable, match="gave no answer in 1 s and was killed"):
            hung.result(0)
        assert served > 10
        assert until(lambda: all(one.available for one in both))
        assert len(children()) == 2


@pytest.mark.slow
def test_r7_a_hang_is_found_even_if_no_caller_waits_that_long() -> None:
    with isolated(response_timeout_s=1.0) as servable, server_ref.running({"m": servable}) as url:
        with Endpoint(url, 0.2, retry=NO_RETRY) as hasty, pytest.raises(DeadlineExceeded):
            hasty(ONES, config=b"hang")
        assert until(lambda: servable.starts == 2)
        with Endpoint(url, 20) as endpoint:
            np.testing.assert_array_equal(endpoint(ONES), 2 * ONES)


@pytest.mark.slow
def test_r5_a_poisoned_row_fails_alone_across_the_process() -> None:
    with isolated() as servable, Instances([servable], batching=Batching(max_rows=8, max_delay_s=5.0)) as instances:
        rows = [np.full((1, 2), 13 if index == 3 else index, np.float32) for index in range(8)]
        with ThreadPoolExecutor(8) as pool:
            futures = [pool.submit(instances.infer, {"x": row}) for row in rows]
            for index, future in enumerate(futures):
                if index == 3:
                    with pytest.raises(InternalError, match="ValueError: 13"):
                        future.result(WAIT_S)
                else:
                    assert future.result(WAIT_S)["y"].tolist() == [[2 * index, 2 * index]]


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_again_is_tried_later_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "mark"
    monkeypatch.setenv("MARK", str(mark))
    with isolated("dies_next_time") as servable:
        with pytest.raises(ModelUnavailable, match="code 7"):
            call(servable, b"exit")

        def told() -> bool:
            with contextlib.suppress(ModelUnavailable):
                call(servable)
            return "not again" in servable._why

        assert until(told)
        with pytest.raises(ModelUnavailable, match=r"could not be loaded again: .*not again"):
            call(servable)
        mark.unlink()
        assert until(lambda: servable.available)
        np.testing.assert_array_equal(call(servable), 2 * ONES)


@pytest.mark.slow
def test_clients_that_try_again_see_no_crash_of_a_worker() -> None:
    """Eight callers in a loop while each of two workers is killed twice."""
    with contextlib.ExitStack() as stack:
        both = [stack.enter_context(isolated()) for _ in range(2)]
        url = stack.enter_context(server_ref.running({"m": Version("m", both)}))
        over = threading.Event()

        def loop(number: int) -> int:
            done = 0
            with Endpoint(url, 20, retry=Retry(attempts=10, budget=100.0)) as endpoint:
                while not over.is_set():
                    x = np.full((1, 2), number, np.float32)
                    np.testing.assert_array_equal(endpoint(x), 2 * x)
                    done += 1
            return done

        with ThreadPoolExecutor(8) as pool:
            callers = [pool.submit(loop, 100 + number) for number in range(8)]
            try:
                for kill in range(4):
                    victim = both[kill % 2]
                    assert until(lambda: all(one.available for one in both))
                    starts = victim.starts
                    os.kill(victim.pid or 0, signal.SIGKILL)
                    assert until(lambda victim=victim, starts=starts: victim.starts > starts)  # type: ignore[misc]
            finally:
                over.set()
            assert all(caller.result(WAIT_S) for caller in callers)
        assert [one.starts for one in both] == [3, 3]


# --------------------------------------------------------------------------- ends

PARENT = """
import sys, threading
from server_ref.isolation import Isolated
servable = Isolated("isolated_models:make")
print(servable.pid, flush=True)
if len(sys.argv) > 1:
    import numpy as np
    threading.Thread(target=servable.infer, args=({"x": np.ones((1, 2), np.float32)},),
                     kwargs={"config": sys.argv[1].encode()}, daemon=True).start()
sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.parametrize("config", [[], ["hang"], ["hold"]], ids=["idle", "hangs", "hangs-in-c"])
def test_a_worker_ends_when_its_parent_is_killed(tmp_path: Path, config: list[str]) -> None:
    before = folders()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PARENT, *config]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=tmp_path)
    assert parent.stdin is not None
    assert parent.stdout is not None
    with parent.stdin, parent.stdout:
        child = psutil.Process(int(parent.stdout.readline()))
        if config:
            time.sleep(0.3)  # it hangs by then, or the case is the first one again
        parent.kill()
        parent.wait()
        assert until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, 30.0)
    if config != ["hold"]:  # then there is nobody left to tidy up
        assert until(lambda: folders() == before)


@pytest.mark.slow
def test_signals_to_the_group_do_not_reach_a_worker() -> None:
    with isolated() as servable:
        pid = servable.pid or 0
        assert os.getpgid(pid) != os.getpgid(0)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(pid, number)
        np.testing.assert_array_equal(call(servable), 2 * ONES)
        assert servable.pid == pid


@pytest.mark.slow
def test_close_ends_a_worker_that_hangs() -> None:
    servable = Isolated("isolated_models:make")
    child = psutil.Process(servable.pid)
    with ThreadPoolExecutor(1) as pool:
        hung = pool.submit(call, servable, b"hang")
        time.sleep(0.2)  # it hangs by then; if not, it ends all the same
        servable.close()
        with pytest.raises(ModelUnavailable):
            hung.result(WAIT_S)
    assert not child.is_running()
    with pytest.raises(ModelUnavailable):
        call(servable)


def test_an_available_servable_is_preferred_and_one_that_is_down_waits() -> None:
    """Without processes: a copy that says that it is down gets a batch only when all say so."""

    class Copy:
        def __init__(self, name: str) -> None:
            self.inner = FunctionServable(
                lambda x: (x, self.calls.append(name))[0], [TensorSpec("x", "float32", (-1,))],
                [TensorSpec("y", "float32", (-1,))],
            )  # fmt: skip
            self.calls: list[str] = []
            self.available = True
            self.concurrency = 1
            self.signature = self.inner.signature
            self.infer = self.inner.infer
            self.changed: Any = None

        def watch(self, changed: Any) -> None:
            self.changed = changed

    one, two = Copy("one"), Copy("two")
    x = np.ones(1, np.float32)
    with Instances([one, two]) as instances:
        assert instances.healthy == 2
        for down, up in ((one, two), (two, one)):
            down.available, up.available = False, True
            before = len(down.calls), len(up.calls)
            for _ in range(10):
                instances.infer({"x": x})
            assert (len(down.calls), len(up.calls)) == (before[0], before[1] + 10)
            assert instances.healthy == 1
        one.available = two.available = False
        instances.infer({"x": x})
        assert instances.healthy == 0
