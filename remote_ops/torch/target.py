"""`Target`: what a node of a graph calls, and the tensor by which the graph knows it.

A graph cannot hold a servable. It holds a handle, a tensor of bytes: within this process they are the key of a table,
in another one (an exported program that was loaded there) they say how to make the endpoint anew.

State: `_TARGETS` knows the targets of this process, weakly; a handle keeps its own alive. `_REBUILT` keeps those that
were made from a handle. Both only through operations that are atomic in CPython.
"""

from __future__ import annotations

import asyncio
import base64
import contextvars
import functools
import json
import os
import secrets
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

from remote_ops.background import background_loop, settled
from remote_ops.client import Endpoint
from remote_ops.deadline import Deadline, ambient
from remote_ops.errors import NotDifferentiable, SignatureError, SpecError
from remote_ops.servable import Servable
from remote_ops.signature import Array
from remote_ops.torch.opspec import OpSpec, has_rows

__all__ = ["Target", "address_of", "handle_at"]

_HANDLE_BYTES = 512
_AT_ONCE = 8


class Target:
    """A servable, and how a graph calls it.

    Args:
        servable: what is called.
        config: bytes for the model.
        max_rows: most rows in one message, 1 or more; None for any number.
    """

    def __init__(self, servable: Servable, config: bytes = b"", max_rows: int | None = None) -> None:
        self.servable = servable
        self.config = config
        self.max_rows = max_rows
        self.at = str(getattr(servable, "url", "") or repr(servable))
        self.is_remote = isinstance(servable, Endpoint)

    # how a graph knows it

    def handle(self) -> torch.Tensor:
        """A tensor of bytes that stands for this target, and keeps it alive."""
        description = self.servable.describe() if type(self.servable) is Endpoint else None
        written = {
            "key": secrets.token_hex(8),
            "endpoint": description,
            "config": base64.b64encode(self.config).decode(),
            "max_rows": self.max_rows,
            "what": "" if description else repr(self.servable)[:200],
        }
        text = json.dumps(written).encode()
        size = -(-len(text) // _HANDLE_BYTES) * _HANDLE_BYTES  # few sizes: a graph is built for one
        key = text.ljust(size)
        _TARGETS[key] = self
        return _tensor(key, self)

    @staticmethod
    def of(handle: torch.Tensor) -> Target:
        """The target that a handle stands for.

        Raises:
            SpecError: it was a servable of another process, so it cannot be reached from here.
        """
        target = getattr(handle, "target", None)
        if target is not None:
            return target  # type: ignore[no-any-return]
        return _find(bytes(handle.cpu().numpy()))

    # calls

    def infer(self, spec: OpSpec, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs for these inputs, on this thread; in several messages at once if they are too many rows."""
        return self._run(spec, arrays, spec.output_names)

    def gradients(self, spec: OpSpec, arrays: Mapping[str, Array], names: Sequence[str]) -> dict[str, Array]:
        """The gradients with respect to the inputs of these names.

        Raises:
            NotDifferentiable: the model cannot give one of them; names both.
        """
        return self._run(spec, arrays, self.wanted(names))

    def wanted(self, names: Sequence[str]) -> list[str]:
        """What to ask for to get the gradients with respect to these inputs."""
        wanted = [f"gradient:{name}" for name in names]
        try:
            self.servable.signature.select_outputs(wanted)
        except NotDifferentiable as error:
            raise NotDifferentiable(
                f"{error.message}; call it under torch.no_grad(), or detach() that input", endpoint=self.at
            ) from error
        return wanted

    def submit(self, spec: OpSpec, arrays: Mapping[str, Array], names: Sequence[str]) -> Future[dict[str, Array]]:
        """The same in the background; one deadline for all pieces."""
        bound = ambient()
        if isinstance(self.servable, Endpoint):
            bound = Deadline.after(self.servable.timeout_s).earlier(bound)
        elif getattr(_THREAD, "is_ours", False):
            return _done_at_once(lambda: self._run_here(arrays, names))
        return asyncio.run_coroutine_threadsafe(self._arun(spec, arrays, names, bound), background_loop())

    def _run(self, spec: OpSpec, arrays: Mapping[str, Array], names: Sequence[str]) -> dict[str, Array]:
        if self.max_rows is not None and self._is_too_large(spec, arrays):
            future = self.submit(spec, arrays, names)
            try:
                return settled(future).result()
            finally:
                future.cancel()  # the wait may have been interrupted
        return self._run_here(arrays, names)

    def _run_here(self, arrays: Mapping[str, Array], names: Sequence[str]) -> dict[str, Array]:
        if self.is_remote:
            return self.servable.infer(arrays, names, config=self.config)
        return self.servable.infer(arrays, names, config=self.config, deadline=ambient())

    async def _arun(
        self, spec: OpSpec, arrays: Mapping[str, Array], names: Sequence[str], deadline: Deadline | None
    ) -> dict[str, Array]:
        if not self._is_too_large(spec, arrays):
            return await self._aone(arrays, names, deadline)
        room = asyncio.Semaphore(_AT_ONCE)

        async def one(piece: Mapping[str, Array]) -> dict[str, Array]:
            async with room:
                return await self._aone(piece, names, deadline)

        tasks = [asyncio.ensure_future(one(piece)) for piece in self._pieces(spec, arrays)]
        try:
            answers = await asyncio.gather(*tasks)
        finally:  # one failed, or nobody waits any more: so nobody wants the others
            for task in tasks:
                task.cancel()
        shared = {f"gradient:{input.name}" for input in spec.inputs if not has_rows(input)}  # by all pieces
        return {
            name: sum(parts[1:], parts[0]) if name in shared else np.concatenate(parts)
            for name in names
            for parts in [[answer[name] for answer in answers]]
        }

    async def _aone(
        self, arrays: Mapping[str, Array], names: Sequence[str], deadline: Deadline | None
    ) -> dict[str, Array]:
        ainfer = getattr(self.servable, "ainfer", None)
        if ainfer is not None:
            return await ainfer(arrays, names, config=self.config, deadline=deadline)  # type: ignore[no-any-return]
        infer = functools.partial(self.servable.infer, arrays, names, config=self.config, deadline=deadline)
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(_threads(), context.run, infer)

    # pieces

    def _is_too_large(self, spec: OpSpec, arrays: Mapping[str, Array]) -> bool:
        if self.max_rows is None:
            return False
        counts = {name: len(array) for name, array in arrays.items() if name not in _whole(spec)}
        if max(counts.values(), default=0) <= self.max_rows:
            return False
        if len(set(counts.values())) > 1:
            got = ", ".join(f"'{name}' of {rows}" for name, rows in counts.items())
            raise SignatureError(
                f"a batch that is sent in pieces: expected as many rows in each input, got {got} rows",
                got=got,
                at=self.at,
            )
        return True

    def _pieces(self, spec: OpSpec, arrays: Mapping[str, Array]) -> Iterator[dict[str, Array]]:
        assert self.max_rows is not None
        whole = _whole(spec)
        rows = max(len(array) for name, array in arrays.items() if name not in whole)
        for start in range(0, rows, self.max_rows):
            stop = start + self.max_rows
            yield {name: array if name in whole else array[start:stop] for name, array in arrays.items()}


def _whole(spec: OpSpec) -> set[str]:
    """The inputs that have no rows, and go with every piece."""
    return {input.name for input in spec.inputs if not has_rows(input)}


_TARGETS: weakref.WeakValueDictionary[bytes, Target] = weakref.WeakValueDictionary()
_REBUILT: dict[bytes, Target] = {}


def _find(key: bytes) -> Target:
    target = _TARGETS.get(key) or _REBUILT.get(key)
    return _REBUILT.setdefault(key, _rebuild(key)) if target is None else target


def _tensor(key: bytes, target: Target) -> torch.Tensor:
    # An ordinary tensor, whatever mode or transform it is made in: it outlives them.
    with _disable_current_modes(), torch.inference_mode(False), torch._C._DisableFuncTorch():
        tensor = torch.from_numpy(np.frombuffer(bytearray(key), np.uint8))
    tensor.target = target  # type: ignore[attr-defined]
    return tensor


def address_of(handle: torch.Tensor) -> str:
    """What a handle holds, as text: for graphs that keep every tensor in their state."""
    return bytes(handle.numpy()).decode()


@functools.cache
def handle_at(address: str) -> torch.Tensor:
    """The handle with that text in it; kept, with its target, for as long as this process lives."""
    key = address.encode()
    return _tensor(key, _find(key))


def _rebuild(key: bytes) -> Target:
    try:
        written = json.loads(key)
        description, config = written["endpoint"], base64.b64decode(written["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise SpecError("this handle names no model: something has written to it", path="handle") from error
    if description is None:
        raise SpecError(
            f"this graph calls {written['what']}, which lived in the process that made the graph: expected a "
            "RemoteModule(URL), which any process can call",
            path="handle",
        )
    return Target(Endpoint.from_description(description), config, written["max_rows"])


_THREAD = threading.local()


@functools.lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    """Threads for servables of this process that were started and not awaited."""
    return ThreadPoolExecutor(64, "remote-ops-local", initializer=lambda: setattr(_THREAD, "is_ours", True))


def _done_at_once(run: Callable[[], dict[str, Array]]) -> Future[dict[str, Array]]:
    """What a model that runs on one of these threads starts itself: if it waited for another, all might wait."""
    future: Future[dict[str, Array]] = Future()
    try:
        future.set_result(run())
    except Exception as error:
        future.set_exception(error)
    return future


os.register_at_fork(after_in_child=_threads.cache_clear)
