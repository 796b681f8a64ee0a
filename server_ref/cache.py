"""A servable that remembers the answers of another, row by row.

It decides what to look up, what to compute and how both make one answer; `rowkeys` names rows, a `RowCache` keeps them.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from remote_ops.deadline import Deadline
from remote_ops.errors import EncodeError, InternalError, SignatureError
from remote_ops.servable import Servable
from remote_ops.signature import Array, Signature, TensorSpec
from server_ref.rowkeys import RowKeys
from server_ref.rowstore import RowCache
from server_ref.rowvalues import pack_rows, payload_bytes, stack_rows

__all__ = ["CacheStats", "Cached"]

T = TypeVar("T")
log = logging.getLogger("server_ref")
_INLINE_BYTES = 1 << 18  # more than these take longer than a hop to a thread, and would hold up a loop
_ROW_BYTES = 1 << 10  # a row takes as long as these, whatever its size


class CacheStats(NamedTuple):
    """How a cache does: counts since it was made, and what its store holds now.

    `hits` and `misses` count rows that were not, and that were, computed. `lookups` counts requests that were looked
    up, `answered` those that needed no run of the model, `bypassed` those that went straight to it; `lookup_ns` is the
    time spent in hashing and looking up. `entries`, `bytes` and `evictions` are the store's, which models may share.
    """

    hits: int = 0
    misses: int = 0
    lookups: int = 0
    answered: int = 0
    bypassed: int = 0
    lookup_ns: int = 0
    entries: int = 0
    bytes: int = 0
    evictions: int = 0


class _Known(NamedTuple):
    """What a servable has said of itself, and what follows from it."""

    signature: Signature
    keys: RowKeys
    row_outputs: frozenset[str]


class _Call(NamedTuple):
    """One checked call, and whether its rows are looked up each by itself."""

    arrays: dict[str, Array]
    wanted: tuple[TensorSpec, ...]
    names: list[str]
    config: bytes
    deadline: Deadline | None
    by_row: bool


class _Found(NamedTuple):
    """What is kept of a call: `kept[output][i]` under `keys[i]` for each distinct row; row `r` is the `order[r]`-th."""

    call: _Call
    keys: list[bytes]
    order: list[int]
    kept: dict[str, list[bytes | None]]
    missing: list[int]  # which distinct rows lack one of the outputs
    lacking: list[str]  # which outputs one of the rows lacks

    @property
    def is_complete(self) -> bool:
        return not self.missing

    @property
    def is_all_missing(self) -> bool:
        """Whether the whole call is to be computed as it came."""
        return len(self.missing) == len(self.order) and len(self.lacking) == len(self.kept)

    def to_compute(self) -> dict[str, Array]:
        """The inputs of the rows that are missing, each once; copies them unless all are."""
        if len(self.missing) == len(self.order):
            return self.call.arrays
        first = {place: row for row, place in reversed(list(enumerate(self.order)))}
        rows = [first[place] for place in self.missing]
        return {name: array[rows] for name, array in self.call.arrays.items()}


class Cached:
    """A servable whose answers are kept, and given again without a run of the model.

    Only for a model that gives the same answer to the same inputs each time, and, where `by_row` holds, to a row
    whatever rows it comes with. Nothing finds out whether a model is such a one: who wraps it says so.

    Rows are told apart by a hash of 256 bits over the model, the config and the names, dtypes, shapes and bytes of the
    inputs. An output is kept by itself, so that asking for more outputs later computes only those. What is missing of a
    request is computed in one call, a row that it holds twice only once; two requests at the same time may both compute
    a row. Errors are not kept. Requests for gradients go to the model, and so does what has no bytes to hash.

    Args:
        servable: what computes; its other public attributes are there as this one's own.
        rows: where the answers are kept; several models may share one.
        model_hash: what tells the model, with the options that change its answers, from every other, such as
            `rowkeys.fingerprint(path)`. Unless given, this object finds only what it has put there itself.
        by_row: None takes the rows of a request apart where the signature leaves axis 0 of each input and each asked
            output open and fixes the rest of the output. True does so too where an output's rows have open sizes, which
            is right if they follow from the row alone and not from the longest of its batch. False keeps requests
            whole, which is right for models whose rows depend on each other.

    A hit of one small row costs about 16 us, under three calls of a `FunctionServable` that does nothing; each further
    row costs 2 us, and each byte of the inputs 1.3 ns.

    Constant: the servable, the store, and the keys once they are made. Changing: the counts, guarded by `_lock`, and
    `_known`, which is replaced as a whole.
    """

    # A hit is quick and a miss is not: how long the last calls took says nothing about the next one.
    never_waits = False

    def __init__(self, servable: Servable, rows: RowCache, *, model_hash: str = "", by_row: bool | None = None) -> None:
        self._servable = servable
        self._rows = rows
        self._identity = model_hash.encode() or secrets.token_bytes(16)
        self._by_row = by_row
        self._known: _Known | None = None
        self._lock = threading.Lock()
        self._hits = self._misses = self._lookups = self._answered = self._bypassed = self._lookup_ns = 0

    def __repr__(self) -> str:
        return f"Cached({self._servable!r}, {self._rows!r})"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        return getattr(self._servable, name)

    @property
    def signature(self) -> Signature:
        """What the model takes and gives."""
        return self._learned().signature

    @property
    def ainfer(self) -> Callable[..., Awaitable[dict[str, Array]]]:
        """`infer` on the running loop, of a servable that has it; large requests are hashed in a thread.

        Raises:
            AttributeError: the servable has none.
        """
        _ = self._servable.ainfer  # type: ignore[attr-defined]
        return self._ainfer

    def cache_stats(self) -> CacheStats:
        """How the cache does, all of it as of one moment."""
        usage = self._rows.usage()
        with self._lock:
            counts = (self._hits, self._misses, self._lookups, self._answered, self._bypassed, self._lookup_ns)
        return CacheStats(*counts, *usage)

    def infer(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        *,
        config: bytes = b"",
        deadline: Deadline | None = None,
    ) -> dict[str, Array]:
        """Give the outputs asked for (None: all), computing what is not kept.

        Raises:
            SignatureError: the inputs or the names asked for do not fit.
            InternalError: the model gave something other than its signature says.

        What the model raises reaches the caller.
        """
        call = self._call(inputs, outputs, config, deadline)
        found = self._look_up(call) if call else None
        if call is None or found is None:
            return self._servable.infer(inputs, outputs, config=config, deadline=deadline)
        answer = self._merge(found, {}) if found.is_complete else None
        if answer is not None:
            return answer
        if not found.is_complete:
            results = self._servable.infer(found.to_compute(), found.lacking, config=config, deadline=deadline)
            answer = self._complete(found, results)
        if answer is None:
            answer = self._fitted(self._servable.infer(call.arrays, call.names, config=config, deadline=deadline), call)
        return answer

    async def _ainfer(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        *,
        config: bytes = b"",
        deadline: Deadline | None = None,
    ) -> dict[str, Array]:
        compute: Callable[..., Awaitable[dict[str, Array]]] = self._servable.ainfer  # type: ignore[attr-defined]
        if self._known is None:  # to learn it may mean to ask the network
            await asyncio.to_thread(self._learned)
        call = self._call(inputs, outputs, config, deadline)
        size = _size(call.arrays) if call else 0
        found = await _apart(size, self._look_up, call) if call else None
        if call is None or found is None:
            return await compute(inputs, outputs, config=config, deadline=deadline)
        size += _kept_bytes(found)
        answer = await _apart(size, self._merge, found, {}) if found.is_complete else None
        if answer is not None:
            return answer
        if not found.is_complete:
            arrays = await _apart(size, found.to_compute)
            results = await compute(arrays, found.lacking, config=config, deadline=deadline)
            answer = await _apart(size + _size(results), self._complete, found, results)
        if answer is None:
            answer = self._fitted(await compute(call.arrays, call.names, config=config, deadline=deadline), call)
        return answer

    def _learned(self) -> _Known:
        if self._known is None:
            signature = self._servable.signature
            self._known = _Known(signature, RowKeys(self._identity, signature), _row_outputs(signature, self._by_row))
        return self._known

    def _call(
        self, inputs: Mapping[str, Array], outputs: Sequence[str] | None, config: bytes, deadline: Deadline | None
    ) -> _Call | None:
        """Check a call; None if it is about gradients."""
        signature, _, row_outputs = self._learned()
        wanted = signature.select_outputs(outputs)
        arrays = {name: _objects(array) for name, array in signature.fit_inputs(inputs).items()}
        names = [spec.name for spec in wanted]
        if len(arrays) > len(signature.inputs) or any(name.startswith("gradient:") for name in names):
            self._bypass()
            return None
        by_row = row_outputs.issuperset(names) and _has_rows(arrays)
        return _Call(arrays, wanted, names, config, deadline, by_row)

    def _bypass(self) -> None:
        with self._lock:
            self._bypassed += 1

    def _look_up(self, call: _Call) -> _Found | None:
        """Find what is kept of a call; None if it holds what cannot be hashed, which is then the model's to judge."""
        since = time.perf_counter_ns()
        keys = self._learned().keys
        try:
            rows = keys.of_rows(call.arrays, call.config) if call.by_row else [keys.of_whole(call.arrays, call.config)]
        except EncodeError:
            self._bypass()
            return None
        distinct, order = _distinct(rows)
        kept = {}
        for name in call.names:
            output = keys.of_output(name)
            kept[name] = self._rows.get([key + output for key in distinct])
        lacking = [name for name, entries in kept.items() if None in entries]
        gaps = [kept[name] for name in lacking]
        missing = [at for at in range(len(distinct)) if any(entries[at] is None for entries in gaps)] if gaps else []
        self._count(len(rows), len(missing), time.perf_counter_ns() - since)
        return _Found(call, distinct, order, kept, missing, lacking)

    def _count(self, rows: int, misses: int, elapsed_ns: int) -> None:
        with self._lock:
            self._hits += rows - misses
            self._misses += misses
            self._lookups += 1
            self._answered += misses == 0
            self._lookup_ns += elapsed_ns

    def _complete(self, found: _Found, results: Mapping[str, Any]) -> dict[str, Array] | None:
        """Keep what was computed, and make it the answer; None if the call must be computed as it came."""
        fitted = self._fitted(results, found.call, found.lacking)
        if found.call.by_row and any(len(array) != len(found.missing) for array in fitted.values()):
            self._known = self._learned()._replace(row_outputs=frozenset())
            log.warning(
                "model '%s': an output has other than one row for each row of the inputs; its answers are now "
                "kept by whole requests - say by_row=False to have it so from the start",
                self.signature.name,
            )
            return fitted if found.is_all_missing else None
        answer = self._merge(found, fitted)
        if answer is not None:
            self._keep(found, fitted)
        return answer

    def _fitted(self, results: Mapping[str, Any], call: _Call, names: Sequence[str] | None = None) -> dict[str, Array]:
        wanted = [spec for spec in call.wanted if names is None or spec.name in names]
        signature = self.signature
        try:
            fitted = signature.fit_outputs(results, wanted)
        except SignatureError as error:
            raise InternalError(f"model '{signature.name}' broke its own signature: {error}") from error
        return {name: _objects(array) for name, array in fitted.items()}

    def _keep(self, found: _Found, fitted: Mapping[str, Array]) -> None:
        keys = self._learned().keys
        for name, array in fitted.items():
            try:
                packed = pack_rows(array if found.call.by_row else array[np.newaxis])
            except EncodeError:  # the codec will say so, if anyone is to see it
                continue
            output = keys.of_output(name)
            self._rows.put(
                [(found.keys[place] + output, row) for place, row in zip(found.missing, packed, strict=True)]
            )

    def _merge(self, found: _Found, fitted: Mapping[str, Array]) -> dict[str, Array] | None:
        """Put kept and computed rows together in the order of the call; None if they are no rows of one array."""
        if found.is_all_missing and fitted:
            return {name: fitted[name] for name in found.call.names}
        answer = {}
        for name, entries in found.kept.items():
            computed = fitted.get(name)
            if computed is not None and not found.call.by_row:
                answer[name] = computed
                continue
            rows = _merged([row for row in entries if row is not None], computed, entries, found.missing)
            if rows is None:
                return None
            answer[name] = _ordered(rows, found)
        return answer


