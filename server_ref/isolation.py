"""A model in a process of its own: it may crash, hang or be killed, and the server that calls it goes on.

It does not serve anybody: it is a servable, and `instances` calls it like any other. What runs in the process is
`worker`'s.

Constant: what is loaded, and the signature that it had first. Changing, guarded by `_lock`: the worker that answers
now, if there is one, and the process that is being started, runs or ends.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import math
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy.typing as npt

from remote_ops import errors, graphpipe
from remote_ops.client import Endpoint
from remote_ops.deadline import Deadline
from remote_ops.errors import (
    ConnectError,
    ConnectionLost,
    DeadlineExceeded,
    InternalError,
    ModelUnavailable,
    RemoteError,
    RemoteOpsError,
    SpecError,
    brief,
)
from remote_ops.policy import Retry
from remote_ops.signature import Signature
from remote_ops.transport import Call, HttpTransport, Reply

__all__ = ["Backoff", "Isolated"]

Array = npt.NDArray[Any]
log = logging.getLogger("server_ref")
_EXIT_S = 5.0
_GONE_S = 1.0
_OURS = ("PYTHONPATH", "PYTHONSAFEPATH")


class Backoff(NamedTuple):
    """How long a process that died is let lie: `first_s`, then twice as long each time, up to `most_s`.

    One that lived for `steady_s` or longer starts anew at `first_s`.
    """

    first_s: float = 0.1
    most_s: float = 30.0
    steady_s: float = 10.0

    def deaths(self, before: int, lived_s: float) -> int:
        """How many deaths in a row it is now, after one more."""
        return 1 if lived_s >= self.steady_s else before + 1

    def wait_s(self, deaths: int) -> float:
        """Seconds until the next start, after so many deaths in a row."""
        return min(self.most_s, self.first_s * 2.0 ** min(deaths - 1, 60))


class _Hung(Exception):
    """No answer within the response timeout."""


class _Patient:
    """A transport that waits as long as a run may take, whatever its caller's deadline: only so is a hang known.

    The caller's deadline still travels with the call, and the worker starts nothing that is late.
    """

    def __init__(self, response_timeout_s: float) -> None:
        self._response_timeout_s = response_timeout_s
        self._inner = HttpTransport(idle_s=math.inf)

    def exchange(self, call: Call, deadline: Deadline) -> Reply:
        try:
            return self._inner.exchange(call, Deadline.after(self._response_timeout_s))
        except DeadlineExceeded as error:
            raise _Hung from error

    async def aexchange(self, call: Call, deadline: Deadline) -> Reply:
        raise NotImplementedError("an isolated model is called from the threads of its instances")

    def close(self) -> None:
        self._inner.close()


class _Worker:
    """A process that answers."""

    def __init__(self, process: subprocess.Popen[bytes], socket: Path, told: Mapping[str, Any], timeout_s: float):
        self.process = process
        self.signature = graphpipe.decode_metadata(base64.b64decode(told["signature"]))
        self.concurrency = int(told["concurrency"])
        self.device = str(told["device"])
        self.endpoint = Endpoint(
            f"http+unix://{quote(str(socket), safe='')}/", math.inf, retry=Retry(attempts=1),
            transport=_Patient(timeout_s),
        )  # fmt: skip
        self.why = ""  # how it ended
        self.over = threading.Event()


class Isolated:
    """A servable that runs a model in a child process, and starts it again when that dies.

    Args:
        what: as `remote_ops.load` takes it; it is loaded in the child.
        options: of `load`, such as `{"device": "cuda:1"}`; what JSON can hold.
        name: of the model, for messages.
        response_timeout_s: how long a call may take before the child is killed.
        start_timeout_s: how long it may take to load.
        backoff: how long to wait before it is started again.
        clock: tells how long a child has lived.

    Raises:
        SpecError, or whatever loading the model raises, as if it were loaded here. What is no error of ours is an
            `InternalError` with its words.
        ModelUnavailable: the child died or took too long while it loaded.

    `close` it in the end. The child ends with this process, however that ends. A call costs some 0.3 ms more than
    without, and 1 ms for each megabyte that goes in and comes out.
    """

    def __init__(
        self,
        what: str | os.PathLike[str],
        *,
        options: Mapping[str, Any] | None = None,
        name: str = "",
        response_timeout_s: float = math.inf,
        start_timeout_s: float = 300.0,
        backoff: Backoff = Backoff(),  # noqa: B008 (immutable)
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name or Path(os.fspath(what).rpartition(":")[2]).stem
        self.response_timeout_s = response_timeout_s
        self._start_timeout_s = start_timeout_s
        self._orders = _orders(os.fspath(what), options or {}, self.name)
        self._backoff = backoff
        self._clock = clock
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._worker: _Worker | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._why = "it has not started yet"
        self._starts = 0
        self._watchers: list[Callable[[], None]] = []
        self._folder = _private_folder()
        first: Future[_Worker] = Future()
        # This thread starts every child and lives as long: the kernel tells a child when the thread that made it ends.
        self._thread = threading.Thread(target=self._supervise, args=(first,), name=f"{self.name}-worker", daemon=True)
        self._thread.start()
        try:
            first.result()
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"Isolated({self.name!r}, pid={self.pid})"

    @property
    def signature(self) -> Signature:
        """What the model takes and gives."""
        return self._signature

    @property
    def pid(self) -> int | None:
        """The process that answers now, if one does."""
        worker = self._worker
        return worker.process.pid if worker else None

    @property
    def available(self) -> bool:
        """Whether a process is there that answers."""
        return self._worker is not None

    @property
    def healthy(self) -> bool:
        """The same, for who asks about readiness."""
        return self.available

    @property
    def starts(self) -> int:
        """How often a process has come up so far."""
        return self._starts

    def watch(self, changed: Callable[[], None]) -> None:
        """Have `changed` called, on any thread, whenever `available` changes."""
        self._watchers.append(changed)

    def infer(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        *,
        config: bytes = b"",
        deadline: Deadline | None = None,
    ) -> dict[str, Array]:
        """Compute the named outputs (None: all) of the named inputs in the child. Raises what the model raises there.

        Raises:
            ModelUnavailable: the child is down, died or was killed, or gave no answer in `response_timeout_s`.
        """
        worker = self._worker
        if worker is None:
            raise ModelUnavailable(f"model '{self.name}' is down, and starts again soon: {self._why}")
        try:
            return worker.endpoint.infer(inputs, outputs, config=config, deadline=deadline)
        except _Hung:
            self._kill(worker, f"it gave no answer in {self.response_timeout_s:g} s and was killed")
        except (ConnectError, ConnectionLost) as error:
            if not worker.over.wait(_GONE_S):
                raise ModelUnavailable(f"no answer from the process of model '{self.name}': {brief(error)}") from error
        raise ModelUnavailable(f"the process of model '{self.name}' ended before it answered: {worker.why}")

    def close(self) -> None:
        """End the child, within seconds, and remove its socket."""
        self._closed.set()
        with self._lock:
            process, answers = self._process, self._worker is not None
        if process is not None:
            _end(process, _EXIT_S if answers else 0.0)
        if self._thread is not threading.current_thread():
            self._thread.join()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Isolated:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _kill(self, worker: _Worker, why: str) -> None:
        """End a child that hangs; the supervisor starts the next."""
        self._down(worker)
        worker.why = worker.why or why
        worker.process.kill()
        worker.over.wait()

    def _down(self, worker: _Worker) -> None:
        with self._lock:
            if self._worker is not worker:
                return
            self._worker = None
        self._tell()

    def _tell(self) -> None:
        for changed in self._watchers:
            changed()

    # the supervisor

    def _supervise(self, first: Future[_Worker]) -> None:
        deaths, failed = 0, None
        while not self._closed.is_set():
            since = self._clock()
            try:
                worker = self._start()
            except BaseException as error:
                failed = error
                if not first.done():
                    first.set_exception(error)
                    return
                self._why = f"it could not be loaded again: {error}"
            else:
                if not first.done():
                    self._signature, self.concurrency, self.device = worker.signature, worker.concurrency, worker.device
                    first.set_result(worker)
                self._run(worker)
            deaths = self._backoff.deaths(deaths, self._clock() - since)
            wait_s = self._backoff.wait_s(deaths)
            if not self._closed.is_set():
                log.warning("model '%s': %s; its process starts again in %.1f s", self.name, self._why, wait_s)
            if self._closed.wait(wait_s):
                break
        if not first.done():
            first.set_exception(failed or ModelUnavailable(f"model '{self.name}' was closed while it loaded"))

    def _run(self, worker: _Worker) -> None:
        """Let a worker answer until its process ends."""
        with self._lock:
            self._worker = worker
            self._starts += 1
        self._tell()
        code = worker.process.wait()
        self._why = worker.why = worker.why or _words(code)
        self._down(worker)
        worker.over.set()
        worker.endpoint.close()
        _forget(worker.process)

    def _start(self) -> _Worker:
        """Start a child and wait until its model is loaded."""
        socket = self._folder / "socket"
        with contextlib.suppress(FileNotFoundError):
            socket.unlink()
        report, theirs = os.pipe()
        try:
            process = self._spawn(theirs, socket)
        except BaseException:
            os.close(report)
            raise
        finally:
            os.close(theirs)
        try:
            told = self._told(process, report)
            worker = _Worker(process, socket, told, self.response_timeout_s)
            if self._starts and worker.signature != self._signature:
                raise SpecError(f"its signature is another now: expected {self._signature}, got {worker.signature}")
            return worker
        except BaseException:
            process.kill()
            process.wait()
            _forget(process)
            raise
        finally:
            os.close(report)

    def _spawn(self, report: int, socket: Path) -> subprocess.Popen[bytes]:
        orders = {**self._orders, "parent": os.getpid(), "report": report, "socket": str(socket)}
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONSAFEPATH": "1"}
        with self._lock:
            if self._closed.is_set():
                raise ModelUnavailable(f"model '{self.name}' is closed")
            process = self._process = subprocess.Popen(
                [sys.executable, "-m", "server_ref.worker"], stdin=subprocess.PIPE, pass_fds=(report,),
                env=environment, start_new_session=True,
            )  # fmt: skip
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died: whoever waits for its report is told
            process.stdin.write(json.dumps(orders).encode() + b"\n")
            process.stdin.flush()
        return process

    def _told(self, process: subprocess.Popen[bytes], report: int) -> Mapping[str, Any]:
        """What a child says of itself once its model is loaded; raises what went wrong there."""
        line = _line(report, self._start_timeout_s)
        if line is None:
            raise ModelUnavailable(f"model '{self.name}' was not loaded in {self._start_timeout_s:g} s")
        if not line:
            raise ModelUnavailable(
                f"the process of model '{self.name}' ended while it loaded: {_words(process.wait())}"
            )
        told: Mapping[str, Any] = json.loads(line)
        if "ready" in told:
            return told["ready"]  # type: ignore[no-any-return]
        raise _raised(self.name, **{key.replace("class", "kind"): value for key, value in told["failed"].items()})


def _private_folder() -> Path:
    """A new folder that only this user can enter; a path of a socket may not be long."""
    long = len(os.fsencode(tempfile.gettempdir())) > _MOST_PATH_BYTES
    return Path(tempfile.mkdtemp(prefix="server_ref-", dir="/tmp" if long else None))


_MOST_PATH_BYTES = 70


def _orders(what: str, options: Mapping[str, Any], name: str) -> dict[str, Any]:
    environment = {name: os.environ.get(name) for name in _OURS}
    orders = {"what": what, "options": dict(options), "name": name, "path": sys.path, "environment": environment}
    try:
        json.dumps(orders)
    except (TypeError, ValueError) as error:
        raise SpecError(
            f"the options of a model in its own process: expected what JSON can hold, got {options!r} ({error})",
            path="options",
        ) from error
    return orders


def _line(fd: int, timeout_s: float) -> bytes | None:
    """One line from a pipe; what there is of it if the pipe ends, None if the time does."""
    give_up, line, poll = time.monotonic() + timeout_s, b"", select.poll()
    poll.register(fd, select.POLLIN)
    while not line.endswith(b"\n"):
        left_s = give_up - time.monotonic()
        if left_s <= 0:
            return None
        if poll.poll(min(left_s, 3600.0) * 1000):
            piece = os.read(fd, 1 << 16)
            if not piece:
                return b""
            line += piece
    return line


def _raised(name: str, kind: str, message: str, path: str, text: str) -> BaseException:
    """The error of a child as ours: its class, if it is one that we raise, and its words."""
    if kind in ("ImportError", "ModuleNotFoundError"):
        return ImportError(text)
    found = getattr(errors, kind, None)
    if not (isinstance(found, type) and issubclass(found, RemoteOpsError)):
        return InternalError(f"model '{name}' cannot be loaded: {kind}: {text}")
    try:
        error: RemoteOpsError = found(message if issubclass(found, RemoteError) else text)
    except TypeError:  # it takes more than words
        return InternalError(f"model '{name}' cannot be loaded: {text}")
    if isinstance(error, SpecError):
        error.path = path
    return error


def _words(code: int) -> str:
    """How a process ended."""
    if code >= 0:
        return f"it exited with code {code}"
    with contextlib.suppress(ValueError):
        return f"it was ended by {signal.Signals(-code).name}"
    return f"it was ended by signal {-code}"


def _end(process: subprocess.Popen[bytes], within_s: float) -> None:
    """Let a child end by itself, and kill it if it does not."""
    with contextlib.suppress(OSError, ValueError):
        if process.stdin is not None:
            process.stdin.close()
    try:
        process.wait(within_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _forget(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError, ValueError):
        if process.stdin is not None:
            process.stdin.close()
