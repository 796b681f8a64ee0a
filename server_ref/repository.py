"""The models of a server over time: opened, warmed, swapped without a gap, watched, and let go in order.

It runs on the server's loop; what blocks runs on a thread of its own, one model at a time, so that a load does not slow
what is served. It knows no sockets and no messages.

Changing, on the loop only: the entries, and what is being loaded or drained.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from remote_ops.errors import ModelNotFound, RemoteOpsError, SpecError
from remote_ops.signature import did_you_mean
from server_ref.catalog import Catalog
from server_ref.model import Version, close_all
from server_ref.routing import routes_of, served_versions
from server_ref.source import Source

__all__ = ["Entry", "Repository"]

log = logging.getLogger("server_ref")


@dataclass(frozen=True)
class Entry:
    """One version of a model, and how it is.

    `state` is `unavailable` (known, not loaded), `loading`, `warming`, `ready`, `draining` or `failed`; `reason` says
    why it is not ready, or why the latest try to load it anew has left the old one in place; `since` is a time of
    `time.time()`. `load_s` is how long it took to open and warm it.
    """

    source: Source
    state: str = "unavailable"
    reason: str = ""
    since: float = 0.0
    load_s: float = 0.0

    @property
    def name(self) -> str:
        """Of the model."""
        return self.source.name

    @property
    def version(self) -> str:
        """Its version."""
        return self.source.version


Told = Callable[[Entry, str, int, int], None]


class Repository:
    """What may be served, and what is.

    Args:
        catalog: where versions are put once they are ready.
        drain_s: how long a version that is replaced may take to finish what it has begun.
        told: is told of each step of a load: the entry, `load` or `warm`, how many are done and of how many; on
            the loading thread.
        fetched: gives the path of a model file, by its URL and SHA-256; without it no URL is loaded.
        opened: opens a source; `opening.open_version` unless a test holds it.
    """

    def __init__(
        self,
        catalog: Catalog,
        *,
        drain_s: float = 30.0,
        told: Told | None = None,
        opened: Callable[..., Version] | None = None,
        fetched: Callable[[str, str], Path] | None = None,
    ) -> None:
        self.catalog = catalog
        self.drain_s = drain_s
        self._entries: dict[tuple[str, str], Entry] = {}
        self._told = told
        self._opened = opened
        self._fetched = fetched
        self._loading = asyncio.Lock()
        self._turns: dict[str, asyncio.Lock] = {}
        self._draining: set[asyncio.Task[None]] = set()
        for version in catalog:
            known = version.source
            source = known if isinstance(known, Source) else Source(version.name, version.version, "")
            self._set(Entry(replace(source, version=version.version), "ready", since=time.time()))

    # what there is

    def index(self) -> list[Entry]:
        """Every version that is known, by model and in the order in which they became known."""
        return sorted(self._entries.values(), key=lambda entry: entry.name)

    def entry(self, name: str, version: str = "") -> Entry:
        """One version; the newest that is ready unless said, else the newest that is known.

        Raises:
            ModelNotFound: no such model, or no such version of it.
        """
        there = [entry for entry in self._entries.values() if entry.name == name]
        if not there:
            known = {entry.name for entry in self._entries.values()}
            raise ModelNotFound(f"no model '{name}': there are {', '.join(known) or 'none'}{did_you_mean(name, known)}")
        if not version:
            return next((entry for entry in reversed(there) if entry.state == "ready"), there[-1])
        found = self._entries.get((name, version))
        if found is None:
            known = {entry.version for entry in there}
            hint = did_you_mean(version, known)
            raise ModelNotFound(f"no version '{version}' of model '{name}': there are {', '.join(known)}{hint}")
        return found

    def declare(self, sources: Iterable[Source]) -> list[Source]:
        """Make known what may be served, without loading it; gives what the policies of the models want loaded.

        Raises:
            SpecError: two are one version of one model.
        """
        sources = list(sources)
        for source in sources:
            key = source.name, source.version
            if key in self._entries and self._entries[key].source.what != source.what:
                raise SpecError(
                    f"two models are called '{source.name}'{f' version {source.version}' if source.version else ''}: "
                    f"{self._entries[key].source.what} and {source.what}; rename one",
                    path="models",
                )
            self._entries.setdefault(key, Entry(source, since=time.time()))
        self._make_known({source.name for source in sources})
        return [source for source in sources if source.version in self._wanted(source)]

    def _wanted(self, source: Source) -> Iterable[str]:
        there = [entry.version for entry in self._entries.values() if entry.name == source.name]
        return served_versions(there, source.rules.versions)

    # changes

    async def load(self, name: str, *, version: str = "") -> Entry:
        """Open what is known, or open it anew; the old one serves until the new one is warm.

        Raises:
            ModelNotFound: it is not known.
            RemoteOpsError: it cannot be opened; what was served before still is.
        """
        return await self.open(self.entry(name, version).source)

    async def fetch(self, name: str, url: str, sha256: str, *, version: str = "") -> Entry:
        """Open a model file from the web, known or not.

        Raises:
            SpecError: it may not be had from there, or has no digest, or another.
            TransportError: it could not be had.
            RemoteOpsError: it cannot be opened; what was served before still is.
        """
        if self._fetched is None:
            raise SpecError("model URLs are refused here: expected --allow-model-url with its beginning", path="url")
        if not sha256:
            raise SpecError("a model from the web needs its digest: expected 64 hex digits", path="sha256")
        path = await self._apart(functools.partial(self._fetched, url, sha256))
        known = self._entries.get((name, version))
        source = Source(name, version, str(path), None if known is None else known.source.settings, sha256)
        return await self.open(source)

    async def open(self, source: Source) -> Entry:
        """The same for a source, known or not."""
        if not source.what:
            raise SpecError(f"model '{source.name}' was handed over open: it cannot be opened again", path=source.name)
        turn = self._turns.setdefault(source.name, asyncio.Lock())
        async with turn:
            return await self._open(source)

    async def _open(self, source: Source) -> Entry:
        key = source.name, source.version
        served = self._served(*key)
        if source.rules.swap == "replace" and served is not None:
            await self._close(self.catalog.remove(*key))
            served = None
        state = "ready" if served is not None else "loading"
        entry = self._set(Entry(source, state, "loading anew" if served else "", time.time()))
        began = time.perf_counter()
        try:
            progress = functools.partial(self._step, entry)
            version = await self._apart(functools.partial(self._opened or open_version, source, progress))
        except Exception as error:
            self._note_failure(entry, served, error)
            raise
        entry = self._set(
            replace(entry, state="ready", reason="", since=time.time(), load_s=time.perf_counter() - began)
        )
        if version.version != source.version:  # the model says of itself which version it is
            del self._entries[key]
            entry = self._set(replace(entry, source=replace(source, version=version.version)))
            self._make_known([source.name])
        self._put(version, source)
        log.info("model %r version %r is ready after %.2f s", source.name, version.version, entry.load_s)
        return entry

    def _put(self, version: Version, source: Source) -> None:
        before = self.catalog.add(source.name, version)
        self._route(source)
        if before is not None:
            self._drain_later(before)

    def _note_failure(self, entry: Entry, served: Version | None, error: Exception) -> None:
        words = str(error) if isinstance(error, RemoteOpsError | ImportError) else f"{type(error).__name__}: {error}"
        kept = "; the one before it is still served" if served is not None else ""
        self._set(replace(entry, state="ready" if served else "failed", reason=f"{words}{kept}", since=time.time()))
        log.error("model %r version %r was not loaded: %s%s", entry.name, entry.version, words, kept)

    async def unload(self, name: str, *, version: str = "") -> list[Entry]:
        """Serve a version, or all of a model, no more: not ready at once, then what runs is finished.

        Raises:
            ModelNotFound: it is not known.
        """
        self.entry(name, version)
        gone = [entry for entry in self._entries.values() if entry.name == name and version in ("", entry.version)]
        async with self._turns.setdefault(name, asyncio.Lock()):
            for entry in gone:
                if self._served(name, entry.version) is None:
                    continue
                self._set(replace(entry, state="draining", since=time.time()))
                taken = self.catalog.remove(name, entry.version)
                self._route(entry.source)
                await self._close(taken)
                self._set(replace(entry, state="unavailable", reason="unloaded", since=time.time()))
        return [self._entries[entry.name, entry.version] for entry in gone]

    async def follow(self, name: str, sources: Sequence[Source], *, anew: Collection[str], gone: Sequence[str]) -> None:
        """Serve a model as its files are now: what is wanted is there before what is not goes.

        Args:
            name: of the model.
            sources: all of its versions that there are.
            anew: those that have changed or come.
            gone: those that are no longer there.
        """
        for source in sources:
            key = source.name, source.version
            entry = self._entries.get(key, Entry(source, since=time.time()))
            self._entries[key] = replace(entry, source=source)
        self._make_known([name])
        there = [source.version for source in sources]
        wanted = set(served_versions(there, sources[0].rules.versions)) if sources else set()
        for source in sources:
            if source.version in wanted and (source.version in anew or not self._served(name, source.version)):
                with contextlib.suppress(Exception):  # its entry says why, and so does the log
                    await self.open(source)
        ready = {version for version in wanted if self._served(name, version)}
        for version in [version for version in self._versions(name) if version not in wanted]:
            if ready or not wanted:
                await self.unload(name, version=version)
        for version in gone:
            if self._served(name, version) is None:
                self._entries.pop((name, version), None)
        self._make_known([name])

    def _make_known(self, names: Iterable[str]) -> None:
        for name in names:
            self.catalog.know(name, self._versions(name))

    def _versions(self, name: str) -> list[str]:
        return [entry.version for entry in self._entries.values() if entry.name == name]

    async def scale(self, name: str, count: int, *, version: str = "") -> Entry:
        """Serve a version with another number of copies on each of its devices.

        Raises:
            ModelNotFound: it is not known.
            SpecError: no such number.
        """
        if not 1 <= count <= 64:
            raise SpecError(f"expected 1 to 64 instances, got {count}", path="instances.count")
        source = self.entry(name, version).source
        instances = source.rules.instances.model_copy(update={"count": count})
        return await self.open(replace(source, settings=source.rules.model_copy(update={"instances": instances})))

    def set_labels(self, name: str, labels: dict[str, str]) -> None:
        """Let labels stand for versions; those that are left out go.

        Raises:
            ModelNotFound, InvalidRequest: a version that is not served, or not ready.
        """
        model = self.catalog.model(name)
        routes = replace(model.routes, labels={})
        for label, version in labels.items():
            routes = routes.with_label(label, version)
        model.routes = routes

    def set_weights(self, name: str, weights: dict[str, float]) -> None:
        """Split the requests that name no version; without weights the newest gets all.

        Raises:
            ModelNotFound, InvalidRequest: a version that is not served, or no weight.
        """
        model = self.catalog.model(name)
        model.routes = model.routes.with_weights(weights)

    def labels(self, name: str) -> dict[str, str]:
        """What the labels of a model stand for."""
        return dict(self.catalog.model(name).routes.labels)

    def weights(self, name: str) -> dict[str, float]:
        """How its requests are split."""
        return dict(self.catalog.model(name).routes.weights)

    async def close(self) -> None:
        """Let everything go: what is being drained is finished first."""
        if self._draining:
            await asyncio.wait(self._draining)
        for entry in self._entries.values():  # what its caller opened is its caller's to close
            version = self._served(entry.name, entry.version)
            if version is not None and entry.source.what:
                version.stop()
                close_all(version.owned)

    # inside

    def _served(self, name: str, version: str) -> Version | None:
        model = self.catalog.models.get(name)
        return None if model is None else model.versions.get(version)

    def _route(self, source: Source) -> None:
        """Let labels and weights hold for the versions that there are now; the first load of a model sets them."""
        model = self.catalog.models.get(source.name)
        if model is None:
            return
        there = tuple(model.versions)
        if model.is_routed:
            return
        versions = source.rules.versions
        model.routes = routes_of(source.name, {*model.known, *there}, there, versions)
        model.sticky, model.is_routed = ("" if versions.sticky == "none" else versions.sticky.lower()), True

    def _set(self, entry: Entry) -> Entry:
        self._entries[entry.name, entry.version] = entry
        return entry

    def _step(self, entry: Entry, step: str, done: int, of: int) -> None:
        if step == "warm" and entry.state == "loading":
            self._set(replace(entry, state="warming"))
        if self._told is not None:
            self._told(entry, step, done, of)

    def _drain_later(self, version: Version) -> None:
        task = asyncio.get_running_loop().create_task(self._close(version))
        self._draining.add(task)
        task.add_done_callback(self._draining.discard)

    async def _close(self, version: Version) -> None:
        """Let a version that gets no more requests finish, then let its threads and memory go."""
        loop = asyncio.get_running_loop()
        give_up = loop.time() + self.drain_s
        while version.pending and loop.time() < give_up:
            await asyncio.sleep(0.005)
            version.sweep()
        version.stop()
        await self._apart(functools.partial(close_all, version.owned))

    async def _apart(self, do: Callable[[], Any]) -> Any:
        """Do what blocks on a thread that no exit waits for, one thing at a time."""
        async with self._loading:
            loop = asyncio.get_running_loop()
            done: asyncio.Future[Any] = loop.create_future()

            def work() -> None:
                try:
                    end = functools.partial(done.set_result, do())
                except BaseException as error:
                    end = functools.partial(done.set_exception, error)
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                    loop.call_soon_threadsafe(lambda: done.cancelled() or end())

            threading.Thread(target=work, name="load", daemon=True).start()
            return await done


def open_version(source: Source, progress: Callable[[str, int, int], None]) -> Version:
    """Open a source; what that needs is imported only now."""
    from server_ref import opening

    return opening.open_version(source, progress)