def _distinct(keys: list[bytes]) -> tuple[list[bytes], list[int]]:
    """The keys without repetitions, and for each key the place of its like among them."""
    place = {key: at for at, key in enumerate(dict.fromkeys(keys))}
    return list(place), [place[key] for key in keys]


def _merged(
    hits: list[bytes], computed: Array | None, entries: Sequence[bytes | None], missing: Sequence[int]
) -> Array | None:
    """Kept and computed rows as one array, in the order of the distinct rows; None if they do not fit together."""
    if computed is None:
        return stack_rows(hits)
    if len(missing) == len(entries):
        return computed
    places = sorted(set(range(len(entries))) - set(missing))
    kept = stack_rows([entry for at in places if (entry := entries[at]) is not None])
    if kept is None or kept.dtype != computed.dtype or kept.shape[1:] != computed.shape[1:]:
        return None
    rows = np.empty((len(entries), *computed.shape[1:]), computed.dtype)
    rows[places], rows[list(missing)] = kept, computed
    return rows


def _ordered(rows: Array, found: _Found) -> Array:
    if not found.call.by_row:
        return rows.reshape(rows.shape[1:])
    return rows if len(found.order) == len(found.keys) else rows[found.order]


def _row_outputs(signature: Signature, by_row: bool | None) -> frozenset[str]:
    """The outputs whose axis 0 counts the rows of the inputs, by the signature; none if it has no rows."""
    if by_row is False or not all(_is_open(spec) for spec in signature.inputs):
        return frozenset()
    return frozenset(
        spec.name for spec in signature.outputs if _is_open(spec) and (by_row or -1 not in (spec.shape or ())[1:])
    )


def _is_open(spec: TensorSpec) -> bool:
    return bool(spec.shape) and spec.shape is not None and spec.shape[0] == -1


def _has_rows(arrays: Mapping[str, Array]) -> bool:
    sizes = {len(array) for array in arrays.values()}
    return len(sizes) == 1 and sizes != {0}


def _objects(array: Array) -> Array:
    """Numpy's own kinds of string as an array of objects, which is what kept strings come back as."""
    return array.astype(object) if array.dtype.kind in "SUT" else array


def _size(arrays: Mapping[str, Any]) -> int:
    """About how many bytes could be hashed in the time that these arrays take."""
    found = [array for array in arrays.values() if isinstance(array, np.ndarray) and array.ndim]
    return sum(payload_bytes(array) + _ROW_BYTES * len(array) for array in found)


def _kept_bytes(found: _Found) -> int:
    return sum(len(entry) for entries in found.kept.values() for entry in entries if entry is not None)


async def _apart(size_bytes: int, do: Callable[..., T], *args: Any) -> T:
    """Do it here if it is quick, else in a thread."""
    return await asyncio.to_thread(do, *args) if size_bytes > _INLINE_BYTES else do(*args)
