"""A deadline is an instant that only moves closer, and the ambient one follows the context."""

from __future__ import annotations

import asyncio
import math
import threading
from typing import Any

import numpy as np
import pytest

from remote_ops.deadline import Deadline, ambient, deadline
from remote_ops.errors import DeadlineExceeded, SpecError


class Clock:
    """A clock that stands still until it is told otherwise."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_what_remains_shrinks_with_the_clock_and_goes_below_zero() -> None:
    clock = Clock()
    bound = Deadline.after(2.0, clock=clock)
    assert (bound.remaining(), bound.expired()) == (2.0, False)
    clock.now += 1.5
    assert (bound.remaining(), bound.expired()) == (0.5, False)
    clock.now += 0.5
    assert (bound.remaining(), bound.expired()) == (0.0, True)
    clock.now += 1
    assert (bound.remaining(), bound.expired()) == (-1.0, True)


def test_a_timeout_of_zero_has_passed_at_once() -> None:
    assert Deadline.after(0, clock=Clock()).expired()


def test_never_does_not_pass() -> None:
    assert math.isinf(Deadline.never().remaining())
    assert not Deadline.never().expired()
    assert Deadline.after(math.inf).at == math.inf


@pytest.mark.parametrize("timeout_s", [-1, -0.001, math.nan, -math.inf, "5", None, [1], 1j])
def test_what_is_no_length_of_time_is_refused(timeout_s: Any) -> None:
    with pytest.raises(SpecError, match="0 or more"):
        Deadline.after(timeout_s)
    with pytest.raises(SpecError), deadline(timeout_s):
        pass
    assert ambient() is None


def test_numpy_and_whole_numbers_are_lengths_of_time() -> None:
    clock = Clock()
    assert Deadline.after(np.float32(0.5), clock=clock).remaining() == 0.5
    assert Deadline.after(3, clock=clock).remaining() == 3


def test_of_two_deadlines_the_one_that_passes_first_holds() -> None:
    clock = Clock()
    soon, late = Deadline.after(1, clock=clock), Deadline.after(2, clock=clock)
    assert soon.earlier(late) is soon
    assert late.earlier(soon) is soon
    assert soon.earlier(None) is soon
    assert soon.earlier(Deadline.never()) is soon
    assert Deadline.never().earlier(soon) is soon


def test_nothing_starts_after_the_deadline() -> None:
    clock = Clock()
    bound = Deadline.after(1, clock=clock)
    bound.require("the second attempt")
    clock.now += 1.25
    with pytest.raises(DeadlineExceeded, match=r"the second attempt: the deadline passed 0\.250 s ago"):
        bound.require("the second attempt")


def test_a_deadline_cannot_be_moved() -> None:
    with pytest.raises(AttributeError):
        Deadline.after(1).at = 5  # type: ignore[misc]


def test_an_inner_block_shortens_the_outer_one_and_never_extends_it() -> None:
    assert ambient() is None
    with deadline(100) as outer:
        assert ambient() is outer
        with deadline(50) as inner:
            assert inner.at < outer.at
            assert ambient() is inner
            with deadline(1000) as widest:
                assert widest is inner
        assert ambient() is outer
    assert ambient() is None


def test_a_block_that_raises_leaves_the_outer_deadline_in_place() -> None:
    with deadline(100) as outer:
        with pytest.raises(KeyError), deadline(1):
            raise KeyError
        assert ambient() is outer
    assert ambient() is None


def test_another_thread_does_not_inherit_the_ambient_deadline() -> None:
    seen: list[Deadline | None] = []
    with deadline(100):
        thread = threading.Thread(target=lambda: seen.append(ambient()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_asyncio_tasks_inherit_the_ambient_deadline_and_keep_their_own() -> None:
    async def child(timeout_s: float) -> tuple[Deadline | None, Deadline]:
        before = ambient()
        with deadline(timeout_s) as own:
            await asyncio.sleep(0)
            assert ambient() is own
        return before, own

    async def parent() -> None:
        with deadline(100) as outer:
            (first, own_1), (second, own_2) = await asyncio.gather(child(50), child(1000))
            assert first is second is outer
            assert own_1.at < outer.at
            assert own_2 is outer
            assert ambient() is outer
            assert await asyncio.to_thread(ambient) is outer

    asyncio.run(parent())
    assert ambient() is None
