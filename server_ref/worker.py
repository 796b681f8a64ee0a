"""`python -m server_ref.worker`: the process in which one model runs by itself; `isolation` starts, feeds and ends it.

It reads one line of orders from stdin, loads the model, tells through a pipe what came of that, and serves it on a unix
socket until stdin ends. It makes no choices: all that it does is in the orders.
"""

from __future__ import annotations

import base64
import ctypes
import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from remote_ops import graphpipe, http1
from remote_ops.errors import SpecError
from remote_ops.servable import Servable, load
from server_ref.connection import Timeouts
from server_ref.lanes import room_for
from server_ref.lifecycle import running

__all__ = ["main"]

_EXIT_S = 10
_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Do as the line on stdin says, until stdin ends."""
    orders = json.loads(sys.stdin.buffer.readline())
    sys.path[:] = orders["path"]
    _restore(orders["environment"])
    for number in (signal.SIGINT, signal.SIGTERM):  # they are for whoever started us, who drains before we end
        signal.signal(number, signal.SIG_IGN)
    _die_soon_after(orders["parent"])
    os.set_inheritable(orders["report"], False)
    stdin = os.dup(0)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    try:
        return _serve(orders, stdin)
    finally:
        signal.alarm(_EXIT_S)  # what hangs on the way out is cut off


def _serve(orders: Mapping[str, Any], stdin: int) -> int:
    with open(orders["report"], "wb") as report:
        try:
            servable = load(orders["what"], **orders["options"])
            server = running(
                {orders["name"]: servable},
                f"unix:{orders['socket']}",
                limits=http1.Limits(max_body_bytes=1 << 40),
                timeouts=Timeouts(math.inf, math.inf, math.inf, math.inf),
            )
            with server:
                report.write(_line(_described(servable)))
                report.close()
                os.read(stdin, 1)
            shutil.rmtree(Path(orders["socket"]).parent, ignore_errors=True)  # whoever made it may be dead
        except BaseException as error:
            if not report.closed:
                report.write(_line(_failure(error)))
            return 1
    return 0


def _restore(environment: Mapping[str, str | None]) -> None:
    for name, value in environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def _die_soon_after(parent: int) -> None:
    """Be ended if the parent is: when stdin ends, and by an alarm in case this interpreter hangs and cannot see that.

    The signal of the death, SIGQUIT, calls `alarm` with its own number, 3, for seconds: without a line of Python.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
        libc.signal(signal.SIGQUIT, ctypes.cast(libc.alarm, ctypes.c_void_p))
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGQUIT)
    if os.getppid() != parent:
        raise SystemExit(1)


def _described(servable: Servable) -> dict[str, Any]:
    metadata = graphpipe.encode_metadata(servable.signature)
    device = getattr(servable, "device", "remote" if hasattr(servable, "url") else "cpu")
    told = {"signature": base64.b64encode(metadata).decode(), "device": str(device), "concurrency": room_for(servable)}
    return {"ready": told}


def _failure(error: BaseException) -> dict[str, Any]:
    path = error.path if isinstance(error, SpecError) else ""
    message = getattr(error, "message", None) or str(error)
    return {"failed": {"class": type(error).__name__, "message": message, "path": path, "text": str(error)}}


def _line(told: Mapping[str, Any]) -> bytes:
    return json.dumps(told).encode() + b"\n"


if __name__ == "__main__":
    sys.exit(main())
