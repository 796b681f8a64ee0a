"""What the tests share: a garbage collector that passes over the frameworks, and a core for each process of tests."""

from __future__ import annotations

import gc
import os

# Before torch is imported: workers that start a thread for every core each wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish() -> None:
    """Set aside what the imports made: in a test, a collection then takes no half second with torch and TensorFlow.

    What a test makes comes later, and is collected as ever.
    """
    gc.collect()
    gc.freeze()
