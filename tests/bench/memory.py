"""Does the server keep what it once needed? (figure h)"""

from __future__ import annotations

import numpy as np
import psutil
from models import IMAGE, ROWS
from timing import server

from remote_ops import Endpoint


def main() -> None:
    """Print figure h."""
    images = np.random.default_rng(0).random((ROWS, *IMAGE), np.float32)
    with server("headline", "echo") as (url, pid), Endpoint(url + "headline") as endpoint:
        resident = []
        for calls in (5, 195):
            for _ in range(calls):
                endpoint(images)
            resident.append(psutil.Process(pid).memory_info().rss / 1e6)
    before, after = resident
    what = "h  server memory after 200 headline requests, above 5"
    print(f"{what:58} {after:>11.1f} MB {before:>11.1f} MB {after - before:+8.2f}  (at most +10 MB)", flush=True)


if __name__ == "__main__":
    main()
