"""Ctrl-C while TensorFlow waits for a remote op: the calls of the process end, so that it need not wait for them.

TensorFlow runs ops without a look at signals: `KeyboardInterrupt` comes when they are over. Python writes the number of
a signal to a pipe at once, though, and a thread here reads it. Where the program has its own handler of SIGINT, or its
own such pipe, as some event loops have, nothing is done.

State: the pipe, of one process, made once under `_LOCK`; after a fork, of none.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from pathlib import Path

__all__ = ["arm"]

_LOCK = threading.Lock()
_pipe: list[int] = []  # its writing end, once there is one


def arm(library: Path) -> None:
    """Have Ctrl-C end the calls of a loaded kernel from now on. Costs half a microsecond once it is so."""
    if threading.current_thread() is not threading.main_thread() or not _is_plain():
        return
    with _LOCK:
        if not _pipe:
            _pipe.append(_watched(library))
    before = signal.set_wakeup_fd(_pipe[0], warn_on_full_buffer=False)
    if before not in (-1, _pipe[0]):
        signal.set_wakeup_fd(before)


def _is_plain() -> bool:
    """Whether Ctrl-C means what it does unless said."""
    return signal.getsignal(signal.SIGINT) is signal.default_int_handler


def _watched(library: Path) -> int:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    os.register_at_fork(after_in_child=_disarm)
    threading.Thread(target=_watch, args=(reading, library), name="remote_ops.tf.interrupt", daemon=True).start()
    return writing


def _watch(reading: int, library: Path) -> None:
    cancel_all = ctypes.CDLL(str(library)).remote_ops_cancel_all
    while signals := os.read(reading, 64):
        if signal.SIGINT in signals and _is_plain():
            cancel_all()


def _disarm() -> None:
    """A forked child has no such thread, and must not wake that of its parent."""
    if _pipe and (before := signal.set_wakeup_fd(-1)) != _pipe[0]:
        signal.set_wakeup_fd(before)
    _pipe.clear()
