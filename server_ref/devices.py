"""What the process takes of its machine: memory, and NVIDIA devices where `nvidia-ml-py` is installed.

It changes nothing, and asks only when it is asked.
"""

from __future__ import annotations

import contextlib
import os
import resource
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Device", "devices", "resident_bytes"]


class Device(NamedTuple):
    """An accelerator of this machine: its name, its memory in bytes, and percents of the time that it computes."""

    number: int
    name: str
    used_bytes: int
    total_bytes: int
    busy_percent: int | None


def resident_bytes() -> int:
    """Memory of this process that is in RAM, in bytes; costs some 10 us."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def devices() -> list[Device]:
    """Every NVIDIA device of this machine; none where there is none, or nothing to ask it with."""
    nvml = _nvml()
    if nvml is None:
        return []
    try:
        return [_device(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError:
        return []


def _device(nvml: Any, index: int) -> Device:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    name = nvml.nvmlDeviceGetName(handle)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    busy = None
    with contextlib.suppress(nvml.NVMLError):  # not every device tells
        busy = int(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    return Device(index, name.decode() if isinstance(name, bytes) else name, memory.used, memory.total, busy)


@lru_cache(maxsize=1)
def _nvml() -> Any:
    """The library, ready to be asked; None where there is no driver."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml
