"""What Triton's clients read of a model: metadata, configuration, statistics and place in the index, as JSON values.

It is pure: versions in, values out. Fields that mean nothing here keep Triton's default.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from remote_ops import oip
from remote_ops.signature import BY_NUMPY, TensorSpec
from server_ref.cache import CacheStats
from server_ref.catalog import Model
from server_ref.model import Version
from server_ref.repository import Entry
from server_ref.stats import Durations

__all__ = ["configuration", "index_row", "metadata", "statistics"]

_TYPES = {BY_NUMPY[dtype].name: f"TYPE_{datatype}" for datatype, dtype in oip.DATATYPES.items()}
_TYPES["string"] = "TYPE_STRING"
_STATES = {"loading": "LOADING", "warming": "LOADING", "ready": "READY", "draining": "UNLOADING"}
_CUDA = re.compile(r"cuda(?::(\d+))?")


def metadata(version: Version, versions: Sequence[str]) -> bytes:
    """What a model takes and gives, under the name that it is served by.

    Raises:
        EncodeError: it has an input or output of dtype `any`.
    """
    return oip.encode_metadata(replace(version.signature, name=version.name), versions)


# --------------------------------------------------------------------------- configuration


def configuration(model: Model, version: Version) -> dict[str, Any]:
    """Triton's `ModelConfig`: with batching, sizes are those of a row, and `max_batch_size` is how many go together."""
    rows, signature = _max_rows(version), version.signature
    found = {
        "name": version.name,
        "platform": signature.server,
        "backend": "remote_ops",
        "runtime": "",
        "version_policy": _policy([name for name in model.versions if name]),
        "max_batch_size": rows,
        "input": [_side(spec, rows) | _OF_INPUTS for spec in signature.inputs],
        "output": [_side(spec, rows) | _OF_OUTPUTS for spec in signature.outputs],
        "batch_input": [],
        "batch_output": [],
        "optimization": _OPTIMIZATION,
        "instance_group": [_group(version)],
        "default_model_filename": "",
        "cc_model_filenames": {},
        "metric_tags": {},
        "parameters": {},
        "model_warmup": [],
    }
    return found | ({"dynamic_batching": _batching(version)} if rows else {})


_OF_INPUTS = {
    "format": "FORMAT_NONE",
    "is_shape_tensor": False,
    "allow_ragged_batch": False,
    "optional": False,
    "is_non_linear_format_io": False,
}
_OF_OUTPUTS = {"label_filename": "", "is_shape_tensor": False, "is_non_linear_format_io": False}
_OPTIMIZATION = {
    "priority": "PRIORITY_DEFAULT",
    "input_pinned_memory": {"enable": True},
    "output_pinned_memory": {"enable": True},
    "gather_kernel_buffer_threshold": 0,
    "eager_batching": False,
}


def _max_rows(version: Version) -> int:
    """How many rows go together; 0 where requests are not put together, or not along a first axis of any size."""
    specs = (*version.signature.inputs, *version.signature.outputs)
    along_rows = all(spec.shape is not None and spec.shape[:1] == (-1,) for spec in specs)
    return version.instances.lanes.batching.max_rows if along_rows else 0


def _side(spec: TensorSpec, rows: int) -> dict[str, Any]:
    shape = (-1,) if spec.shape is None else spec.shape
    dtype = "TYPE_INVALID" if spec.dtype == "any" else _TYPES.get(spec.dtype, "TYPE_UINT8")
    return {"name": spec.name, "data_type": dtype, "dims": list(shape[1:] if rows else shape)}


def _policy(names: Sequence[str]) -> dict[str, Any]:
    if names and all(name.isdigit() for name in names):
        return {"specific": {"versions": [int(name) for name in names]}}
    return {"latest": {"num_versions": 1}}


def _group(version: Version) -> dict[str, Any]:
    devices = [_CUDA.match(str(getattr(one, "device", "cpu"))) for one in version.instances.servables]
    gpus = sorted({int(device[1] or 0) for device in devices if device})
    return {
        "name": f"{version.name}_0",
        "kind": "KIND_GPU" if gpus else "KIND_CPU",
        "count": version.instances.lanes.concurrency,
        "gpus": gpus,
        "secondary_devices": [],
        "profile": [],
        "passive": False,
        "host_policy": "",
    }


def _batching(version: Version) -> dict[str, Any]:
    rules = version.instances.lanes.batching
    levels = rules.priorities if rules.priorities > 1 else 0
    return {
        "preferred_batch_size": list(rules.preferred_rows),
        "max_queue_delay_microseconds": round(rules.max_delay_s * 1e6),
        "preserve_ordering": False,
        "priority_levels": levels,
        "default_priority_level": rules.level(0) if levels else 0,
        "priority_queue_policy": {},
    }


# --------------------------------------------------------------------------- statistics


def statistics(version: Version) -> dict[str, Any]:
    """What a version has done; counts of computing are of executions, and every time is the sum over its count.

    `inference_count` counts rows, so that `inference_count / execution_count` is how many go together.
    """
    now = version.stats.snapshot()
    hit, miss = _cached(version)
    return {
        "name": version.name,
        "version": version.version,
        "last_inference": int(now.last_at * 1000),
        "inference_count": now.rows,
        "execution_count": now.executions,
        "inference_stats": {
            "success": _spent(now.success),
            "fail": _spent(now.failure),
            "queue": _spent(now.queue),
            "compute_input": _spent(now.compute_input),
            "compute_infer": _spent(now.compute_infer),
            "compute_output": _spent(now.compute_output),
            "cache_hit": hit,
            "cache_miss": miss,
        },
        "response_stats": {},
        "batch_stats": [
            {
                "batch_size": rows,
                "compute_input": _spent(spent[0]),
                "compute_infer": _spent(spent[1]),
                "compute_output": _spent(spent[2]),
            }
            for rows, spent in sorted(now.batches.items())
        ],
        "memory_usage": [],
    }


def _spent(durations: Durations) -> dict[str, int]:
    return {"count": durations.times, "ns": round(durations.seconds * 1e9)}


def _cached(version: Version) -> tuple[dict[str, int], dict[str, int]]:
    """Requests that the cache answered and those that it did not; the time for looking up is shared out by number."""
    cache = version.cache_stats() if version.cache_stats else CacheStats()
    hit_ns = cache.lookup_ns * cache.answered // max(cache.lookups, 1)
    missed = cache.lookups - cache.answered
    return {"count": cache.answered, "ns": hit_ns}, {"count": missed, "ns": cache.lookup_ns - hit_ns}


# --------------------------------------------------------------------------- the repository


def index_row(entry: Entry | Version) -> dict[str, str]:
    """One version in Triton's words; one that is served, and of which nobody says more, is ready."""
    state = _STATES.get(getattr(entry, "state", "ready"), "UNAVAILABLE")
    return {"name": entry.name, "version": entry.version, "state": state, "reason": getattr(entry, "reason", "")}
