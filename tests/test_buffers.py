"""A buffer is lent until the last view of it dies, and not one view longer or shorter."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import threading
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from remote_ops.buffers import BufferPool
from remote_ops.graphpipe import decode_response, encode_response

Array = npt.NDArray[Any]
LARGE = 1 << 20


def address(buffer: memoryview | Array) -> int:
    return int(np.asarray(buffer).__array_interface__["data"][0])


@pytest.mark.parametrize("size", [1 << 16, (1 << 16) + 1, LARGE - 1, LARGE, 3_333_333])
def test_large_buffers_are_writable_64_byte_aligned_and_exactly_as_long_as_asked(size: int) -> None:
    pool = BufferPool()
    for _ in range(2):  # a fresh one, and one that came back
        buffer = pool.take(size)
        assert len(buffer) == size
        assert address(buffer) % 64 == 0
        buffer[0] = buffer[-1] = 7
        assert (buffer.format, buffer.ndim, buffer.readonly) == ("B", 1, False)
        del buffer


@pytest.mark.parametrize("size", [0, 1, 100, (1 << 16) - 1])
def test_small_buffers_are_not_pooled(size: int) -> None:
    pool = BufferPool()
    assert len(pool.take(size)) == size
    assert pool.idle_bytes() == 0


def test_a_buffer_comes_back_once_nobody_views_it() -> None:
    pool = BufferPool()
    buffer = pool.take(LARGE)
    where = address(buffer)
    assert pool.idle_bytes() == 0
    del buffer
    assert pool.idle_bytes() >= LARGE
    assert address(pool.take(LARGE)) == where
    assert pool.idle_bytes() >= LARGE


VIEWS: dict[str, Any] = {
    "the memoryview": lambda b: b,
    "a slice of it": lambda b: b[10:20],
    "a cast of it": lambda b: b.cast("f"),
    "an array over it": lambda b: np.ndarray((256,), np.float32, b, 64),
    "an element's row": lambda b: np.frombuffer(b, np.float32).reshape(512, 512)[3],
    "a transpose": lambda b: np.frombuffer(b, np.float32).reshape(512, 512).T,
    "a view as another dtype": lambda b: np.frombuffer(b, np.uint16).view(np.int8)[::-3],
    "a view of a view of a view": lambda b: np.asarray(np.frombuffer(b, np.uint8)[5:].reshape(-1, 1).T)[0, :7],
    "a memoryview of an array": lambda b: np.frombuffer(b, np.uint8)[8:16].data,
    "an iterator": lambda b: iter(np.frombuffer(b, np.uint8)),
    "a broadcast": lambda b: np.broadcast_to(np.frombuffer(b, np.uint8), (2, LARGE)),
    "an object that holds one": lambda b: {"key": [np.frombuffer(b, np.uint8)]},
}


@pytest.mark.parametrize("kind", VIEWS)
def test_a_buffer_is_not_lent_again_while_any_view_of_it_lives(kind: str) -> None:
    pool = BufferPool()
    buffer = pool.take(LARGE)
    where = address(buffer)
    view = VIEWS[kind](buffer)
    del buffer
    gc.collect()
    assert pool.idle_bytes() == 0
    assert address(pool.take(LARGE)) != where
    lent = pool.idle_bytes()
    del view
    assert pool.idle_bytes() > lent


def test_decoded_tensors_keep_the_buffer_of_their_message_lent() -> None:
    pool = BufferPool()
    sent: list[Array] = [np.arange(40_000, dtype=np.float32), np.ones((200, 100))]
    encoded = b"".join(encode_response(sent))
    message = pool.take(len(encoded))
    message[:] = encoded
    first, second = decode_response(message).tensors
    del message, first
    assert pool.idle_bytes() == 0
    pool.take(len(encoded))[:] = bytes(len(encoded))
    assert second.tolist() == sent[1].tolist()
    lent = pool.idle_bytes()
    del second
    assert pool.idle_bytes() > lent


def test_a_view_in_a_reference_cycle_gives_its_buffer_back_when_collected() -> None:
    pool = BufferPool()
    cycle: list[Any] = [pool.take(LARGE)]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert pool.idle_bytes() >= LARGE


def test_a_garbage_collection_at_any_moment_disturbs_no_call() -> None:
    # A collection may return buffers while the pool is being read; it starts where Python allocates, so try each place.
    thresholds = gc.get_threshold()
    try:
        for allocations in range(1, 12):
            gc.disable()
            pool = BufferPool()
            held = [pool.take(1 << 16) for _ in range(30)]
            del held
            for _ in range(3):
                cycle: list[Any] = [pool.take(3 << 16)]
                cycle.append(cycle)
            del cycle
            gc.set_threshold(gc.get_count()[0] + allocations)
            gc.enable()
            assert pool.idle_bytes() >= 30 << 16
            assert len(pool.take(1 << 16)) == 1 << 16
    finally:
        gc.enable()
        gc.set_threshold(*thresholds)


def test_a_buffer_outlives_its_pool() -> None:
    pool = BufferPool()
    array = np.frombuffer(pool.take(LARGE), np.uint8)
    array[:] = 5
    del pool
    gc.collect()
    assert int(array.sum()) == 5 * LARGE


@pytest.mark.parametrize("keep_bytes", [0, 1, LARGE, 3 * LARGE])
def test_no_more_idle_bytes_are_kept_than_asked(keep_bytes: int) -> None:
    pool = BufferPool(keep_bytes)
    held = [pool.take(LARGE) for _ in range(8)]
    while held:
        held.pop()
        assert pool.idle_bytes() <= keep_bytes
    assert pool.idle_bytes() == keep_bytes // LARGE * LARGE


def test_a_buffer_serves_sizes_near_its_own_and_not_far_smaller_ones() -> None:
    pool = BufferPool()
    where = address(pool.take(LARGE))
    assert address(pool.take(LARGE - 1000)) == where
    big = pool.take(10 * LARGE)
    del big
    idle = pool.idle_bytes()
    small = pool.take(1 << 16)
    assert pool.idle_bytes() == idle
    del small


def test_many_threads_never_share_a_buffer() -> None:
    pool = BufferPool(keep_bytes=4 * LARGE)
    faults: list[str] = []

    def hammer(seed: int) -> None:
        choose = random.Random(seed)
        held: list[tuple[int, Array]] = []
        for n in range(300):
            mark = (seed * 1000 + n) % 2**31
            array = np.frombuffer(pool.take(choose.choice((1 << 16, 1 << 17, 1 << 18))), np.int32)
            array[::997] = mark
            held.append((mark, array[:: choose.choice((1, 997))]))
            del array
            if len(held) > choose.randrange(5):
                mark, view = held.pop(choose.randrange(len(held)))
                if view[0] != mark or (len(view) < 1000 and (view != mark).any()):
                    faults.append(f"thread {seed}: a buffer of mine was overwritten")
                del view

    threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    gc.collect()
    assert 0 < pool.idle_bytes() <= 4 * LARGE


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_does_not_write_into_its_parents_memory() -> None:
    pool = BufferPool()
    lent = np.frombuffer(pool.take(LARGE), np.uint8)
    lent[:] = 1
    idle = pool.take(2 * LARGE)
    idle[:] = b"\2" * (2 * LARGE)
    del idle
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 warns of forking beside threads
        child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            lent[:] = 9
            pool.take(2 * LARGE)[:] = b"\x09" * (2 * LARGE)
            pool.take(LARGE)[:] = b"\x09" * LARGE
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert int(lent.min()) == int(lent.max()) == 1
    again = pool.take(2 * LARGE)
    assert set(bytes(again)) == {2}
