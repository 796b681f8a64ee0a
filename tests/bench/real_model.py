"""What does serving add to a trained model, for one client and for five? (figures f, g)"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import models
import numpy as np
from timing import bare_exchange, in_turn, median, row, server

from remote_ops import Endpoint


def rows_per_s(calls: list[Callable[[], object]], seconds: float) -> float:
    """Calls per second of all `calls` together, each on a thread of its own."""
    counts = [0] * len(calls)
    end = time.perf_counter() + seconds

    def repeat(index: int) -> None:
        while time.perf_counter() < end:
            calls[index]()
            counts[index] += 1

    threads = [threading.Thread(target=repeat, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / seconds


# The same model behind two bare sockets: what any server would add at least.
_BARE_MODEL = """
import models, numpy
session = models.magika()._session
def answer(up):
    return session.run(None, {"bytes": numpy.frombuffer(up, numpy.int32).reshape(1, 2048)})[0].data
"""


def main() -> None:
    """Print figures f and g."""
    window = np.random.default_rng(0).integers(0, 256, (1, 2048), np.int32)
    local = models.magika()
    session, feed = local._session, {"bytes": window}

    def bare() -> object:
        return session.run(None, feed)

    with (
        server("magika", "echo") as (url, _),
        Endpoint(url + "magika") as endpoint,
        bare_exchange(window.nbytes, 214 * 4, prepare=_BARE_MODEL) as raw,
    ):

        def served() -> object:
            return endpoint(window)

        in_turn([bare, served], 50)
        for how, (bare_s, raw_s, served_s) in (
            ("in turn", [median(times) for times in in_turn([bare, raw, served], 600)]),
            ("each alone", [median(in_turn([call], 600)[0]) for call in (bare, raw, served)]),
        ):
            what = f"f  magika batch 1, added to {bare_s * 1e3:.2f} ms in process, {how}"
            row(what, f"{(served_s - bare_s) * 1e6:.0f} us", f"{(raw_s - bare_s) * 1e6:.0f} us",
                served_s / raw_s, "150 us")  # fmt: skip
        for clients, lanes in ((1, 1), (5, 2)):
            ratios = []
            for _ in range(9):
                theirs = rows_per_s([bare] * lanes, 1.5)
                ours = rows_per_s([served] * clients, 1.5)
                ratios.append((ours / theirs, ours, theirs))
            ratio, ours, theirs = sorted(ratios)[len(ratios) // 2]
            what = f"g  magika rows/s, {clients} client{'s'[: clients > 1]} / {lanes} in process"
            print(f"{what:58} {ours:>12.0f}/s {theirs:>12.0f}/s {ratio:8.2f}  (at least 0.95)", flush=True)


if __name__ == "__main__":
    main()
