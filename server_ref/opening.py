"""From what is to be served to a version that serves it: copies opened, queue and cache set up, warmed.

It blocks, and is called on a thread of its own. Where models come from, and when, is `repository`'s.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from remote_ops.errors import RemoteOpsError, SpecError
from remote_ops.servable import Servable, load
from remote_ops.signature import DTYPES, Array, Signature, TensorSpec
from server_ref.batching import Batching
from server_ref.cache import Cached
from server_ref.graphs import watched
from server_ref.isolation import Isolated
from server_ref.lanes import QueueLimits
from server_ref.model import Version, close_all
from server_ref.rowkeys import fingerprint as file_fingerprint
from server_ref.rowstore import MemoryRows, RowCache
from server_ref.settings import Warmup
from server_ref.source import Progress, Source

__all__ = ["open_version"]


def open_version(source: Source, progress: Progress = lambda step, done, of: None) -> Version:
    """Open every copy of a model, and run each until it is warm.

    Raises:
        RemoteOpsError, ImportError: it cannot be opened, or fails as it is warmed; says what is wrong.

    Takes what opening takes for each copy, one after the other.
    """
    servables: list[Servable] = []
    try:
        for index, device in enumerate(source.copies):
            progress("load", index, len(source.copies))
            servables.append(_open_one(source, device))
            if source.concurrency:
                servables[-1].concurrency = source.concurrency  # type: ignore[attr-defined]  # what `room_for` reads
        progress("load", len(servables), len(servables))
        rows = _rows_of(source)
        version = _version_of(source, servables, rows)
        version.source, version.owned = source, (*servables, rows)
        if source.rules.warmup is not None:
            warm(servables, source.rules.warmup, version.instances.lanes.batching, source.folder, progress)
        return version
    except BaseException:
        close_all(servables)
        raise


def _open_one(source: Source, device: str) -> Servable:
    settings = source.rules
    options = {**source.options, **settings.options.given(), "device": device}
    if settings.isolate == "process":
        timeout_s = settings.limits.response_timeout_s
        return Isolated(source.what, options=options, name=source.name, response_timeout_s=timeout_s or math.inf)
    return watched(load(source.what, **options))


def _version_of(source: Source, servables: Sequence[Servable], rows: RowCache | None) -> Version:
    settings, batching = source.rules, Batching()
    if (rules := settings.batching) is not None:
        batching = Batching(
            rules.max_rows, rules.max_delay_ms / 1000, rules.preferred_rows, rules.allowed_rows,
            rules.priorities, rules.usual_priority,
        )  # fmt: skip
    queue, limits = settings.queue, settings.limits
    timeout_s = math.inf if queue.timeout_ms is None else queue.timeout_ms / 1000
    return Version(
        source.name,
        servables,
        version=source.version,
        batching=batching,
        limits=QueueLimits(queue.max_requests, queue.max_bytes, timeout_s, limits.max_body_bytes or 0),
        response_timeout_s=math.inf if limits.response_timeout_s is None else limits.response_timeout_s,
        awaited=None
        if rows is None
        else lambda instances: Cached(
            instances,
            rows,
            model_hash=_hash_of(source),
            by_row=None if settings.cache is None else settings.cache.by_row,
        ),
    )


def _rows_of(source: Source) -> RowCache | None:
    """Where the rows of a model are kept; None if they are not."""
    cache = source.rules.cache
    if cache is None:
        return None
    if cache.path is None:
        return MemoryRows(cache.max_bytes, ttl_s=cache.ttl_s)
    from server_ref.rowdisk import DiskRows  # it needs lmdb, which is an extra

    return DiskRows(source.folder / cache.path, max_bytes=cache.max_bytes, ttl_s=cache.ttl_s)


def _hash_of(source: Source) -> str:
    """What tells the answers of a model from those of another; empty, so of this run alone, if no file says so."""
    fingerprint = source.fingerprint or (file_fingerprint(source.what) if Path(source.what).exists() else "")
    if not fingerprint:
        return ""
    options = {**source.options, **source.rules.options.given(), "devices": source.copies}
    return f"{source.name} {source.version} {fingerprint} {json.dumps(options, sort_keys=True, default=str)}"


# --------------------------------------------------------------------------- warming


def warm(
    servables: Sequence[Servable], warmup: Warmup, batching: Batching, folder: Path, progress: Progress
) -> list[float]:
    """Run each copy with each size of batch, so that no caller pays for what a first run sets up.

    Gives the seconds of each run.

    Raises:
        SpecError: an input is to be filled from a file that is not there or does not fit.
        RemoteOpsError: the model failed.
    """
    sizes = sorted({*warmup.rows, *batching.allowed_rows})
    runs = [(servable, rows) for rows in sizes for servable in servables]
    took = []
    for index, (servable, rows) in enumerate(runs):
        progress("warm", index, len(runs))
        inputs = dict(filled(servable.signature, warmup, rows, folder))
        since = time.perf_counter()
        try:
            servable.infer(inputs)
        except RemoteOpsError:
            raise
        except Exception as error:
            shapes = ", ".join(f"'{name}' {list(array.shape)}" for name, array in inputs.items())
            raise SpecError(f"the model failed on {shapes}: {error}", path="warmup") from error
        took.append(time.perf_counter() - since)
    progress("warm", len(runs), len(runs))
    return took


def filled(signature: Signature, warmup: Warmup, rows: int, folder: Path) -> Iterator[tuple[str, Array]]:
    """The inputs of one run of warming by name, each of `rows` rows where axis 0 is open, other open sizes 1."""
    if unknown := [name for name in warmup.inputs if name not in {spec.name for spec in signature.inputs}]:
        known = ", ".join(spec.name for spec in signature.inputs)
        raise SpecError(f"no input is called '{unknown[0]}': expected some of {known}", path="warmup.inputs")
    for spec in signature.inputs:
        yield spec.name, _filled(spec, warmup.inputs.get(spec.name, "zeros"), rows, folder)


def _filled(spec: TensorSpec, fill: str, rows: int, folder: Path) -> Array:
    if fill.endswith(".npy"):
        return _read(spec, folder / fill, rows)
    shape = tuple(_sized(size, rows if axis == 0 else 1) for axis, size in enumerate(spec.shape or ()))
    dtype = DTYPES[spec.dtype].numpy
    if spec.dtype == "string":
        return np.full(shape, b"", object)
    if fill == "random" and spec.is_float:
        return np.random.default_rng(0).standard_normal(shape).astype(dtype)
    return np.full(shape, int(fill != "zeros"), dtype)


def _sized(size: int, open_size: int) -> int:
    return open_size if size < 0 else size


def _read(spec: TensorSpec, path: Path, rows: int) -> Array:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise SpecError(f"cannot read the input '{spec.name}' for warming: {error}", path=str(path)) from error
    if array.ndim and spec.shape is not None and spec.shape[:1] == (-1,) and len(array):
        array = np.resize(array, (rows, *array.shape[1:]))
    return spec.fit(array)
