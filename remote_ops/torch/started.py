"""Calls that were started and not yet waited for, each known to the graph by a number: its ticket.

It keeps them; it does not know what they compute.

State: `_STARTED`, by operations that are atomic in CPython, and `_sweep_is_due`, whether somebody will look through it.
A call leaves the table when it is waited for, when it is given up, or `KEEP_S` after its answer came. The call itself
ends by its own deadline.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import math
import os
import threading
import time
from concurrent.futures import Future
from typing import Any

import torch

from remote_ops.background import background_loop, settled
from remote_ops.deadline import Deadline, ambient
from remote_ops.errors import DeadlineExceeded, SpecError

__all__ = ["KEEP_S", "give_up", "give_up_pass", "in_flight", "start", "take"]

KEEP_S = 300.0
_NONE = -1  # what torch calls no backward pass


class _Call:
    """One of them: where it goes, which backward pass of which thread it belongs to, and when its answer came."""

    __slots__ = ("at", "backward_pass", "done_s", "future", "thread")

    def __init__(self, future: Future[Any], at: str) -> None:
        self.future = future
        self.at = at
        self.backward_pass = _backward_pass()
        self.thread = threading.get_ident()
        self.done_s = math.inf


_STARTED: dict[int, _Call] = {}
_NUMBERS = itertools.count(1)
_sweep_is_due = False


def start(future: Future[Any], at: str) -> int:
    """Keep a call until it is waited for; give its number.

    Args:
        future: of the call.
        at: where it goes, for errors.
    """
    _give_up_orphans()
    number = next(_NUMBERS)
    _STARTED[number] = call = _Call(future, at)
    future.add_done_callback(lambda _: _done(call))
    return number


def take(number: int) -> tuple[Any, str]:
    """Wait for a call, once, and give its answer and the place that it came from.

    Raises:
        SpecError: there is no such call: it was waited for already, or nobody did so in time.
        DeadlineExceeded: the surrounding deadline passed first; the call is given up.
    """
    call = _STARTED.pop(number, None)
    if call is None:
        raise SpecError(
            f"no call was started with ticket {number}, or it was waited for already, or it was dropped {KEEP_S:.0f} s "
            "after its answer came: expected one wait for each start",
            path="ticket",
        )
    bound = ambient() or Deadline.never()
    try:
        return settled(call.future, bound.remaining()).result(0), call.at
    except concurrent.futures.CancelledError as error:
        raise DeadlineExceeded(f"the call of {call.at} was given up before its answer came") from error
    except concurrent.futures.TimeoutError as error:
        if not bound.expired() or isinstance(error, DeadlineExceeded):
            raise
        raise DeadlineExceeded(f"no answer from {call.at} in time, to a call that was started before") from error
    finally:
        call.future.cancel()  # the wait itself may have been interrupted


def give_up(number: int) -> None:
    """Cancel a call that nobody will wait for; its connection is closed."""
    if call := _STARTED.pop(number, None):
        call.future.cancel()


def give_up_pass() -> None:
    """Cancel what the backward pass that runs on this thread has started."""
    running = _backward_pass()
    for number, call in _STARTED.copy().items():
        if call.backward_pass == running != _NONE:
            give_up(number)


def in_flight() -> int:
    """How many calls were started and not yet waited for."""
    _give_up_orphans()
    return len(_STARTED)


def _backward_pass() -> int:
    return torch._C._current_graph_task_id()


def _give_up_orphans() -> None:
    """Cancel what backward passes of this thread have left behind, an interrupted one for instance."""
    if _backward_pass() == _NONE:
        thread = threading.get_ident()
        for number, call in _STARTED.copy().items():
            if call.backward_pass != _NONE and call.thread == thread:
                give_up(number)


def _done(call: _Call) -> None:
    global _sweep_is_due
    if call.future.cancelled():  # by somebody who has taken it from the table
        return
    call.done_s = time.monotonic()
    if not _sweep_is_due:
        _sweep_is_due = True
        loop = background_loop()
        loop.call_soon_threadsafe(loop.call_later, KEEP_S, _sweep)


def _sweep() -> None:
    """Drop the answers that nobody came for; look again later if there is anything left."""
    global _sweep_is_due
    now = time.monotonic()
    for number, call in _STARTED.copy().items():
        if now - call.done_s >= KEEP_S:
            _STARTED.pop(number, None)
    _sweep_is_due = bool(_STARTED)
    if _sweep_is_due:
        background_loop().call_later(max(KEEP_S / 8, 0.01), _sweep)


def _after_fork() -> None:
    global _sweep_is_due
    _STARTED.clear()
    _sweep_is_due = False


os.register_at_fork(after_in_child=_after_fork)
